"""What verification costs on a GPU, beside the time in which the logits can be read at all.

    python -m specdec.eval.verify_cost --json out.json

Trees of 64 nodes over logits of a made-up text: Zipf's law, with an exponent of its own in every
row, so that some rows are nearly certain and others wide open. The rules run in CUDA graphs that
rotate over sets of logits larger than the L2 cache; before that, their first decision is compared
with what torch decides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from specdec.batch import TreeBatch
from specdec.eval.attention import clock
from specdec.eval.attention.ceilings import measure_reads
from specdec.eval.provenance import provenance
from specdec.judge import by_kernels
from specdec.noise import split_seeds
from specdec.rules import RULES
from specdec.sampling import Sampler
from specdec.topology import Topology
from specdec.tree import ProposalLaw, TokenTree
from specdec.verify import Noise, Outcome

CANDIDATES = 64
"""Tokens that a draft draws from, as `DraftModel` does by default."""
CHUNK_ROWS = 64
"""Rows that torch works on at once, to compare."""
SPAN = 20e3
"""Microseconds that a case is measured for."""


@dataclass(frozen=True)
class Case:
    """A rule, the law of its trees, and whether options apply."""

    rule: str
    law: ProposalLaw
    options: str


TOP_P = "temperature 0.8, top-p 0.9"
CASES = (
    Case("greedy", ProposalLaw.DETERMINISTIC, ""),
    Case("sample-and-match", ProposalLaw.DETERMINISTIC, ""),
    Case("sample-and-match", ProposalLaw.DETERMINISTIC, TOP_P),
    Case("multi-round", ProposalLaw.IID, TOP_P),
    Case("without-replacement", ProposalLaw.WITHOUT_REPLACEMENT, TOP_P),
    Case("traversal", ProposalLaw.WITHOUT_REPLACEMENT, TOP_P),
)


@dataclass(frozen=True)
class Row:
    """One case at one batch size; times in microseconds."""

    rule: str
    options: str
    batch: int
    us: float
    limit_us: float
    """One read of the logits at the measured bandwidth."""
    alike: int
    """Trees, of `batch`, that torch decides alike."""


def make_logits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, vocab]: the r-th likeliest token has -a log r, in a random order, a from 1 to 2."""
    ranks = -torch.arange(1, vocab + 1, device=device, dtype=torch.float32).log()
    steepness = torch.linspace(1, 2, rows, device=device)
    out = torch.empty(rows, vocab, dtype=dtype, device=device)
    for row in range(rows):
        out[row] = (ranks * steepness[row])[torch.randperm(vocab, device=device)]
    return out


def make_trees(law: ProposalLaw, batch: int, nodes: int, logits: Tensor) -> TreeBatch:
    """Trees of one shape whose tokens are likely under the first `logits`."""
    shape = Topology.fading(nodes)
    vocab = logits.shape[1]
    likely = logits.float().topk(CANDIDATES, 1)
    names, scores = likely.indices.cpu(), likely.values.cpu()
    trees = []
    for tree in range(batch):
        rows = slice(tree * nodes, (tree + 1) * nodes)
        probs, named = scores[rows].softmax(1), names[rows]
        tokens, left = [0], probs.clone()
        for parent in shape.parents[1:]:
            if law == ProposalLaw.DETERMINISTIC:
                pick = int(left[parent].argmax())
            else:
                pick = int(torch.multinomial(left[parent], 1))
            if law != ProposalLaw.IID:
                left[parent, pick] = 0.0
            tokens.append(int(named[parent, pick]))
        drawn = law != ProposalLaw.DETERMINISTIC
        trees.append(
            TokenTree(
                torch.tensor(tokens),
                torch.tensor(shape.parents),
                law,
                probs if drawn else None,
                named if drawn else None,
            )
        )
    return TreeBatch.pack(trees, vocab_size=vocab, device=logits.device)


def make_sampler(options: str) -> Sampler:
    """The sampler of a case."""
    warpers = (TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)) if options else ()
    return Sampler(True, warpers)


def alike(case: Case, trees: TreeBatch, logits: Tensor, noise: Noise, found: Outcome) -> int:
    """How many trees torch decides as `found`.

    The distributions are in float32; what the rounding of sums moves over an edge can differ.
    """
    rule, sampler = RULES[case.rule](), make_sampler(case.options)
    if not rule.samples:
        target = logits.float()
    else:
        parts = [
            sampler.probs(sampler.scores(part, trees, [])) for part in logits.split(CHUNK_ROWS)
        ]
        target = torch.cat(parts)
    wanted = rule.verify(trees, target, noise)
    same = (wanted.paths == found.paths).all(1) & (wanted.next_tokens == found.next_tokens)
    return int(same.sum())


def measure(
    batches: Sequence[int], nodes: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> list[Row]:
    """All cases at all batch sizes. On a CPU nothing is timed, and the times are 0."""
    torch.manual_seed(0)
    bandwidth = 0.0
    cold = 1
    if device.type == "cuda":
        bandwidth = max(read.tbps for read in measure_reads(device)) * 1e6  # bytes a microsecond
        cold = 3 * torch.cuda.get_device_properties(device).L2_cache_size
    rows = []
    for batch in batches:
        first = make_logits(batch * nodes, vocab, dtype, device)
        size = first.numel() * first.element_size()
        # The other sets hold the same numbers, in other memory.
        sets = [first, *(first.clone() for _ in range(-(-cold // size) - 1))]
        if len(sets) == 1 and device.type == "cuda":
            sets.append(first.clone())
        noise = Noise(split_seeds(0, batch, device), torch.full((batch,), 100, device=device))
        for case in CASES:
            trees = make_trees(case.law, batch, nodes, first)
            rule, sampler = RULES[case.rule](), make_sampler(case.options)
            found = by_kernels(rule, sampler, first, trees, noise)[0]
            same = alike(case, trees, first, noise, found)

            def run(index: int) -> Tensor:
                return by_kernels(rule, sampler, sets[index], trees, noise)[0].next_tokens  # noqa: B023

            us = 0.0
            if device.type == "cuda":
                timed = clock.capture(run, len(sets))
                timed.measure(SPAN / 2, SPAN)
                us = timed.us
            limit = size / bandwidth if bandwidth else 0.0
            rows.append(Row(case.rule, case.options, batch, us, limit, same))
    return rows


def show(rows: Sequence[Row], vocab: int, nodes: int) -> Table:
    table = Table(
        "rule", "options", "batch", "us", "read once", "times that", "as torch decides",
        title=f"Verification of trees of {nodes} nodes, vocabulary {vocab:,}, in microseconds",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.rule,
            row.options,
            str(row.batch),
            f"{row.us:.1f}",
            f"{row.limit_us:.1f}",
            f"{row.us / row.limit_us:.2f}" if row.limit_us else "",
            f"{row.alike} of {row.batch}",
        )
    return table


def main(
    batch: Annotated[list[int] | None, typer.Option(help="Trees; 1 and 16 by default.")] = None,
    nodes: Annotated[int, typer.Option(help="Of each tree, the root included.")] = 64,
    vocab: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 128256,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write.")] = None,
) -> None:
    """Needs a CUDA device."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("verification by kernels is measured on a CUDA device; none here")
    device = torch.device("cuda")
    rows = measure(batch or (1, 16), nodes, vocab, getattr(torch, dtype), device)
    Console(width=120).print(show(rows, vocab, nodes))
    if json_file is not None:
        record = {
            "provenance": provenance(device, getattr(torch, dtype)),
            "nodes": nodes,
            "vocab": vocab,
            "rows": [asdict(row) for row in rows],
        }
        json_file.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    typer.run(main)
