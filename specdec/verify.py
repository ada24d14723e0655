"""Acceptance rules: which path of a scored tree is kept, and which token follows it.

Every rule walks down from the root of each tree of a batch at once, one depth at a time, on the
device. *Accepted* nodes form the path; the *next token* comes after it: the bonus token when the
path ended at a leaf, the corrected token when the children of its last node were rejected.

Letters: B trees, R rows, V vocabulary, K children of a node (at most), D depth of the deepest node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.batch import TreeBatch
from specdec.noise import Purpose, uniform
from specdec.sampling import draw
from specdec.tree import ProposalLaw

ALL_LAWS = frozenset(ProposalLaw)


@dataclass(frozen=True)
class Noise:
    """The randomness of one step: uniform numbers keyed by request, position and purpose."""

    seeds: Tensor  # [B] int64
    next_positions: Tensor  # [B] int64, absolute position of the token after each root

    def at(self, trees: Tensor, depths: Tensor | int, purpose: int) -> Tensor:
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


class AcceptanceRule(ABC):
    """Decides a step. `legal_laws` are the proposal laws under which the rule is lossless."""

    name: str
    legal_laws: frozenset[ProposalLaw]
    samples: bool = True
    """Whether `verify` wants probabilities; a rule that does not takes raw logits."""

    @abstractmethod
    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        """Chooses a path through each tree and the token behind it.

        Args:
            trees: what was proposed.
            target: [R, V], the target's distribution after each node (logits for greedy).
            noise: the step's randomness.
        """


class Greedy(AcceptanceRule):
    """Keeps a node when it is the target's most likely token: equals greedy decoding."""

    name = "greedy"
    legal_laws = ALL_LAWS
    samples = False

    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        return _match(trees, target.argmax(-1))


class SampleAndMatch(AcceptanceRule):
    """Samples the target at every node and keeps the children that were sampled.

    Lossless whatever proposed the tree, since the tokens are the target's own samples. They are
    keyed by position: the text equals that of a run without speculation and the same seed.
    """

    name = "sample-and-match"
    legal_laws = ALL_LAWS

    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        return _match(trees, draw(target, noise.at(trees.tree, trees.depths, Purpose.SAMPLE)))


class MultiRound(AcceptanceRule):
    """SpecInfer's multi-round rejection sampling (arXiv 2305.09781, algorithm 2).

    Children are tried in the order drawn; each rejection takes the draft's share out of the
    target's distribution. A child that was chosen, not drawn, counts as drawn from a distribution
    with all its weight there.
    """

    name = "multi-round"
    legal_laws = frozenset({ProposalLaw.DETERMINISTIC, ProposalLaw.IID})

    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        index = torch.arange(len(trees.sizes), device=trees.device)
        next_tokens = torch.full_like(index, -1)

        def decide(rows: Tensor, kids: Tensor, depth: int) -> Tensor:
            accept, residual = multi_round_law(
                target[rows],
                None if trees.draft_probs is None else trees.draft_probs[rows],
                trees.tokens[kids.clamp_min(0)],
                kids >= 0,
                trees.laws[rows],
            )
            tries = [noise.at(index, depth, Purpose.ACCEPT + k) for k in range(kids.shape[1])]
            hits = torch.stack(tries, 1) < accept if tries else accept > 1
            token = draw(residual, noise.at(index, depth, Purpose.SAMPLE))
            # The walk asks for decisions until the path has ended: the last one counts.
            ended = (next_tokens >= 0) | hits.any(1)
            next_tokens.copy_(torch.where(ended, next_tokens, token))
            return hits

        paths, continued = _walk(trees, decide)
        return Outcome(paths, next_tokens, continued)


def multi_round_law(
    target: Tensor, draft: Tensor | None, tokens: Tensor, present: Tensor, laws: Tensor
) -> tuple[Tensor, Tensor]:
    """The law of one group of siblings, without any randomness.

    Args:
        target: [B, V] probabilities.
        draft: [B, V] distribution the children were drawn from; None if all were chosen.
        tokens: [B, K] int64, the children in the order drawn.
        present: [B, K] bool, which of them exist.
        laws: [B] int8, the law of each group, `DETERMINISTIC` or `IID`.

    Returns:
        [B, K], the chance that child k is accepted given that the ones before were not, and
        [B, V], the distribution of the next token given that all were rejected.
    """
    rest = target
    chances = []
    drawn = laws != ProposalLaw.DETERMINISTIC
    for child, exists in zip(tokens.unbind(1), present.unbind(1), strict=True):
        column = child[:, None]
        chance = rest.gather(1, column)[:, 0]
        left = rest.scatter(1, column, 0.0)
        if draft is not None:
            share = draft.gather(1, column)[:, 0]
            ratio = torch.where(share > 0, chance / share, (chance > 0).to(chance)).clamp_max(1.0)
            chance = torch.where(drawn, ratio, chance)
            left = torch.where(drawn[:, None], (rest - draft).clamp_min(0.0), left)
        total = left.sum(1, keepdim=True)
        # Nothing is left when the child was accepted for certain; the residual is then never used.
        left = torch.where(total > 0, left / total, rest)
        rest = torch.where(exists[:, None], left, rest)
        chances.append(torch.where(exists, chance, 0.0))
    accept = torch.stack(chances, 1) if chances else target.new_zeros(len(target), 0)
    return accept, rest


RULES: dict[str, type[AcceptanceRule]] = {
    rule.name: rule for rule in (Greedy, SampleAndMatch, MultiRound)
}


def select_rule(name: str, law: ProposalLaw, *, do_sample: bool) -> AcceptanceRule:
    """The rule for a run: `auto` takes the best legal one, any other name is checked.

    Greedy decoding always uses `greedy`: a sampling rule has nothing to sample there.

    Raises:
        ValueError: no such rule, greedy asked for while sampling, or the rule is not lossless for
            what the drafter proposes; the message names the legal choices.
    """
    if name not in ("auto", *RULES):
        raise ValueError(f"rule: expected auto, {', '.join(RULES)}, got {name!r}")
    if not do_sample:
        return Greedy()
    if name == "greedy":
        raise ValueError("rule: 'greedy' decodes greedily, got do_sample=True; use rule='auto'")
    if name == "auto":
        return MultiRound() if law == ProposalLaw.IID else SampleAndMatch()
    rule = RULES[name]()
    if law not in rule.legal_laws:
        legal = [r.name for r in RULES.values() if r.samples and law in r.legal_laws]
        raise ValueError(
            f"rule: {name!r} is not lossless for {law.name.lower()} proposals, "
            f"use one of auto, {', '.join(legal)}"
        )
    return rule


def _match(trees: TreeBatch, choice: Tensor) -> Outcome:
    """Follows the tokens [R] that the target chose after each node, as far as they are there."""

    def decide(rows: Tensor, kids: Tensor, depth: int) -> Tensor:
        return trees.tokens[kids.clamp_min(0)] == choice[rows][:, None]

    paths, continued = _walk(trees, decide)
    last = paths.amax(1)  # parents precede children, so the deepest node has the largest index
    return Outcome(paths, choice[trees.offsets + last], continued)


def _walk(
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
