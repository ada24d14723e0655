"""`specdec eval`: the grid itself, and subcommands that read what it left.

`specdec eval [options]` runs a grid; `specdec eval compare A B` and its like take the folders of
runs. A subcommand is a function with `@app.command()` here, or one registered by
`app.command("name")(function)` where it is defined in a module of its own.
"""

from __future__ import annotations

import datetime
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from specdec.console import err, out, print_json, readable_errors
from specdec.eval.grid import Grid, Settings
from specdec.eval.records import Row, Run, RunFolder
from specdec.eval.report.command import report

app = typer.Typer(
    help="Compare drafters, trees, rules and baselines on suites of prompts.",
    invoke_without_command=True,
    pretty_exceptions_show_locals=False,
)

app.command()(report)


@app.callback()
def run(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="A grid as TOML; other options change it.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Target: a name, a folder or a hub id. Repeatable.")
    ] = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="ngram, file.py:Name, or a smaller model. Repeatable."),
    ] = None,
    tree: Annotated[
        list[str] | None,
        typer.Option(help="Nodes (16), chain:5, or for a model 4,2,1 or beam:8x6. Repeatable."),
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Acceptance rule. Repeatable.")] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="0 decodes greedily. Repeatable.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="hf-eager, hf-compile, hf-prompt-lookup, hf-assisted:MODEL. Repeatable; the "
            "plain loop is always there."
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="builtin, humaneval, gsm8k, mt-bench, alpaca, cnn-dm, spec-bench=PATH, "
            "NAME=PATH or a JSONL file. Repeatable."
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="128 by default.")] = None,
    repetitions: Annotated[int | None, typer.Option(min=1, help="Of every prompt.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts of a suite, from its categories in turn.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampled runs.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 on a CPU, else bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    capture: Annotated[
        bool | None, typer.Option("--capture/--no-capture", help="Steps as CUDA graphs.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the run; one that was begun there is continued."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Thresholds as TOML: fail when a metric falls below.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare drafters, trees, rules and baselines on suites of prompts."""
    sources = {p.opts[0]: context.get_parameter_source(p.name) for p in context.command.params}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if context.invoked_subcommand is not None:
        if given:
            raise typer.BadParameter(
                f"{context.invoked_subcommand} takes its options behind its name, got "
                f"{', '.join(given)} before it"
            )
        return
    lists = {
        "targets": model,
        "drafters": drafter,
        "trees": tree,
        "rules": rule,
        "temperatures": temperature,
        "baselines": baseline,
        "suites": suite,
    }
    settings = {
        "max_new_tokens": max_new_tokens,
        "repetitions": repetitions,
        "limit": limit,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "capture": capture,
    }
    with readable_errors():
        from specdec.eval.check import failures, load_thresholds
        from specdec.eval.metrics import scipy_stats
        from specdec.eval.runner import run_grid

        scipy_stats()  # a run that cannot be summed up in the end had better not begin
        thresholds = None if check is None else load_thresholds(check)
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        where = RunFolder(folder or Path("eval-runs") / now)
        rows = run_grid(_grid(where, config, lists, settings), where)
        if not rows:  # a process of several that is not the first
            return
        done = where.run()
        if as_json:
            print_json({"folder": str(where.path), "summary": _as_dict(done, rows)})
        else:
            out.print(_summary(done, rows))
            out.print(f"Rows are in {where.path}", markup=False, highlight=False)
        failed = failures(done, rows, thresholds or [])
        for problem in failed:
            err.print(problem, markup=False, style="red")
        if failed:
            raise typer.Exit(1)


def _grid(
    folder: RunFolder, config: Path | None, lists: dict[str, Any], settings: dict[str, Any]
) -> Grid:
    """The grid of a file or the default one, changed by options; or the one begun in the folder."""
    lists = {name: tuple(value) for name, value in lists.items() if value}
    settings = {name: value for name, value in settings.items() if value is not None}
    if folder.exists and config is None and not lists and not settings:
        return Grid.from_dict(folder.run().grid)
    grid = Grid() if config is None else Grid.from_file(config)
    assert settings.keys() <= {f.name for f in fields(Settings)}
    return replace(grid, **lists, settings=replace(grid.settings, **settings))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Folder of a run.")],
    after: Annotated[Path, typer.Argument(help="Folder of another.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Says what changed between two runs beyond noise."""
    with readable_errors():
        from specdec.eval.differences import difference_table, differences

        found = differences(RunFolder(before), RunFolder(after))
        changed = [d for d in found if d.verdict in ("better", "worse")]
        if as_json:
            print_json({"changed": len(changed), "differences": [d.to_dict() for d in found]})
            return
        out.print(difference_table(found))
        out.print(
            f"{len(changed)} of {sum(d.p_value is not None for d in found)} comparisons changed "
            "beyond noise."
            if changed
            else "no difference"
        )


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    tree: Annotated[
        list[str],
        typer.Option(help="Nodes (16), chain:5, or for a model 4,2,1 or beam:8x6. Repeatable."),
    ],
    drafter: Annotated[
        str, typer.Option(help="ngram, file.py:Name, or a draft model that the run has.")
    ] = "ngram",
    target: Annotated[str | None, typer.Option(help="Of several in the run.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of several in the run.")] = None,
    fit: Annotated[
        list[str] | None,
        typer.Option(help="Configurations to fit step times to; all by default. Repeatable."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences in a pass. Repeatable.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="FROM:TO, such as H100:H200: scale times by data-sheet figures."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predicts the speed of other trees, batches and GPUs from a run."""
    with readable_errors():
        from specdec.eval.simulate import prediction_table, simulate_run

        found = simulate_run(
            RunFolder(folder),
            drafter,
            tree,
            target=target,
            temperature=temperature,
            fit_to=fit,
            batches=batch or [1],
            gpu=gpu,
        )
        if as_json:
            print_json([prediction.to_dict() for prediction in found])
        else:
            out.print(prediction_table(found))


def _summary(run: Run, rows: list[Row]) -> Table:
    """One line for each configuration, over all prompts."""
    from specdec.eval.metrics import summarize

    table = Table(
        "configuration", "tokens per step", "speed-up", "accepted", "equal / near-tie / different"
    )
    for configuration in run.configurations:
        summary = summarize(run, rows, configuration)
        shown = [
            str(summary.measures.get(name, ""))
            for name in ("tokens_per_step", "speedup", "acceptance_rate")
        ]
        verdicts = summary.lossless
        compared = " / ".join(str(verdicts[v]) for v in ("equal", "near-tie", "different"))
        if verdicts["error"]:
            compared += f", {verdicts['error']} errors"
        table.add_row(configuration.name, *shown, "" if configuration.is_plain else compared)
    return table


def _as_dict(run: Run, rows: list[Row]) -> dict[str, Any]:
    """The measures of every configuration over all prompts, as plain values."""
    from specdec.eval.metrics import summarize

    found = {}
    for configuration in run.configurations:
        summary = summarize(run, rows, configuration)
        found[configuration.name] = {
            "measures": {name: vars(measured) for name, measured in summary.measures.items()},
            "speedups": {name: vars(measured) for name, measured in summary.speedups.items()},
            "lossless": summary.lossless,
        }
    return found
