"""From rows to numbers: ratios of sums, with bootstrap intervals over prompts.

A metric is a ratio of two sums over rows, or for a speed-up a ratio of two such ratios, so long
answers weigh more than short ones, as they do on a bill; means of ratios of single prompts are made
nowhere. Its interval comes from drawing prompts with replacement (all repetitions of a prompt
together) and taking the 2.5th and 97.5th percentile of the ratio of sums: scipy's percentile
bootstrap. It says how far the number would move with other prompts of the same kind, and how much
the clock scatters between prompts; not what another machine would do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from specdec.eval.records import PHASES, Configuration, Row, Run, total

RESAMPLES = 2000
LEVEL = 0.95

K = TypeVar("K", int, str)
Prompt = tuple[str, str]
"""(suite, prompt id)."""


@dataclass(frozen=True)
class Metric:
    """A ratio of two sums over rows."""

    name: str
    label: str
    unit: str
    better: Literal["higher", "lower"]
    above: Callable[[Row], float]
    below: Callable[[Row], float]
    timed: bool
    """Whether it depends on the clock."""
    needs: Callable[[Row], bool] = lambda row: True
    """Rows without what it needs are left out."""
    against: bool = False
    """Whether it is divided by the same ratio of a baseline."""


def _drafts(row: Row) -> bool:
    return row.drafted is not None and row.accepted is not None


def _wasted(row: Row) -> float:
    return (row.drafted or 0) - (row.accepted or 0)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "tokens_per_step",
            "tokens per step",
            "tokens",
            "higher",
            lambda row: row.decode_tokens,
            lambda row: row.steps,
            timed=False,
        ),
        Metric(
            "speedup",
            "speed-up",
            "x",
            "higher",
            lambda row: row.decode_tokens,
            lambda row: row.decode_seconds,
            timed=True,
            against=True,
        ),
        Metric(
            "tokens_per_second",
            "tokens per second, decoding",
            "1/s",
            "higher",
            lambda row: row.decode_tokens,
            lambda row: row.decode_seconds,
            timed=True,
        ),
        Metric(
            "acceptance_rate",
            "accepted share of drafts",
            "",
            "higher",
            lambda row: row.accepted or 0,
            lambda row: row.drafted or 0,
            timed=False,
            needs=_drafts,
        ),
        Metric(
            "wasted_per_token",
            "wasted drafts per new token",
            "nodes",
            "lower",
            _wasted,
            lambda row: row.new_tokens,
            timed=False,
            needs=_drafts,
        ),
        Metric(
            "drafted_per_step",
            "drafts per step",
            "nodes",
            "lower",
            lambda row: row.drafted or 0,
            lambda row: row.steps,
            timed=False,
            needs=_drafts,
        ),
        Metric(
            "draft_ms_per_step",
            "drafting per step",
            "ms",
            "lower",
            lambda row: 1000 * row.seconds.get("draft", 0.0),
            lambda row: row.steps,
            timed=True,
            needs=_drafts,
        ),
        Metric(
            "step_ms",
            "time per step",
            "ms",
            "lower",
            lambda row: 1000 * row.decode_seconds,
            lambda row: row.steps,
            timed=True,
        ),
        Metric(
            "prefill_ms",
            "prefill per prompt",
            "ms",
            "lower",
            lambda row: 1000 * row.seconds.get("prefill", 0.0),
            lambda row: 1,
            timed=True,
        ),
    )
}
"""By name. `speedup` is against the plain loop unless another baseline is named."""


@dataclass(frozen=True)
class Measure:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float
    """Both NaN where there is no interval, as for a single prompt."""
    prompts: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def measure(metric: Metric, rows: Iterable[Row], baseline: Iterable[Row] = ()) -> Measure | None:
    """A metric over rows of one configuration; None if no row has what it needs.

    Args:
        metric: what to measure.
        rows: of one configuration; those with errors do not count.
        baseline: rows of the configuration to divide by, for metrics that are `against` one; only
            prompts and repetitions that both have count.
    """
    sums = sums_by_prompt(metric, rows, baseline)
    if not sums:
        return None
    table = np.array(list(sums.values())).T
    value = float(ratio(table))
    if not np.isfinite(value):
        return None
    low, high = interval(ratio, table)
    return Measure(value, low, high, table.shape[1])


def sums_by_prompt(
    metric: Metric, rows: Iterable[Row], baseline: Iterable[Row] = ()
) -> dict[Prompt, tuple[float, ...]]:
    """(above, below) of each prompt over its repetitions; behind them the baseline's, if asked."""
    good = [row for row in rows if row.error is None and metric.needs(row)]
    if not metric.against:
        pairs: list[tuple[Row, tuple[float, ...]]] = [
            (row, (metric.above(row), metric.below(row))) for row in good
        ]
    else:
        other = {_place(row): row for row in baseline if row.error is None}
        pairs = [
            (
                row,
                tuple(
                    f(r) for r in (row, other[_place(row)]) for f in (metric.above, metric.below)
                ),
            )
            for row in good
            if _place(row) in other
        ]
    sums: dict[Prompt, tuple[float, ...]] = {}
    for row, numbers in pairs:
        prompt = (row.suite, row.prompt)
        before = sums.get(prompt, (0.0,) * len(numbers))
        sums[prompt] = tuple(a + b for a, b in zip(before, numbers, strict=True))
    return sums


