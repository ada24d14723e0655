"""What only first calls pay for: kernels are compiled, steps and passes captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from specdec.captured import SHORTEST
from specdec.console import err
from specdec.passes import ROWS

if TYPE_CHECKING:
    from specdec.wrap import SpeculativeModel

NEW_TOKENS = 48
"""Enough for a step with trees of every size to be compiled, captured and timed."""


def warm_up(model: SpeculativeModel, *, requests: int, longest: int, progress: bool) -> None:
    """See `SpeculativeModel.warm_up`."""
    target = model._driven()
    calls = [(requests, ROWS[0], NEW_TOKENS)]
    if target.uncaptured is None:
        # The longest first, so that nothing moves later: neither pages nor the texts of steps, of
        # which there is one behind the token that comes with the prompt. The second call captures.
        passes = [(1, rows, 2) for rows in reversed(ROWS) for _ in range(2)]
        calls = [*_long_calls(requests, longest), *passes, *calls]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=err, disable=not progress, transient=True) as display:
        for call in display.track(calls, description="capturing"):
            _generate(model, *call)
    target.graphs.forget_budgets()


def _long_calls(requests: int, longest: int) -> list[tuple[int, int, int]]:
    """A call for each length of prefix that steps are captured for anew, up to `longest`."""
    if longest <= SHORTEST:
        return []
    starts = [longest - NEW_TOKENS]
    reach = 1 << (longest - 1).bit_length()  # of the steps for the longest
    while reach > 2 * SHORTEST:
        reach //= 2
        starts.append(reach // 2 + 1)
    return [(requests, start, NEW_TOKENS) for start in starts]


def _generate(model: SpeculativeModel, requests: int, rows: int, new: int) -> None:
    """A call whose prompts have that many tokens each."""
    # Tokens that repeat themselves, so that drafters have something to draft.
    ids = torch.arange(rows, device=model.cache.device).remainder(7).expand(requests, -1)
    kept, model.prefix_cache = model.prefix_cache, False  # of no use to anybody later
    try:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    finally:
        model.prefix_cache = kept
