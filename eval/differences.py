"""What changed between two runs beyond noise, metric by metric and category by category.

Only prompts that both runs have are compared, each with itself. Whether a difference is more than
noise is a paired permutation test: if nothing had changed, the two results of a prompt could be
exchanged (scipy, all exchanges where there are few prompts, 9999 of them otherwise). Many tests
find something by chance, so p-values are adjusted for their number (Benjamini and Hochberg 1995):
those over all prompts together, and those of single categories together.

Speed is compared as the speed-up over the plain loop of the same run. Tokens per second are shown
without a verdict: two runs may have had different machines, and always had different hours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from specdec.eval.metrics import (
    LEVEL,
    METRICS,
    Metric,
    categories,
    interval,
    ratio,
    scipy_stats,
    sums_by_prompt,
)
from specdec.eval.records import Configuration, Row, RunFolder

JUDGED = ("tokens_per_step", "acceptance_rate", "wasted_per_token", "speedup")
SHOWN = ("tokens_per_second",)
ALPHA = 1 - LEVEL
EXCHANGES = 9999


@dataclass(frozen=True)
class Difference:
    """One metric of one configuration on one category, in both runs."""

    configuration: str
    category: str | None
    """None for all prompts."""
    metric: str
    before: float
    after: float
    low: float
    """Of the relative change, `after / before - 1`: its 95 % bootstrap interval over prompts."""
    high: float
    prompts: int
    p_value: float | None
    """Of the permutation test, adjusted; None where no verdict is given."""

    @property
    def change(self) -> float:
        return self.after / self.before - 1 if self.before else float("nan")

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `no difference`, or `` where none is given."""
        if self.p_value is None:
            return ""
        if self.p_value >= ALPHA:
            return "no difference"
        risen = self.after > self.before
        return "better" if risen == (METRICS[self.metric].better == "higher") else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "change": self.change, "verdict": self.verdict}


def differences(before: RunFolder, after: RunFolder) -> list[Difference]:
    """All metrics of all configurations that both runs have by name.

    Raises:
        ValueError: they have no configuration or no prompt in common.
    """
    runs, rows = [f.run() for f in (before, after)], [f.rows() for f in (before, after)]
    names = [c.name for c in runs[0].configurations]
    common = [c for c in runs[1].configurations if c.name in names]
    if not common:
        raise ValueError(
            f"{before.path} and {after.path} have no configuration in common: {', '.join(names)} "
            f"and {', '.join(c.name for c in runs[1].configurations)}"
        )
    shared = {(r.suite, r.prompt) for r in rows[0]} & {(r.suite, r.prompt) for r in rows[1]}
    if not shared:
        raise ValueError(f"{before.path} and {after.path} have no prompt in common")
    sides = [[row for row in side if (row.suite, row.prompt) in shared] for side in rows]
    found: list[Difference] = []
    for category in (None, *categories(sides[0])):
        group = [
            difference
            for configuration in common
            for name in (*(() if configuration.is_plain else JUDGED), *SHOWN)
            if (
                difference := _difference(
                    METRICS[name],
                    [runs[0].configuration(configuration.name), configuration],
                    [run.plain_of(run.configuration(configuration.name)) for run in runs],
                    sides,
                    category,
                )
            )
        ]
        found += group
    overall = [d for d in found if d.category is None]
    return [*_adjusted(overall), *_adjusted([d for d in found if d.category is not None])]


def _difference(
    metric: Metric,
    own: Sequence[Configuration],
    plain: Sequence[Configuration],
    sides: Sequence[Sequence[Row]],
    category: str | None,
) -> Difference | None:
    sums = [
        sums_by_prompt(metric, _of(rows, configuration, category), _of(rows, baseline, category))
        for rows, configuration, baseline in zip(sides, own, plain, strict=True)
    ]
    prompts = [prompt for prompt in sums[0] if prompt in sums[1]]
    if not prompts:
        return None
    tables = [np.array([side[prompt] for prompt in prompts]).T for side in sums]
    before, after = (float(ratio(table)) for table in tables)
    if not (np.isfinite(before) and np.isfinite(after)) or before == after == 0:
        return None  # nothing was drafted, or nothing accepted
    low, high = interval(_change, np.concatenate(tables))
    p_value = _p_value(*tables) if metric.name in JUDGED and len(prompts) > 1 else None
    return Difference(
        own[0].name, category, metric.name, before, after, low, high, len(prompts), p_value
    )


def _of(rows: Sequence[Row], configuration: Configuration, category: str | None) -> list[Row]:
    return [
        row
        for row in rows
        if row.configuration == configuration.name and category in (None, row.category)
    ]


def _p_value(before: NDArray[Any], after: NDArray[Any]) -> float:
    both = np.concatenate([before, after], axis=1)
    count = before.shape[1]

    def change(left: NDArray[Any], right: NDArray[Any], axis: int) -> NDArray[Any]:
        with np.errstate(divide="ignore", invalid="ignore"):
            moved: NDArray[Any] = np.nan_to_num(
                ratio(both[:, right], axis) - ratio(both[:, left], axis)
            )
            return moved

    test = scipy_stats().permutation_test(
        (np.arange(count), count + np.arange(count)),
        change,
        permutation_type="samples",
        vectorized=True,
        n_resamples=EXCHANGES,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def _change(both: NDArray[Any], axis: int) -> NDArray[Any]:
    """Relative, of the ratio of sums: the first half of the parts is before, the second after."""
    before, after = np.split(both, 2)
    moved: NDArray[Any] = ratio(after, axis) / ratio(before, axis) - 1
    return moved


def _adjusted(found: Sequence[Difference]) -> list[Difference]:
    tested = [d for d in found if d.p_value is not None]
    if not tested:
        return list(found)
    values = scipy_stats().false_discovery_control([d.p_value for d in tested])
    new = {id(d): float(value) for d, value in zip(tested, values, strict=True)}
    return [replace(d, p_value=new[id(d)]) if id(d) in new else d for d in found]


def difference_table(found: Sequence[Difference]) -> Table:
    """What changed, and overall figures in any case."""
    table = Table("configuration", "category", "metric", "before", "after", "change", "verdict")
    for d in found:
        if d.category is None or d.verdict in ("better", "worse"):
            style = {"better": "green", "worse": "red"}.get(d.verdict, "")
            table.add_row(
                d.configuration,
                d.category or "all",
                METRICS[d.metric].label,
                f"{d.before:.3g}",
                f"{d.after:.3g}",
                "" if math.isnan(d.change) else f"{d.change:+.1%} [{d.low:+.1%}, {d.high:+.1%}]",
                f"[{style}]{d.verdict}[/]" if style else d.verdict,
            )
    return table
