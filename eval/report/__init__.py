"""A page, Markdown and CSV of a run: from its rows and traces to tables and plots."""

from __future__ import annotations

from pathlib import Path

from specdec.eval.records import RunFolder
from specdec.eval.report.page import markdown, render
from specdec.eval.report.rows import results
from specdec.eval.report.tables import tables
from specdec.eval.trace import Trace


def write_report(folder: Path, title: str | None = None) -> list[Path]:
    """Writes `report.html`, `report.md` and `report-*.csv` into a run's folder.

    Args:
        folder: holds `run.json` and `rows.jsonl`, or `traces/*.json`, or both.
        title: of the page; by default what it is.

    Returns:
        The files written.

    Raises:
        ImportError: there is a run, and scipy or plotly is not installed.
        ValueError: a file is not what it should be, or the folder has nothing to show.
    """
    traces = {file.stem: Trace.load(file) for file in sorted((folder / "traces").glob("*.json"))}
    files: dict[str, str] = {}
    shown, name = None, "Traces"
    source = RunFolder(folder)
    if source.exists:
        shown, name = results(source.run(), source.rows()), "Evaluation"
    elif not traces:
        raise ValueError(f"{folder}: expected run.json with rows.jsonl, or traces/*.json")
    name = title or name
    if shown is not None:
        files["report.md"] = markdown(name, shown)
        files |= {f"report-{table.id}.csv": table.csv() for table in tables(shown)}
    files["report.html"] = render(name, shown, traces)
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in files]


__all__ = ["write_report"]
