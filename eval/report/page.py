"""The page: one HTML file that needs nothing else, from the templates beside this file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

import specdec
from specdec.eval.report.results import Notice, Results
from specdec.eval.report.tables import Table, tables
from specdec.eval.trace import Trace

if TYPE_CHECKING:
    from specdec.eval.report.figures import Figure

HERE = Path(__file__).parent
SECTIONS = {
    "speed": "Speed",
    "acceptance": "Acceptance",
    "trees": "Trees",
    "time": "Time",
    "provenance": "Provenance",
}


@dataclass(frozen=True)
class _View:
    """Results as the templates ask for them."""

    results: Results

    @property
    def lead(self) -> str:
        return self.results.lead

    @property
    def notices(self) -> Sequence[Notice]:
        return self.results.notices

    @property
    def provenance(self) -> Sequence[tuple[str, str]]:
        return self.results.provenance

    @cached_property
    def figures(self) -> list[Figure]:
        try:
            from specdec.eval.report.figures import figures
        except ImportError as error:
            raise ImportError("plots need plotly: pip install 'specdec-toolkit[eval]'") from error
        return figures(self.results)

    @cached_property
    def tables(self) -> list[Table]:
        return tables(self.results)

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Those that have something to show."""
        filled = {part.section for part in self.figures} | {part.section for part in self.tables}
        filled.add("provenance")
        return [(id, name) for id, name in SECTIONS.items() if id in filled]

    def figures_of(self, section: str) -> list[Figure]:
        return [part for part in self.figures if part.section == section]

    def tables_of(self, section: str) -> list[Table]:
        return [part for part in self.tables if part.section == section]


def render(title: str, results: Results | None, traces: Mapping[str, Trace]) -> str:
    """HTML with styles, scripts and data inside.

    Args:
        title: its heading.
        results: to show first; None for traces alone.
        traces: by the name to show; may be empty.

    Raises:
        ImportError: there are results, and plotly is not installed.
        ValueError: there is nothing to show.
    """
    if results is None and not traces:
        raise ValueError("report: expected results or traces, got neither")
    view = None if results is None else _View(results)
    drawn = {part.id: part.figure for part in view.figures} if view else {}
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined
    )

    def inline(name: str) -> Markup:
        return Markup((HERE / name).read_text(encoding="utf-8"))

    return environment.get_template("page.html").render(
        title=title,
        version=specdec.__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sections=[
            *(view.sections if view else []),
            *([("traces", "Traces")] if traces else []),
        ],
        report=view,
        style=inline("style.css"),
        page_script=inline("page.js"),
        trace_script=inline("trace.js"),
        trace_names=list(traces),
        traces=htmlsafe_json_dumps([t.to_dict() for t in traces.values()]) if traces else "",
        figures=htmlsafe_json_dumps(drawn) if drawn else "",
        plotly=_plotly() if drawn else "",
    )


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def markdown(title: str, results: Results) -> str:
    """The same without pictures: notices, tables, provenance."""
    lines = [f"# {title}", "", results.lead, ""]
    for notice in results.notices:
        mark = {"warn": "**Note:** ", "bad": "**Warning:** "}.get(notice.kind, "")
        lines += [f"> {mark}{notice.text}", *(f"> * {point}" for point in notice.points), ""]
    for table in tables(results):
        lines += [f"## {table.title}", "", table.note, "", table.markdown()]
    lines += ["## Provenance", ""]
    lines += [f"* {name}: {value}" for name, value in results.provenance]
    return "\n".join(lines) + "\n"