def _place(row: Row) -> tuple[str, str, int]:
    return (row.suite, row.prompt, row.repetition)


def ratio(table: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    """Ratio of sums: [2, ..., prompts] of (above, below), or [4, ...] with those of a baseline."""
    with np.errstate(divide="ignore", invalid="ignore"):
        sums = [part.sum(axis=axis) for part in table]
        value: NDArray[Any] = sums[0] / sums[1]
        return value if len(sums) == 2 else value / (sums[2] / sums[3])


def interval(
    statistic: Callable[[NDArray[Any], int], NDArray[Any]], table: NDArray[Any]
) -> tuple[float, float]:
    """The bootstrap interval of a statistic, drawing columns (prompts) with replacement.

    Args:
        statistic: of [k, ..., prompts] along an axis.
        table: [k, prompts].

    Returns:
        Both ends; NaN for fewer than two prompts, and where some draws leave nothing to divide by.
    """
    stats = scipy_stats()
    if table.shape[1] < 2:
        return (float("nan"), float("nan"))
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # then it is NaN
        found = stats.bootstrap(
            tuple(table),
            lambda *parts, axis: statistic(np.stack(parts), axis),
            paired=True,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return (float(found.low), float(found.high))


def scipy_stats() -> Any:
    """scipy's statistics, imported where they are first needed.

    Raises:
        ImportError: scipy is not installed; the message says how to install it.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            "intervals and tests need scipy: pip install 'specdec-toolkit[eval]'"
        ) from error
    return stats


@dataclass(frozen=True)
class Summary:
    """One configuration on the prompts of one category, or on all."""

    configuration: Configuration
    category: str | None
    """None for all prompts."""
    rows: tuple[Row, ...]
    measures: Mapping[str, Measure]
    """By name in `METRICS`; those that cannot be measured are absent."""
    speedups: Mapping[str, Measure]
    """By name of a baseline configuration: the plain loop of the same target and temperature, and
    those of transformers."""

    @property
    def acceptance_by_depth(self) -> dict[int, float]:
        """How often a child was accepted at each depth, given that its parent was."""
        return _shares(
            [row.accepted_by_depth for row in self.rows],
            [row.reached_by_depth for row in self.rows],
        )

    @property
    def acceptance_by_rank(self) -> dict[int, float]:
        """How often the child in each place was accepted, given that its parent was."""
        return _shares(
            [row.accepted_by_rank for row in self.rows],
            [row.offered_by_rank for row in self.rows],
        )

    @property
    def accepted_by_class(self) -> dict[str, float]:
        """The share of new tokens of each class that had been drafted."""
        return _shares(
            [row.accepted_by_class for row in self.rows],
            [row.emitted_by_class for row in self.rows],
        )

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase, and `host`: what no phase accounts for."""
        rows = [row for row in self.rows if row.error is None]
        named = [*PHASES, "total"]
        sums = {name: sum(row.seconds.get(name, 0.0) for row in rows) for name in named}
        whole = sums.pop("total")
        return {**sums, "host": max(0.0, whole - sum(sums.values()))}

    @property
    def lossless(self) -> dict[str, int]:
        """Rows by verdict: `equal`, `near-tie`, `different`, `not compared`, `error`."""
        found = dict.fromkeys(("equal", "near-tie", "different", "not compared", "error"), 0)
        for row in self.rows:
            found[verdict(row)] += 1
        return found


def verdict(row: Row) -> str:
    """What became of the comparison with the plain loop, in a word."""
    if row.error is not None:
        return "error"
    if row.lossless is None:
        return "not compared"
    return row.lossless.verdict


def _shares(above: Sequence[Mapping[K, int]], below: Sequence[Mapping[K, int]]) -> dict[K, float]:
    counts, all_ = total(above), total(below)
    return {key: counts.get(key, 0) / count for key, count in all_.items() if count}


def summarize(
    run: Run, rows: Sequence[Row], configuration: Configuration, category: str | None = None
) -> Summary:
    """A configuration on the prompts of a category, or on all, with every metric.

    Args:
        run: for its configurations.
        rows: of the run, all of them.
        configuration: one of the run's.
        category: one of the rows', or None.
    """

    def of(other: Configuration) -> list[Row]:
        return [
            row
            for row in rows
            if row.configuration == other.name and category in (None, row.category)
        ]

    own, plain = of(configuration), run.plain_of(configuration)
    measures = {name: measure(metric, own, of(plain)) for name, metric in METRICS.items()}
    baselines = [plain] + [
        other
        for other in run.configurations
        if other.is_transformers
        and (other.target, other.temperature) == (configuration.target, configuration.temperature)
    ]
    speedups = {
        other.name: measure(METRICS["speedup"], own, of(other))
        for other in baselines
        if other != configuration
    }
    return Summary(
        configuration,
        category,
        tuple(own),
        {name: found for name, found in measures.items() if found is not None},
        {name: found for name, found in speedups.items() if found is not None},
    )


def categories(rows: Iterable[Row]) -> list[str]:
    """Those of the rows, in the order in which they come."""
    return list(dict.fromkeys(row.category for row in rows))
