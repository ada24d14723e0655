"""Thresholds for continuous integration: a run fails when a metric falls below one.

    ["ngram 8"]
    tokens_per_step = 1.2
    acceptance_rate = 0.1
    lossless = true

A table for each configuration, by name; keys are metrics of `specdec.eval.metrics`, and `lossless`.
For metrics where less is better, the value is the most that passes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec.eval.metrics import METRICS, summarize
from specdec.eval.records import Row, Run

Thresholds = Mapping[str, Mapping[str, float | bool]]
LOSSLESS = "lossless"


@dataclass(frozen=True)
class Verdict:
    """One threshold and what the run has."""

    configuration: str
    metric: str
    wanted: float | bool
    found: str
    passed: bool

    def __rich__(self) -> str:
        word = "[green]passed[/]" if self.passed else "[bold red]failed[/]"
        return f"{word}  {self.configuration}: {self.metric} {self.found}, expected {self.wanted}"


def load_thresholds(file: Path) -> Thresholds:
    """What a file asks for.

    Raises:
        ValueError: it cannot be read, or names something that is not a metric.
    """
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--check: {file}: {error}") from None
    if not data:
        raise ValueError(f"--check: {file}: expected a table for at least one configuration")
    for name, wanted in data.items():
        if not isinstance(wanted, dict) or not wanted:
            raise ValueError(f"--check: {file}: expected a table of thresholds for {name!r}")
        for metric, value in wanted.items():
            kinds = (bool,) if metric == LOSSLESS else (int, float)
            if metric not in (LOSSLESS, *METRICS) or type(value) not in kinds:
                raise ValueError(
                    f"--check: {file}: {name}: expected lossless = true or a number for one of "
                    f"{', '.join(METRICS)}, got {metric} = {value!r}"
                )
    return data


def check(run: Run, rows: Sequence[Row], thresholds: Thresholds) -> list[Verdict]:
    """Every threshold against the run; what could not be measured fails.

    Raises:
        ValueError: a configuration is not in the run.
    """
    names = [c.name for c in run.configurations]
    verdicts = []
    for name, wanted in thresholds.items():
        if name not in names:
            raise ValueError(f"--check: expected one of {', '.join(names)}, got {name!r}")
        summary = summarize(run, rows, run.configuration(name))
        for metric, value in wanted.items():
            if metric == LOSSLESS:
                counts = summary.lossless
                good = counts["equal"] + counts["near-tie"]
                passed = not value or (good == len(summary.rows) > 0)
                found = f"for {good} of {len(summary.rows)} outputs"
            else:
                measured = summary.measures.get(metric)
                found = "not measured" if measured is None else f"{measured}"
                higher = METRICS[metric].better == "higher"
                passed = measured is not None and (
                    measured.value >= value if higher else measured.value <= value
                )
            verdicts.append(Verdict(name, metric, value, found, passed))
    return verdicts
