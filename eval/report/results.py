"""What a report shows: one `Arm` for each configuration, and what is to be said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

OVERALL = "overall"


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval, where one is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Arm:
    """One configuration over all prompts.

    Estimates are given by category, and for `OVERALL`; each is a ratio of sums.
    """

    name: str
    family: str
    """What it is apart from the size of its tree: a line of the plot over sizes."""
    nodes: int
    """Largest tree, its root included: 1 for plain decoding."""
    prompts: int
    steps: int
    tokens: int
    speedup: Mapping[str, Estimate]
    """Tokens per second over those of the baseline; empty for the baseline itself."""
    tokens_per_second: Mapping[str, Estimate]
    tokens_per_step: Mapping[str, Estimate]
    drafted: int
    accepted: int
    by_depth: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """How often a node with children was reached above each depth, and one of them accepted."""
    by_rank: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """The same by place among siblings, 1 for the first: how often it was there to be tried."""
    by_class: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Tokens of each class in the text, and how many of them were accepted drafts."""
    over: Mapping[str, Estimate] = field(default_factory=dict)
    """Overall speed-up over further baselines, by their names."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase, and the rest as `host`."""

    @property
    def wasted(self) -> float | None:
        """Share of the drafted nodes that were not accepted."""
        return 1 - self.accepted / self.drafted if self.drafted else None

    @property
    def draft_cost(self) -> float | None:
        """Time to draft over time of the target's passes; None where captured steps hold both."""
        forward = self.seconds.get("forward", 0.0)
        if self.seconds.get("captured"):
            return None
        return self.seconds.get("draft", 0.0) / forward if forward else None


@dataclass(frozen=True)
class Notice:
    """Something a reader must know before the numbers."""

    kind: Literal["good", "warn", "bad", "plain"]
    text: str
    points: Sequence[str] = ()


@dataclass(frozen=True)
class Results:
    """Everything that a report shows but traces.

    Args:
        lead: in a sentence, what was compared.
        baseline: what speed-ups are relative to.
        arms: in the order to show them.
        notices: verdicts, methods, and what is missing.
        provenance: what ran, where and when: name and value.
    """

    lead: str
    baseline: str
    arms: Sequence[Arm]
    notices: Sequence[Notice]
    provenance: Sequence[tuple[str, str]]

    @property
    def categories(self) -> list[str]:
        """In the order met, without `OVERALL`."""
        found = dict.fromkeys(name for arm in self.arms for name in arm.tokens_per_step)
        return [name for name in found if name != OVERALL]
