"""Five drafters on one prompt: the same text, in different numbers of steps.

python examples/compare_drafters.py
"""

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec import Topology
from specdec.drafters import Beam, DraftModel
from specdec.testing import degraded

PROMPT = "List the days of the week, then list them again in reverse order."

folder = specdec.models.fetch("smollm2-135m")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": PROMPT}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)

drafters = {
    "none": "none",
    "n-grams": "ngram",
    # A stand-in for a small model: as slow as the target, but wrong in places.
    "model, chain": DraftModel(degraded(model, bits=5), Topology.chain(6)),
    "model, tree": DraftModel(degraded(model, bits=5), Topology.branching([3, 1, 1])),
    "model, likeliest paths": DraftModel(degraded(model, bits=5), Beam(width=4, depth=5)),
}
table = Table("drafter", "steps", "tokens per step", "acceptance by depth")
texts = set()
for name, drafter in drafters.items():
    wrapped = specdec.wrap(model, drafter, nodes=16)
    output = wrapped.generate(
        **inputs, max_new_tokens=64, do_sample=False, return_dict_in_generate=True
    )
    stats = output.stats
    by_depth = "  ".join(f"{rate:.2f}" for rate in stats.acceptance_by_depth.values())
    table.add_row(name, str(stats.steps), f"{stats.tokens_per_step:.2f}", by_depth)
    answer = output.sequences[0, inputs["input_ids"].shape[1] :]
    texts.add(tokenizer.decode(answer, skip_special_tokens=True))

console = Console()
console.print(texts.pop())
console.print(table)
assert not texts, "every drafter gives the same text"
