"""`specdec eval`: the grid itself, and subcommands that read what it left."""

from __future__ import annotations

import typer

from specdec.eval.command import run
from specdec.eval.report.command import report

app = typer.Typer(
    invoke_without_command=True, no_args_is_help=True, pretty_exceptions_show_locals=False
)
app.callback()(run)
app.command()(report)
