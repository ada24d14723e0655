"""From logits to the distribution that a token is drawn from, and the draw.

Letters: R rows (nodes of all trees), B trees, V vocabulary, L tokens of a text, G rows of a group.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.logits_process import ExponentialDecayLengthPenalty, TopHLogitsWarper

from specdec.batch import TreeBatch
from specdec.kernels.options import Cuts
from specdec.transfer import upload

OF_LOGITS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TopHLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    SuppressTokensLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
)
"""They look at nothing but logits: all nodes at once, for drafts too."""

CAPTURABLE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""Those of them that never ask the device for a number."""

OF_TEXT = (
    RepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    NoBadWordsLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    ExponentialDecayLengthPenalty,
    SuppressTokensAtBeginLogitsProcessor,
)
"""They look at the text as well, row by row: all nodes with texts of one length at once."""

REFUSED = {
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "it remembers one text; use guidance_scale",
    SynthIDTextWatermarkLogitsProcessor: "it remembers its last call, and trees have many",
}


@dataclass(frozen=True)
class Text:
    """What processors see of one sequence: as in transformers, the padding comes first."""

    tokens: Sequence[int]
    row: int
    """Of the batch that was passed to `generate`, for processors with settings for each."""


class TreeProcessor(LogitsProcessor):
    """A processor that answers for all nodes of a batch of trees at once."""

    @abstractmethod
    def process_trees(self, scores: Tensor, histories: Histories) -> Tensor:
        """[R, V] float32 scores behind each node to the same, processed."""

    def end(self, row: int) -> None:
        """The request of a row stops running, finished or not; it may come back."""


@dataclass(frozen=True)
class Sampler:
    """The sampling options of a run: transformers' own processors, applied to tree nodes.

    Every node is processed with the text that leads to it: its sequence's tokens and its own path.

    Args:
        do_sample: False for greedy decoding.
        processors: in transformers' order. One that is not transformers' own is called for every
            node by itself; it must answer by its arguments alone, not by what it was asked before.
        rows: rows of the batch passed to `generate`. A processor that is not transformers' own is
            handed as many, all of them the node's, so that it may have a setting for each row.

    Raises:
        NotImplementedError: a processor cannot work on trees; the message names it.
    """

    do_sample: bool = False
    processors: Sequence[LogitsProcessor] = ()
    rows: int = 1

    def __post_init__(self) -> None:
        for processor in self.processors:
            reason = REFUSED.get(type(processor))
            if reason is not None:
                raise NotImplementedError(f"{type(processor).__name__} is not supported: {reason}")

    @cached_property
    def cuts(self) -> Cuts | None:
        """The options as the kernels know them; None if there are others, or in another order."""
        found: dict[type, LogitsProcessor] = {type(p): p for p in self.processors}
        kinds = [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper]
        if [type(p) for p in self.processors] != [kind for kind in kinds if kind in found]:
            return None
        if any(
            getattr(p, "filter_value", -math.inf) != -math.inf
            or getattr(p, "min_tokens_to_keep", 1) != 1
            for p in self.processors
        ):
            return None
        names = ("temperature", "top_k", "top_p", "min_p")
        return Cuts(
            **{
                name: getattr(found[kind], name)
                for name, kind in zip(names, kinds, strict=True)
                if kind in found
            }
        )

    @cached_property
    def _of_logits(self) -> tuple[LogitsProcessor, ...]:
        return tuple(p for p in self.processors if type(p) in OF_LOGITS)

    @property
    def capturable(self) -> bool:
        """Whether the options can be part of a CUDA graph."""
        return all(type(processor) in CAPTURABLE for processor in self.processors)

    @cached_property
    def settings(self) -> Hashable:
        """Equal for samplers that do the same, if they are `capturable`."""
        return self.do_sample, tuple(
            (
                type(p),
                tuple((k, v if isinstance(v, int | float) else id(v)) for k, v in vars(p).items()),
            )
            for p in self.processors
        )

    def node_scores(self, logits: Tensor) -> Tensor:
        """What `scores` gives where all options look at nothing but logits."""
        if not self.processors:
            return logits
        scores = logits.float()
        for processor in self.processors:
            scores = processor(None, scores)
        return scores

    def scores(self, logits: Tensor, trees: TreeBatch, texts: Sequence[Text]) -> Tensor:
        """Processed logits after each node, the `scores` of transformers.

        Args:
            logits: [R, V].
            trees: B trees.
            texts: B texts that end with the roots.

        Returns:
            [R, V] float32; the logits themselves, untouched, when there is nothing to process.
        """
        if not self.processors:
            return logits
        scores = logits.float()
        histories = Histories(trees, texts)
        for processor in self.processors:
            if type(processor) in OF_LOGITS:
                scores = processor(None, scores)
            elif type(processor) in OF_TEXT:
                scores = _by_length(processor, scores, histories)
            else:
                scores = self._by_node(processor, scores, histories)
        return scores

    def _by_node(self, processor: LogitsProcessor, scores: Tensor, histories: Histories) -> Tensor:
        if isinstance(processor, TreeProcessor):
            return processor.process_trees(scores, histories)
        texts = {
            row: text
            for rows, ids in histories.by_length
            for row, text in zip(rows.tolist(), ids, strict=True)
        }
        processed, forbidden = scores.clone(), set()
        for row, above in enumerate(histories.above):
            # A text that cannot occur may be one that the processor has no answer for.
            if above >= 0 and (
                above in forbidden or processed[above, texts[row][-1]] == float("-inf")
            ):
                forbidden.add(row)
                continue
            place, text = histories.row_of[row], texts[row]
            if isinstance(processor, PrefixConstrainedLogitsProcessor):
                processed[row] = _allowed(processor, place, text, scores[row])
            else:
                many = scores[row].expand(self.rows, -1).clone()
                processed[row] = processor(text.expand(self.rows, -1), many)[place]
        return processed

    def end(self, row: int) -> None:
        """Tells processors that keep something for a request that it stops running."""
        for processor in self.processors:
            if isinstance(processor, TreeProcessor):
                processor.end(row)

    def probs(self, scores: Tensor) -> Tensor:
        """[R, V] float32 distributions of the next tokens; rows sum to one."""
        return scores.float().softmax(-1)

    def draft_probs(self, logits: Tensor) -> Tensor:
        """What a draft model draws from: the options that look at logits alone, applied to its own.

        Any draft will do; what depends on the text is left to the target.
        """
        scores = logits.float()
        for processor in self._of_logits:
            scores = processor(None, scores)
        return scores.softmax(-1)


