"""What the attention benchmark found: the result as data, as JSON and as tables.

Needs neither Triton nor a GPU, so a saved result can be read anywhere.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

OURS = "ours:"
"""How the names of our own arms begin; everything else is a peer to compare with."""


@dataclass(frozen=True)
class Read:
    """The paged read of one size, with the best number of programs."""

    megabytes: float  # of keys and values, 1e6 bytes
    programs: int
    us: float
    tbps: float  # 1e12 bytes a second


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do in the process that timed the cases."""

    copy_tbps: float  # device to device, read and write counted
    read_tbps: float  # the best paged read
    matmul_tflops: float  # bfloat16, 8192 cubed, a short burst
    null_us: float  # a kernel of a graph that does nothing
    reads: list[Read]

    def limit_us(self, moved: int, flops: int) -> float:
        """Microseconds that no kernel can beat.

        Args:
            moved: bytes of every key and value once, queries and results.
            flops: floating-point operations of both products.
        """
        busy = max(moved / (self.read_tbps * 1e6), flops / (self.matmul_tflops * 1e6))
        return self.null_us + busy


@dataclass
class Counters:
    """Bytes of one call, counted while it runs, except for partial results."""

    kv_bytes: int  # keys and values asked for by all programs
    partial_bytes: int  # partial results written, from the work list
    saved_percent: float  # keys and values not asked for, against mode `sequence`


@dataclass
class Row:
    """One arm on one case: skipped for a reason, failed with an error, or timed."""

    peer: str
    paged: bool = True  # reads the pages; otherwise only for reference
    detail: str = ""  # what ran, where a library chooses
    skipped: str | None = None
    error: str | None = None
    deviation: float | None = None  # relative L2 from float64, the worst request and head
    deviation_over_sdpa: float | None = None
    us: float | None = None  # median over both rounds
    p10: float | None = None
    p90: float | None = None
    rounds: list[float] = field(default_factory=list)  # median of each round
    calls: int | None = None  # in the graph
    plan_us: float | None = None
    plan_on: str | None = None  # host or device
    counters: Counters | None = None


@dataclass
class CaseResult:
    """All arms on one case."""

    label: str
    case: dict[str, Any]  # the fields of `cases.Case`
    moved: int  # bytes: every key and value once, queries and results
    kv_bytes: int  # bytes: every key and value once
    flops: int
    sets: int  # pools that are used in turn
    limit_us: float
    rows: list[Row] = field(default_factory=list)
    sdpa: Row | None = None  # torch's own attention on the same data, gated and not timed
    error: str | None = None  # why the case has no rows

    @property
    def timed(self) -> list[Row]:
        """The rows that passed the gate and were timed, fastest first."""
        return sorted((row for row in self.rows if row.us is not None), key=lambda row: row.us or 0)

    def of(self, peer: str) -> Row | None:
        return next((row for row in self.rows if row.peer == peer), None)


