"""A result as tables, Markdown and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.table import Table

from specdec.eval.generate.bench import ArmResult, Result

BASES = ("hf-eager", "hf-compile", "hf-lookup", "plain")
"""What speeds are given in units of, where it ran."""


def arms_table(result: Result) -> Table:
    """The arms beside each other."""
    header, rows = _arm_cells(result)
    return _table(f"{result.model}, batch 1, {result.new_tokens} new tokens", header, rows)


def steps_table(result: Result) -> Table:
    """Captured steps by tree size, with what each part takes."""
    header, rows = _step_cells(result)
    return _table(
        f"a captured step; reading the weights takes {result.floor_ms:.2f} ms", header, rows
    )


def markdown(result: Result) -> str:
    """Both tables, and the kernels of the first step."""
    lines = []
    for header, rows in (_arm_cells(result), _step_cells(result)):
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def draw(result: Result, file: Path) -> Path:
    """Where the time of a captured step goes, by tree size, as stacked bars.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'specdec-toolkit[eval]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{step.nodes}" for step in result.steps]
    below = [0.0] * len(names)
    for part in sorted({part for step in result.steps for part in step.parts}):
        heights = [step.parts.get(part, 0.0) for step in result.steps]
        axes.bar(names, heights, bottom=below, label=part, width=0.6)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.axhline(result.floor_ms, color="black", linewidth=1, linestyle="--")
    axes.annotate("reading the weights once", (0, result.floor_ms), va="bottom", fontsize=8)
    axes.set(xlabel="nodes of the tree", ylabel="milliseconds")
    axes.set_title(f"A captured step of {result.model}, batch 1")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{result.provenance['device']}, {result.provenance['date']}", fontsize=8)
    figure.savefig(file, dpi=150)
    return file


def _arm_cells(result: Result) -> tuple[list[str], list[list[str]]]:
    bases = [arm for name in BASES if (arm := result.of(name)) is not None]
    header = [
        "arm",
        "tokens/s",
        "tokens/step",
        "first token, ms",
        "start, s",
        "gap, us",
        "same text",
    ]
    header += [f"against {base.name}" for base in bases]
    rows = []
    for arm in result.arms:
        if not arm.runs:
            rows.append([arm.name, arm.error or "did not run", *[""] * (len(header) - 2)])
            continue
        rows.append(
            [
                arm.name,
                f"{arm.tokens_per_second:.1f}",
                "" if arm.tokens_per_step is None else f"{arm.tokens_per_step:.2f}",
                f"{statistics.median(run.first for run in arm.runs) * 1e3:.1f}",
                f"{arm.start_seconds:.1f}",
                "" if arm.gap_us is None else f"{arm.gap_us:.0f}",
                _sameness(arm),
                *(f"{arm.tokens_per_second / base.tokens_per_second:.2f}" for base in bases),
            ]
        )
    return header, rows


def _sameness(arm: ArmResult) -> str:
    known = [run.same for run in arm.runs if run.same is not None]
    return f"{sum(known)} of {len(known)}" if known else ""


def _step_cells(result: Result) -> tuple[list[str], list[list[str]]]:
    parts = sorted({part for step in result.steps for part in step.parts})
    header = ["nodes", "ms", "over the weights", *parts]
    rows = [
        [
            str(step.nodes),
            f"{step.ms:.3f}",
            f"{step.ms / result.floor_ms:.2f}",
            *(f"{step.parts.get(part, 0.0):.3f}" for part in parts),
        ]
        for step in sorted(result.steps, key=lambda step: step.nodes)
    ]
    return header, rows


def _table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
