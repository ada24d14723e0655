"""The chain in a tree: what another drafter would propose if it could not branch."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from specdec.drafting import (
    DeviceDrafter,
    DraftBuffers,
    DraftContext,
    Observation,
    SequenceDrafter,
)
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

    def on_device(self, requests: int, nodes: int, device: torch.device) -> DeviceDrafter | None:
        inner = self.inner.on_device(requests, _spare(nodes), device)
        return None if inner is None else _DeviceChains(inner)

    @property
    def on_host(self) -> str:
        return f"follows {type(self.inner).__name__}, which {self.inner.on_host}"

    def begin(self, sequences: Sequence[int]) -> None:
        self.inner.begin(sequences)

    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        tree = self.inner.draft(tokens, _spare(nodes))
        return tree.first_chain().cut(depth=nodes - 1)

    def observe(self, observation: Observation) -> None:
        self.inner.observe(observation)

    def end(self, sequences: Sequence[int]) -> None:
        self.inner.end(sequences)

    def __repr__(self) -> str:
        return f"Chains({self.inner!r})"


def _spare(nodes: int) -> int:
    return min(Chains.SPARE * nodes, MAX_NODES)


class _DeviceChains(DeviceDrafter):
    """The same chains inside of captured steps."""

    def __init__(self, inner: DeviceDrafter) -> None:
        self.inner, self.max_depth = inner, inner.max_depth

    @property
    def state(self) -> Hashable:
        return self.inner.state

    def load(self, context: DraftContext) -> None:
        self.inner.load(context)

    @property
    def lagging(self) -> bool:
        return self.inner.lagging

    def catch_up(self, text: Tensor) -> None:
        self.inner.catch_up(text)

    @contextmanager
    def launching(self, nodes: int, most: int) -> Iterator[None]:
        with self.inner.launching(_spare(nodes) if nodes > 1 else 1, most):
            yield

    def settle(self, emitted: Sequence[int]) -> None:
        self.inner.settle(emitted)

    def draft(self, buffers: DraftBuffers) -> None:
        requests, nodes = len(buffers.lengths), buffers.nodes
        spare = _spare(nodes)
        parents = buffers.parents.new_zeros(requests, spare)
        parents[:, 0] = -1
        tree = replace(
            buffers,
            tokens=buffers.tokens.new_zeros(requests * spare),
            parents=parents.flatten(),
            counts=torch.ones_like(buffers.counts),
        )
        self.inner.draft(tree)
        chain = first_chains(tree.parents.view(requests, spare), tree.counts, nodes)
        there = chain < spare
        picked = tree.tokens.view(requests, spare).gather(1, chain.where(there, 0))
        places = torch.arange(nodes, device=chain.device, dtype=buffers.parents.dtype)
        buffers.tokens.view(requests, nodes).copy_(picked)
        buffers.parents.view(requests, nodes).copy_((places - 1).where((places == 0) | there, 0))
        buffers.counts.copy_(there.sum(1))


def first_chains(parents: Tensor, counts: Tensor, nodes: int) -> Tensor:
    """The root, its first child, that one's first child and so on, of many trees at once.

    Args:
        parents: [B, N] of each tree, -1 for its root.
        counts: [B] nodes of each tree; what lies behind is no node.
        nodes: of the chain, at most.

    Returns:
        [B, nodes] int64 nodes, N where the chain has ended.
    """
    batch, size = parents.shape
    places = torch.arange(size, device=parents.device).expand(batch, size)
    below = (parents >= 0) & (places < counts[:, None])
    first = torch.full((batch, size + 1), size, dtype=torch.int64, device=parents.device)
    first.scatter_reduce_(1, parents.long().where(below, size), places.where(below, size), "amin")
    # Steps along the chain by powers of two: few kernels, however long it is.
    depths = torch.arange(nodes, device=parents.device)
    chain, jump = torch.zeros_like(depths).expand(batch, nodes), first
    for bit in range((nodes - 1).bit_length()):
        chain = jump.gather(1, chain).where((depths >> bit & 1).bool(), chain)
        jump = jump.gather(1, jump)
    return chain
