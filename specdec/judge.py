"""Judges scored trees: what the sampling options leave of each row, and what the rule keeps.

The definition is in torch: `Sampler` and the rules. On a CUDA device the common options and rules
run as kernels that read the logits once, in their own dtype, and never wait for the device; for the
same noise they decide the same, but for the rounding of sums. `in_torch` says when they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.batch import TreeBatch
from specdec.rules import (
    Block,
    Greedy,
    MultiRound,
    SampleAndMatch,
    TokenLevel,
    Traversal,
    WithoutReplacement,
)
from specdec.sampling import Sampler, Text
from specdec.verify import AcceptanceRule, Noise, Outcome

if TYPE_CHECKING:
    from specdec.kernels.walks import Decision, Forest

FROM_THE_ROOT = (MultiRound, TokenLevel, WithoutReplacement)
FROM_THE_LEAVES = (Traversal, Block)
MATCHING = (Greedy, SampleAndMatch)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Judgement:
    """What a rule decided for the trees of a lane, and from what."""

    outcome: Outcome
    scores: Tensor  # [R, V], after the sampling options; the logits if kernels judged
    logits: Tensor  # [R, V]
    healthy: Tensor  # [B] bool, every node of the path had a token to go on with

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and logits of some rows, float32."""
        return self.scores[rows].float(), self.logits[rows].float()


def in_torch(
    rule: AcceptanceRule, sampler: Sampler, trees: TreeBatch, logits: Tensor, *, keep: bool = False
) -> str | None:
    """Why torch judges such trees and not the kernels; None if the kernels do.

    Args:
        rule, sampler, trees: what is to be done.
        logits: [R, V].
        keep: whether processed scores are asked for.
    """
    if not logits.is_cuda:
        return f"the logits are on {logits.device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if logits.dtype not in DTYPES or logits.stride(-1) != 1:
        return f"the logits are {logits.dtype} with strides {logits.stride()}"
    if type(rule) not in (*MATCHING, *FROM_THE_ROOT, *FROM_THE_LEAVES):
        return f"the rule {rule.label!r} has no kernel"
    if keep and sampler.processors:
        return "scores are kept"
    if not rule.samples:
        return "processors change the logits" if sampler.processors else None
    if sampler.cuts is None:
        return "options other than temperature, top-k, top-p and min-p, or in another order"
    if not isinstance(rule, MATCHING) and trees.draft_probs is not None:
        if trees.draft_tokens is None:
            return "draft probabilities are as wide as the vocabulary"
        if trees.draft_tokens.shape[1] > 256:
            return f"drafts name {trees.draft_tokens.shape[1]} candidates, more than 256"
    return None


def judge(
    rule: AcceptanceRule,
    sampler: Sampler,
    logits: Tensor,
    trees: TreeBatch,
    texts: Sequence[Text],
    noise: Noise,
    *,
    keep: bool = False,
) -> Judgement:
    """Decides a lane's trees.

    Args:
        rule, sampler: how.
        logits: [R, V].
        trees: B trees of R nodes.
        texts: B texts that end with the roots.
        noise: the step's randomness.
        keep: whether the judgement's scores will be looked at.
    """
    if in_torch(rule, sampler, trees, logits, keep=keep) is None:
        return Judgement(*by_kernels(rule, sampler, logits, trees, noise))
    scores = sampler.scores(logits, trees, texts)
    target = sampler.probs(scores) if rule.samples else scores
    outcome = rule.verify(trees, target, noise)
    best = scores[trees.offsets[:, None] + outcome.paths.clamp_min(0)].amax(-1)
    # Greedy decoding may follow an infinite score; nothing can be drawn by one.
    healthy = (best.isfinite() if rule.samples else best > float("-inf")).all(1)
    return Judgement(outcome, scores, logits, healthy)


def by_kernels(
    rule: AcceptanceRule, sampler: Sampler, logits: Tensor, trees: TreeBatch, noise: Noise
) -> tuple[Outcome, Tensor, Tensor, Tensor]:
    """The fields of a `Judgement`, by kernels alone: nothing waits, nothing depends on values.

    A CUDA graph can hold it when all trees are of one size.
    """
    from specdec.kernels import scan, vocab, walks  # need Triton

    forest = _forest(trees)
    if not rule.samples:
        best, choices = scan.greatest(logits)
        decision = walks.match(forest, choices, best, sampled=False)
        return _fields(decision, logits)
    assert sampler.cuts is not None
    seeds, positions = noise.seeds, noise.next_positions
    if isinstance(rule, SampleAndMatch):
        rows = vocab.distributions(
            logits,
            sampler.cuts,
            seeds=seeds,
            positions=positions,
            tree=trees.tree,
            depths=forest.depths,
        )
        return _fields(walks.match(forest, rows.tokens, rows.best, sampled=True), logits)
    rows = vocab.distributions(logits, sampler.cuts)
    leaves = isinstance(rule, FROM_THE_LEAVES)
    return _fields(walks.reject(forest, rows, seeds, positions, leaves=leaves), logits)


def _fields(decision: Decision, logits: Tensor) -> tuple[Outcome, Tensor, Tensor, Tensor]:
    outcome = Outcome(decision.paths, decision.next_tokens, decision.continued)
    return outcome, logits, logits, decision.healthy


def _forest(trees: TreeBatch) -> Forest:
    """The trees as kernels read them: row behind row. Drafters may hand over views of any kind."""
    from specdec.kernels.walks import Forest  # needs Triton

    drawn = trees.draft_probs, trees.draft_tokens
    draft_probs, draft_tokens = (None if x is None else x.contiguous() for x in drawn)
    return Forest(
        trees.tokens.contiguous(),
        trees.parents.contiguous(),
        trees.depths.contiguous(),
        trees.ancestors.contiguous(),
        trees.offsets,
        trees.laws.contiguous(),
        draft_probs,
        draft_tokens,
        nodes=max(trees.sizes),
        longest=trees.max_depth + 1,
    )
