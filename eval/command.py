"""`specdec eval`: the grid itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.console import err, out, readable_errors
from specdec.eval.check import check, load_thresholds
from specdec.eval.grid import Grid
from specdec.eval.records import RunFolder
from specdec.eval.runner import evaluate
from specdec.eval.summary import summary_table


def run(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder; a run that is there goes on.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of the grid; options here come before it.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A name, folder or hub id; may be repeated.")
    ] = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="ngram, FILE.py:NAME or a model; may be repeated."),
    ] = None,
    tree: Annotated[
        list[str] | None, typer.Option(help="8, chain:8, for models 4,2,1; may be repeated.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="0 is greedy; may be repeated.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Of transformers: hf-eager, hf-compile, hf-prompt-lookup, hf-assisted:MODEL."
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="builtin, NAME, NAME=PATH or a JSONL file; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of a suite, at most.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="For each prompt.")] = None,
    repetitions: Annotated[int | None, typer.Option(min=1, help="Of each prompt.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampled runs.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 on a CPU by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    capture: Annotated[
        bool | None, typer.Option("--capture/--no-capture", help="Steps as CUDA graphs.")
    ] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option("--check", help="TOML file of least values; fails if one is not reached."),
    ] = None,
) -> None:
    """Compare drafters, trees, rules and baselines on suites of prompts.

    Without options that say otherwise: plain decoding, n-gram chains and n-gram trees of 8 nodes
    on SmolLM2 and the built-in prompts. `specdec eval report` then draws the folder.
    """
    if context.invoked_subcommand is not None:
        return
    with readable_errors():
        if folder is None:
            raise ValueError("--out: expected a folder for the run, got none")
        wanted = None if thresholds is None else load_thresholds(thresholds)
        grid = Grid() if config is None else Grid.from_file(config)
        lists: dict[str, Any] = {
            "targets": target,
            "drafters": drafter,
            "trees": tree,
            "rules": rule,
            "temperatures": temperature,
            "baselines": baseline,
            "suites": suite,
        }
        single: dict[str, Any] = {
            "limit": limit,
            "max_new_tokens": new_tokens,
            "repetitions": repetitions,
            "seed": seed,
            "dtype": dtype,
            "device": device,
            "capture": capture,
        }
        grid = replace(
            grid,
            settings=replace(grid.settings, **_given(single)),
            **{name: tuple(value) for name, value in _given(lists).items()},
        )
        runs = RunFolder(folder)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=err,
            transient=True,
        ) as bar:
            task = bar.add_task("prompts", total=None)
            evaluate(
                grid,
                runs,
                lambda what, done, total: bar.update(
                    task, description=what, completed=done, total=total
                ),
            )
        out.print(summary_table(runs.run(), runs.rows()))
        if wanted is not None:
            verdicts = check(runs.run(), runs.rows(), wanted)
            for verdict in verdicts:
                out.print(verdict, highlight=False)
            if not all(verdict.passed for verdict in verdicts):
                raise typer.Exit(1)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
