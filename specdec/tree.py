"""Token trees: what a drafter proposes and the verifier scores in one pass.

Letters: N nodes of one tree, V vocabulary, D positions, K candidates for one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.bits import ancestor_bits
from specdec.transfer import upload

if TYPE_CHECKING:
    from specdec.topology import Topology

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
        draft_tokens: [N, C] int64, for drafters that draw from few candidates: then `draft_probs`
            is [N, C] too, entry c the probability of token `draft_tokens[n, c]`, and nothing as
            wide as the vocabulary is kept. A token may be named twice if one of them has none.

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
    draft_tokens: Tensor | None = None
    ancestor_bits: tuple[int, ...] = field(init=False, repr=False)
    """One Python integer a node: bit j says that node j is an ancestor, itself included."""

    def __post_init__(self) -> None:
        _check_nodes(self.tokens, self.parents)
        _check_law(self.tokens, self.law, self.draft_probs)
        _check_candidates(self.draft_probs, self.draft_tokens)
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
        return self._only(keep)

    def first_chain(self) -> TokenTree:
        """The tree without all but the first child of every node, which keeps its law."""
        keep = [0]
        for node, parent in enumerate(self.parents.tolist()):
            if parent == keep[-1]:
                keep.append(node)
        return self if len(keep) == len(self) else self._only(keep)

    def _only(self, keep: list[int]) -> TokenTree:
        new_index = {old: new for new, old in enumerate(keep)}
        parents = self.parents.tolist()
        law, probs, names = self.law, self.draft_probs, self.draft_tokens
        if isinstance(law, Tensor):
            law = law[keep]
            if not bool(law.any()):  # nothing that was drawn is left
                law, probs, names = ProposalLaw.DETERMINISTIC, None, None
        return TokenTree(
            self.tokens[keep],
            upload([new_index.get(parents[old], -1) for old in keep], self.tokens.device),
            law,
            None if probs is None else probs[keep],
            None if names is None else names[keep],
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
        wrong = (rows < 0).any(-1) | ~((total - 1).abs() < 1e-2)
        if bool(wrong.any()):
            first = int(wrong.int().argmax())
            node = int((law != 0).nonzero()[first]) if isinstance(law, Tensor) else first
            raise ValueError(
                "draft_probs: expected rows of probabilities that sum to one, "
                f"got a sum of {float(total[first]):.3g} for the children of node {node}"
            )
        if draft_probs.device != tokens.device:
            raise ValueError(f"draft_probs: expected on {tokens.device}, got {draft_probs.device}")


def _check_candidates(draft_probs: Tensor | None, draft_tokens: Tensor | None) -> None:
    if draft_tokens is None:
        return
    shape = None if draft_probs is None else draft_probs.shape
    if draft_tokens.dtype != torch.int64 or draft_tokens.shape != shape:
        raise ValueError(
            "draft_tokens: expected int64 in the shape of draft_probs, "
            f"got {draft_tokens.dtype} {list(draft_tokens.shape)} "
            f"beside {None if shape is None else list(shape)}"
        )
