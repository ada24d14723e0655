"""Runs the attention benchmark: every arm on every case, gated, timed in two rounds, counted.

A time is given only to a result that was compared with float64 before. Rounds run in opposite
order of the arms, so that a drift of the clocks shows as a difference between the rounds.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from specdec.attention import tree_attention
from specdec.eval.attention import ceilings, clock, peers
from specdec.eval.attention.cases import Case
from specdec.eval.attention.data import Data
from specdec.eval.attention.report import OURS, CaseResult, Ceilings, Counters, Result, Row
from specdec.eval.provenance import clocks, provenance
from specdec.kernels import flash
from specdec.kernels import worklist as work
from specdec.kernels.partition import Mode

GATE = 1e-2
"""The largest relative L2 deviation from float64 of a request and head that is timed."""


@dataclass(frozen=True)
class _Arm:
    """A peer that passed the gate, captured."""

    row: Row
    prepared: peers.Prepared  # kept: the graph reads its tensors, and writes to some
    timed: clock.Timed


def run(
    cases: Sequence[Case],
    chosen: Sequence[peers.Peer],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = math.inf,
    after_case: Callable[[Result], None] = lambda _: None,
) -> Result:
    """Measures the ceilings, then case after case.

    Args:
        device: a CUDA device.
        seconds: after so many no case is started.
        after_case: called with what there is so far.
    """
    begin = time.monotonic()
    result = Result(provenance(device, dtype), ceilings.measure(device))
    for case in cases:
        if time.monotonic() - begin > seconds:
            result.stopped = f"time was up before {case.label}"
            break
        result.cases.append(measure(case, chosen, result.ceilings, device, dtype))
        result.provenance["clocks_after"] = clocks(device)
        after_case(result)
        broken = _broken(device)
        if broken is not None:
            result.stopped = f"the device failed in {case.label}: {broken}"
            break
        gc.collect()
        torch.cuda.empty_cache()
    return result


def measure(
    case: Case,
    chosen: Sequence[peers.Peer],
    limits: Ceilings,
    device: torch.device,
    dtype: torch.dtype,
) -> CaseResult:
    """All arms on one case."""
    found = CaseResult(case.label, asdict(case), 0, 0, 0, 0, 0.0)
    with _noted(found):
        data = Data(case, device, dtype)
        found.moved, found.kv_bytes, found.flops = data.bytes, data.kv_bytes, data.flops
        found.sets = data.sets
        found.limit_us = limits.limit_us(data.bytes, data.flops)
        exact = data.exact(0)
        found.sdpa = _gate_sdpa(data, exact)
        arms = []
        for peer in chosen:
            row = Row(peer.name, peer.paged, skipped=peer.applies(case))
            found.rows.append(row)
            if row.skipped is None:
                with _noted(row):
                    arms.append(_capture(peer, data, exact, row))
        _time(arms)
        _compare(found)
        _count(data, [arm.row for arm in arms])
    return found


@contextmanager
def _noted(place: Row | CaseResult) -> Iterator[None]:
    """An arm may fail in any way; the others go on, and its row says why."""
    try:
        yield
    except Exception as error:
        place.error = f"{type(error).__name__}: {error}"[:300]


def _gate_sdpa(data: Data, exact: Tensor) -> Row:
    """How far torch's own attention is from float64, as a measure for ours."""
    peer = peers.PEERS["sdpa"]
    row = Row(peer.name, skipped=peer.applies(data.case))
    if row.skipped is None:
        with _noted(row):
            prepared = peer.prepare(data)
            row.detail = prepared.detail
            row.deviation = _deviation(data, prepared.run(0), exact)
    return row


def _capture(peer: peers.Peer, data: Data, exact: Tensor, row: Row) -> _Arm:
    """The peer's graph, after its result has passed."""
    prepared = peer.prepare(data)
    row.detail = prepared.detail
    row.deviation = _deviation(data, prepared.run(0), exact)
    if row.deviation is None or row.deviation > GATE:
        got = "one that is not finite" if row.deviation is None else f"{row.deviation:.3g}"
        raise ValueError(f"gate: expected a deviation of at most {GATE}, got {got}")
    if prepared.plan_us is not None:
        row.plan_us, row.plan_on = prepared.plan_us(), prepared.plan_on
    timed = clock.capture(prepared.run, data.sets)
    row.calls = timed.calls
    # The graph must compute what the eager call does.
    again = prepared.run((timed.calls - 1) % data.sets).double()
    apart = float((timed.last.double() - again).norm() / again.norm())
    if not apart <= GATE:
        raise ValueError(f"graph: expected the eager call's result, got one {apart:.2g} away")
    return _Arm(row, prepared, timed)


def _deviation(data: Data, out: Tensor, exact: Tensor) -> float | None:
    """None if anything is not finite."""
    error = data.error(out, exact)
    return error if math.isfinite(error) else None


def _time(arms: Sequence[_Arm]) -> None:
    """Two rounds in opposite order."""
    samples: dict[str, list[float]] = {arm.row.peer: [] for arm in arms}
    for order in (arms, arms[::-1]):
        for arm in order:
            with _noted(arm.row):
                added = arm.timed.measure()
                samples[arm.row.peer] += added
                arm.row.rounds.append(statistics.median(added))
    for arm in arms:
        row, found = arm.row, samples[arm.row.peer]
        if len(row.rounds) == 2:
            row.us = statistics.median(found)
            row.p10, *_, row.p90 = statistics.quantiles(found, n=10, method="inclusive")


def _compare(found: CaseResult) -> None:
    """Our deviations in units of torch's."""
    base = found.sdpa.deviation if found.sdpa is not None else None
    for row in found.rows:
        if base and row.deviation is not None and row.peer.startswith(OURS):
            row.deviation_over_sdpa = row.deviation / base


def _count(data: Data, rows: Sequence[Row]) -> None:
    """Counters for our rows, in calls of their own that nobody times."""
    ours = [row for row in rows if row.peer.startswith(OURS)]
    base = None
    for row in ours:
        with _noted(row):
            base = base or requested_bytes(data, "sequence")
            mode: Mode = row.peer.removeprefix(OURS)  # type: ignore[assignment]
            asked = requested_bytes(data, mode)
            row.counters = Counters(asked, partial_bytes(data, mode), 100 * (1 - asked / base))


def requested_bytes(data: Data, mode: Mode) -> int:
    """Bytes of keys and values that all programs of one call load."""
    case, pool = data.case, data.pools[0]
    tree_attention(data.queries[0], pool, data.plan, backend="triton", mode=mode)
    counter = torch.zeros(1, dtype=torch.int64, device=data.device)
    flash.tree_attention(
        data.queries[0],
        pool.keys,
        pool.values,
        schedule=peers.schedule_of(data.plan, mode),
        scale=1 / math.sqrt(case.dim),
        softcap=None,
        sinks=None,
        counter=counter,
    )
    return int(counter) * 2 * case.dim * data.dtype.itemsize


def partial_bytes(data: Data, mode: Mode) -> int:
    """Bytes of partial results that one call leaves for the merge."""
    schedule = peers.schedule_of(data.plan, mode)
    element = 4 if data.dtype == torch.float32 else 2
    row = data.case.dim * element + 2 * 4  # weighted sums of values, and `merge.state_of`
    return int(schedule.header[int(work.PARTIALS)]) * schedule.tiling.block_m * row


def _broken(device: torch.device) -> str | None:
    """Why the device can do no more: an illegal access spoils all that comes after it."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
