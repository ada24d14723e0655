"""The shape of a tree without its tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from specdec.bits import ancestor_bits
from specdec.tree import MAX_NODES


@dataclass(frozen=True)
class Topology:
    """The shape of a tree without its tokens, in level order, so that levels are contiguous.

    Args:
        parents: index of every node's parent, -1 for node 0; parents before children, level by
            level, the children of one node side by side.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.parents[:1] != (-1,) or not all(
            0 <= parent < node for node, parent in enumerate(self.parents[1:], start=1)
        ):
            raise ValueError(
                f"parents: expected -1 for node 0, then earlier nodes, got {self.parents}"
            )
        if list(self.parents) != sorted(self.parents) or len(self.parents) > MAX_NODES:
            raise ValueError(
                f"parents: expected at most {MAX_NODES} nodes in level order, got {self.parents}"
            )

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def ancestor_bits(self) -> tuple[int, ...]:
        """One Python integer a node: bit j says that node j is an ancestor, itself included."""
        return ancestor_bits(self.parents)

    @cached_property
    def inner(self) -> frozenset[int]:
        """The nodes that have children."""
        return frozenset(self.parents[1:])

    def cut(self, *, depth: int, nodes: int = MAX_NODES) -> Topology:
        """The shape without the nodes below `depth` and those behind the first `nodes`."""
        return Topology(self.parents[: min(nodes, sum(level <= depth for level in self.depths))])

    @classmethod
    def chain(cls, nodes: int) -> Topology:
        return cls(tuple(range(-1, nodes - 1)))

    @classmethod
    def branching(cls, widths: Sequence[int]) -> Topology:
        """Every node of depth d has `widths[d]` children."""
        parents, level = [-1], [0]
        for width in widths:
            below = [parent for parent in level for _ in range(width)]
            level = list(range(len(parents), len(parents) + len(below)))
            parents += below
        return cls(tuple(parents))

    @classmethod
    def fading(cls, nodes: int, *, accept: float = 0.6, rank_decay: float = 0.25) -> Topology:
        """The best shape of a given size when the r-th child is accepted with a falling chance.

        The chance of child r is `accept * rank_decay**r`, the usual pattern of a draft model's
        likeliest tokens; nodes are taken by the chance of their path, as Sequoia does with
        measured rates (arXiv 2402.12374, section 3.1).
        """
        chosen: list[tuple[int, ...]] = []
        heap: list[tuple[float, tuple[int, ...]]] = [(-accept, (0,))]
        while heap and len(chosen) < nodes - 1:
            chance, path = heapq.heappop(heap)
            chosen.append(path)
            heapq.heappush(heap, (chance * accept, (*path, 0)))
            heapq.heappush(heap, (chance * rank_decay, (*path[:-1], path[-1] + 1)))
        ordered = sorted(chosen, key=lambda path: (len(path), path))
        index = {(): 0} | {path: node for node, path in enumerate(ordered, start=1)}
        return cls((-1, *(index[path[:-1]] for path in ordered)))
