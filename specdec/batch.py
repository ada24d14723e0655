"""The trees of a batch in packed form, on the device.

Letters: N nodes of one tree, B trees, R rows (nodes of all trees), V vocabulary, W words of bits,
K children of a node (at most).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
    draft_probs: Tensor | None  # [R, V] float
    sizes: tuple[int, ...]  # nodes of each tree, known to the host
    laws_used: frozenset[ProposalLaw]  # all that occur in `laws`, known to the host
    max_depth: int  # an upper bound known to the host
    max_children: int  # an upper bound known to the host

    def __post_init__(self) -> None:
        if len(self.tokens) != sum(self.sizes):
            raise ValueError(f"sizes: expected to sum to {len(self.tokens)} rows, got {self.sizes}")

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @cached_property
    def offsets(self) -> Tensor:
        """[B] int64, first row of every tree."""
        starts = [0]
        for size in self.sizes[:-1]:
            starts.append(starts[-1] + size)
        return upload(starts, self.device)

    @cached_property
    def tree(self) -> Tensor:
        """[R] int64, the tree that each row belongs to."""
        sizes = upload(self.sizes, self.device)
        index = torch.arange(len(self.sizes), device=self.device)
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
        families = [Counter(tree.parents.tolist()[1:]) for tree in trees]
        return cls(
            upload(tokens, device),
            upload(parents, device),
            upload([b.bit_count() - 1 for b in bits], device),
            upload(ancestor_words(bits, max(sizes)), device),
            upload(laws, device),
            _pack_probs(trees, vocab_size, device),
            sizes,
            frozenset(ProposalLaw(law) for law in set(laws.tolist())),
            max(b.bit_count() for b in bits) - 1,
            max(max(family.values(), default=0) for family in families),
        )


def _pack_probs(
    trees: Sequence[TokenTree], vocab_size: int, device: torch.device | str
) -> Tensor | None:
    """[R, V] draft probabilities; zeros below nodes whose children were chosen."""
    if all(tree.draft_probs is None for tree in trees):
        return None
    for tree in trees:
        if tree.draft_probs is not None and tree.draft_probs.shape[1] != vocab_size:
            raise ValueError(
                f"draft_probs: expected [{len(tree)}, {vocab_size}], "
                f"got {list(tree.draft_probs.shape)}"
            )
    rows = [
        torch.zeros(len(tree), vocab_size) if tree.draft_probs is None else tree.draft_probs
        for tree in trees
    ]
    return torch.cat([upload(probs.float(), device) for probs in rows])
