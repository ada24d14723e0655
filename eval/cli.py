"""`specdec eval`: the grid itself, and subcommands that read what it left.

`specdec eval [options]` runs a grid; `specdec eval compare A B` and its like take the folders of
runs. A subcommand is a function with `@app.command()` here, or one registered by
`app.command("name")(function)` where it is defined in a module of its own.
"""

from __future__ import annotations

import typer

from specdec.eval.report.command import report

app = typer.Typer(
    help="Compare drafters, trees, rules and baselines on suites of prompts.",
    invoke_without_command=True,
    pretty_exceptions_show_locals=False,
)

app.command()(report)
