"""The page: one HTML file that needs nothing else, from the templates beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import specdec
from specdec.eval.trace import Trace

HERE = Path(__file__).parent


def render(title: str, traces: Mapping[str, Trace], report: Any = None) -> str:
    """HTML with styles, scripts and data inside.

    Args:
        title: its heading.
        traces: by the name to show; may be empty.
        report: results to show above them.

    Raises:
        ImportError: jinja2 or plotly is not installed.
        ValueError: there is nothing to show.
    """
    if report is None and not traces:
        raise ValueError("report: expected results or traces, got neither")
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from jinja2.utils import htmlsafe_json_dumps
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            "the report needs jinja2 and plotly: pip install 'specdec-toolkit[eval]'"
        ) from error
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined
    )

    def inline(name: str) -> Markup:
        return Markup((HERE / name).read_text(encoding="utf-8"))

    figures = {} if report is None else {part.id: part.figure for part in report.figures}
    sections = [] if report is None else report.sections
    return environment.get_template("page.html").render(
        title=title,
        version=specdec.__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        sections=[*sections, *([("traces", "Traces")] if traces else [])],
        report=report,
        style=inline("style.css"),
        page_script=inline("page.js"),
        trace_script=inline("trace.js"),
        trace_names=list(traces),
        traces=htmlsafe_json_dumps([t.to_dict() for t in traces.values()]) if traces else "",
        figures=htmlsafe_json_dumps(figures) if figures else "",
        plotly=Markup(get_plotlyjs()) if figures else "",
    )
