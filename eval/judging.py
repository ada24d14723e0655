"""Are the tokens of a run those of the plain loop; how likely are they under the target?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.eval.records import Lossless

NEAR_TIE = 1e-4
"""Float32 logits this close may be ordered by rounding: passes over other numbers of rows add in
another order. In narrower types the bound grows with the spacing of their numbers."""


def judge(model: Any, prompt: Tensor, got: Sequence[int], plain: Sequence[int]) -> Lossless:
    """Compares greedy tokens with those of the plain loop.

    Args:
        model: the target, to look at its two best logits where tokens first differ.
        prompt: [1, L] token ids.
        got: new tokens.
        plain: those of the plain loop.
    """
    place = first_difference(got, plain)
    if place is None:
        return Lossless(equal=True)
    text = torch.tensor([plain[:place]], dtype=prompt.dtype, device=prompt.device)
    with torch.no_grad():
        logits = model(torch.cat([prompt, text], dim=1), logits_to_keep=1).logits[0, -1]
    top = logits.float().topk(2).values
    gap = float(top[0] - top[1])
    rounding = 4 * torch.finfo(model.dtype).eps * float(top[0].abs())
    return Lossless(
        equal=False, first_difference=place, gap=gap, near_tie=gap < max(NEAR_TIE, rounding)
    )


def first_difference(got: Sequence[int], plain: Sequence[int]) -> int | None:
    """The first place where they differ, or where one ends; None if they are equal."""
    for place, (one, other) in enumerate(zip(got, plain, strict=False)):
        if one != other:
            return place
    return None if len(got) == len(plain) else min(len(got), len(plain))


@torch.no_grad()
def log_likelihood(model: Any, prompt: Tensor, tokens: Sequence[int], temperature: float) -> float:
    """Of new tokens under the target at a temperature, in one pass over prompt and tokens."""
    answer = torch.tensor([tokens], device=prompt.device)
    text = torch.cat([prompt, answer], dim=1)
    logits = model(text, logits_to_keep=len(tokens) + 1).logits[0, :-1].float() / temperature
    return float(logits.log_softmax(-1).gather(1, answer.T).sum())
