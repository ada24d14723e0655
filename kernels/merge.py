"""Merges the pieces of cut columns: gathered in a fixed order under their true maximum.

Splitting keys and merging: Flash-Decoding. docs/tree-attention.md has the formulas.

Letters: R rows (query tokens), Hq query heads, G heads of a group, DV head dim, M packed rows of a
block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.worklist import (
    ALONE,
    BLOCKS,
    FIRST_ROW,
    ITEM_FIELDS,
    PARENT,
    PARTIALS,
    PIECES,
    SLOT0,
    STEPS,
    Schedule,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(float("-inf"))
FRACTION = tl.constexpr(0x7FFFFF)  # of the bits of a float32
ONE = tl.constexpr(0x3F800000)

MANY = 8192
"""Results from which on a program takes eight: there most have nothing to merge."""


@triton.jit
def state_of(peak, total, largest):
    """What a piece leaves of its rows [M] beside their weighted sums of values.

    Half precision holds these sums as multiples of the power of two below their `largest` element,
    down to 2^-100. That power is the exponent of the second number; its fraction is that of
    `total`, whose own power of two goes to the first number, the maximum. So weights do
    not depend on how large values are, and no logarithm or quotient is taken.

    Returns:
        The two numbers, and what to multiply the sums with, which leaves elements below 4.
    """
    power = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    power = tl.minimum(tl.maximum(power, -100), 126)
    bits = total.to(tl.int32, bitcast=True)
    above = tl.maximum((bits >> 23) - 127, -1)  # a sum is 1 or hardly less, or nothing is there
    both = ((power - above + 127) << 23) | (bits & FRACTION)
    shrink = ((127 - power) << 23).to(tl.float32, bitcast=True)
    return peak + above.to(tl.float32), both.to(tl.float32, bitcast=True), shrink


@triton.jit
def _apart(both):
    """What `state_of` put into its second number: the sum's fraction, and the power of two."""
    bits = both.to(tl.int32, bitcast=True)
    share = ((bits & FRACTION) | ONE).to(tl.float32, bitcast=True)
    return share, (bits & ~FRACTION).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "fresh"])
