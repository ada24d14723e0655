"""`specdec eval compare`: what changed between two runs beyond noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from specdec.eval.metrics import METRICS, Measure, Metric, measure_table, sums_by_prompt
from specdec.eval.records import Row, Run

COMPARED = ("tokens_per_step", "acceptance_rate", "speedup", "tokens_per_second")
Side = tuple[Run, Sequence[Row]]


@dataclass(frozen=True)
class Change:
    """A metric of one configuration in two runs."""

    configuration: str
    metric: Metric
    before: float
    after: float
    ratio: Measure
    """After over before, on the prompts that both have."""

    @property
    def significant(self) -> bool:
        """Whether the interval of the ratio leaves out 1."""
        return not self.ratio.low <= 1 <= self.ratio.high

    @property
    def verdict(self) -> str:
        if np.isnan(self.ratio.low):
            return "too few prompts"
        if not self.significant:
            return "no difference"
        return "better" if (self.ratio.value > 1) == (self.metric.better == "higher") else "worse"


def changes(a: Side, b: Side, names: Sequence[tuple[str, str]] = ()) -> list[Change]:
    """What became of each metric from run `a` to run `b`.

    Args:
        a: the run to compare with.
        b: the run that is compared.
        names: pairs of configurations, one of each run; by default those of equal names.

    Raises:
        ValueError: there is no such configuration, or the two have nothing in common.
    """
    known = [[c.name for c in run.configurations] for run, _ in (a, b)]
    names = names or [(name, name) for name in known[0] if name in known[1]]
    for pair in names:
        for name, have in zip(pair, known, strict=True):
            if name not in have:
                raise ValueError(f"expected one of {', '.join(have)}, got {name!r}")
    found = list(_changes(a, b, names))
    if not found:
        raise ValueError("the two runs have no configuration with a common prompt")
    return found


def _changes(a: Side, b: Side, names: Sequence[tuple[str, str]]) -> Iterator[Change]:
    for before, after in names:
        for name in COMPARED:
            tables = [_sums(METRICS[name], side, own) for side, own in ((a, before), (b, after))]
            common = [prompt for prompt in tables[0] if prompt in tables[1]]
            if not common:
                continue
            old, new = (np.array([table[p] for p in common]).T for table in tables)
            sides = [measure_table(table) for table in (old, new)]
            ratio = measure_table(np.concatenate([new, old]))
            if all(np.isfinite(m.value) for m in (*sides, ratio)):
                label = before if before == after else f"{before} -> {after}"
                yield Change(label, METRICS[name], sides[0].value, sides[1].value, ratio)


def _sums(metric: Metric, side: Side, name: str) -> dict[tuple[str, str], tuple[float, ...]]:
    run, rows = side
    configuration = run.configuration(name)
    plain = run.plain_of(configuration).name
    if metric.against and name == plain:
        return {}
    own = [row for row in rows if row.configuration == name]
    return sums_by_prompt(metric, own, [row for row in rows if row.configuration == plain])


def changes_table(found: Sequence[Change]) -> Table:
    """On the terminal."""
    table = Table("configuration", "metric", "before", "after", "ratio", "prompts", "verdict")
    for change in found:
        color = {"better": "green", "worse": "bold red"}.get(change.verdict, "dim")
        low, high = change.ratio.low, change.ratio.high
        interval = "" if np.isnan(low) else f" ({low:.3f} to {high:.3f})"
        table.add_row(
            change.configuration,
            change.metric.label,
            f"{change.before:.4g}",
            f"{change.after:.4g}",
            f"{change.ratio.value:.3f}{interval}",
            str(change.ratio.prompts),
            f"[{color}]{change.verdict}[/]",
        )
    return table
