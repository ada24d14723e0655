"""What a draft model costs inside a captured step, and what one costs that is never right.

    python -m specdec.eval.draft_cost --json cost.json

With random weights nothing is accepted, so only times mean anything: those of steps with trees of
one size, captured and not, and those of whole calls in which the node budget finds out that drafts
do not pay, beside plain decoding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

import specdec
from specdec.console import err, out
from specdec.drafters import Beam, DraftModel
from specdec.eval.generate import shapes
from specdec.eval.provenance import provenance
from specdec.topology import Topology

TREES: dict[str, tuple[Topology | Beam, int]] = {
    "chain of 5": (Topology.chain(5), 5),
    "4 x 2 x 1": (Topology.branching([4, 2, 1]), 21),
    "beam 4 x 4, 16 nodes": (Beam(4, 4), 16),
    "beam 8 x 6, 32 nodes": (Beam(8, 6), 32),
    "beam 8 x 6, 49 nodes": (Beam(8, 6), 49),
}
"""Shapes, and nodes of the largest trees."""
ADAPTIVE = ("beam 4 x 4, 16 nodes", "beam 8 x 6, 49 nodes")
"""Those that the node budget may shrink."""
CALLS = 3


@dataclass(frozen=True)
class Row:
    """One call."""

    tree: str
    way: str
    call: int
    seconds: float
    steps: int
    tokens_per_step: float

    @property
    def step_ms(self) -> float:
        """Of a step, the prompt included."""
        return 1000 * self.seconds / self.steps


def measure(target: Any, draft: Any, ids: Tensor, new: int) -> Iterator[Row]:
    """All trees of one size, then those that the node budget may shrink.

    Args:
        target, draft: models on one device.
        ids: [1, L] prompt.
        new: tokens of a call with trees of one size; the others have four times as many.
    """
    yield from _calls("none", "plain", target, ids, new, 1)
    for tree, (shape, nodes) in TREES.items():
        for way, capture in (("captured", True), ("uncaptured", False)):
            drafter = DraftModel(draft, shape)
            options = {"drafter": drafter, "adaptive": False, "capture": capture}
            yield from _calls(tree, way, target, ids, new, nodes, **options)
    yield from _calls("none", "adaptive", target, ids, 4 * new, 1)
    for tree in ADAPTIVE:
        shape, nodes = TREES[tree]
        drafter = DraftModel(draft, shape)
        yield from _calls(tree, "adaptive", target, ids, 4 * new, nodes, drafter=drafter)
    yield from _calls("n-grams, 32 nodes", "adaptive", target, ids, 4 * new, 32)


def _calls(
    tree: str, way: str, target: Any, ids: Tensor, new: int, nodes: int, **options: Any
) -> Iterator[Row]:
    options.setdefault("drafter", "none" if nodes == 1 else "ngram")
    model: Any = specdec.wrap(target, nodes=nodes, **options)
    model.warm_up(longest=ids.shape[1] + new, progress=False)
    for call in range(CALLS):
        model.cache.prefixes.clear()  # the prompt is computed each time
        _wait(ids)
        start = time.perf_counter()
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        _wait(ids)
        seconds = time.perf_counter() - start
        stats = answer.stats
        yield Row(tree, way, call, seconds, stats.steps, stats.tokens_per_step)
    model.unwrap()


def _wait(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)


def show(rows: Sequence[Row]) -> Table:
    """The last call of each, and the first one's seconds beside it."""
    table = Table("tree", "way", "tokens/step", "ms/step", "last call, s", "first call, s")
    for first, last in zip(rows[::CALLS], rows[CALLS - 1 :: CALLS], strict=True):
        table.add_row(
            last.tree,
            last.way,
            f"{last.tokens_per_step:.2f}",
            f"{last.step_ms:.2f}",
            f"{last.seconds:.3f}",
            f"{first.seconds:.3f}",
        )
    return table


def main(
    target: Annotated[str, typer.Option(help="A shape with random weights.")] = "llama-3.1-8b",
    draft: Annotated[str, typer.Option(help="Another one.")] = "llama-3.2-1b",
    prompt: Annotated[int, typer.Option(help="Tokens.")] = 512,
    new: Annotated[int, typer.Option(help="New tokens of a call; of adaptive ones 4 x.")] = 128,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write.")] = None,
) -> None:
    """Needs a CUDA device."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("steps are captured on a CUDA device; there is none here")
    device = torch.device("cuda")
    models = [shapes.load(name, device, torch.bfloat16).model for name in (target, draft)]
    ids = torch.randint(1, 100_000, (1, prompt), device=device)
    record: dict[str, Any] = {
        "provenance": provenance(device, torch.bfloat16),
        "target": target,
        "draft": draft,
    }
    rows: list[Row] = []
    for row in measure(models[0], models[1], ids, new):
        rows.append(row)
        err.print(f"{row.tree}, {row.way}: {row.step_ms:.2f} ms a step")
        if json_file is not None:  # as they come: somebody may run out of time
            json_file.write_text(json.dumps({**record, "rows": [*map(asdict, rows)]}, indent=1))
    out.print(show(rows))


if __name__ == "__main__":
    typer.run(main)
