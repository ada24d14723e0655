"""A run on the terminal; the page has more."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from specdec.eval.metrics import Measure, summarize
from specdec.eval.records import Row, Run

SHOWN = ("speedup", "tokens_per_second", "tokens_per_step", "acceptance_rate")


def summary_table(run: Run, rows: Sequence[Row]) -> Table:
    """The main metrics of each configuration over all prompts, with 95 % intervals."""
    table = Table("configuration", "speed-up", "tokens/s", "tokens per step", "accepted", "output")
    for configuration in run.configurations:
        summary = summarize(run, rows, configuration)
        verdicts = [f"{count} {name}" for name, count in summary.lossless.items() if count]
        cells = [_cell(summary.measures.get(name)) for name in SHOWN]
        table.add_row(configuration.name, *cells, ", ".join(verdicts))
    return table


def _cell(measure: Measure | None) -> str:
    if measure is None:
        return "-"
    if measure.low != measure.low:  # of too few prompts
        return f"{measure.value:.3g}"
    return f"{measure.value:.3g} ({measure.low:.3g} to {measure.high:.3g})"