def _merge_kernel(
    OUT,
    LSE,
    PART,
    STATES,
    HEADER,
    ITEMS,
    ROW_TABLE,
    SINKS,
    rows,
    fresh,
    HQ: tl.constexpr,
    G: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PDL: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_PIECES: tl.constexpr,
):
    """Gathers the pieces of (row, head) pairs, innermost item first, in order of keys."""
    if PDL:
        if fresh > 0:  # see `flash.tree_attention`
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dims = tl.arange(0, DVP)
    order = tl.arange(0, MERGE_PIECES)
    tiles = tl.where(tl.load(HEADER + PARTIALS) > 0, tl.cdiv(rows * HQ, MERGE_ROWS), 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        index = tile * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
        row, head = index // HQ, index % HQ
        real = row < rows
        at = ROW_TABLE + row * ITEM_FIELDS
        inside = real
        acc = tl.zeros([MERGE_ROWS, DVP], tl.float32)
        peak = tl.full([MERGE_ROWS], NEVER, tl.float32)
        total = tl.zeros([MERGE_ROWS], tl.float32)
        done = tl.zeros([MERGE_ROWS], tl.int1)
        while tl.max(inside.to(tl.int32), 0) > 0:
            steps = tl.load(at + STEPS, mask=inside, other=0)
            packed = (row - tl.load(at + FIRST_ROW, mask=inside, other=0)) * G + head % G
            blocks = tl.load(at + BLOCKS, mask=inside, other=0)
            block, kv_head = packed // BLOCK_M, head // G
            column = tl.where(blocks > 0, kv_head * blocks + block, block * (HQ // G) + kv_head)
            count = tl.where(steps > 0, tl.load(at + PIECES, mask=inside, other=0), 0)
            slot = tl.load(at + SLOT0, mask=inside, other=0) + column * count
            alone = tl.load(at + ALONE, mask=inside, other=0)
            parent = tl.load(at + PARENT, mask=inside, other=-1)
            done = done | ((alone > 0) & (count == 1))  # written by the only piece
            count = tl.where(done, 0, count)
            if PDL:  # the work list is older than the launch before; its partial results are not
                tl.extra.cuda.gdc_wait()
            for k in range(0, tl.max(count, 0), MERGE_PIECES):
                have = (k + order)[None, :] < count[:, None]
                place = (slot[:, None] + k + order[None, :]) * BLOCK_M + (packed % BLOCK_M)[:, None]
                high = tl.load(STATES + place * 2, mask=have, other=NEVER)
                both = tl.load(STATES + place * 2 + 1, mask=have, other=0.0)
                share, size = _apart(both)
                at_part = PART + place[:, :, None].to(tl.int64) * DV + dims[None, None, :]
                mask = have[:, :, None] & (dims[None, None, :] < DV)
                part = tl.load(at_part, mask=mask, other=0.0).to(tl.float32)
                new = tl.maximum(peak, tl.max(high, 1))
                base = tl.where(new == NEVER, 0.0, new)
                weight = tl.exp2(high - base[:, None])
                fade = tl.exp2(peak - base)
                acc = acc * fade[:, None] + tl.sum(part * (weight * size)[:, :, None], 1)
                total = total * fade + tl.sum(weight * share, 1)
                peak = new
            at = ITEMS + parent * ITEM_FIELDS
            inside = parent >= 0
        write = real & (done == 0)
        if HAS_LSE:
            tl.store(LSE + index, (peak + tl.log2(total)) * LN2, mask=write)
        if HAS_SINKS:
            sink = tl.load(SINKS + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            new = tl.maximum(peak, sink)
            fade = tl.exp2(peak - new)
            total = total * fade + tl.exp2(sink - new)
            acc = acc * fade[:, None]
        out = acc / total[:, None]
        at_out = OUT + index[:, None].to(tl.int64) * DV + dims[None, :]
        tl.store(at_out, out.to(OUT.dtype.element_ty), mask=write[:, None] & (dims[None, :] < DV))
    if PDL:  # also programs without work, see `flash.tree_attention`
        tl.extra.cuda.gdc_wait()


def merge(
    out: Tensor,  # [R, Hq, DV], filled where the work list left pieces
    lse: Tensor | None,  # [R, Hq] float32
    part: Tensor,  # [slots, M, DV], weighted sums of values times a power of two
    states: Tensor,  # [slots, M, 2] float32, see `state_of`
    schedule: Schedule,
    sinks: Tensor | None,  # [Hq]
    fresh: int,  # 1 for the first user of the work list, which must not look at it early
    options: dict[str, Any],  # of the launch of attention, as the kernel names them
) -> None:
    """Launches the merge; on Hopper and later it starts while attention ends."""
    results = out.shape[0] * out.shape[1]
    blocks = triton.cdiv(results, schedule.tiling.block_m)
    own = schedule.requests * out.shape[1] // options["G"]  # columns, if none has two blocks
    pieces = schedule.programs // max(blocks, own)
    rows, pieces = _shape(results, pieces, options["DVP"], known=blocks >= own)
    most = schedule.tiling.merges if rows < 8 else 8
    if not out.is_cuda:
        rows = 64  # the interpreter pays for programs, not for rows
    programs = triton.cdiv(results, rows)
    if out.is_cuda:
        processors = torch.cuda.get_device_properties(out.device).multi_processor_count
        programs = min(programs, most * processors)
    _merge_kernel[(programs,)](
        out, states if lse is None else lse, part, states,
        schedule.header, schedule.items, schedule.rows,
        states if sinks is None else sinks, out.shape[0], fresh, **options,
        MERGE_ROWS=rows, MERGE_PIECES=pieces, num_warps=1, enable_fp_fusion=True,
        **({"launch_pdl": True} if options["PDL"] else {}),
    )  # fmt: skip


def _shape(results: int, pieces: int, width: int, *, known: bool) -> tuple[int, int]:
    """How many results a program of the merge takes, and how many of their pieces at a time.

    A program is one warp: more of them find room at once, and none waits for another.

    Args:
        results: rows times heads.
        pieces: of a column, at least.
        width: head dim, rounded up to a power of two.
        known: whether there are hardly more pieces than that, if none has two rounds of workers.
    """
    pieces = min(32, triton.next_power_of_2(max(1, pieces)))
    if results >= MANY and width <= 128:  # wider ones would not fit in the registers of a warp
        return 8, min(4, pieces) if known else 4
    rows = 2 if results >= 512 and pieces <= (8 if width > 64 else 32) else 1
    return rows, max(8 // rows if known else 8, pieces)
