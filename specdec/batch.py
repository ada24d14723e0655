"""The trees of a batch in packed form, on the device.

Letters: N nodes of one tree, B trees, R rows (nodes of all trees), V vocabulary, W words of bits,
K children of a node (at most).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from specdec.bits import ancestor_words
from specdec.transfer import upload
from specdec.tree import ProposalLaw, TokenTree


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """The trees of a batch, packed without padding; all tensors on one device.

    Rows `offsets[b]:offsets[b + 1]` are the nodes of tree b. Drafters that work on the device
    build this directly and keep the promises of `TokenTree`; `pack` checks trees from the host.
    """

    tokens: Tensor  # [R] int64
    parents: Tensor  # [R] int64, index within the own tree, -1 for roots
    depths: Tensor  # [R] int64
    ancestors: Tensor  # [R, W] int32, bit j of word w: node 32 * w + j is an ancestor or itself
    laws: Tensor  # [R] int8, law of the children of each node
    draft_probs: Tensor | None  # [R, V] float, or [R, C] beside `draft_tokens`
    sizes: tuple[int, ...]  # nodes of each tree, known to the host
    laws_used: frozenset[ProposalLaw]  # all that occur in `laws`, known to the host
    max_depth: int  # an upper bound known to the host
    max_children: int  # an upper bound known to the host
    draft_tokens: Tensor | None = None  # [R, C] int64, which tokens `draft_probs` are of
    host_parents: tuple[int, ...] | None = None  # `parents`, where the host knows them anyway

    def __post_init__(self) -> None:
        if len(self.tokens) != sum(self.sizes):
            raise ValueError(f"sizes: expected to sum to {len(self.tokens)} rows, got {self.sizes}")

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @cached_property
    def offsets(self) -> Tensor:
        """[B] int64, first row of every tree; nothing is uploaded if all are of one size."""
        if len(set(self.sizes)) == 1:
            return torch.arange(len(self.sizes), device=self.device) * self.sizes[0]
        starts = [0]
        for size in self.sizes[:-1]:
            starts.append(starts[-1] + size)
        return upload(starts, self.device)

    @cached_property
    def tree(self) -> Tensor:
        """[R] int64, the tree that each row belongs to."""
        index = torch.arange(len(self.sizes), device=self.device)
        if len(set(self.sizes)) == 1:
            return index.repeat_interleave(self.sizes[0])
        sizes = upload(self.sizes, self.device)
        return torch.repeat_interleave(index, sizes, output_size=len(self.tokens))

    @cached_property
    def nodes(self) -> Tensor:
        """[R] int64, index of each row within its own tree."""
        return torch.arange(len(self.tokens), device=self.device) - self.offsets[self.tree]

    @cached_property
    def children(self) -> Tensor:
        """[R, K] int64, rows of each node's children in the order drawn, -1 where absent.

        K is at least 1, so that a batch of bare roots has a table too.
        """
        count = len(self.tokens)
        rows = torch.arange(count, device=self.device)
        # Roots are filed under an extra row, which is cut off again.
        parents = torch.where(self.parents < 0, count, self.offsets[self.tree] + self.parents)
        filed, order = torch.sort(parents, stable=True)
        rank = rows - torch.searchsorted(filed, filed)
        width = max(self.max_children, 1)
        table = rows.new_full((count + 1, width), -1)
        table[filed, rank.clamp_max(width - 1)] = order
        return table[:count]

    def draft_rows(self, rows: Tensor, vocab_size: int) -> Tensor | None:
        """[G, V], what the children of some rows were drawn from; None if all were chosen."""
        if self.draft_probs is None or self.draft_tokens is None:
            return None if self.draft_probs is None else self.draft_probs[rows]
        probs = self.draft_probs[rows]
        dense = probs.new_zeros(len(rows), vocab_size)
        return dense.scatter_add_(1, self.draft_tokens[rows], probs)  # padding adds nothing

    @cached_property
    def known_parents(self) -> tuple[int, ...]:
        """`parents` on the host; waits for the device if the host did not know them."""
        return self.host_parents or tuple(self.parents.tolist())

    @cached_property
    def _shape(self) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Post-order and inner levels by row."""
        known = self.known_parents
        order: list[int] = []
        levels: list[list[int]] = []
        start = 0
        for size in self.sizes:
            places, inner = _tree_shape(known[start : start + size])
            order += [start + place for place in places]
            levels += [[] for _ in range(len(inner) - len(levels))]
            for level, nodes in zip(levels, inner, strict=False):
                level += [start + node for node in nodes]
            start += size
        return tuple(order), tuple(map(tuple, levels))

    @cached_property
    def postorder(self) -> Tensor:
        """[R] int64, place of each row when every tree is left from its leaves up, in turn."""
        return upload(self._shape[0], self.device)

    @cached_property
    def inner_levels(self) -> tuple[Tensor, ...]:
        """For every depth the rows [G] that have children."""
        return tuple(upload(rows, self.device) for rows in self._shape[1])

    @classmethod
    def roots(cls, tokens: Tensor) -> TreeBatch:
        """Trees of one node.

        Args:
            tokens: [B] int64.
        """
        return cls(
            tokens=tokens,
            parents=torch.full_like(tokens, -1),
            depths=torch.zeros_like(tokens),
            ancestors=torch.ones_like(tokens, dtype=torch.int32)[:, None],
            laws=torch.full_like(tokens, ProposalLaw.DETERMINISTIC, dtype=torch.int8),
            draft_probs=None,
            sizes=(1,) * len(tokens),
            laws_used=frozenset({ProposalLaw.DETERMINISTIC}),
            max_depth=0,
            max_children=0,
            host_parents=(-1,) * len(tokens),
        )

    @classmethod
    def pack(
        cls, trees: Sequence[TokenTree], *, vocab_size: int, device: torch.device | str = "cpu"
    ) -> TreeBatch:
        """Packs trees built on the host and moves them to the device.

        Raises:
            ValueError: a token lies outside the vocabulary, or draft probabilities do not cover
                it.
        """
        sizes = tuple(len(tree) for tree in trees)
        tokens = torch.cat([tree.tokens for tree in trees])
        if int(tokens.max()) >= vocab_size:
            raise ValueError(
                f"tokens: expected ids below the vocabulary size {vocab_size}, "
                f"got {int(tokens.max())}"
            )
        parents = torch.cat([tree.parents for tree in trees])
        bits = [bits for tree in trees for bits in tree.ancestor_bits]
        laws = torch.cat([tree.laws for tree in trees])
        draft_probs, draft_tokens = _pack_probs(trees, vocab_size, device)
        known = parents.tolist()
        starts = [0, *accumulate(sizes)]
        families = [Counter(known[a + 1 : b]) for a, b in pairwise(starts)]
        return cls(
            upload(tokens, device),
            upload(parents, device),
            upload([b.bit_count() - 1 for b in bits], device),
            upload(ancestor_words(bits, max(sizes)), device),
            upload(laws, device),
            draft_probs,
            sizes,
            frozenset(ProposalLaw(law) for law in set(laws.tolist())),
            max(b.bit_count() for b in bits) - 1,
            max(max(family.values(), default=0) for family in families),
            draft_tokens,
            tuple(known),
        )