class Histories:
    """The text that leads to each node of a batch, the node included."""

    def __init__(self, trees: TreeBatch, texts: Sequence[Text]) -> None:
        self.texts = texts
        self.sizes = trees.sizes
        self.parents = trees.known_parents
        self.tokens = trees.tokens
        self._trees = [tree for tree, size in enumerate(trees.sizes) for _ in range(size)]

    @cached_property
    def row_of(self) -> list[int]:
        """For each of R rows, the row of the batch passed to `generate`."""
        return [self.texts[tree].row for tree in self._trees]

    @cached_property
    def above(self) -> list[int]:
        """For each of R rows, the row of its parent, -1 for a root."""
        starts = [row for row, parent in enumerate(self.parents) if parent < 0]
        return [
            starts[tree] + parent if parent >= 0 else -1
            for tree, parent in zip(self._trees, self.parents, strict=True)
        ]

    @cached_property
    def by_length(self) -> list[tuple[Tensor, Tensor]]:
        """Groups of nodes whose texts are equally long: rows [G] and their texts [G, L]."""
        return list(self._by_length())

    def _by_length(self) -> Iterator[tuple[Tensor, Tensor]]:
        groups: dict[int, list[tuple[int, int, list[int]]]] = defaultdict(list)
        start = 0
        for tree, size in enumerate(self.sizes):
            paths: list[list[int]] = []
            for node, parent in enumerate(self.parents[start : start + size]):
                paths.append([*paths[parent], start + node] if node else [])
                length = len(self.texts[tree].tokens) + len(paths[node])
                groups[length].append((start + node, tree, paths[node]))
            start += size
        device = self.tokens.device
        known = [upload(list(text.tokens), device) for text in self.texts]
        for group in groups.values():
            ids = [torch.cat([known[tree], self.tokens[path]]) for _, tree, path in group]
            yield upload([row for row, _, _ in group], device), torch.stack(ids)


def _by_length(processor: LogitsProcessor, scores: Tensor, histories: Histories) -> Tensor:
    out = torch.empty_like(scores)
    for rows, ids in histories.by_length:
        out[rows] = _for_rows(processor, histories, rows)(ids, scores[rows])
    return out


def _for_rows(processor: LogitsProcessor, histories: Histories, rows: Tensor) -> LogitsProcessor:
    """The processor with its settings for each row of the batch spread over nodes."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor):
        return processor
    spread: Any = copy.copy(processor)
    places = [histories.row_of[row] for row in rows.tolist()]
    spread.prompt_ignore_length = ignored[places]
    return spread  # type: ignore[no-any-return]


def _allowed(
    processor: PrefixConstrainedLogitsProcessor, place: int, text: Tensor, scores: Tensor
) -> Tensor:
    """One node under `prefix_allowed_tokens_fn`, which is told the number of its prompt."""
    ask = processor._prefix_allowed_tokens_fn
    group = place // processor._num_beams
    one = PrefixConstrainedLogitsProcessor(lambda _, sent: ask(group, sent), 1)
    out: Tensor = one(text[None], scores[None])[0]
    return out


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one token from each distribution by inverting its cumulative sum.

    The same uniform number and nearly the same distribution give the same token, except at the
    edge of a step.

    Args:
        probs: [..., V], not negative; need not sum to one.
        uniforms: [...] float64 in [0, 1).

    Returns:
        [...] int64, never a token of probability zero; any token where the probabilities are not
        numbers or all zero.
    """
    cumulative = probs.double().cumsum(-1)
    threshold = (uniforms * cumulative[..., -1])[..., None]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # The last token that has any probability: rounding must not carry a draw past it.
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous()).squeeze(-1)
    return torch.minimum(tokens, last).clamp_max(probs.shape[-1] - 1)
