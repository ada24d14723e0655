"""Token trees: what a drafter proposes and the verifier scores in one pass.

Letters: N nodes of one tree, B trees in a batch, R rows (nodes of all trees, packed), V vocabulary,
W words of 32 bits.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from specdec.transfer import upload

WORD_BITS = 32
MAX_NODES = 256


class ProposalLaw(IntEnum):
    """How the children of a node came about; it decides which acceptance rules are lossless.

    Cutting a tree by depth or size keeps the law. Dropping a drawn child because of its value does
    not: a drafter that deduplicates its draws must say `WITHOUT_REPLACEMENT` or `DETERMINISTIC`.
    """

    DETERMINISTIC = 0
    """Chosen without randomness: a lookup, the k most likely tokens."""
    IID = 1
    """Drawn independently from one distribution; siblings may be equal."""
    WITHOUT_REPLACEMENT = 2
    """Drawn one after the other, each from what the earlier draws left."""


@dataclass(frozen=True, eq=False)
class TokenTree:
    """The tree proposed for one sequence, parents before children.

    Node 0, the root, is the last known token: it is part of the text, but not yet in the KV cache.
    Node counts include it. Children of one node are kept in the order in which they were drawn.

    Args:
        tokens: [N] int64, token of every node.
        parents: [N] int64, index of every node's parent; -1 for the root, `parents[i] < i`.
        law: how children were proposed: one law for all, or [N] int8, row n for the children of n.
        draft_probs: [N, V] float, row n is the distribution that the children of n were drawn
            from. Needed for the laws that draw, refused for trees that are wholly deterministic.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: shapes or devices differ, there are more than 256 nodes, a parent is not an
            earlier node, or probabilities are missing or superfluous.

    The checks read the tensors. Drafters that build trees on an accelerator make a `TreeBatch`.
    """

    tokens: Tensor
    parents: Tensor
    law: ProposalLaw | Tensor = ProposalLaw.DETERMINISTIC
    draft_probs: Tensor | None = None
    ancestor_bits: tuple[int, ...] = field(init=False, repr=False)
    """One Python integer a node: bit j says that node j is an ancestor, itself included."""

    def __post_init__(self) -> None:
        _check_nodes(self.tokens, self.parents)
        _check_law(self.tokens, self.law, self.draft_probs)
        parents = self.parents.tolist()
        for node, parent in enumerate(parents):
            if (parent == -1) != (node == 0) or not -1 <= parent < node:
                raise ValueError(
                    "parents: expected -1 for node 0 alone and an earlier node for every other, "
                    f"got parent {parent} for node {node}"
                )
        object.__setattr__(self, "ancestor_bits", ancestor_bits(parents))

    def __len__(self) -> int:
        return len(self.ancestor_bits)

    @property
    def depths(self) -> list[int]:
        """Distance of every node from the root."""
        return [bits.bit_count() - 1 for bits in self.ancestor_bits]

    def children(self, node: int) -> list[int]:
        """The children of a node in the order proposed."""
        return [child for child, parent in enumerate(self.parents.tolist()) if parent == node]

    def paths(self) -> list[list[int]]:
        """The tokens along every path from the root to a leaf."""
        tokens, inner = self.tokens.tolist(), set(self.parents.tolist())
        return [
            [token for node, token in enumerate(tokens) if bits >> node & 1]
            for leaf, bits in enumerate(self.ancestor_bits)
            if leaf not in inner
        ]

    def cut(self, *, depth: int, nodes: int = MAX_NODES) -> TokenTree:
        """The tree without the nodes below `depth` and without those behind the first `nodes`."""
        depths = self.depths
        keep = [node for node in range(len(self)) if depths[node] <= depth][:nodes]
        if len(keep) == len(self):
            return self
        new_index = {old: new for new, old in enumerate(keep)}
        parents = self.parents.tolist()
        law, probs = self.law, self.draft_probs
        if isinstance(law, Tensor):
            law = law[keep]
            if not bool(law.any()):  # nothing that was drawn is left
                law, probs = ProposalLaw.DETERMINISTIC, None
        return TokenTree(
            self.tokens[keep],
            upload([new_index.get(parents[old], -1) for old in keep], self.tokens.device),
            law,
            None if probs is None else probs[keep],
        )

    @property
    def laws(self) -> Tensor:
        """[N] int8, law of the children of each node."""
        if isinstance(self.law, Tensor):
            return self.law
        return torch.full_like(self.tokens, self.law, dtype=torch.int8)

    @classmethod
    def root(cls, token: int) -> TokenTree:
        """A tree that proposes nothing: plain decoding."""
        return cls.from_lists([token], [-1])

    @classmethod
    def chain(cls, root: int, tokens: Sequence[int]) -> TokenTree:
        """One guess for each of the next positions."""
        return cls.from_lists([root, *tokens], list(range(-1, len(tokens))))

    @classmethod
    def star(cls, root: int, tokens: Sequence[int]) -> TokenTree:
        """Several guesses for the next position."""
        return cls.from_lists([root, *tokens], [-1] + [0] * len(tokens))

    @classmethod
    def from_lists(cls, tokens: Sequence[int], parents: Sequence[int]) -> TokenTree:
        """A tree from plain lists; `parents[0]` is -1."""
        return cls(torch.tensor(tokens), torch.tensor(parents))

    @classmethod
    def from_paths(cls, root: int, paths: Iterable[Sequence[int]], nodes: int) -> TokenTree:
        """Merges token paths, the most promising first, until the tree has `nodes` nodes.

        Paths that begin alike share nodes.
        """
        tokens, parents = [root], [-1]
        child_of: dict[tuple[int, int], int] = {}
        for path in paths:
            parent = 0
            for token in path:
                child = child_of.get((parent, token))
                if child is None:
                    if len(tokens) >= nodes:
                        break
                    child = child_of[parent, token] = len(tokens)
                    tokens.append(token)
                    parents.append(parent)
                parent = child
        return cls.from_lists(tokens, parents)

    @classmethod
    def from_choices(
        cls, root: int, choices: Iterable[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> TokenTree:
        """A tree from index paths, the form in which Medusa and EAGLE publish theirs.

        Args:
            root: the last known token.
            choices: `(0, 2)` stands for the third candidate of depth 2 below the first of depth 1.
                Every prefix of a path is a path of its own, in any order.
            candidates: for every depth the tokens to choose from, the most likely first.
        """
        ordered = sorted({tuple(choice) for choice in choices}, key=lambda path: (len(path), path))
        index = {(): 0} | {path: node for node, path in enumerate(ordered, start=1)}
        orphans = [path for path in ordered if path[:-1] not in index]
        if orphans:
            raise ValueError(
                f"choices: expected every prefix to be a path, got orphan {orphans[0]}"
            )
        return cls.from_lists(
            [root, *(candidates[len(path) - 1][path[-1]] for path in ordered)],
            [-1, *(index[path[:-1]] for path in ordered)],
        )

    @classmethod
    def static(cls, topology: Topology, tokens: Sequence[int]) -> TokenTree:
        """A tree of a fixed shape: `tokens[i]` for node i of the topology, the root first."""
        return cls.from_lists(tokens, topology.parents)

    @classmethod
    def best_first(cls, root: int, tokens: Tensor, probs: Tensor, nodes: int) -> TokenTree:
        """The `nodes` nodes that are most likely to be accepted under independent marginals.

        A path is as likely as the product of its marginals, so a heap finds the best tree: a node's
        only rivals are its next sibling and its first child (DDTree, arXiv 2604.12989, section 3).

        Args:
            root: the last known token.
            tokens: [D, K] int64, candidates for each of the next D positions.
            probs: [D, K] float, their probabilities, falling along K.
            nodes: size of the tree, the root included.
        """
        depth, width = tokens.shape
        candidate, chance = tokens.tolist(), probs.tolist()
        out_tokens, parents = [root], [-1]
        heap = [(-chance[0][0], 0, 0, 0, 1.0)]  # (-path probability, parent, level, rank, above)
        while heap and len(out_tokens) < nodes:
            probability, parent, level, rank, above = heapq.heappop(heap)
            node = len(out_tokens)
            out_tokens.append(candidate[level][rank])
            parents.append(parent)
            if rank + 1 < width:
                rival = -above * chance[level][rank + 1]
                heapq.heappush(heap, (rival, parent, level, rank + 1, above))
            if level + 1 < depth:
                child = probability * chance[level + 1][0]
                heapq.heappush(heap, (child, node, level + 1, 0, -probability))
        return cls.from_lists(out_tokens, parents)


def ancestor_bits(parents: Sequence[int]) -> tuple[int, ...]:
    """For every node an integer whose bit j says that node j is an ancestor, itself included."""
    bits: list[int] = []
    for node, parent in enumerate(parents):
        bits.append(1 << node | (bits[parent] if parent >= 0 else 0))
    return tuple(bits)


def _check_nodes(tokens: Tensor, parents: Tensor) -> None:
    for name, tensor in (("tokens", tokens), ("parents", parents)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {tensor.dtype}")
        if tensor.ndim != 1 or not 1 <= len(tensor) <= MAX_NODES:
            raise ValueError(
                f"{name}: expected shape [N] with 1 to {MAX_NODES} nodes, got {list(tensor.shape)}"
            )
    if tokens.shape != parents.shape or tokens.device != parents.device:
        raise ValueError(
            "tokens and parents: expected one shape on one device, got "
            f"{list(tokens.shape)} on {tokens.device} and {list(parents.shape)} on {parents.device}"
        )
    if int(tokens.min()) < 0:
        raise ValueError(f"tokens: expected token ids, got {int(tokens.min())}")


def _check_law(tokens: Tensor, law: ProposalLaw | Tensor, draft_probs: Tensor | None) -> None:
    if isinstance(law, Tensor):
        if law.dtype != torch.int8 or law.shape != tokens.shape or law.device != tokens.device:
            raise ValueError(
                f"law: expected [N] int8 on {tokens.device}, "
                f"got {list(law.shape)} {law.dtype} on {law.device}"
            )
        drawn = bool((law != ProposalLaw.DETERMINISTIC).any())
    else:
        drawn = law != ProposalLaw.DETERMINISTIC
    if drawn != (draft_probs is not None):
        raise ValueError(
            "draft_probs: needed exactly when children are drawn, got "
            f"{'none' if draft_probs is None else 'some'} with law {law!r}"
        )
    if draft_probs is not None:
        if draft_probs.ndim != 2 or len(draft_probs) != len(tokens):
            raise ValueError(
                f"draft_probs: expected [{len(tokens)}, V], got {list(draft_probs.shape)}"
            )
        rows = draft_probs if not isinstance(law, Tensor) else draft_probs[law != 0]
        total = rows.sum(-1)
        if not bool((rows >= 0).all()) or not bool(((total - 1).abs() < 1e-2).all()):
            raise ValueError(
                "draft_probs: expected rows of probabilities that sum to one, "
                f"got sums from {float(total.min()):.3g} to {float(total.max()):.3g}"
            )
        if draft_probs.device != tokens.device:
            raise ValueError(f"draft_probs: expected on {tokens.device}, got {draft_probs.device}")


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


def ancestor_words(bits: Sequence[int], nodes: int) -> Tensor:
    """Packs Python integers of `nodes` bits into int32 words: [R, ceil(nodes / 32)], on the CPU."""
    width = -(-nodes // WORD_BITS)
    mask, sign, wrap = (1 << WORD_BITS) - 1, 1 << (WORD_BITS - 1), 1 << WORD_BITS
    words = [
        [
            word - wrap if word & sign else word
            for word in ((b >> WORD_BITS * w) & mask for w in range(width))
        ]
        for b in bits
    ]
    return torch.tensor(words, dtype=torch.int32)


def unpack_words(words: Tensor, nodes: int) -> Tensor:
    """The bits of int32 words [..., W] as booleans [..., nodes]."""
    index = torch.arange(nodes, device=words.device)
    return (words[..., index // WORD_BITS] >> (index % WORD_BITS)) & 1 != 0
