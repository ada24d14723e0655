"""One prompt with and without speculation, side by side, in the same loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import specdec
from specdec.generation import SpeculativeOutput
from specdec.stats import GenerationStats


@dataclass(frozen=True)
class Comparison:
    """The same call plainly and with drafts."""

    plain: GenerationStats
    drafted: GenerationStats
    plain_tokens: Tensor  # [1, L + answer]
    drafted_tokens: Tensor  # [1, L + answer]

    @property
    def same_tokens(self) -> bool:
        return torch.equal(self.plain_tokens, self.drafted_tokens)

    @property
    def speedup(self) -> float:
        """Tokens per second with drafts over tokens per second without."""
        return self.drafted.tokens_per_second / self.plain.tokens_per_second

    def to_dict(self) -> dict[str, object]:
        """Plain numbers for JSON."""
        return {
            "same_tokens": self.same_tokens,
            "speedup": self.speedup,
            "plain": self.plain.to_dict(),
            "drafted": self.drafted.to_dict(),
        }

    def __rich__(self) -> Table:
        table = Table(title=f"speed-up {self.speedup:.2f}")
        for heading in ("", "plain", "with trees"):
            table.add_column(heading)
        plain, drafted = self.plain, self.drafted
        table.add_row("tokens", str(plain.tokens), str(drafted.tokens))
        table.add_row("steps", str(plain.steps), str(drafted.steps))
        table.add_row(
            "tokens per step", f"{plain.tokens_per_step:.2f}", f"{drafted.tokens_per_step:.2f}"
        )
        table.add_row(
            "tokens/s", f"{plain.tokens_per_second:.1f}", f"{drafted.tokens_per_second:.1f}"
        )
        table.add_row("drafted, accepted", "", f"{drafted.drafted}, {drafted.accepted}")
        by_depth = "  ".join(f"{d}: {a:.2f}" for d, a in drafted.acceptance_by_depth.items())
        table.add_row("acceptance by depth", "", by_depth)
        same = "yes" if self.same_tokens else "no"
        table.add_row("same tokens", "", same)
        return table


def compare(wrapped: specdec.SpeculativeModel, **options: Any) -> Comparison:
    """Runs one call with no drafts and again with the wrapped model's own.

    Both compute the whole prompt: nothing is reused, not even from the first passes.

    Args:
        wrapped: the model; its drafter, rule and node budget make the second run.
        options: those of `generate`, for one prompt. Sampled runs have equal tokens only under
            `rule="sample-and-match"` with a `seed`.
    """
    reuses, wrapped.prefix_cache = wrapped.prefix_cache, False
    try:
        return _compare(wrapped, options)
    finally:
        wrapped.prefix_cache = reuses


def _compare(wrapped: specdec.SpeculativeModel, options: dict[str, Any]) -> Comparison:
    baseline = wrapped.without_drafts()
    options = {**options, "return_dict_in_generate": True}
    for model in (baseline, wrapped):  # neither arm pays for the first pass of a process
        model.generate(**{**options, "max_new_tokens": 1})
    plain, drafted = baseline.generate(**options), wrapped.generate(**options)
    assert isinstance(plain, SpeculativeOutput)
    assert isinstance(drafted, SpeculativeOutput)
    assert plain.stats is not None
    assert drafted.stats is not None
    return Comparison(plain.stats, drafted.stats, plain.sequences, drafted.sequences)
