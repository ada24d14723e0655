"""Classifier-free guidance on trees (Sanchez et al., arXiv 2306.17806), as in transformers.

Every text has a second one beside it, which begins with the negative prompt instead of the prompt
and goes on with the same tokens. Its tree is the same below the root, so every node has both
distributions. The second texts live in the target's cache; their trees are scored in a pass of
their own, behind the one that scores the trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, UnbatchedClassifierFreeGuidanceLogitsProcessor

from specdec.batch import TreeBatch
from specdec.sampling import Histories, Sampler, TreeProcessor
from specdec.support import causal_model
from specdec.target import Target
from specdec.transfer import upload
from specdec.tree import MAX_NODES, TokenTree


@dataclass
class _Second:
    """The second text of a row, as far as it is cached."""

    sequence: int
    cached: int = 0


@dataclass(eq=False)
class Guidance(TreeProcessor):
    """Moves the log-probabilities of every node away from those behind the negative prompt.

    Args:
        scale: 1 changes nothing, more moves further.
        model: the model that scores the second texts; the target's own.
        negative: a negative prompt for each row of the batch; None for the last token of the
            prompt, as in transformers.
        width: tokens of a prompt, padding included: what follows in a text was emitted.
    """

    scale: float
    model: Any
    negative: Sequence[Sequence[int]] | None
    width: int
    target: Target | None = None
    _second: dict[int, _Second] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_transformers(
        cls, processor: UnbatchedClassifierFreeGuidanceLogitsProcessor, input_ids: Tensor
    ) -> Guidance:
        """The same guidance; transformers' own processor remembers one text, and trees have many.

        Args:
            processor: not used yet.
            input_ids: [B, L] the prompts that it goes with.

        Raises:
            ValueError: there are negative prompts for another number of rows, or an empty one.
        """
        context: dict[str, Any] = processor.unconditional_context
        ids, mask = context["input_ids"], context["attention_mask"]
        negative = None
        if ids is not None:
            rows = len(input_ids)
            if ids.ndim != 2 or len(ids) not in (1, rows):
                raise ValueError(
                    f"negative_prompt_ids: expected [1, L] or [{rows}, L], got {list(ids.shape)}"
                )
            seen = torch.ones_like(ids) if mask is None else mask
            negative = [line[keep != 0].tolist() for line, keep in zip(ids, seen, strict=True)]
            if not all(negative):
                raise ValueError("negative_prompt_ids: expected at least one token in every row")
            negative = negative * (rows // len(negative))
        return cls(processor.guidance_scale, processor.model, negative, input_ids.shape[1])

    def bound(self, target: Target) -> Guidance:
        """The same, ready to run.

        Raises:
            NotImplementedError: it is by another model than the target's.
        """
        if not isinstance(self.model, PreTrainedModel) or causal_model(self.model) is not (
            causal_model(target.model)
        ):
            raise NotImplementedError(
                "guidance by another model is not supported: pass guidance_scale to generate()"
            )
        return Guidance(self.scale, self.model, self.negative, self.width, target)

    def process_trees(self, scores: Tensor, histories: Histories) -> Tensor:
        scores = scores.log_softmax(-1)
        other = self._logits(histories).to(scores.device).float().log_softmax(-1)
        return self.scale * (scores - other) + other

    def end(self, row: int) -> None:
        second = self._second.pop(row, None)
        if second is not None and self.target is not None:
            self.target.cache.release(second.sequence)

    def _logits(self, histories: Histories) -> Tensor:
        """[R, V] behind the nodes of the same trees below the second texts."""
        assert self.target is not None, "guidance runs only when it is bound to a target"
        target, device = self.target, self.target.device
        tokens, parents = histories.tokens.tolist(), histories.parents
        members, missing, trees, start, row = [], [], [], 0, 0
        kept: list[int] = []
        for text, size in zip(histories.texts, histories.sizes, strict=True):
            if text.row not in self._second:
                self._second[text.row] = _Second(target.cache.admit())
            second = self._second[text.row]
            known = list(text.tokens)
            first = known[self.width - 1 : self.width]
            prompt = first if self.negative is None else list(self.negative[text.row])
            left = [*prompt, *known[self.width :]][second.cached :]
            # What is new goes on top of the tree, if there is room there.
            over = len(left) - 1 if len(left) + size > MAX_NODES else 0
            missing.append(upload(left[:over], device))
            left = left[over:]
            second.cached += over
            above = len(left) - 1
            below = parents[start + 1 : start + size]
            trees.append(
                TokenTree.from_lists(
                    [*left, *tokens[start + 1 : start + size]],
                    [*range(-1, above), *(parent + above for parent in below)],
                )
            )
            members.append(second)
            kept += range(row + above, row + above + size)
            start, row = start + size, row + above + size
        numbers = [second.sequence for second in members]
        target.prefill(numbers, missing)
        packed = TreeBatch.pack(trees, vocab_size=target.vocab_size, device=device)
        counts = [len(tree) - size + 1 for tree, size in zip(trees, histories.sizes, strict=True)]
        longest = max(counts)
        paths = [[*range(count), *[-1] * (longest - count)] for count in counts]
        with target.speculate(numbers, packed) as scored:
            logits = scored.logits
            scored.commit(upload(paths, device))
        scored.settle(counts)
        for second, count in zip(members, counts, strict=True):
            second.cached += count
        return logits[upload(kept, device)]


def bind(sampler: Sampler, target: Target) -> Sampler:
    """The sampler with its guidance, if it has any, ready to run; it is for one run then."""
    if not any(isinstance(p, Guidance) for p in sampler.processors):
        return sampler
    bound = [p.bound(target) if isinstance(p, Guidance) else p for p in sampler.processors]
    return replace(sampler, processors=tuple(bound))
