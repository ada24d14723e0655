"""From a run's folder to what a report shows.

A run's folder holds `run.json` (what was compared, see `Run`) and `rows.jsonl` (a line for each
prompt under each configuration, see `Row`). Every number of the report is a ratio of sums over
rows; intervals come from resampling prompts, which are what a run has a sample of.

Needs scipy, which comes with the `eval` extra.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from specdec.eval.report.results import OVERALL, Arm, Estimate, Notice, Results
from specdec.stats import PHASES

RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 0
LEAST_PROMPTS = 5
"""For an interval: fewer have too few resamples that differ."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One prompt under one configuration, once: sums, as in `GenerationStats`."""

    arm: str
    prompt: str
    category: str
    tokens: int
    steps: int
    drafted: int
    accepted: int
    seconds: Mapping[str, float]
    """By phase; `total` is all of it, the prefill included."""
    repeat: int = 0
    reached: Mapping[str, int] = field(default_factory=dict)
    accepted_at: Mapping[str, int] = field(default_factory=dict)
    """Both by depth."""
    ranks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By place among siblings: how often tried, how often accepted."""
    classes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By token class: tokens emitted, and those that were accepted drafts."""

    @property
    def decoding(self) -> float:
        """Seconds without the prefill, which drafting does not change."""
        return self.seconds["total"] - self.seconds.get("prefill", 0.0)


@dataclass(frozen=True)
class Run:
    """What was compared.

    Args:
        title: of the page.
        arms: the configurations in the order to show them; of each its `name`, and where it has
            them `family` (what it is apart from the size of its tree) and `nodes`.
        baseline: the arm that speed-ups are relative to.
        baselines: further arms to relate the others to.
        synthetic: whether the rows were made up.
        lossless: by arm, whether its outputs passed the check; arms that are absent were not
            checked.
        missing: what a reader might expect and the run does not have.
        provenance: model, device, versions, seeds, commands.
    """

    title: str
    arms: Sequence[Mapping[str, Any]]
    baseline: str
    baselines: Sequence[str] = ()
    synthetic: bool = False
    lossless: Mapping[str, bool] = field(default_factory=dict)
    missing: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def load(folder: Path) -> tuple[Run, list[Row]]:
    """Reads a run's folder.

    Raises:
        ValueError: a file is not what it should be, or names an arm that the run does not have.
    """
    run: Run = _read(Run, folder / "run.json", (folder / "run.json").read_text(encoding="utf-8"))
    names = [arm["name"] for arm in run.arms]
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        row: Row = _read(Row, f"{folder / 'rows.jsonl'}:{number}", line)
        if row.arm not in names:
            raise ValueError(
                f"{folder / 'rows.jsonl'}:{number}: expected an arm of the run, "
                f"{', '.join(names)}, got {row.arm!r}"
            )
        rows.append(row)
    for name in (run.baseline, *run.baselines):
        if name not in names:
            raise ValueError(f"{folder / 'run.json'}: the baseline {name!r} is not among its arms")
    return run, rows


def _read(kind: Any, where: object, text: str) -> Any:
    """A dataclass from JSON; names it does not have are left to later versions."""
    try:
        data = json.loads(text)
        return kind(**{f.name: data[f.name] for f in fields(kind) if f.name in data})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def results(run: Run, rows: Sequence[Row]) -> Results:
    """Everything that a report shows of a run.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("rows.jsonl: expected at least one row, got none")
    by_arm = {arm["name"]: [row for row in rows if row.arm == arm["name"]] for arm in run.arms}
    arms = [_arm(run, about, by_arm) for about in run.arms if by_arm[about["name"]]]
    prompts = {row.prompt for row in rows}
    categories = {row.category for row in rows}
    return Results(
        lead=(
            f"{len(arms)} configurations over {len(prompts)} prompts in {len(categories)} "
            f"{'category' if len(categories) == 1 else 'categories'}."
        ),
        baseline=run.baseline,
        arms=arms,
        notices=_notices(run, rows, by_arm),
        provenance=[(name, str(value)) for name, value in run.provenance.items()],
    )


def _arm(run: Run, about: Mapping[str, Any], by_arm: Mapping[str, Sequence[Row]]) -> Arm:
    name, rows = about["name"], by_arm[about["name"]]

    def over(baseline: str) -> dict[str, Estimate]:
        if name in (run.baseline, baseline):
            return {}
        return _by_category(rows, _speed, by_arm[baseline])

    further = {each: over(each).get(OVERALL) for each in run.baselines}
    return Arm(
        name=name,
        family=about.get("family", name),
        nodes=about.get("nodes", 1),
        prompts=len({row.prompt for row in rows}),
        steps=sum(row.steps for row in rows),
        tokens=sum(row.tokens for row in rows),
        speedup=over(run.baseline),
        tokens_per_second=_by_category(rows, _speed),
        tokens_per_step=_by_category(rows, lambda row: (row.tokens, row.steps)),
        drafted=sum(row.drafted for row in rows),
        accepted=sum(row.accepted for row in rows),
        by_depth=_depths(rows),
        by_rank={int(rank): pair for rank, pair in _pairs(rows, "ranks").items()},
        by_class=_pairs(rows, "classes"),
        over={each: estimate for each, estimate in further.items() if estimate is not None},
        seconds=_seconds(rows),
    )


def _speed(row: Row) -> tuple[float, float]:
    return row.tokens, row.decoding


def _by_category(
    rows: Sequence[Row],
    parts: Callable[[Row], tuple[float, float]],
    baseline: Sequence[Row] = (),
) -> dict[str, Estimate]:
    """A ratio of sums, or its ratio to the baseline's on the same prompts."""
    top, bottom = _sums(rows, parts), _sums(baseline, parts)
    found = {}
    for category in (OVERALL, *dict.fromkeys(row.category for row in rows)):
        keys = [
            key for key in top if category in (OVERALL, key[0]) and (not baseline or key in bottom)
        ]
        samples = [np.array([top[key] for key in keys]).T]
        if baseline:
            samples.append(np.array([bottom[key] for key in keys]).T)
        if keys and all((sample.sum(1) > 0).all() for sample in samples):
            found[category] = _estimate(np.concatenate(samples))
    return found


