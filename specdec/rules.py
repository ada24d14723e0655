"""The acceptance rules and which of them is used.

Each is split into a *law* (`laws.py`: acceptance and residual probabilities, pure) and a *draw*
(here: uniform numbers turned into decisions), so that the proofs can enumerate the law.

Letters: B trees, R rows, V vocabulary, K children of a node (at most), D depth of the deepest node.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specdec.batch import TreeBatch
from specdec.laws import SiblingLaw, sibling_law, threshold_law, typical_law
from specdec.noise import Purpose, uniform
from specdec.sampling import Sampler, draw
from specdec.tree import ProposalLaw
from specdec.verify import (
    ALL_LAWS,
    AcceptanceRule,
    DeviceChoice,
    Noise,
    Outcome,
    paths_to,
    walk,
)

CHOSEN, IID, ONCE = ProposalLaw


class Greedy(AcceptanceRule):
    """Keeps a node when it is the target's most likely token: equals greedy decoding."""

    name = "greedy"
    legal_laws = ALL_LAWS
    samples = False

    def on_device(self, sampler: Sampler) -> DeviceChoice | None:
        return _Likeliest(sampler) if sampler.capturable else None

    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        return _match(trees, target.argmax(-1))


@dataclass(frozen=True)
class _Likeliest(DeviceChoice):
    """The token with the highest score."""

    sampler: Sampler

    def choose(
        self, logits: Tensor, seeds: Tensor, lengths: Tensor, depths: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = self.sampler.node_scores(logits)
        if scores.is_cuda:
            from specdec.kernels import scan  # needs Triton

            best, tokens = scan.greatest(scores)
        else:
            best, tokens = scores.max(-1)
        return tokens, best


class SampleAndMatch(AcceptanceRule):
    """Samples the target at every node and keeps the children that were sampled.

    Lossless whatever proposed the tree, since the tokens are the target's own samples. They are
    keyed by position: the text equals that of a run without speculation and the same seed.
    """

    name = "sample-and-match"
    legal_laws = ALL_LAWS

    def on_device(self, sampler: Sampler) -> DeviceChoice | None:
        return _Sample(sampler) if sampler.capturable else None

    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        return _match(trees, draw(target, noise.at(trees.tree, trees.depths, Purpose.SAMPLE)))


@dataclass(frozen=True)
class _Sample(DeviceChoice):
    """The token that a run without drafts would draw at the position."""

    sampler: Sampler

    def choose(
        self, logits: Tensor, seeds: Tensor, lengths: Tensor, depths: Tensor
    ) -> tuple[Tensor, Tensor]:
        if logits.is_cuda and self.sampler.cuts is not None:
            from specdec.kernels import vocab  # needs Triton

            count, nodes = depths.shape
            rows = vocab.distributions(
                logits,
                self.sampler.cuts,
                seeds=seeds,
                positions=lengths,
                tree=torch.arange(count, device=depths.device).repeat_interleave(
                    nodes, output_size=count * nodes
                ),
                depths=depths.flatten(),
            )
            return rows.tokens, rows.best
        scores = self.sampler.node_scores(logits)
        numbers = uniform(seeds[:, None], lengths[:, None] + depths, Purpose.SAMPLE)
        best = scores.amax(-1)
        # Nothing can be drawn by an infinite score.
        best = torch.where(best.isfinite(), best, torch.nan)
        return draw(self.sampler.probs(scores), numbers.flatten()), best


class MultiRound(AcceptanceRule):
    """SpecInfer's multi-round rejection sampling (arXiv 2305.09781, algorithm 2).

    Children are tried in the order drawn; each rejection takes the draft's share out of the
    target's distribution.
    """

    name = "multi-round"
    legal_laws = frozenset({CHOSEN, IID})
    draws = IID

    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        index = torch.arange(len(trees.sizes), device=trees.device)
        next_tokens = torch.full_like(index, -1)

        def decide(rows: Tensor, kids: Tensor, depth: int) -> Tensor:
            law = _law(trees, target, rows)
            tries = [noise.at(index, depth, Purpose.ACCEPT + k) for k in range(kids.shape[1])]
            hits = torch.stack(tries, 1) < law.chances
            token = draw(law.residual, noise.at(index, depth, Purpose.SAMPLE))
            # The walk asks for decisions until the path has ended: the last one counts.
            ended = (next_tokens >= 0) | hits.any(1)
            next_tokens.copy_(torch.where(ended, next_tokens, token))
            return hits

        paths, continued = walk(trees, decide)
        return Outcome(paths, next_tokens, continued)


class TokenLevel(MultiRound):
    """Rejection sampling token by token along a chain (Leviathan et al., arXiv 2211.17192)."""

    name = "token-level"
    legal_laws = ALL_LAWS  # a single child is drawn alike with and without replacement
    chains = True


class WithoutReplacement(MultiRound):
    """Sequoia's rejection of children drawn without replacement (arXiv 2402.12374, algorithm 2)."""

    name = "without-replacement"
    legal_laws = frozenset({CHOSEN, ONCE})
    draws = ONCE


class Traversal(AcceptanceRule):
    """Traversal verification, from the leaves up (arXiv 2505.12398, algorithm 1).

    A rejected node does not end its path: its parent is tried next, with the weight that is left.
    So a sequence that is likely as a whole is kept although one of its tokens alone would not be.
    """

    name = "traversal"
    legal_laws = ALL_LAWS
    draws = ONCE

    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        entered, accept = traversal_law(trees, target)
        # A step may decide that many positions without reaching them, and the next one decides
        # them again: the numbers belong to the step, which is to say to its root.
        tries = noise.at(trees.tree, 0, Purpose.ACCEPT + trees.nodes)
        order = trees.postorder
        count = len(trees.tokens)
        first = torch.full_like(trees.offsets, count).scatter_reduce(
            0, trees.tree, torch.where(tries >= accept, count, order), "amin"
        )
        # A root's own test always succeeds. So does one against NaN: the step ends there, and its
        # request with it.
        places = torch.arange(count, device=trees.device)
        by_place = torch.empty_like(order).scatter_(0, order, places)
        rows = by_place[first]
        law = _law(trees, target, rows, entered[rows])
        index = torch.arange(len(trees.sizes), device=trees.device)
        tokens = draw(law.residual, noise.at(index, trees.depths[rows], Purpose.SAMPLE))
        return Outcome(paths_to(trees, rows), tokens, (trees.children[rows] >= 0).any(1))


class Block(Traversal):
    """Block verification of chains (Sun et al., arXiv 2403.10444, algorithm 2).

    On a chain traversal verification does the same: the last position whose own test succeeds is
    the first one from the end.
    """

    name = "block"
    chains = True


def traversal_law(trees: TreeBatch, target: Tensor) -> tuple[Tensor, Tensor]:
    """The law of traversal verification for whole trees.

    Returns:
        [R], the weight with which each node is entered, and [R], the chance that it ends the path
        given that everything before it in post-order has failed. Neither depends on decisions, so
        a depth of all trees is done at once.
    """
    count = len(target)
    entered = target.new_ones(count + 1)  # the last one takes what belongs to no child
    accept = entered.clone()
    for rows in trees.inner_levels:
        law = _law(trees, target, rows, entered[rows])
        kids = trees.children[rows]
        kids = torch.where(kids >= 0, kids, count)
        entered[kids] = law.chances
        accept[kids] = law.chances
        accept[rows] = law.weight
    return entered[:count], accept[:count]


def sibling_chances(trees: TreeBatch, target: Tensor, rows: Tensor) -> Tensor:
    """[G, K], the chance that each child of some rows is accepted once those before it are not."""
    return _law(trees, target, rows).chances


def _law(
    trees: TreeBatch, target: Tensor, rows: Tensor, weight: Tensor | None = None
) -> SiblingLaw:
    """The law of the children of some rows.

    A row without a distribution, behind a node that may never be reached, counts as a leaf.
    """
    usable = target[rows].sum(1).isfinite()
    kids = torch.where(usable[:, None], trees.children[rows], -1)
    draft = trees.draft_rows(rows, target.shape[1])
    return sibling_law(
        target[rows],
        None if draft is None else draft.to(target.dtype),
        trees.tokens[kids.clamp_min(0)],
        kids >= 0,
        trees.laws[rows],
        weight,
    )


class _Lossy(AcceptanceRule):
    """Takes the deepest path of acceptable nodes, then a sample: not the target's distribution."""

    legal_laws = ALL_LAWS
    lossless = False

    @abstractmethod
    def accepts(self, target: Tensor, tokens: Tensor) -> Tensor:
        """[R] bool, given [R, V] behind each node's parent and [R] its token."""

    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        rows = _deepest(trees, self.accepts(target[_above(trees)], trees.tokens))
        index = torch.arange(len(trees.sizes), device=trees.device)
        tokens = draw(target[rows], noise.at(index, trees.depths[rows], Purpose.SAMPLE))
        return Outcome(paths_to(trees, rows), tokens, (trees.children[rows] >= 0).any(1))


@dataclass(frozen=True)
class Typical(_Lossy):
    """Medusa's typical acceptance: lossy (arXiv 2401.10774, section 2.3.1).

    Args:
        epsilon, delta: a token is accepted when it is likelier than the smaller of `epsilon` and
            `delta * exp(-entropy)`; Medusa's values by default.
    """

    name: ClassVar[str] = "typical"
    epsilon: float = 0.09
    delta: float = 0.3

    def accepts(self, target: Tensor, tokens: Tensor) -> Tensor:
        return typical_law(target, tokens, self.epsilon, self.delta)


@dataclass(frozen=True)
class Threshold(_Lossy):
    """Accepts tokens that the target finds likely enough: lossy.

    Args:
        least: the probability that is enough.
    """

    name: ClassVar[str] = "threshold"
    least: float = 0.3

    def accepts(self, target: Tensor, tokens: Tensor) -> Tensor:
        return threshold_law(target, tokens, self.least)


RULES: dict[str, type[AcceptanceRule]] = {
    rule.name: rule
    for rule in (
        Greedy,
        SampleAndMatch,
        TokenLevel,
        MultiRound,
        WithoutReplacement,
        Block,
        Traversal,
        Typical,
        Threshold,
    )
}


def select_rule(
    rule: str | AcceptanceRule,
    law: ProposalLaw,
    *,
    do_sample: bool,
    can_draft: frozenset[ProposalLaw] | None = None,
) -> tuple[AcceptanceRule, ProposalLaw]:
    """The rule for a run and the law to draft under.

    `auto` takes the best rule for what the drafter does by itself. A rule asked for by name
    switches a drafter that chooses its candidates to the law it draws best with, if the drafter
    can. Greedy decoding always uses `greedy`: a sampling rule has nothing to sample there.

    Args:
        rule: a name, or a rule with settings of its own.
        law: what the drafter does by itself.
        do_sample: whether the run samples.
        can_draft: the laws that the drafter can draft under; `law` alone if left out.

    Raises:
        ValueError: no such rule, greedy asked for while sampling, or the rule is not lossless for
            what the drafter proposes; the message names the legal choices.
    """
    check_rule(rule)
    can_draft = can_draft or frozenset({law})
    if not do_sample:
        return Greedy(), CHOSEN if CHOSEN in can_draft else law
    if rule == "auto":
        return (SampleAndMatch() if law == CHOSEN else Traversal()), law
    chosen = RULES[rule]() if isinstance(rule, str) else rule
    if not chosen.samples:
        raise ValueError("rule: 'greedy' decodes greedily, got do_sample=True; use rule='auto'")
    if chosen.draws in can_draft and (law == CHOSEN or law not in chosen.legal_laws):
        return chosen, chosen.draws
    if law not in chosen.legal_laws:
        legal = [r.name for r in RULES.values() if r.samples and r.lossless and law in r.legal_laws]
        raise ValueError(
            f"rule: {chosen.name!r} is not lossless for {law.name.lower()} proposals, "
            f"use one of auto, {', '.join(legal)}"
        )
    return chosen, law


def check_rule(rule: object) -> None:
    """Raises ValueError unless `rule` is a name or an `AcceptanceRule`."""
    if not isinstance(rule, AcceptanceRule) and rule not in ("auto", *RULES):
        raise ValueError(
            f"rule: expected auto, {', '.join(RULES)} or an AcceptanceRule, got {rule!r}"
        )


def _match(trees: TreeBatch, choice: Tensor) -> Outcome:
    """Follows the tokens [R] that the target chose after each node, as far as they are there."""
    rows = _deepest(trees, trees.tokens == choice[_above(trees)])
    return Outcome(paths_to(trees, rows), choice[rows], (trees.children[rows] >= 0).any(1))


def _above(trees: TreeBatch) -> Tensor:
    """[R], the row of each node's parent; a root's own."""
    return trees.offsets[trees.tree] + trees.parents.clamp_min(0)


def _deepest(trees: TreeBatch, good: Tensor) -> Tensor:
    """[B], the first of the deepest rows that are `good` [R] with all their ancestors.

    Roots are, whatever `good` says of them.
    """
    above = _above(trees)
    good = good | (trees.parents < 0)
    for _ in range(trees.max_depth):
        good = good & good[above]
    count = len(trees.tokens)
    place = torch.arange(count, device=trees.device)
    key = torch.where(good, trees.depths * count + (count - 1 - place), -1)
    best = torch.full_like(trees.offsets, -1).scatter_reduce(0, trees.tree, key, "amax")
    return count - 1 - best % count
