"""What the commands share: where they write, and how they fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from specdec import models
from specdec.pages import OutOfPages

out, err = Console(), Console(stderr=True)

EXPECTED_ERRORS = (
    ValueError, NotImplementedError, ImportError, OSError, OutOfPages, models.FetchError
)  # fmt: skip


@contextmanager
def readable_errors() -> Iterator[None]:
    """Says what is wrong with the input without a traceback."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        err.print(str(error), markup=False)
        raise typer.Exit(1) from error


def print_json(value: object) -> None:
    """Prints JSON that a program reads: one line, nothing else on standard output."""
    typer.echo(json.dumps(value))
