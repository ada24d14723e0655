"""`specdec eval report`: a run as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.console import out, readable_errors
from specdec.eval.report import write_report


def report(
    folder: Annotated[Path, typer.Argument(help="Of a run, or one with traces/ in it.")],
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
) -> None:
    """Writes a run as report.html, one file that works offline, and as Markdown and CSV."""
    with readable_errors():
        for file in write_report(folder, title):
            out.print(str(file), markup=False, highlight=False)
