"""From logits to the distribution that a token is drawn from, and the draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SUPPORTED_PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)


@dataclass(frozen=True)
class Sampler:
    """The sampling options of a run: transformers' own processors, applied to tree nodes.

    Args:
        do_sample: False for greedy decoding.
        processors: in transformers' order; only those that look at nothing but the logits.

    Raises:
        NotImplementedError: a processor needs more than the logits; the message names it.
    """

    do_sample: bool = False
    processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        for processor in self.processors:
            if type(processor) not in SUPPORTED_PROCESSORS:
                raise NotImplementedError(
                    f"{type(processor).__name__} is not supported yet: the options that change the "
                    "distribution are temperature, top_k and top_p"
                )

    def probs(self, logits: Tensor) -> Tensor:
        """The distribution of the next token after each node.

        Args:
            logits: [R, V].

        Returns:
            [R, V] float32, rows sum to one.
        """
        scores = logits.float()
        for processor in self.processors:
            scores = processor(None, scores)
        return scores.softmax(-1)

    def draft_probs(self, logits: Tensor) -> Tensor:
        return self.probs(logits)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one token from each distribution by inverting its cumulative sum.

    The same uniform number and nearly the same distribution give the same token, except at the
    edge of a step.

    Args:
        probs: [..., V], not negative; need not sum to one.
        uniforms: [...] float64 in [0, 1).

    Returns:
        [...] int64, never a token of probability zero.
    """
    cumulative = probs.double().cumsum(-1)
    threshold = (uniforms * cumulative[..., -1])[..., None]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # The last token that has any probability: rounding must not carry a draw past it.
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous()).squeeze(-1)
    return torch.minimum(tokens, last)
