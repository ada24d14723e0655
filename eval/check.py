"""Thresholds for continuous integration: a run that falls below them fails.

    [[threshold]]
    metric = "tokens_per_step"    # any of specdec.eval.metrics.METRICS
    min = 1.5                     # or max
    configuration = "ngram 8"     # all but the baselines if left out
    category = "code"             # all prompts together if left out

Whatever the thresholds are, a row that differs from the plain loop where it must not, or that ended
with an error, fails the run too.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.eval.metrics import METRICS, categories, summarize, verdict
from specdec.eval.records import Row, Run


@dataclass(frozen=True)
class Threshold:
    """A bound for one metric."""

    metric: str
    min: float | None = None
    max: float | None = None
    configuration: str | None = None
    category: str | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {self.metric!r}")
        if self.min is None and self.max is None:
            raise ValueError(f"threshold for {self.metric}: expected min or max, got neither")


def load_thresholds(file: Path) -> list[Threshold]:
    """Those of a TOML file.

    Raises:
        ValueError: it cannot be read, or sets nothing, or something unknown.
    """
    try:
        data: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        items = data.pop("threshold", [])
        if data or not items:
            raise ValueError(f"expected [[threshold]] tables only, got {sorted(data) or 'none'}")
        return [Threshold(**item) for item in items]
    except (OSError, tomllib.TOMLDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"--check: {file}: {error}") from None


def failures(run: Run, rows: Sequence[Row], thresholds: Sequence[Threshold]) -> list[str]:
    """What a run fails, a sentence each.

    Raises:
        ValueError: a threshold is about a configuration or category that the run does not have.
    """
    found = []
    names = [c.name for c in run.configurations]
    for threshold in thresholds:
        if threshold.configuration not in (None, *names):
            raise ValueError(
                f"--check: the run has {', '.join(names)}, not {threshold.configuration!r}"
            )
        if threshold.category not in (None, *categories(rows)):
            raise ValueError(
                f"--check: the run has {', '.join(categories(rows))}, not {threshold.category!r}"
            )
        for configuration in run.configurations:
            if threshold.configuration is None:
                if configuration.is_plain or configuration.is_transformers:
                    continue
            elif configuration.name != threshold.configuration:
                continue
            summary = summarize(run, rows, configuration, threshold.category)
            where = f"{configuration.name}, {threshold.category or 'all prompts'}"
            measured = summary.measures.get(threshold.metric)
            if measured is None:
                found.append(f"{where}: {threshold.metric} could not be measured")
            elif threshold.min is not None and measured.value < threshold.min:
                found.append(
                    f"{where}: {threshold.metric} is {measured}, expected at least {threshold.min}"
                )
            elif threshold.max is not None and measured.value > threshold.max:
                found.append(
                    f"{where}: {threshold.metric} is {measured}, expected at most {threshold.max}"
                )
    ours = {c.name for c in run.configurations if not c.is_transformers}
    for row in rows:
        if row.error is not None:
            found.append(f"{row.configuration}, prompt {row.prompt}: {row.error}")
        elif row.configuration in ours and verdict(row) == "different":
            assert row.lossless is not None
            found.append(
                f"{row.configuration}, prompt {row.prompt}: differs from the plain loop at new "
                f"token {row.lossless.first_difference}"
            )
    return found
