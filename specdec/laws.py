"""The laws of acceptance rules: probabilities in, probabilities out, no randomness.

They work in the dtype of the target's probabilities, so that the proofs can sum them in float64.

Letters: G groups of siblings, K children in a group (at most), V vocabulary, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.tree import ProposalLaw


@dataclass(frozen=True)
class SiblingLaw:
    """What verification does with the children of one node, tried in the order drawn."""

    chances: Tensor
    """[G, K], the weight with which each child is entered, given that those before it failed."""
    weight: Tensor
    """[G], the weight that is left for the node itself when all its children have failed."""
    residual: Tensor
    """[G, V], the distribution of the next token then."""


def sibling_law(
    target: Tensor,
    draft: Tensor | None,
    tokens: Tensor,
    present: Tensor,
    laws: Tensor,
    weight: Tensor | None = None,
) -> SiblingLaw:
    """The one law behind every lossless rule that rejects.

    A node is entered with a weight `w`: the chance that it, or something below it, has to be
    accepted for the output to follow the target. Its first child `x`, drawn from `q`, gets
    `min(w p(x) / q(x), 1)`. When that child fails, `max(w p - q, 0)` is left over: its sum S gives
    the node the weight `S / (S + 1 - w)`, its shape the distribution that the next child is held
    against. Children drawn without replacement take their token out of `q`.

    With `w = 1` this is the multi-round rejection of SpecInfer (arXiv 2305.09781, algorithm 2) and,
    where tokens are taken out of `q`, of Sequoia (arXiv 2402.12374, algorithm 2). With the weight
    handed down it is block verification (Sun et al., arXiv 2403.10444, algorithm 2) on a chain and
    traversal verification (arXiv 2505.12398, algorithm 1) on a tree.

    A child that was chosen counts as drawn from a `q` with all its weight there; so does one that
    was "drawn" without replacement when nothing was left to draw from.

    Args:
        target: [G, V] probabilities.
        draft: [G, V], the distribution the first child was drawn from; None if all were chosen.
        tokens: [G, K] int64, the children in the order drawn.
        present: [G, K] bool, which of them exist.
        laws: [G] int8, the `ProposalLaw` of each group.
        weight: [G], the weight of each node; 1 if left out.
    """
    rest, share = target, draft
    w = torch.ones_like(target[:, 0]) if weight is None else weight
    chances = []
    for child, exists in zip(tokens.unbind(1), present.unbind(1), strict=True):
        column = child[:, None]
        mass = w[:, None] * rest
        chance = mass.gather(1, column)[:, 0]
        left = mass.scatter(1, column, 0.0)
        if share is not None:
            drawn = (laws != ProposalLaw.DETERMINISTIC) & (share.sum(1) > 0)
            odds = share.gather(1, column)[:, 0]
            ratio = torch.where(odds > 0, chance / odds, (chance > 0).to(chance)).clamp_max(1.0)
            chance = torch.where(drawn, ratio, chance)
            left = torch.where(drawn[:, None], (mass - share).clamp_min(0.0), left)
            share = _taken(share, column, exists & (laws == ProposalLaw.WITHOUT_REPLACEMENT))
        total = left.sum(1)
        # Where nothing is left and the weight was 1, the child was accepted for certain.
        failing = total + (1 - w).clamp_min(0.0)
        after = torch.where(failing > 0, total / failing, torch.ones_like(total))
        w = torch.where(exists, after, w)
        shape = torch.where(total[:, None] > 0, left / total[:, None], rest)
        rest = torch.where(exists[:, None], shape, rest)
        chances.append(torch.where(exists, chance, 0.0))
    stacked = torch.stack(chances, 1) if chances else target.new_zeros(len(target), 0)
    return SiblingLaw(stacked, w, rest)


def _taken(share: Tensor, column: Tensor, where: Tensor) -> Tensor:
    """The distribution of the next draw once a token is out; zeros when no other is possible."""
    without = share.scatter(1, column, 0.0)
    total = without.sum(1, keepdim=True)
    without = torch.where(total > 0, without / total, torch.zeros_like(without))
    return torch.where(where[:, None], without, share)


def typical_law(target: Tensor, tokens: Tensor, epsilon: float, delta: float) -> Tensor:
    """Medusa's typical acceptance (arXiv 2401.10774, section 2.3.1): not the target's law.

    Args:
        target: [R, V] probabilities after the parent of each node.
        tokens: [R] int64, the nodes.
        epsilon: a token at least this likely is always typical.
        delta: a token is typical too when it is likelier than `delta * exp(-entropy)`.

    Returns:
        [R] bool, whether each node is accepted once its parent is.
    """
    entropy = torch.special.entr(target).sum(1)
    bound = (delta * torch.exp(-entropy)).clamp_max(epsilon)
    return target.gather(1, tokens[:, None])[:, 0] > bound


def threshold_law(target: Tensor, tokens: Tensor, least: float) -> Tensor:
    """Accepts what is likely enough: not the target's law. Shapes as in `typical_law`."""
    return target.gather(1, tokens[:, None])[:, 0] >= least
