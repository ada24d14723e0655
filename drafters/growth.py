"""How a draft model's trees grow, level by level: fixed shapes, likeliest paths, drawn children.

All of it is torch on tensors whose shapes the host knows, so that it runs inside a CUDA graph as
well as outside; only drawn children are for the host's loop.

Letters: B trees, N nodes of each, w nodes of a level that are run, V vocabulary, W words of bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.bits import ancestor_bits, ancestor_words, signed_words
from specdec.drafting import DraftContext
from specdec.noise import Purpose, uniform
from specdec.pages import check_count
from specdec.sampling import draw
from specdec.topology import Topology
from specdec.transfer import upload
from specdec.tree import MAX_NODES, ProposalLaw


@dataclass(frozen=True)
class Beam:
    """Trees that grow along the likeliest paths, other ones in every step.

    A path is as likely as the product of the draft model's probabilities along it. At each depth
    the `width` likeliest nodes are run, and each offers its `width` likeliest children; of all that
    was offered, the likeliest paths form the tree (EAGLE-2, arXiv 2406.16858, section 4). Where
    `width` is at least the nodes of the tree below the root, that is the tree with the greatest sum
    of path probabilities, which OPT-Tree looks for (arXiv 2406.17276, section 3).

    Args:
        width: nodes of one depth that are run, and children that each of them offers.
        depth: of the deepest node; the draft model runs as many times in a step.
    """

    width: int = 8
    depth: int = 6

    def __post_init__(self) -> None:
        check_count("width", self.width)
        check_count("depth", self.depth)
        if self.rows > MAX_NODES:
            raise ValueError(
                f"width, depth: expected width * (depth - 1) to be at most {MAX_NODES}, "
                f"got {self.width} * {self.depth - 1}"
            )

    @property
    def rows(self) -> int:
        """Nodes below the root that are run."""
        return self.width * (self.depth - 1)


@dataclass(frozen=True)
class Level:
    """Nodes of one depth that the draft model is to run, w of each tree."""

    tokens: Tensor  # [B, w] int64
    ancestors: Tensor  # [B, w, W] int32 over the rows behind the text, in which the root is
    first: int  # row of the first; those of a level lie side by side
    depth: int  # of the nodes; the root has 0


Run = Callable[[Level], Tensor]
"""Runs a level: [B, w, V] logits behind its nodes."""


@dataclass(frozen=True)
class Grown:
    """The trees of a batch."""

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64, -1 for roots
    draft_probs: Tensor | None = None  # [B, N, C], where children were drawn
    draft_tokens: Tensor | None = None  # [B, N, C] int64


class Growth(ABC):
    """A way to grow trees. Its tensors stay where they are, so a CUDA graph may refer to them."""

    size: int
    """N, nodes of each tree, the root included."""
    depth: int
    """No node is deeper."""
    rows: int
    """Nodes below the root that are run."""
    max_children: int
    shape: Topology | None = None
    """Of all trees alike, where the host knows it."""

    @abstractmethod
    def grow(self, roots: Tensor, logits: Tensor, run: Run) -> Grown:
        """Grows a tree below every root.

        Args:
            roots: [B] int64 tokens.
            logits: [B, V] float32 behind them.
            run: asked for one level after the other.
        """


@dataclass(frozen=True)
class _ShapeLevel:
    """Nodes of one depth that have children."""

    nodes: tuple[int, ...]
    places: Tensor  # [w] int64, among all nodes of that depth
    ancestors: Tensor  # [w, W] int32
    first: int
    most: int  # children of one of them
    offered: Tensor  # [children] int64: the places of the children among w * most


class ShapeGrowth(Growth):
    """Trees of one shape: the likeliest children of every node.

    Args:
        shape: of all trees.
        device: where they grow.
    """

    def __init__(self, shape: Topology, device: torch.device) -> None:
        self.shape: Topology = shape
        self.size, self.depth = len(shape), shape.depths[-1]
        self.rows = max(0, len(shape.inner) - 1)
        self.max_children = max(map(shape.parents.count, range(len(shape))))
        self._device_parents = upload(shape.parents, device)
        self._levels = list(self._level_by_level(device))

    def _level_by_level(self, device: torch.device) -> Iterator[_ShapeLevel]:
        shape = self.shape
        inner = sorted(shape.inner - {0})
        row = {node: row for row, node in enumerate(inner)}
        bits = ancestor_bits([row.get(shape.parents[node], -1) for node in inner])
        for depth in range(self.depth):
            level = [node for node in range(len(shape)) if shape.depths[node] == depth]
            nodes = [node for node in level if node in shape.inner]
            widths = [shape.parents.count(node) for node in nodes]
            most = max(widths)
            own = [bits[row[node]] for node in nodes] if depth else [0]
            offered = [at * most + rank for at, width in enumerate(widths) for rank in range(width)]
            yield _ShapeLevel(
                tuple(nodes),
                upload([level.index(node) for node in nodes], device),
                upload(ancestor_words(own, max(1, self.rows)), device),
                row.get(nodes[0], 0),
                most,
                upload(offered, device),
            )

    def grow(self, roots: Tensor, logits: Tensor, run: Run) -> Grown:
        batch, tokens = len(roots), [roots[:, None]]
        behind = logits[:, None]
        for depth, level in enumerate(self._levels):
            if depth:
                behind = run(self._level(level, depth, tokens[-1]))
            offered = behind.topk(level.most).indices.flatten(1)
            tokens.append(offered.index_select(1, level.offered))
        return Grown(torch.cat(tokens, 1), self._device_parents.expand(batch, -1))

    def _level(self, level: _ShapeLevel, depth: int, tokens: Tensor) -> Level:
        words = level.ancestors.expand(len(tokens), -1, -1)
        return Level(tokens.index_select(1, level.places), words, level.first, depth)


class DrawnGrowth(ShapeGrowth):
    """Trees of one shape whose children are drawn, with the probabilities that they had.

    Args:
        shape: of all trees.
        context: the step's sampling options and randomness.
        candidates: of the likeliest tokens, how many may be drawn.
    """

    def __init__(self, shape: Topology, context: DraftContext, candidates: int) -> None:
        super().__init__(shape, context.device)
        self._context = context
        self._lengths = upload([len(tokens) for tokens in context.tokens], context.device)
        self._candidates = min(candidates, context.vocab_size)

    def grow(self, roots: Tensor, logits: Tensor, run: Run) -> Grown:
        size = (len(roots), self.size, self._candidates)
        probs = torch.zeros(size, device=roots.device)
        names = torch.zeros(size, dtype=torch.int64, device=roots.device)
        tokens, behind = [roots[:, None]], logits[:, None]
        for depth, level in enumerate(self._levels):
            if depth:
                behind = run(self._level(level, depth, tokens[-1]))
            children: list[Tensor] = []
            for place, node in enumerate(level.nodes):
                probs[:, node], names[:, node] = self._candidates_of(behind[:, place])
                children += self._draw(node, probs[:, node], names[:, node])
            tokens.append(torch.stack(children, 1))
        parents = self._device_parents.expand(len(roots), -1)
        return Grown(torch.cat(tokens, 1), parents, probs, names)

    def _candidates_of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        probs, names = self._context.sampler.draft_probs(logits).topk(self._candidates)
        return probs / probs.sum(1, keepdim=True), names

    def _draw(self, node: int, probs: Tensor, names: Tensor) -> Iterator[Tensor]:
        """[B] tokens of a node's children, one after the other."""
        tried = torch.zeros_like(probs, dtype=torch.bool)
        for child in (c for c, parent in enumerate(self.shape.parents) if parent == node):
            # Another step may draw for the same position: the numbers belong to this one.
            noise = uniform(self._context.seeds, self._lengths, Purpose.DRAFT + child)
            pick = draw(probs, noise)
            if self._context.law == ProposalLaw.WITHOUT_REPLACEMENT:
                # When nothing is left to draw, the likeliest untried candidate is chosen.
                pick = torch.where(probs.sum(1) > 0, pick, (~tried).int().argmax(1))
                probs = probs.scatter(1, pick[:, None], 0.0)
                tried = tried.scatter(1, pick[:, None], True)
            yield names.gather(1, pick[:, None])[:, 0]


