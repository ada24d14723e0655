"""The sampling options that kernels know; needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Cuts:
    """The options that look at one row of logits, applied in this order as transformers does.

    Args:
        temperature: above 0.
        top_k: tokens kept; 0 for all.
        top_p: share kept of what `top_k` left, 1 for all of it.
        min_p: least probability, as a share of the likeliest token's; 0 for any.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def scale(self) -> float:
        """What a difference of logits is multiplied by before 2 is raised to it."""
        return LOG2E / self.temperature

    @property
    def any(self) -> bool:
        """Whether tokens are cut at all."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0
