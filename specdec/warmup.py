"""What only first calls pay for: kernels are compiled, steps and passes captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from specdec.console import err
from specdec.graphs import SHORTEST, reach
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
        # The longest first, so that nothing moves later: neither pages nor the texts of steps. Of
        # these there is one behind the token that comes with the prompt, in passes. The second call
        # captures a pass.
        passes = [(1, rows, 2) for rows in reversed(ROWS) for _ in range(2)]
        starts = _long_starts(longest, model.nodes)
        calls = [*((requests, start, NEW_TOKENS) for start in starts), *passes, *calls]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=err, disable=not progress, transient=True) as display:
        try:
            for call in display.track(calls, description="capturing"):
                _generate(model, *call)
        finally:
            target.graphs.forget_budgets()


def _long_starts(longest: int, nodes: int) -> list[int]:
    """Prompts behind which steps are captured anew, for texts of up to `longest` tokens.

    A step is captured for its text, what the steps before it may still add, and its tree.
    """
    last = max(1, longest - NEW_TOKENS)
    farthest = reach(longest + 3 * nodes)
    starts = []
    while farthest > SHORTEST:
        starts.append(max(1, min(farthest // 2 + 1 - nodes, last)))
        farthest //= 2
    # The longest first; what it has room for, the others have, too.
    return list(dict.fromkeys([last, *starts])) if starts else []


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
