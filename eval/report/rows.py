"""From the rows of a run to what a report shows: its metrics, by configuration and category.

Needs scipy, which comes with the `eval` extra.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specdec.eval.metrics import (
    LEVEL,
    RESAMPLES,
    Measure,
    Summary,
    categories,
    summarize,
    verdict,
)
from specdec.eval.records import Configuration, Row, Run, total
from specdec.eval.report.results import OVERALL, Arm, Estimate, Notice, Results

LEAST_PROMPTS = 5
"""For an interval: fewer have too few resamples that differ."""


def results(run: Run, rows: Sequence[Row]) -> Results:
    """Everything that a report shows of a run.

    Raises:
        ValueError: there are no rows without an error.
    """
    good = [row for row in rows if row.error is None]
    if not good:
        raise ValueError("rows.jsonl: expected at least one row without an error, got none")
    by_name = {
        c.name: own
        for c in run.configurations
        if (own := [row for row in good if row.configuration == c.name])
    }
    shown = [c for c in run.configurations if c.name in by_name]
    prompts = {(row.suite, row.prompt) for row in good}
    suites = list(dict.fromkeys(row.suite for row in good))
    several = len({(c.target, c.temperature) for c in shown}) > 1
    return Results(
        lead=(
            f"{len(shown)} configurations of {' and '.join(dict.fromkeys(c.target for c in shown))}"
            f" over {len(prompts)} prompts of {', '.join(suites)}."
        ),
        baseline="plain decoding in the same loop"
        + (" at the same temperature of the same target" if several else ""),
        arms=[_arm(run, good, configuration) for configuration in shown],
        notices=_notices(run, rows, by_name),
        provenance=_provenance(run),
    )


def _arm(run: Run, rows: Sequence[Row], own: Configuration) -> Arm:
    whole = summarize(run, rows, own)
    by_category: dict[str, Summary] = {OVERALL: whole}
    for category in categories(whole.rows):
        by_category[category] = summarize(run, rows, own, category)

    def of(name: str) -> dict[str, Estimate]:
        return {
            category: _estimate(summary.measures[name])
            for category, summary in by_category.items()
            if name in summary.measures
        }

    plain = run.plain_of(own).name
    seconds = dict(whole.seconds)
    if own.is_transformers:  # it has no phases: its time is all of the target's
        seconds = {"prefill": seconds["prefill"], "forward": seconds["host"]}
    return Arm(
        name=own.name,
        family=_family(run, own),
        nodes=own.nodes or 1,
        prompts=len({(row.suite, row.prompt) for row in whole.rows}),
        steps=sum(row.steps for row in whole.rows),
        tokens=sum(row.new_tokens for row in whole.rows),
        speedup={} if own.name == plain else of("speedup"),
        tokens_per_second=of("tokens_per_second"),
        tokens_per_step=of("tokens_per_step"),
        drafted=sum(row.drafted or 0 for row in whole.rows),
        accepted=sum(row.accepted or 0 for row in whole.rows),
        by_depth=_pairs(whole.rows, "reached_by_depth", "accepted_by_depth"),
        by_rank={
            rank + 1: pair
            for rank, pair in _pairs(whole.rows, "offered_by_rank", "accepted_by_rank").items()
        },
        by_class=_pairs(whole.rows, "emitted_by_class", "accepted_by_class"),
        over={
            name: _estimate(measure) for name, measure in whole.speedups.items() if name != plain
        },
        seconds=seconds,
    )


def _estimate(measure: Measure) -> Estimate:
    if measure.prompts < LEAST_PROMPTS:
        return Estimate(measure.value)
    return Estimate(measure.value, measure.low, measure.high)


def _pairs(rows: Sequence[Row], whole: str, part: str) -> dict[Any, tuple[int, int]]:
    all_, some = (total([getattr(row, name) for row in rows]) for name in (whole, part))
    return {key: (count, some.get(key, 0)) for key, count in all_.items()}


def _family(run: Run, own: Configuration) -> str:
    """What a configuration is apart from the size of its tree."""
    words = [own.drafter]
    if own.tree is not None and own.tree.startswith("chain"):
        words.append("chain")
    for name in ("target", "rule", "temperature"):
        if len({getattr(c, name) for c in run.configurations if not c.is_transformers}) > 1:
            words.append(f"{name} {getattr(own, name)}")
    return ", ".join(words)


def _notices(run: Run, rows: Sequence[Row], by_name: Mapping[str, Sequence[Row]]) -> list[Notice]:
    notices = []
    if run.provenance.get("synthetic"):
        notices.append(
            Notice("warn", "Synthetic: these numbers were made up to show the page. Nothing ran.")
        )
    notices.append(_verdict(run, by_name))
    repeats = 1 + max(row.repetition for row in rows)
    notices.append(
        Notice(
            "plain",
            "How to read the numbers",
            [
                "Every rate and speed-up is a ratio of sums over prompts, not a mean of ratios: "
                "long answers count for more.",
                f"Intervals: {LEVEL:.0%}, percentile bootstrap over prompts, {RESAMPLES} "
                "resamples, paired with the baseline; none for fewer than "
                f"{LEAST_PROMPTS} prompts. They hold what prompts differ in, not what machines do; "
                f"{repeats} run{'s' if repeats > 1 else ''} of each prompt.",
                "Tokens per second leave out the prefill, which drafting does not change.",
                *_missing(run, rows, by_name),
            ],
        )
    )
    return notices


def _missing(run: Run, rows: Sequence[Row], by_name: Mapping[str, Sequence[Row]]) -> list[str]:
    """What a reader might expect and the run does not have."""
    missing = []
    if not any(c.is_transformers for c in run.configurations):
        missing.append("Missing: baselines of transformers. Speed-ups are over our own loop.")
    prompts = sum(int(suite["prompts"]) for suite in run.suites)
    wanted = prompts * int(run.settings["repetitions"]) * len(run.configurations)
    if len(rows) < wanted:
        missing.append(
            f"Unfinished: {len(rows)} of {wanted} rows. `specdec eval --out DIR` goes on with it."
        )
    absent = [c.name for c in run.configurations if c.name not in by_name]
    if absent:
        missing.append(f"Missing: all rows of {', '.join(absent)}.")
    fewer = [
        name
        for name, own in by_name.items()
        if len(own) < len(by_name.get(run.plain_of(run.configuration(name)).name, ()))
    ]
    if fewer:
        missing.append(
            f"Missing: some rows of {', '.join(fewer)}. Speed-ups use the prompts that both have."
        )
    failed = [row for row in rows if row.error is not None]
    if failed:
        names = dict.fromkeys(row.configuration for row in failed)
        missing.append(
            f"Failed: {len(failed)} generations, of {', '.join(names)}; the first said "
            f"{failed[0].error!r}. They are in no number."
        )
    return missing


def _verdict(run: Run, by_name: Mapping[str, Sequence[Row]]) -> Notice:
    """Whether the tokens are those of plain decoding."""
    ours = [
        c.name
        for c in run.configurations
        if c.name in by_name and not c.is_plain and not c.is_transformers
    ]
    found = {name: [verdict(row) for row in by_name[name]] for name in ours}
    words = [word for each in found.values() for word in each]
    ties = words.count("near-tie")
    points = [f"{ties} differ where the two best logits are so close that rounding decides."]
    points = points if ties else []
    broken = {name: each.count("different") for name, each in found.items() if "different" in each}
    if broken:
        told = ", ".join(f"{count} of {name}" for name, count in broken.items())
        text = f"Not lossless: outputs differ from plain decoding ({told})."
        return Notice("bad", text, points)
    unchecked = [name for name, each in found.items() if "not compared" in each]
    if unchecked or not ours:
        text = f"Not compared with plain decoding token by token: {', '.join(unchecked) or 'all'}."
        return Notice("warn", text, points)
    of = "up to rounding" if ties else "token for token"
    text = f"Lossless: all {len(words)} outputs are those of plain decoding, {of}."
    return Notice("good", text, points)


def _provenance(run: Run) -> list[tuple[str, str]]:
    suites = [f"{suite['name']} ({suite.get('prompts', '?')} prompts)" for suite in run.suites]
    facts = {"created": run.created, "suites": ", ".join(suites), **_flat(run.settings)}
    facts |= _flat(run.provenance)
    if run.resumed:
        facts["resumed"] = f"{len(run.resumed)} times"
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _flat(given: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested names joined by points."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = value
    return flat
