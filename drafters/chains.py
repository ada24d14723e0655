"""The chain in a tree: what another drafter would propose if it could not branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from specdec.drafting import Observation, SequenceDrafter
from specdec.tree import MAX_NODES, TokenTree


class Chains(SequenceDrafter):
    """Follows the first child of every node of another drafter's trees.

    Beside that drafter it shows what branching is worth, all else being equal. The tree it looks
    into may be `SPARE` times larger than the chain, or branches would use up the chain's budget.
    """

    SPARE: ClassVar[int] = 4

    def __init__(self, inner: SequenceDrafter) -> None:
        self.inner = inner
        self.law = inner.law

    def begin(self, sequences: Sequence[int]) -> None:
        self.inner.begin(sequences)

    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        tree = self.inner.draft(tokens, min(self.SPARE * nodes, MAX_NODES))
        return tree.first_chain().cut(depth=nodes - 1)

    def observe(self, observation: Observation) -> None:
        self.inner.observe(observation)

    def end(self, sequences: Sequence[int]) -> None:
        self.inner.end(sequences)

    def __repr__(self) -> str:
        return f"Chains({self.inner!r})"