def _sums(
    rows: Sequence[Row], parts: Callable[[Row], tuple[float, float]]
) -> dict[tuple[str, str], tuple[float, float]]:
    """By category and prompt, over repeated runs."""
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for row in rows:
        (a, b), (x, y) = sums.get((row.category, row.prompt), (0.0, 0.0)), parts(row)
        sums[row.category, row.prompt] = (a + x, b + y)
    return sums


def _estimate(sample: Array) -> Estimate:
    """From [2 or 4, prompts]: numerators and denominators, and those of the baseline."""
    value = float(_ratio(*sample))
    if sample.shape[1] < LEAST_PROMPTS:
        return Estimate(value)
    interval = bootstrap(
        tuple(sample),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def _ratio(*parts: Array, axis: int = -1) -> Any:
    sums = [part.sum(axis) for part in parts]
    ratio = sums[0] / sums[1]
    return ratio if len(sums) == 2 else ratio / (sums[2] / sums[3])


def _depths(rows: Sequence[Row]) -> dict[int, tuple[int, int]]:
    tried: Counter[int] = Counter()
    taken: Counter[int] = Counter()
    for row in rows:
        tried.update({int(depth): count for depth, count in row.reached.items()})
        taken.update({int(depth): count for depth, count in row.accepted_at.items()})
    return {depth: (tried[depth], taken[depth]) for depth in sorted(tried)}


def _pairs(rows: Sequence[Row], name: str) -> dict[str, tuple[int, int]]:
    sums: dict[str, tuple[int, int]] = {}
    for row in rows:
        for key, (whole, part) in getattr(row, name).items():
            a, b = sums.get(key, (0, 0))
            sums[key] = (a + whole, b + part)
    return sums


def _seconds(rows: Sequence[Row]) -> dict[str, float]:
    total = sum(row.seconds["total"] for row in rows)
    phases = {phase: sum(row.seconds.get(phase, 0.0) for row in rows) for phase in PHASES}
    return {**phases, "other": max(0.0, total - sum(phases.values()))}


def _notices(run: Run, rows: Sequence[Row], by_arm: Mapping[str, Sequence[Row]]) -> list[Notice]:
    notices = []
    if run.synthetic:
        notices.append(
            Notice("warn", "Synthetic: these numbers were made up to show the page. Nothing ran.")
        )
    notices.append(_verdict(run))
    repeats = 1 + max(row.repeat for row in rows)
    missing = [f"Missing: {each}" for each in run.missing]
    incomplete = [name for name, own in by_arm.items() if len(own) < len(by_arm[run.baseline])]
    if incomplete:
        missing.append(
            f"Missing: rows of {', '.join(incomplete)}. Speed-ups use the prompts that both have."
        )
    notices.append(
        Notice(
            "plain",
            "How to read the numbers",
            [
                "Every rate and speed-up is a ratio of sums over prompts, not a mean of ratios: "
                "long answers count for more.",
                f"Intervals: {CONFIDENCE:.0%}, percentile bootstrap over prompts, {RESAMPLES} "
                "resamples, paired with the baseline; none for fewer than "
                f"{LEAST_PROMPTS} prompts. They hold what prompts differ in, not what machines do; "
                f"{repeats} run{'s' if repeats > 1 else ''} of each prompt.",
                "Tokens per second leave out the prefill, which drafting does not change.",
                *missing,
            ],
        )
    )
    return notices


def _verdict(run: Run) -> Notice:
    others = [arm["name"] for arm in run.arms if arm["name"] not in (run.baseline, *run.baselines)]
    broken = [name for name in others if run.lossless.get(name) is False]
    unknown = [name for name in others if name not in run.lossless]
    if broken:
        return Notice("bad", f"Not lossless: the outputs of {', '.join(broken)} failed the check.")
    if unknown:
        return Notice("warn", f"Not checked for losslessness: {', '.join(unknown)}.")
    return Notice("good", "Lossless: the outputs of all configurations passed the check.")
