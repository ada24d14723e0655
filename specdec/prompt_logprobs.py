"""Log-probabilities of the tokens of prompts, as vLLM's `prompt_logprobs` reports them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.transfer import upload

ROWS = 64
"""Rows of logits that are in float32 at once."""


@dataclass(frozen=True)
class PromptLogprobs:
    """What the model thinks of each token of a batch of prompts, given those before it.

    Before temperature, penalties and any other option. Where there is nothing - padding, and the
    first token, which nothing comes before - log-probabilities are NaN, ranks and tokens -1.
    """

    logprobs: Tensor  # [B, L] float32, of the prompt's own token
    ranks: Tensor  # [B, L] int64, 1 for the likeliest token
    top_logprobs: Tensor  # [B, L, k] float32, of the likeliest tokens, in order
    top_tokens: Tensor  # [B, L, k] int64


@dataclass(eq=False)
class PromptScores:
    """Collects them for one prompt, piece by piece as it is prefilled.

    Args:
        length: tokens of the prompt.
        top: k, how many of the likeliest tokens to report beside the prompt's own.
    """

    length: int
    top: int
    _parts: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, start: int, tokens: Sequence[int], logits: Tensor) -> None:
        """Takes a piece; the host does not wait.

        Args:
            start: place of its first token in the text.
            tokens: the text; may go on behind the prompt.
            logits: [n, V] behind each token of the piece.
        """
        count = min(len(logits), self.length - 1 - start)
        for first in range(0, count, ROWS):
            rows = logits[first : min(first + ROWS, count)].float().log_softmax(-1)
            place = start + first + 1
            following = upload(list(tokens[place : place + len(rows)]), rows.device)
            own = rows.gather(1, following[:, None])
            rank = (rows > own).sum(1) + 1
            top = rows.topk(self.top, 1)
            self._parts.append((place, own[:, 0], rank, top.values, top.indices))

    def fill(self, out: PromptLogprobs, row: int) -> None:
        """Writes a prompt's part, which ends at the right edge, into that of a batch."""
        edge = out.logprobs.shape[1] - self.length
        for place, *values in self._parts:
            here = slice(edge + place, edge + place + len(values[0]))
            names = ("logprobs", "ranks", "top_logprobs", "top_tokens")
            for name, value in zip(names, values, strict=True):
                whole: Tensor = getattr(out, name)
                whole[row, here] = value.to(whole.device)


def gathered(scores: Sequence[PromptScores], width: int, device: torch.device) -> PromptLogprobs:
    """Those of a batch of prompts, padded on the left to `width` tokens."""
    size, top = (len(scores), width), max(score.top for score in scores)

    def blank(*shape: int, value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    out = PromptLogprobs(
        blank(*size, value=torch.nan, dtype=torch.float32),
        blank(*size, value=-1, dtype=torch.int64),
        blank(*size, top, value=torch.nan, dtype=torch.float32),
        blank(*size, top, value=-1, dtype=torch.int64),
    )
    for row, score in enumerate(scores):
        score.fill(out, row)
    return out