@dataclass
class Result:
    """One run of the benchmark."""

    provenance: dict[str, Any]
    ceilings: Ceilings
    cases: list[CaseResult] = field(default_factory=list)
    stopped: str | None = None  # why cases are missing

    @property
    def peers(self) -> list[str]:
        """Every arm that any case has, in order."""
        return list(dict.fromkeys(row.peer for case in self.cases for row in case.rows))

    @property
    def own_failures(self) -> list[str]:
        """What went wrong with our own arms, or with whole cases."""
        rows = [
            f"{case.label}: {row.peer}: {row.error}"
            for case in self.cases
            for row in case.rows
            if row.error is not None and row.peer.startswith(OURS)
        ]
        return rows + [f"{case.label}: {case.error}" for case in self.cases if case.error]

    def save(self, file: Path) -> None:
        """Writes JSON, never half of it."""
        draft = file.with_suffix(".tmp")
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(draft, file)

    @classmethod
    def load(cls, file: Path) -> Result:
        saved = json.loads(file.read_text())
        try:
            ceilings = saved["ceilings"]
            reads = [Read(**read) for read in ceilings["reads"]]
            return cls(
                saved["provenance"],
                Ceilings(**{**ceilings, "reads": reads}),
                [_case(case) for case in saved["cases"]],
                saved["stopped"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: expected a saved attention benchmark: {error}") from error


def _case(saved: dict[str, Any]) -> CaseResult:
    sdpa = saved["sdpa"]
    rows = [_row(row) for row in saved["rows"]]
    return CaseResult(**{**saved, "rows": rows, "sdpa": None if sdpa is None else _row(sdpa)})


def _row(saved: dict[str, Any]) -> Row:
    counters = saved["counters"]
    return Row(**{**saved, "counters": None if counters is None else Counters(**counters)})


def best(rows: Iterable[Row]) -> Row | None:
    """The fastest that reads the pages."""
    paged = [row for row in rows if row.paged and row.us is not None]
    return min(paged, key=lambda row: row.us or 0, default=None)


def ratios(result: Result, arm: str = "ours:auto") -> tuple[list[float], list[float]]:
    """`arm` over the limit, and the best peer over `arm`, for each case that has them."""
    over_limit, speedups = [], []
    for case in result.cases:
        row = case.of(arm)
        if row is None or row.us is None:
            continue
        over_limit.append(row.us / case.limit_us)
        rival = best(other for other in case.rows if not other.peer.startswith(OURS))
        if rival is not None and rival.us is not None:
            speedups.append(rival.us / row.us)
    return over_limit, speedups


def summary(result: Result) -> list[str]:
    """Geometric means, a sentence each."""
    lines = []
    over_limit, speedups = ratios(result)
    for name, values in (("ours:auto / limit", over_limit), ("best peer / ours:auto", speedups)):
        if values:
            mean = statistics.geometric_mean(values)
            lines.append(f"{name}: {mean:.2f} (geometric mean of {len(values)} cases)")
    return lines


def table(result: Result) -> Table:
    """For a terminal."""
    headings, rows = _cells(result)
    shown = Table(title="microseconds of a call", caption=" ".join(summary(result)))
    for index, heading in enumerate(headings):
        shown.add_column(escape(heading), justify="left" if index == 0 else "right")
    shown.columns[-1].justify = "left"
    for row in rows:
        shown.add_row(*map(escape, row))
    return shown


def markdown(result: Result) -> str:
    """For the documentation: where the numbers come from, the table, the geometric means."""
    origin = result.provenance
    headings, rows = _cells(result)
    ceilings = result.ceilings
    lines = [
        f"{origin['device']}, torch {origin['torch']}, triton {origin['triton']}, "
        f"Python {origin['python']}, {origin['date']}. Microseconds of a call; limit = "
        f"{ceilings.null_us:.1f} + max(bytes / {ceilings.read_tbps:.2f} TB/s, "
        f"FLOP / {ceilings.matmul_tflops:.0f} TFLOP/s).",
        "",
        "| " + " | ".join(headings) + " |",
        "|---" + "|---:" * (len(headings) - 2) + "|---|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
        "",
        *(f"- {line}" for line in summary(result)),
        "",
        "```bash",
        origin["command"],
        "```",
    ]
    return "\n".join(lines) + "\n"


def _cells(result: Result) -> tuple[list[str], list[list[str]]]:
    """Headings, and the cells of each case."""
    headings = ["case", "limit", *result.peers, "best / limit", "errors"]
    return headings, [_line(case, result.peers) for case in result.cases]


def _line(case: CaseResult, peers: list[str]) -> list[str]:
    cells = [case.label, f"{case.limit_us:.1f}"]
    for peer in peers:
        row = case.of(peer)
        if row is None or row.us is None:
            cells.append("failed" if row is not None and row.error else "-")
        else:
            cells.append(f"{row.us:.1f}")
    fastest = best(case.rows)
    cells.append("-" if fastest is None else f"{(fastest.us or 0) / case.limit_us:.2f}")
    errors = [f"{row.peer}: {row.error}" for row in case.rows if row.error]
    cells.append(" ".join("; ".join([case.error] if case.error else errors).split()))
    return cells
