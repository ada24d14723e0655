"""The tables of a report, once for HTML, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from specdec.eval.report.results import OVERALL, Arm, Estimate, Results
from specdec.stats import PHASES

ABSENT = "-"


@dataclass(frozen=True)
class Column:
    """A heading, and whether the column holds words rather than numbers."""

    label: str
    words: bool = False


@dataclass(frozen=True)
class Cell:
    """What is read, what is sorted by and written to CSV, and the interval beside it."""

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        """As it is read; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"{_digits(self.low)} to {_digits(self.high)}"


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first column names the row."""

    id: str
    section: str
    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    folded: bool = True
    """Whether the page shows it on demand: where a plot shows the same."""

    def markdown(self) -> str:
        """As a GitHub table, intervals in brackets."""
        lines = [
            "| " + " | ".join(column.label for column in self.columns) + " |",
            "|" + "|".join(" --- " if c.words else " ---: " for c in self.columns) + "|",
        ]
        for row in self.rows:
            cells = [
                cell.text.replace("|", "\\|") + (f" ({cell.interval})" if cell.interval else "")
                for cell in row
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Full precision; columns with intervals are followed by their ends."""
        ranged = [
            any(row[index].low is not None for row in self.rows)
            for index in range(len(self.columns))
        ]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        heads: list[str] = []
        for column, has_ends in zip(self.columns, ranged, strict=True):
            heads += [column.label]
            heads += [f"{column.label} low", f"{column.label} high"] if has_ends else []
        writer.writerow(heads)
        for row in self.rows:
            line: list[object] = []
            for column, cell, has_ends in zip(self.columns, row, ranged, strict=True):
                line += [cell.text if column.words else _blank(cell.value)]
                line += [_blank(cell.low), _blank(cell.high)] if has_ends else []
            writer.writerow(line)
        return out.getvalue()


def tables(results: Results) -> list[Table]:
    """All tables that there are numbers for."""
    made = [
        _configurations(results),
        _categories(results),
        _depths(results),
        _ranks(results),
        _classes(results),
    ]
    return [table for table in [*made, _time(results)] if table.rows]


def _configurations(results: Results) -> Table:
    others = list(dict.fromkeys(name for arm in results.arms for name in arm.over))
    heads = [
        "Speed-up",
        *(f"over {name}" for name in others),
        *("Tokens/s", "Tokens per step", "Wasted", "Draft cost"),
        *("Nodes", "Prompts", "Tokens", "Steps"),
    ]
    rows = [
        [
            Cell(arm.name),
            _estimate(arm.speedup.get(OVERALL)),
            *(_estimate(arm.over.get(name)) for name in others),
            _estimate(arm.tokens_per_second.get(OVERALL)),
            _estimate(arm.tokens_per_step.get(OVERALL)),
            _share(arm.wasted),
            _share(arm.draft_cost),
            *(_count(n) for n in (arm.nodes, arm.prompts, arm.tokens, arm.steps)),
        ]
        for arm in results.arms
    ]
    note = (
        f"Overall, as ratios of sums over all prompts. Speed-up: tokens per second over those of "
        f"{results.baseline}. Wasted: share of drafted nodes not accepted. Draft cost: time to "
        "draft over time of the target's passes, where steps are not captured as a whole."
    )
    columns = _columns("Configuration", heads)
    return Table("configurations", "speed", "Configurations", note, columns, rows, folded=False)


def _categories(results: Results) -> Table:
    rows = [
        [
            Cell(category),
            Cell(arm.name),
            _estimate(arm.speedup.get(category)),
            _estimate(arm.tokens_per_second.get(category)),
            _estimate(arm.tokens_per_step.get(category)),
        ]
        for category in results.categories
        for arm in results.arms
        if category in arm.tokens_per_step
    ]
    columns = [
        Column("Category", words=True),
        Column("Configuration", words=True),
        *(Column(label) for label in ("Speed-up", "Tokens/s", "Tokens per step")),
    ]
    note = f"Each a ratio of sums over the prompts of its category; relative to {results.baseline}."
    return Table("categories", "speed", "By category", note, columns, rows)


def _depths(results: Results) -> Table:
    rows = _acceptance((arm.name, arm.by_depth) for arm in results.arms)
    note = "How often a draft was accepted, given that its parent was and had children."
    columns = _columns("Configuration", ["Depth", "Accepted", "Tried", "Times accepted"])
    return Table("depths", "acceptance", "Acceptance by depth", note, columns, rows)


def _ranks(results: Results) -> Table:
    rows = _acceptance((arm.name, arm.by_rank) for arm in results.arms)
    note = (
        "How often the first, second, ... child of an accepted node was the one that was accepted, "
        "where there was one."
    )
    columns = _columns("Configuration", ["Rank", "Accepted", "Tried", "Times accepted"])
    return Table("ranks", "acceptance", "Acceptance by rank", note, columns, rows)


def _acceptance(
    found: Iterable[tuple[str, Mapping[int, tuple[int, int]]]],
) -> list[Sequence[Cell]]:
    return [
        [Cell(name), _count(place), _share(hits / tries), _count(tries), _count(hits)]
        for name, counts in found
        for place, (tries, hits) in sorted(counts.items())
        if tries
    ]


def _classes(results: Results) -> Table:
    names = list(dict.fromkeys(name for arm in results.arms for name in arm.by_class))
    rows = [
        [Cell(arm.name), *(_part(arm.by_class.get(name, (0, 0))) for name in names)]
        for arm in results.arms
        if arm.drafted and arm.by_class
    ]
    note = "Share of the emitted tokens of each class that were accepted drafts."
    columns = _columns("Configuration", [name.capitalize() for name in names])
    return Table("classes", "acceptance", "By token class", note, columns, rows, folded=False)


def _time(results: Results) -> Table:
    phases = phases_of(results.arms)
    rows = [
        [Cell(arm.name), *(_number(ms) for ms in (*each.values(), sum(each.values())))]
        for arm in results.arms
        if (each := milliseconds_per_token(arm, phases))
    ]
    note = "Milliseconds per emitted token. `host` is what no phase covers."
    columns = _columns("Configuration", [*phases, "all"])
    return Table("time", "time", "Where time goes", note, columns, rows)


def phases_of(arms: Sequence[Arm]) -> list[str]:
    """The phases that any arm spent time in, in the order of a step."""
    return [
        name for name in (*PHASES, "host") if any(arm.seconds.get(name, 0.0) > 0 for arm in arms)
    ]


def milliseconds_per_token(arm: Arm, phases: Sequence[str]) -> Mapping[str, float]:
    """By phase; empty where nothing was timed."""
    if not arm.tokens or not arm.seconds:
        return {}
    return {phase: 1000 * arm.seconds.get(phase, 0.0) / arm.tokens for phase in phases}


def _columns(first: str, others: Sequence[str]) -> list[Column]:
    return [Column(first, words=True), *(Column(label) for label in others)]


def _estimate(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return Cell(ABSENT)
    return Cell(_digits(estimate.value), estimate.value, estimate.low, estimate.high)


def _number(value: float) -> Cell:
    return Cell(_digits(value), value)


def _share(value: float | None) -> Cell:
    return Cell(ABSENT) if value is None else Cell(f"{value:.1%}", value)


def _part(counts: tuple[int, int]) -> Cell:
    whole, hits = counts
    return _share(hits / whole if whole else None)


def _count(value: int) -> Cell:
    return Cell(f"{value:,}".replace(",", " "), value)


def _digits(value: float) -> str:
    """Three significant digits, and no exponent."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _blank(value: float | None) -> object:
    return "" if value is None else value
