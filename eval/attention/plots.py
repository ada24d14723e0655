"""Three pictures of a saved result. Needs matplotlib, which comes with the `eval` extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdec.eval.attention.report import OURS, CaseResult, Result

MARKERS = "osD^vP*Xph"


def draw(result: Result, folder: Path) -> list[Path]:
    """Writes every picture that the result has numbers for, and returns the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'specdec-toolkit[eval]'") from error
    timed = [case for case in result.cases if case.timed]
    # Where nothing is shared, every mode asks for the same bytes.
    counted = [case for case in timed if any(share < 0.99 for share in _requested(case).values())]
    pictures = []
    if timed:
        pictures += [("time_against_limit", _time_against_limit), ("roofline", _roofline)]
    if counted:
        pictures.append(("requested_bytes", _requested_bytes))
    files = []
    for name, fill in pictures:
        # Not pyplot: it holds every figure, and asks for a display.
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes = figure.add_subplot()
        fill(axes, result, counted if fill is _requested_bytes else timed)
        figure.suptitle(f"{result.provenance['device']}, {result.provenance['date']}", fontsize=9)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=150)
    return files


def _time_against_limit(axes: Any, result: Result, cases: list[CaseResult]) -> None:
    for marker, peer, points in _points(result, cases):
        limits = [case.limit_us for case, _ in points]
        axes.scatter(limits, [us for _, us in points], marker=marker, label=peer, s=22, alpha=0.8)
    ends = [min(case.limit_us for case in cases), max(case.limit_us for case in cases)]
    axes.plot(ends, ends, color="black", linewidth=1, label="limit")
    axes.set(xscale="log", yscale="log", xlabel="limit, µs", ylabel="measured, µs")
    axes.set_title("Time of a call against the limit of its case")
    axes.legend()


def _roofline(axes: Any, result: Result, cases: list[CaseResult]) -> None:
    ceilings = result.ceilings
    intensities = sorted(case.flops / case.moved for case in cases)
    ridge = ceilings.matmul_tflops / ceilings.read_tbps
    ends = sorted([intensities[0] / 2, ridge, max(intensities[-1], ridge) * 2])
    roof = [min(ceilings.matmul_tflops, ceilings.read_tbps * x) for x in ends]
    name = f"{ceilings.read_tbps:.2f} TB/s, {ceilings.matmul_tflops:.0f} TFLOP/s"
    axes.plot(ends, roof, color="black", linewidth=1, label=name)
    for marker, peer, points in _points(result, cases):
        x = [case.flops / case.moved for case, _ in points]
        y = [case.flops / us / 1e6 for case, us in points]
        axes.scatter(x, y, marker=marker, label=peer, s=22, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s")
    axes.set_title("Roofline; bytes are those that must move")
    axes.legend()


def _requested_bytes(axes: Any, result: Result, cases: list[CaseResult]) -> None:
    modes = [peer for peer in result.peers if peer.startswith(OURS)]
    width = 0.8 / len(modes)
    for index, mode in enumerate(modes):
        share = [_requested(case).get(mode, 0.0) for case in cases]
        left = [place + (index - (len(modes) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(left, share, width, label=mode.removeprefix(OURS))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), [case.label for case in cases], rotation=90, fontsize=6)
    axes.set(ylabel="relative to mode sequence")
    axes.set_title("Bytes of keys and values asked for by all programs")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.figure.set_figwidth(max(9, 0.35 * len(cases)))


def _points(
    result: Result, cases: list[CaseResult]
) -> list[tuple[str, str, list[tuple[CaseResult, float]]]]:
    """For each arm its marker, its name, and its cases with their microseconds."""
    found = []
    for index, peer in enumerate(result.peers):
        points = []
        for case in cases:
            row = case.of(peer)
            if row is not None and row.us is not None:
                points.append((case, row.us))
        if points:
            found.append((MARKERS[index % len(MARKERS)], peer, points))
    return found


def _requested(case: CaseResult) -> dict[str, float]:
    """Bytes of keys and values that each mode asks for, relative to mode `sequence`."""
    return {
        row.peer: 1 - row.counters.saved_percent / 100
        for row in case.rows
        if row.counters is not None
    }
