"""Single passes as CUDA graphs: prompts, and trees that a captured step does not hold.

Without a graph a small model spends its time on launches. A pass is filled up to one of a few
sizes, so that few graphs serve all: the rows behind the last request belong to none, write to the
trash page, and what is computed for them is thrown away.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.attention import AttentionPlan
from specdec.graphs import capture, reach, shared_memory

if TYPE_CHECKING:
    from specdec.target import Target

ROWS = (16, 32, 64, 96, *range(128, 512, 64), *range(512, 1025, 128))
"""Sizes of passes. More rows keep a GPU busy for longer than they take to launch."""
MOST = 64
"""Passes that are kept captured."""


@dataclass(frozen=True)
class Size:
    """What a graph is made for; all numbers are upper bounds."""

    rows: int
    requests: int  # parts of long chains count, and one without rows
    words: int  # of ancestor bits, 0 for chains
    kept: int  # rows whose logits are computed
    run: int  # rows of one request
    places: int
    prefix: int
    shared: bool


class Pass:
    """Buffers of one size, and after their first use the graph of a pass over them."""

    def __init__(self, target: Target, size: Size) -> None:
        self.target, self.size = target, size
        device = target.device
        self._longs = torch.zeros(5 * size.rows + size.kept, dtype=torch.int64, device=device)
        parts = [*[size.rows] * 5, size.kept]
        *by_row, self._keep = self._longs.split(parts)
        self._tokens, self._sequence, self._nodes, self._slots, self._positions = by_row
        self._starts = torch.zeros(size.requests + 1, dtype=torch.int32, device=device)
        self._words = torch.zeros(size.rows, size.words, dtype=torch.int32, device=device)
        self._logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def load(self, tokens: Tensor, plan: AttentionPlan, keep: Tensor) -> None:
        """Takes in the rows of a pass."""
        rows = len(tokens)
        starts = plan.row_starts if plan.chain_starts is None else plan.chain_starts
        self._longs.zero_()
        self._tokens[:rows], self._sequence[:rows] = tokens, plan.sequence
        self._nodes[:rows], self._slots[:rows] = plan.nodes, plan.slots
        self._positions[:rows], self._keep[: len(keep)] = plan.positions, keep
        self._starts.fill_(rows)
        self._starts[: len(starts)] = starts
        if plan.ancestors is not None:
            self._words.zero_()
            self._words[:rows, : plan.ancestors.shape[1]] = plan.ancestors

    def run(self, memory: Any) -> Tensor:
        """[kept, V] logits, which the next pass overwrites.

        The first time it runs as it is, which compiles what it needs; then it is captured. A CPU
        has no graphs; there the kernels of Triton's interpreter run as they are.

        Args:
            memory: the pool that a graph allocates from.
        """
        if self.graph is None and self._warm and self.target.device.type == "cuda":
            self.graph, self._logits = capture(self._forward, memory)
        if self.graph is None or self._logits is None:
            self._warm = True
            return self._forward()
        self.graph.replay()
        return self._logits

    def _forward(self) -> Tensor:
        return self.target.compute(self._tokens, self._plan(), keep=self._keep)

    def _plan(self) -> AttentionPlan:
        cache, size = self.target.cache, self.size
        return AttentionPlan(
            page_table=cache.page_table,
            prefix_lens=cache.lengths,
            page_size=cache.pool.page_size,
            row_starts=self._starts,
            sequence=self._sequence,
            nodes=self._nodes,
            ancestors=self._words if size.words else None,
            slots=self._slots,
            positions=self._positions,
            max_rows=size.run,
            max_places=size.places,
            max_prefix=size.prefix,
            shared=size.shared,
        )


@dataclass(eq=False)
class PassGraphs:
    """The passes that were captured for a target; they share their memory."""

    target: Target
    _passes: dict[Size, Pass] = field(default_factory=dict)
    _places: Hashable = None  # where the tensors that the graphs refer to lie

    def forward(self, tokens: Tensor, plan: AttentionPlan, keep: int | Tensor) -> Tensor:
        """The same as `Target.forward`, from a graph if there is one for so many rows.

        Args:
            tokens, plan, keep: as there.
        """
        if self.target.uncaptured is not None or len(tokens) > ROWS[-1]:
            return self.target.compute(tokens, plan, keep)
        if not isinstance(keep, Tensor):
            first = len(tokens) - keep if keep else 0
            keep = torch.arange(first, len(tokens), device=tokens.device)
        found = self._find(_size(plan, len(tokens), len(keep)))
        found.load(tokens, plan, keep)
        memory = shared_memory(other.graph for other in self._passes.values())
        return found.run(memory)[: len(keep)].clone()

    def _find(self, size: Size) -> Pass:
        places = self.target.places
        if places != self._places:  # the old graphs would write to memory that is others' now
            self._passes.clear()
            self._places = places
        found = self._passes.pop(size, None) or Pass(self.target, size)
        self._passes[size] = found  # the last one, so that the first is the longest unused
        while len(self._passes) > MOST:
            del self._passes[next(iter(self._passes))]
        return found

    @property
    def captured(self) -> list[Pass]:
        """The passes that are captured now."""
        return [found for found in self._passes.values() if found.graph is not None]


def _size(plan: AttentionPlan, rows: int, kept: int) -> Size:
    starts = plan.row_starts if plan.chain_starts is None else plan.chain_starts
    return Size(
        rows=next(size for size in ROWS if rows <= size),
        requests=_power(len(starts)),  # one more than there are
        words=0 if plan.ancestors is None else _power(plan.ancestors.shape[1]),
        kept=_power(kept),
        run=_power(plan.max_rows),
        places=max(ROWS[0], _power(plan.max_places)),
        prefix=reach(plan.max_prefix),
        shared=plan.shared,
    )


def _power(count: int) -> int:
    """The least power of two that is not less."""
    return 1 << (count - 1).bit_length()
