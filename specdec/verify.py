"""What an acceptance rule is: which path of a scored tree is kept, and which token follows it.

*Accepted* nodes form the path; the *next token* comes after it: the bonus token when the path ended
at a leaf, the corrected token when the children of its last node were rejected. The rules
themselves are in `rules.py`, their laws in `laws.py`.

Letters: B trees, R rows, V vocabulary, K children of a node (at most), D depth of the deepest node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specdec.batch import TreeBatch
from specdec.noise import uniform
from specdec.sampling import Sampler
from specdec.tree import ProposalLaw

ALL_LAWS = frozenset(ProposalLaw)


@dataclass(frozen=True)
class Noise:
    """The randomness of one step: uniform numbers keyed by request, position and purpose."""

    seeds: Tensor  # [B] int64
    next_positions: Tensor  # [B] int64, absolute position of the token after each root

    def at(self, trees: Tensor, depths: Tensor | int, purpose: int | Tensor) -> Tensor:
        """Numbers for the token that follows nodes of the given depths in the given trees."""
        return uniform(self.seeds[trees], self.next_positions[trees] + depths, purpose)


@dataclass(frozen=True)
class Outcome:
    """What a rule decided for each tree."""

    paths: Tensor  # [B, D + 1] int64 node indices, the root first, -1 behind the last
    next_tokens: Tensor  # [B] int64
    continued: Tensor  # [B] bool, the last node of the path had children (all of them rejected)

    @property
    def lengths(self) -> Tensor:
        """[B] int64, nodes on the path, the root included."""
        return (self.paths >= 0).sum(1)


class DeviceChoice(ABC):
    """What the target says after each node of a tree, inside a captured step.

    For rules that keep a node when the target says the same; it only launches work on the current
    stream, and never asks the device for a number.
    """

    @abstractmethod
    def choose(
        self, logits: Tensor, seeds: Tensor, lengths: Tensor, depths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[R] int64 tokens, and [R] a score of each: minus infinity or NaN if there is none.

        Args:
            logits: [R, V] after each node; R = B * N.
            seeds: [B] int64, of the requests.
            lengths: [B] int64, of their texts, the roots included.
            depths: [B, N] int64, of the nodes.
        """


class AcceptanceRule(ABC):
    """Decides a step. `legal_laws` are the proposal laws under which the rule may be used."""

    name: ClassVar[str]
    legal_laws: ClassVar[frozenset[ProposalLaw]]
    draws: ClassVar[ProposalLaw | None] = None
    """The law to draft under, where a drafter has the choice; None leaves it to the drafter."""
    chains: ClassVar[bool] = False
    """Whether trees must be chains."""
    samples: ClassVar[bool] = True
    """Whether `verify` wants probabilities; a rule that does not takes scores as they are."""
    lossless: ClassVar[bool] = True
    """Whether the output follows the target's distribution."""

    @property
    def label(self) -> str:
        """The name, and a warning where one is due: for statistics."""
        return self.name if self.lossless else f"{self.name} (lossy)"

    def on_device(self, sampler: Sampler) -> DeviceChoice | None:
        """Itself as a part of captured steps; None if it cannot be, or not with these options."""
        return None

    @abstractmethod
    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        """Chooses a path through each tree and the token behind it.

        Args:
            trees: what was proposed.
            target: [R, V], the target's distribution after each node (logits for greedy).
            noise: the step's randomness.
        """


def walk(
    trees: TreeBatch, decide: Callable[[Tensor, Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Walks down every tree at once.

    Args:
        trees: B trees.
        decide: given the current rows [B], their children [B, K] (rows, -1 where absent) and the
            depth of the current rows, returns [B, K] bool: which children may be taken; the first
            is. It is also asked at the last depth, and for walks that have ended.

    Returns:
        [B, D + 1] node indices, -1 behind the last, and [B] bool, whether the last node had
        children.
    """
    rows = trees.offsets
    walking = torch.ones_like(rows, dtype=torch.bool)
    path = [torch.zeros_like(rows)]
    for depth in range(trees.max_depth + 1):
        kids = trees.children[rows]
        hits = decide(rows, kids, depth) & (kids >= 0) & walking[:, None]
        if depth == trees.max_depth:
            break
        walking = hits.any(1)
        first = hits.int().argmax(1, keepdim=True)
        rows = torch.where(walking, kids.gather(1, first)[:, 0], rows)
        path.append(torch.where(walking, trees.nodes[rows], -1))
    continued = (trees.children[rows] >= 0).any(1)
    return torch.stack(path, 1), continued


def paths_to(trees: TreeBatch, rows: Tensor) -> Tensor:
    """[B, D + 1] node indices from each root to the given row [B] of its tree, -1 behind it."""
    count = len(trees.sizes)
    # A column behind the last takes what is written once the root has been passed.
    table = trees.tokens.new_full((count, trees.max_depth + 2), -1)
    index = torch.arange(count, device=trees.device)
    node, depth = trees.nodes[rows], trees.depths[rows]
    for _ in range(trees.max_depth + 1):
        table[index, torch.where(node >= 0, depth, trees.max_depth + 1)] = node
        node = torch.where(node >= 0, trees.parents[trees.offsets + node.clamp_min(0)], -1)
        depth = depth - 1
    return table[:, :-1]