@lru_cache(maxsize=1024)
def _tree_shape(parents: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Each node's place in post-order, and for every depth the nodes that have children."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    sizes = [1] * len(parents)
    for node in range(len(parents) - 1, 0, -1):
        sizes[parents[node]] += sizes[node]
    first = [0] * len(parents)  # place of the first node below each one
    levels: list[list[int]] = []
    depths = [0] * len(parents)
    for node, below in enumerate(children):
        place = first[node]
        for child in below:
            first[child], depths[child] = place, depths[node] + 1
            place += sizes[child]
        if below:
            levels += [[] for _ in range(depths[node] + 1 - len(levels))]
            levels[depths[node]].append(node)
    order = tuple(start + size - 1 for start, size in zip(first, sizes, strict=True))
    return order, tuple(map(tuple, levels))


def _pack_probs(
    trees: Sequence[TokenTree], vocab_size: int, device: torch.device | str
) -> tuple[Tensor | None, Tensor | None]:
    """[R, V] draft probabilities, zeros below nodes whose children were chosen.

    Where all trees name the tokens that they could draw: [R, C], and the tokens [R, C].
    """
    drawn = [tree for tree in trees if tree.draft_probs is not None]
    if not drawn:
        return None, None
    sparse = all(tree.draft_tokens is not None for tree in drawn)
    width = vocab_size
    if sparse:
        width = max(tree.draft_tokens.shape[1] for tree in drawn if tree.draft_tokens is not None)
    probs, tokens = [], []
    for tree in trees:
        own, names = tree.draft_probs, tree.draft_tokens
        if own is None:
            own, names = torch.zeros(len(tree), 0), None
        if names is None:
            names = torch.arange(own.shape[1]).expand(len(tree), -1)
            if own.shape[1] not in (0, vocab_size):
                raise ValueError(
                    f"draft_probs: expected [{len(tree)}, {vocab_size}], got {list(own.shape)}"
                )
        elif not sparse:
            own = own.new_zeros(len(tree), vocab_size).scatter_add_(1, names, own)
        pad = (0, width - own.shape[1])
        probs.append(upload(torch.nn.functional.pad(own.float(), pad), device))
        if sparse:
            tokens.append(upload(torch.nn.functional.pad(names, pad), device))
    return torch.cat(probs), torch.cat(tokens) if sparse else None
