"""Beam search: every step forks the likeliest beams and prunes the others.

python examples/beam_search.py
"""

from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec


def beam_search(model: Any, prompt: list[int], beams: int, new: int) -> tuple[list[int], float]:
    """The likeliest of `beams` texts of `new` tokens, and its log-probability."""
    with model.branch(prompt) as root:
        live, sums = [root], [0.0]
        for _ in range(new):
            ahead = specdec.logprobs(live)  # one pass, one row a beam
            totals = (ahead + ahead.new_tensor(sums)[:, None]).flatten()
            best = totals.topk(beams)
            sums = best.values.tolist()
            children = []
            for flat in best.indices.tolist():
                parent, token = divmod(flat, ahead.shape[1])
                children += [child.append([token]) for child in live[parent].fork()]
            for branch in live:
                branch.prune()
            live = children
        return live[0].tokens[len(prompt) :], sums[0]


def main() -> None:
    folder = specdec.models.fetch("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = specdec.wrap(AutoModelForCausalLM.from_pretrained(folder))
    prompt = tokenizer("The three primary colors are")["input_ids"]
    answer, total = beam_search(model, prompt, beams=4, new=16)
    Console().print(tokenizer.decode(prompt + answer), f"(log-probability {total:.2f})")


if __name__ == "__main__":
    main()
