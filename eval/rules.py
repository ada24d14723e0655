"""Expected accepted length of every rule on the same trees, with SmolLM2 and a degraded copy.

    python -m specdec.eval.rules --json out.json

The rules' own laws say how many nodes each would accept on average from the trees that were drawn,
so no rule's luck enters: rules that are legal for the same law are compared tree by tree. The text
goes on by traversal verification, or by sample-and-match where children were chosen.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import specdec
from specdec import models
from specdec.batch import TreeBatch
from specdec.drafters import DraftModel
from specdec.eval.provenance import provenance
from specdec.eval.suites import BUILTIN, load_suite
from specdec.rules import (
    RULES,
    MultiRound,
    SampleAndMatch,
    Traversal,
    sibling_chances,
    traversal_law,
)
from specdec.testing import degraded
from specdec.topology import Topology
from specdec.tree import ProposalLaw
from specdec.verify import ALL_LAWS, AcceptanceRule, Noise, Outcome

CHOSEN, IID, ONCE = ProposalLaw
SHAPES = {
    "chain of 4": Topology.chain(5),
    "chain of 8": Topology.chain(9),
    "tree of 16": Topology.fading(16),
    "tree of 64": Topology.fading(64),
}


def expected_lengths(trees: TreeBatch, target: Tensor) -> dict[str, Tensor]:
    """[B] expected accepted nodes, the root not counted, for every legal lossless rule."""
    found: dict[str, Tensor] = {}
    for name, rule in RULES.items():
        illegal = not trees.laws_used <= rule.legal_laws or (rule.chains and trees.max_children > 1)
        if illegal or not rule.lossless or not rule.samples:
            continue
        if issubclass(rule, Traversal):
            found[name] = _from_the_leaves(trees, traversal_law(trees, target)[1])
        elif issubclass(rule, MultiRound | SampleAndMatch):
            found[name] = _from_the_root(trees, target, rule())
    return found


def _from_the_root(trees: TreeBatch, target: Tensor, rule: AcceptanceRule) -> Tensor:
    """The sum of the chances to reach each node."""
    reach = torch.zeros(len(target) + 1, dtype=torch.float64, device=target.device)
    reach[trees.offsets] = 1
    for rows in trees.inner_levels:
        kids = trees.children[rows]
        if isinstance(rule, SampleAndMatch):
            tokens = trees.tokens[kids.clamp_min(0)]
            chances = target[rows].gather(1, tokens).double()
        else:
            tried = sibling_chances(trees, target, rows).double()
            missed = (1 - tried).cumprod(1)
            chances = tried * torch.cat([torch.ones_like(missed[:, :1]), missed[:, :-1]], 1)
        places = torch.where(kids >= 0, kids, len(target))
        reach[places] = reach[rows][:, None] * chances
    reach = reach[:-1].clone()
    reach[trees.offsets] = 0
    if isinstance(rule, SampleAndMatch):
        reach[_repeated(trees)] = 0  # the deepest node counts, whichever of equal texts it ends
    return torch.zeros(len(trees.sizes), dtype=torch.float64).index_add(
        0, trees.tree.cpu(), reach.cpu()
    )


def _repeated(trees: TreeBatch) -> list[int]:
    """The rows whose path says the same as that of an earlier row."""
    tokens, known = trees.tokens.tolist(), trees.known_parents
    repeated, start = [], 0
    for size in trees.sizes:
        first: dict[tuple[int, int], int] = {}
        same = [0]  # for each node, the first one with its text
        for node in range(1, size):
            key = (same[known[start + node]], tokens[start + node])
            same.append(first.setdefault(key, node))
            if same[node] != node:
                repeated.append(start + node)
        start += size
    return repeated


def _from_the_leaves(trees: TreeBatch, accept: Tensor) -> Tensor:
    """Depths, by the chance that the path ends there: all before it in post-order must fail."""
    lengths, start = [], 0
    for size in trees.sizes:
        rows = torch.arange(start, start + size, device=accept.device)
        rows = rows[trees.postorder[rows].argsort()]
        chance = accept[rows].double()
        missed = torch.cat([torch.ones_like(chance[:1]), (1 - chance)[:-1]]).cumprod(0)
        lengths.append((chance * missed * trees.depths[rows]).sum())
        start += size
    return torch.stack(lengths).cpu()


class Recorder(AcceptanceRule):
    """Notes what every legal rule would accept, and goes on by one of them."""

    name = "recorder"
    legal_laws = ALL_LAWS

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.lengths: dict[str, list[float]] = defaultdict(list)

    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        if max(trees.sizes) == self.nodes:  # the last steps of a text draft less
            for name, lengths in expected_lengths(trees, target).items():
                self.lengths[name] += lengths.tolist()
        rule = SampleAndMatch() if trees.laws_used == {CHOSEN} else Traversal()
        return rule.verify(trees, target, noise)


@dataclass(frozen=True)
class Row:
    """One rule on the trees of one shape and law."""

    temperature: float
    shape: str
    law: str
    rule: str
    mean: float
    error: float
    """Standard error of the mean."""
    trees: int


def measure(
    model: Any,
    draft: Any,
    prompts: Sequence[Tensor],
    *,
    temperature: float,
    shape: str,
    law: ProposalLaw,
    new: int,
    seed: int = 0,
) -> list[Row]:
    """Runs prompts of one shape and law, all at once; one row for each rule that is legal."""
    topology = SHAPES[shape]
    recorder = Recorder(len(topology))
    drafter = DraftModel(draft, topology, law=law)
    wrapped = specdec.wrap(model, drafter, rule=recorder, nodes=len(topology))
    width = max(prompt.shape[1] for prompt in prompts)
    pads = [width - prompt.shape[1] for prompt in prompts]
    pad = torch.nn.functional.pad
    wrapped.generate(
        torch.cat([pad(prompt, (n, 0)) for prompt, n in zip(prompts, pads, strict=True)]),
        attention_mask=torch.cat(
            [pad(torch.ones_like(p), (n, 0)) for p, n in zip(prompts, pads, strict=True)]
        ),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=new + max(topology.depths),
        min_new_tokens=new,
        seed=seed,
    )
    rows = []
    for name, lengths in recorder.lengths.items():
        values = torch.tensor(lengths, dtype=torch.float64)
        error = float(values.std() / len(values) ** 0.5)
        mean = float(values.mean())
        rows.append(Row(temperature, shape, law.name.lower(), name, mean, error, len(values)))
    return rows


def show(rows: Sequence[Row]) -> Table:
    table = Table("temperature", "shape", "children", "rule", "accepted", "trees")
    for row in rows:
        table.add_row(
            f"{row.temperature}",
            row.shape,
            row.law,
            row.rule,
            f"{row.mean:.3f} ± {row.error:.3f}",
            str(row.trees),
        )
    return table


def main(
    model: Annotated[str, typer.Option(help="A known name, folder or hub id.")] = models.DEFAULT,
    bits: Annotated[int, typer.Option(help="Bits of the degraded draft's weights.")] = 4,
    prompts: Annotated[int, typer.Option(help="How many of the built-in prompts.")] = 4,
    new: Annotated[int, typer.Option(help="New tokens of each.")] = 32,
    shape: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SHAPES)}.")] = None,
    device: Annotated[str, typer.Option()] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write.")] = None,
) -> None:
    """Temperatures 0.6 and 1.0, every shape, every law a draft model can draw with."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = models.resolve(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, use_safetensors=True
    )
    loaded = loaded.to(device).eval()
    draft = degraded(loaded, bits=bits)
    tokenizer: Any = AutoTokenizer.from_pretrained(where)
    texts = [
        tokenizer.apply_chat_template(
            list(prompt.messages),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"].to(device)
        for prompt in load_suite(BUILTIN).limited(prompts).prompts
    ]
    rows: list[Row] = []
    for temperature in (0.6, 1.0):
        for name in shape or SHAPES:
            for law in (IID,) if name.startswith("chain") else (CHOSEN, IID, ONCE):
                rows += measure(
                    loaded, draft, texts, temperature=temperature, shape=name, law=law, new=new
                )
                if json_file is not None:
                    record = {
                        "provenance": provenance(loaded.device, loaded.dtype),
                        "bits": bits,
                        "new": new,
                        "prompts": prompts,
                        "rows": [row.__dict__ for row in rows],
                    }
                    json_file.write_text(json.dumps(record, indent=1))
    Console().print(show(rows))


if __name__ == "__main__":
    typer.run(main)