class BeamGrowth(Growth):
    """The trees of a `Beam`. Their nodes stand in the order of their chances, parents first.

    Args:
        beam: how they grow.
        nodes: of a tree, the root included, at most.
        depth: of the deepest node, at most.
        vocab_size: tokens that a node may offer.
    """

    def __init__(self, beam: Beam, nodes: int, depth: int, vocab_size: int) -> None:
        # No more than `nodes - 1` nodes of a depth, or children of a node, can be in the tree.
        self.width = max(1, min(beam.width, nodes - 1, vocab_size))
        self.depth = min(beam.depth, nodes - 1, depth)
        offered = self.width + self.width**2 * (self.depth - 1) if self.depth else 0
        self.size = 1 + min(nodes - 1, offered)
        self.rows = self.width * max(0, self.depth - 1)
        self.max_children = self.width if self.depth else 0

    def grow(self, roots: Tensor, logits: Tensor, run: Run) -> Grown:
        batch, width, device = len(roots), self.width, roots.device
        # All that is offered, by level; candidate 0 is the root.
        tokens, parents, chances = [roots[:, None]], [roots.new_full((batch, 1), -1)], []
        chosen, chance = roots.new_zeros(batch, 1), logits.new_zeros(batch, 1)
        words = torch.zeros(batch, 1, max(1, -(-self.rows // 32)), dtype=torch.int32, device=device)
        behind, count = logits[:, None], 1
        for depth in range(1, self.depth + 1):
            best, names = behind.topk(width)
            step = (best - behind.logsumexp(2, keepdim=True)).clamp_max(0.0)
            # A draft model may fail; its trees are trees all the same.
            step = step.nan_to_num(nan=float("-inf"), neginf=float("-inf"))
            tokens.append(names.flatten(1))
            parents.append(chosen[:, :, None].expand_as(names).flatten(1))
            chances.append((chance[:, :, None] + step).flatten(1))
            if depth == self.depth:
                break
            # Equals stay in order: what is run is the beginning of what may be in the tree.
            chance, order = chances[-1].sort(dim=1, descending=True, stable=True)
            chance, order = chance[:, :width], order[:, :width]
            first = (depth - 1) * width
            above = words.gather(1, (order // width)[:, :, None].expand(-1, -1, words.shape[2]))
            words = above | _own_bits(first, width, words.shape[2], device)
            chosen, count = order + count, count + chances[-1].shape[1]
            behind = run(Level(tokens[-1].gather(1, order), words, first, depth))
        return self._likeliest(torch.cat(tokens, 1), torch.cat(parents, 1), chances)

    def _likeliest(self, tokens: Tensor, parents: Tensor, chances: list[Tensor]) -> Grown:
        """The tree of the likeliest candidates.

        None is likelier than its parent, and of equals the shallower comes first, so with a
        candidate its parent is chosen, too.
        """
        root = torch.zeros_like(parents[:, :1])
        order = root
        if chances:
            falling = torch.cat(chances, 1).sort(dim=1, descending=True, stable=True).indices
            order = torch.cat([root, falling[:, : self.size - 1] + 1], 1)
        places = torch.arange(self.size, device=order.device).expand_as(order)
        number = torch.zeros_like(parents).scatter(1, order, places)
        above = parents.gather(1, order)
        above = number.gather(1, above.clamp_min(0)).where(above >= 0, -1)
        return Grown(tokens.gather(1, order), above)


def _own_bits(first: int, count: int, words: int, device: torch.device) -> Tensor:
    """[count, words] int32, for rows from `first` on the bit of each."""
    rows = torch.arange(first, first + count, device=device)[:, None]
    word = torch.arange(words, device=device)
    return signed_words((1 << rows % 32).where(rows // 32 == word, 0))
