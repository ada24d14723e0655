"""Flash tree attention for Hopper, in Gluon: the work of `flash._attend_kernel`, shared by role.

A program takes blocks of 128 packed rows. Two groups of four warps compute 64 rows each, from the
same tiles of keys and values. A third brings these into a ring of stages, by the copy engine where
they are neighbours in a page, else one by one. A group that computes starts the scores of a tile,
then the product with the values of the tile before, and does the softmax of the first while the
second runs; while it waits, the other group has the matrix unit. The work list, the partial results
and the merge are those of `flash.py`.

Overlap within a group and two groups that take turns: FlashAttention-3 (arXiv 2407.08608).

Letters: as in `flash.py`; M packed rows of a group of warps.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from specdec.kernels.merge import FRACTION, LN2, LOG2E, NEVER
from specdec.kernels.worklist import (
    ALONE,
    BLOCKS,
    FIRST_ROW,
    KEY0,
    LOOSE,
    OWNER,
    PIECES,
    SLOT0,
    START,
    STEP,
    STEPS,
    STOP,
    TILE0,
    TILES,
    TOKENS,
    WORKER_FIELDS,
    WORKERS,
    Schedule,
)

# Triton 3.6 knows these by another name than later versions do.
_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_keys = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

GROUPS = gl.constexpr(2)
"""Of warps that compute."""

PART_N = gl.constexpr(64)
"""Keys of a copy and of a product; a step has one or two."""

COMPUTE_REGISTERS, COPY_REGISTERS = gl.constexpr(232), gl.constexpr(40)
"""Of a thread: 2 x 232 + 40 are three times the 168 that each of 384 threads can have."""


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _scores(qk, scale, softcap, SOFTCAP: gl.constexpr):
    """Scores, and the factor that is still to come before exp2 applies."""
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        scores = 1 - 2 / (_exp2(qk * (scale / softcap * 2 * LOG2E)) + 1)
        factor = softcap * LOG2E
    else:
        scores = qk
        factor = scale * LOG2E
    return scores, factor


@gluon.jit
def _state_of(peak, total, largest):
    """See `merge.state_of`."""
    power = (largest.to(gl.int32, bitcast=True) >> 23) - 127
    power = gl.minimum(gl.maximum(power, -100), 126)
    bits = total.to(gl.int32, bitcast=True)
    above = gl.maximum((bits >> 23) - 127, -1)
    both = ((power - above + 127) << 23) | (bits & FRACTION)
    shrink = ((127 - power) << 23).to(gl.float32, bitcast=True)
    return peak + above.to(gl.float32), both.to(gl.float32, bitcast=True), shrink


@gluon.jit
def _soften(peak, total, scores, factor, PARTS: gl.constexpr, MASKED: gl.constexpr):
    """As `flash._soften`."""
    largest = scores[0]
    for part in gl.static_range(1, PARTS):
        largest = gl.maximum(largest, scores[part])
    new = gl.maximum(peak, gl.max(largest, 1) * factor)
    base = new
    if MASKED:  # a row that has seen nothing yet must not compute inf - inf
        base = gl.where(new == NEVER, 0.0, new)
    fade = _exp2(peak - base)
    weights = ()
    for part in gl.static_range(PARTS):
        weights = weights + (_exp2(scores[part] * factor - gl.expand_dims(base, 1)),)
    added = weights[0]
    for part in gl.static_range(1, PARTS):
        added = added + weights[part]
    return new, total * fade + gl.sum(added, 1), fade, weights


@gluon.jit
def _start_scores(q_held, k_ring, stage, blank, PARTS: gl.constexpr):
    """Starts the products of the queries with the keys of a stage, one for each of its pages."""
    qk = ()
    for part in gl.static_range(PARTS):
        keys = k_ring.index(stage * PARTS + part).permute((1, 0))
        qk = qk + (warpgroup_mma(q_held, keys, blank, use_acc=False, is_async=True),)
    return qk


@gluon.jit
def _start_product(weights, v_ring, stage, acc, PARTS: gl.constexpr):
    """Starts the product of the weights with the values of a stage."""
    for part in gl.static_range(PARTS):
        acc = warpgroup_mma(weights[part], v_ring.index(stage * PARTS + part), acc, is_async=True)
    return acc


@gluon.jit
def _all(waited, PARTS: gl.constexpr):
    """What a wait returns, as a tuple."""
    if PARTS == 1:
        found = (waited,)
    else:
        found = waited
    return found


@gluon.jit
def _take_turn(GROUP: gl.constexpr):
    """Waits until the other group has given the matrix unit away."""
    if GROUP == 0:
        _named_barrier("bar.sync 8, 256; // dummy $0")
    else:
        _named_barrier("bar.sync 9, 256; // dummy $0")


@gluon.jit
def _give_turn(GROUP: gl.constexpr):
    """Gives the matrix unit to the other group."""
    if GROUP == 0:
        _named_barrier("bar.arrive 9, 256; // dummy $0")
    else:
        _named_barrier("bar.arrive 8, 256; // dummy $0")


@gluon.jit
def _named_barrier(INSTRUCTION: gl.constexpr):
    gl.inline_asm_elementwise(INSTRUCTION, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _stay(number):
    """Nothing that the assembler moves work across: a loop that never turns for a `number` >= 0.

    Without it the softmax sinks below the wait for a product that it should run beside.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred p; again: setp.lt.s32 p, $1, 0; @p nanosleep.u32 9; @p bra again; "
        "mov.b32 $0, $1; }",
        "=r,r",
        [number],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _weights(
    qk, peak, total, scale, softcap,
    PARTS: gl.constexpr, SOFTCAP: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The softmax of a dense step; the weights as operands of a product."""
    scores = ()
    for part in gl.static_range(PARTS):
        score, factor = _scores(qk[part], scale, softcap, SOFTCAP)
        scores = scores + (score,)
    peak, total, fade, weights = _soften(peak, total, scores, factor, PARTS, False)
    p = ()
    for part in gl.static_range(PARTS):
        p = p + (gl.convert_layout(weights[part].to(DTYPE), LAYOUT),)
    return peak, total, fade, p


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The stage of the ring that follows, and the phase of its barriers."""
    stage += 1
    around = stage == STAGES
    return gl.where(around, 0, stage), gl.where(around, phase ^ 1, phase)


@gluon.jit
def _pages(table, t, stop, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, PARTS: gl.constexpr):
    """The pages in which the parts of tile `t` lie."""
    pages = ()
    for part in gl.static_range(PARTS):
        at = (t * BLOCK_N + part * PART_N) // PAGE
        pages = pages + (gl.load(table + at, mask=t < stop, other=0),)
    return pages


@gluon.jit
def _fetch(
    K, V, K_TILES, V_TILES, k_ring, v_ring, full, free,
    HEADER, WORKER_TABLE, TABLE, KEY_SLOTS, table_width, k_token, k_head, v_token, v_head,
    DK: gl.constexpr, DV: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
    LOOSE_STEPS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Brings the keys and values of all pieces of this program, in the order of their use."""
    PARTS: gl.constexpr = BLOCK_N // PART_N
    k_bytes: gl.constexpr = BLOCK_N * DK * K_TILES.dtype.primitive_bitwidth // 8
    v_bytes: gl.constexpr = BLOCK_N * DV * V_TILES.dtype.primitive_bitwidth // 8
    programs = gl.num_programs(0)
    workers = gl.load(HEADER + WORKERS)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    worker = gl.program_id(0)
    while worker >= 0:
        at = WORKER_TABLE + worker * WORKER_FIELDS
        step = gl.load(at + STEP)
        stop = gl.load(at + STOP)
        start = gl.load(at + START)
        steps = gl.load(at + STEPS)
        blocks = gl.load(at + BLOCKS)
        table = TABLE + gl.load(at + OWNER).to(gl.int64) * table_width
        tile0 = gl.load(at + TILE0)
        tiles = gl.load(at + TILES)
        key0 = gl.load(at + KEY0)
        loose = gl.load(at + LOOSE)
        while step < stop:
            column = (step - start) // steps
            begin = step - start - column * steps
            end = gl.minimum(steps, begin + stop - step)
            head = column // blocks
            first = tile0 + gl.minimum(begin, tiles)
            last = tile0 + gl.minimum(end, tiles)
            pages = _pages(table, first, last, PAGE, BLOCK_N, PARTS)
            if PDL:
                tl.extra.cuda.gdc_wait()
            # A stage takes a tile's keys with the values of the tile before, as they are used.
            if first < last:
                mbarrier.wait(free.index(stage), phase ^ 1)
                mbarrier.expect(full.index(stage), k_bytes)
                _copy(K_TILES, k_ring, full, stage, pages, first, head * DK, PAGE, BLOCK_N, PARTS)
                stage, phase = _next(stage, phase, STAGES)
                for t in range(first + 1, last):
                    before = pages
                    pages = _pages(table, t, last, PAGE, BLOCK_N, PARTS)
                    mbarrier.wait(free.index(stage), phase ^ 1)
                    mbarrier.expect(full.index(stage), k_bytes + v_bytes)
                    _copy(K_TILES, k_ring, full, stage, pages, t, head * DK, PAGE, BLOCK_N, PARTS)
                    _copy(
                        V_TILES, v_ring, full, stage, before, t - 1, head * DV, PAGE, BLOCK_N, PARTS
                    )
                    stage, phase = _next(stage, phase, STAGES)
                mbarrier.wait(free.index(stage), phase ^ 1)
                mbarrier.expect(full.index(stage), v_bytes)
                _copy(
                    V_TILES, v_ring, full, stage, pages, last - 1, head * DV, PAGE, BLOCK_N, PARTS
                )
                stage, phase = _next(stage, phase, STAGES)
            loose_begin, loose_end = _loose_tiles(begin, end, tiles, loose, PARTS, LOOSE_STEPS)
            for t in range(loose_begin, loose_end):
                mbarrier.wait(free.index(stage), phase ^ 1)
                key = key0 + t * PART_N
                _gather(
                    K + head * k_head,
                    KEY_SLOTS,
                    key,
                    key0 + loose,
                    k_ring.index(stage * PARTS),
                    k_token,
                )
                _gather(
                    V + head * v_head,
                    KEY_SLOTS,
                    key,
                    key0 + loose,
                    v_ring.index(stage * PARTS),
                    v_token,
                )
                async_copy.commit_group()
                async_copy.wait_group(0)
                fence_async_shared()
                tl.debug_barrier()  # of every thread, before one of them tells the others
                mbarrier.arrive(full.index(stage))
                stage, phase = _next(stage, phase, STAGES)
            step += end - begin
        worker += programs
        worker = gl.where(worker < workers, worker, -1)


@gluon.jit
def _copy(
    TILES, ring, full, stage, pages, t, dim,
    PAGE: gl.constexpr, BLOCK_N: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Starts the copies of tile `t`, one for each of its pages."""
    for part in gl.static_range(PARTS):
        within = (t * BLOCK_N + part * PART_N) % PAGE
        at = [pages[part].to(gl.int32) * PAGE + within, dim]
        _copy_tile(TILES, at, full.index(stage), ring.index(stage * PARTS + part))


@gluon.jit
def _gather(PAGES, KEY_SLOTS, key, stop, held, token):
    """Starts the copies of keys or values one by one: [N, D], zeros where the slot is -1."""
    N: gl.constexpr = held.shape[0]
    D: gl.constexpr = held.shape[1]
    LANES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    keys = key + gl.arange(0, N, layout=gl.SliceLayout(1, LANES))
    slots = gl.expand_dims(gl.load(KEY_SLOTS + keys, mask=keys < stop, other=-1), 1)
    dims = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, LANES)), 0)
    at = PAGES + slots.to(gl.int64) * token + dims
    _copy_keys(held, at, mask=slots >= 0)


@gluon.jit
def _loose_tiles(
    begin, end, tiles, loose,
    PARTS: gl.constexpr, LOOSE_STEPS: gl.constexpr,
):  # fmt: skip
    """The first tile of loose keys of a piece and the end of them, in tiles of `PART_N` keys."""
    first = (gl.maximum(begin - tiles, 0) + LOOSE_STEPS - 1) // LOOSE_STEPS
    last = (gl.maximum(end - tiles, 0) + LOOSE_STEPS - 1) // LOOSE_STEPS
    return first * PARTS, gl.minimum(last * PARTS, (loose + PART_N - 1) // PART_N)


@gluon.jit
def _words(WORDS, row, real, place, W: gl.constexpr):
    """See `flash._words`, for the next `PART_N` keys."""
    words = ()
    for nth in gl.static_range((PART_N + 31) // 32 + 1):
        word = (place >> 5) + nth
        inside = real & (word >= 0) & (word < W)
        words = words + (gl.load(WORDS + row * W + word, mask=inside, other=0),)
    return words


@gluon.jit
def _seen(word, first, tail):
    """See `flash._seen`."""
    hidden = -tail - first
    ones = gl.where(hidden < 32, -1 << gl.minimum(gl.maximum(hidden, 0), 31), 0)
    return gl.where(first < 0, ones, word).to(gl.uint32, bitcast=True)


@gluon.jit
def _visible(words, place, tail, LAYOUT: gl.constexpr):
    """See `flash._visible`."""
    key = gl.expand_dims(gl.arange(0, PART_N, layout=gl.SliceLayout(0, LAYOUT)), 0)
    first, shift = place & -32, (place & 31).to(gl.uint32)
    found = gl.zeros([place.shape[0], PART_N], gl.uint32, LAYOUT)
    low = _seen(words[0], first, tail)
    for nth in gl.static_range((PART_N + 31) // 32):
        high = _seen(words[nth + 1], first + 32 * (nth + 1), tail)
        bits = (low >> shift) | ((high << 1) << (31 - shift))
        found = gl.where(key // 32 == nth, gl.expand_dims(bits, 1), found)
        low = high
    return (found & (1 << (key % 32).to(gl.uint32))) != 0


@gluon.jit
def _compute(
    GROUP: gl.constexpr,
    q_held, k_ring, v_ring, full, free,
    Q, OUT, LSE, PART, STATES, HEADER, WORKER_TABLE,
    ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, SINKS,
    scale, softcap, q_row, q_head,
    HQ: gl.constexpr, G: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, W: gl.constexpr,
    CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr, HAS_SINKS: gl.constexpr,
    HAS_LSE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    LOOSE_STEPS: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A group's rows of all pieces of this program."""
    M: gl.constexpr = BLOCK_M // GROUPS
    dtype: gl.constexpr = Q.dtype.element_ty
    PARTS: gl.constexpr = BLOCK_N // PART_N
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART_N, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, RESULT)
    Q_LANES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DK, DK // 8], [4, 1], [1, 0])

    if GROUP == 1:
        _give_turn(GROUP)
    programs = gl.num_programs(0)
    workers = gl.load(HEADER + WORKERS)
    stage, phase = gl.to_tensor(0), gl.to_tensor(0)
    worker = gl.program_id(0)
    while worker >= 0:
        at = WORKER_TABLE + worker * WORKER_FIELDS
        step = gl.load(at + STEP)
        stop = gl.load(at + STOP)
        start = gl.load(at + START)
        steps = gl.load(at + STEPS)
        blocks = gl.load(at + BLOCKS)
        row0 = gl.load(at + FIRST_ROW)
        tokens = gl.load(at + TOKENS)
        tiles = gl.load(at + TILES)
        key0 = gl.load(at + KEY0)
        loose = gl.load(at + LOOSE)
        alone = gl.load(at + ALONE)
        slot0 = gl.load(at + SLOT0)
        pieces = gl.load(at + PIECES)
        while step < stop:
            column = (step - start) // steps
            begin = step - start - column * steps
            end = gl.minimum(steps, begin + stop - step)
            head = column // blocks
            packed0 = (column - head * blocks) * BLOCK_M + GROUP * M
            if PDL:  # the work list is older than the launch before; queries and keys are not
                tl.extra.cuda.gdc_wait()

            packed = packed0 + gl.arange(0, M, layout=gl.SliceLayout(1, Q_LANES))
            at_q = Q + (
                (row0 + packed // G).to(gl.int64) * q_row + (head * G + packed % G) * q_head
            )
            dims = gl.arange(0, DK, layout=gl.SliceLayout(0, Q_LANES))
            real = packed < tokens * G
            q = gl.load(
                gl.expand_dims(at_q, 1) + gl.expand_dims(dims, 0),
                mask=gl.expand_dims(real, 1),
                other=0.0,
            )
            tl.debug_barrier()  # the piece before has read its queries
            q_held.store(q)
            fence_async_shared()
            tl.debug_barrier()

            acc = gl.zeros([M, DV], gl.float32, RESULT)
            peak = gl.full([M], NEVER, gl.float32, ROWS)
            total = gl.zeros([M], gl.float32, ROWS)

            # Prefix tiles: every row sees every key.
            blank = gl.zeros([M, PART_N], gl.float32, SCORES)
            p = ()
            for _part in gl.static_range(PARTS):
                p = p + (gl.zeros([M, PART_N], dtype, WEIGHTS),)
            dense = gl.minimum(end, tiles) - gl.minimum(begin, tiles)
            if dense > 0:
                mbarrier.wait(full.index(stage), phase)
                qk = _start_scores(q_held, k_ring, stage, blank, PARTS)
                qk = _all(warpgroup_mma_wait(0, deps=qk), PARTS)
                mbarrier.arrive(free.index(stage))
                stage, phase = _next(stage, phase, STAGES)
                peak, total, fade, p = _weights(
                    qk, peak, total, scale, softcap, PARTS, SOFTCAP, dtype, WEIGHTS
                )
                for _ in range(1, dense):
                    mbarrier.wait(full.index(stage), phase)
                    _take_turn(GROUP)
                    qk = _start_scores(q_held, k_ring, stage, blank, PARTS)
                    product = _start_product(p, v_ring, stage, acc, PARTS)
                    _give_turn(GROUP)
                    qk = _all(warpgroup_mma_wait(PARTS, deps=qk), PARTS)
                    peak, total, fade, p = _weights(
                        qk, peak, total, scale, softcap, PARTS, SOFTCAP, dtype, WEIGHTS
                    )
                    _stay(dense)
                    waited = warpgroup_mma_wait(0, deps=(product,) + p)
                    acc, p = waited[0], waited[1:]
                    mbarrier.arrive(free.index(stage))
                    stage, phase = _next(stage, phase, STAGES)
                    acc = acc * gl.expand_dims(gl.convert_layout(fade, OUT_ROWS), 1)

            # Loose keys: ends of prefixes and trees. What their mask needs comes meanwhile.
            loose_begin, loose_end = _loose_tiles(begin, end, tiles, loose, PARTS, LOOSE_STEPS)
            packed = packed0 + gl.arange(0, M, layout=ROWS)
            row = row0 + packed // G
            masked = (packed < tokens * G) & (loose_begin < loose_end)
            tail = gl.load(ROW_TAILS + row, mask=masked, other=0)
            root = gl.load(ROW_ROOTS + row, mask=masked, other=0)
            behind = key0 + loose_begin * PART_N - root
            if CAUSAL:
                depth = gl.load(ROW_DEPTHS + row, mask=masked, other=-1)
            else:
                words = _words(WORDS, row, masked, behind, W)

            if dense > 0:
                mbarrier.wait(full.index(stage), phase)
                product = _start_product(p, v_ring, stage, acc, PARTS)
                acc = warpgroup_mma_wait(0, deps=(product,))
                mbarrier.arrive(free.index(stage))
                stage, phase = _next(stage, phase, STAGES)

            for _ in range(loose_begin, loose_end):
                mbarrier.wait(full.index(stage), phase)
                qk = _start_scores(q_held, k_ring, stage * PARTS, blank, 1)
                qk = warpgroup_mma_wait(0, deps=qk)
                scores, factor = _scores(qk, scale, softcap, SOFTCAP)
                if CAUSAL:
                    key = gl.arange(0, PART_N, layout=gl.SliceLayout(0, SCORES))
                    key = gl.expand_dims(behind, 1) + gl.expand_dims(key, 0)
                    sees = key >= -gl.expand_dims(tail, 1)
                    sees = sees & (key <= gl.expand_dims(depth, 1))
                else:
                    sees = _visible(words, behind, tail, SCORES)
                scores = gl.where(sees, scores, NEVER)
                behind += PART_N
                if not CAUSAL:
                    words = _words(WORDS, row, masked, behind, W)
                peak, total, fade, weights = _soften(peak, total, (scores,), factor, 1, True)
                acc = acc * gl.expand_dims(gl.convert_layout(fade, OUT_ROWS), 1)
                loose_p = (gl.convert_layout(weights[0].to(dtype), WEIGHTS),)
                product = _start_product(loose_p, v_ring, stage * PARTS, acc, 1)
                acc = warpgroup_mma_wait(0, deps=(product,))
                mbarrier.arrive(free.index(stage))
                stage, phase = _next(stage, phase, STAGES)

            packed = packed0 + gl.arange(0, M, layout=OUT_ROWS)
            row = row0 + packed // G
            query_head = head * G + packed % G
            real = packed < tokens * G
            dims = gl.expand_dims(gl.arange(0, DV, layout=gl.SliceLayout(0, RESULT)), 0)
            peak = gl.convert_layout(peak, OUT_ROWS)
            total = gl.convert_layout(total, OUT_ROWS)
            if (begin == 0) & (end == steps) & (alone > 0):
                if HAS_LSE:
                    lse = (peak + gl.log2(total)) * LN2
                    gl.store(LSE + row * HQ + query_head, lse, mask=real)
                if HAS_SINKS:
                    sink = gl.load(SINKS + query_head, mask=real, other=0.0).to(gl.float32) * LOG2E
                    new = gl.maximum(peak, sink)
                    fade = _exp2(peak - new)
                    total = total * fade + _exp2(sink - new)
                    acc = acc * gl.expand_dims(fade, 1)
                at_out = OUT + gl.expand_dims((row * HQ + query_head).to(gl.int64) * DV, 1) + dims
                out = acc * gl.expand_dims(1 / total, 1)
                gl.store(at_out, out.to(OUT.dtype.element_ty), mask=gl.expand_dims(real, 1))
            else:
                high, both, shrink = _state_of(peak, total, gl.max(gl.abs(acc), 1))
                slot = slot0 + column * pieces + begin // ((steps + pieces - 1) // pieces)
                place = slot * BLOCK_M + GROUP * M + gl.arange(0, M, layout=OUT_ROWS)
                gl.store(STATES + place * 2, high, mask=real)
                gl.store(STATES + place * 2 + 1, both, mask=real)
                left = (acc * gl.expand_dims(shrink, 1)).to(PART.dtype.element_ty)
                at_part = PART + gl.expand_dims(place.to(gl.int64) * DV, 1) + dims
                gl.store(at_part, left, mask=gl.expand_dims(real, 1))
            step += end - begin
        worker += programs
        worker = gl.where(worker < workers, worker, -1)


@gluon.jit(do_not_specialize=["table_width", "fresh"])
def attend_kernel(
    Q, K, V, K_TILES, V_TILES, OUT, LSE, PART, STATES, HEADER, WORKER_TABLE, TABLE,
    KEY_SLOTS, ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, SINKS,
    scale, softcap, table_width, fresh, q_row, q_head, k_token, k_head, v_token, v_head,
    HQ: gl.constexpr, G: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    PAGE: gl.constexpr, W: gl.constexpr, CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr,
    HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, LOOSE_STEPS: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        if fresh > 0:  # see `flash.tree_attention`
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    M: gl.constexpr = BLOCK_M // GROUPS
    dtype: gl.constexpr = Q.dtype.element_ty
    Q_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, DK], dtype)
    q_held = gl.allocate_shared_memory(dtype, [GROUPS, M, DK], Q_TILE)
    PARTS: gl.constexpr = BLOCK_N // PART_N
    k_ring = gl.allocate_shared_memory(dtype, [STAGES * PARTS, PART_N, DK], K_TILES.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES * PARTS, PART_N, DV], V_TILES.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(free.index(stage), GROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (
                0, q_held.index(0), k_ring, v_ring, full, free,
                Q, OUT, LSE, PART, STATES, HEADER, WORKER_TABLE,
                ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, SINKS,
                scale, softcap, q_row, q_head,
                HQ, G, DK, DV, W, CAUSAL, SOFTCAP, HAS_SINKS, HAS_LSE,
                BLOCK_M, BLOCK_N, LOOSE_STEPS, STAGES, PDL,
            )),
            (_compute, (
                1, q_held.index(1), k_ring, v_ring, full, free,
                Q, OUT, LSE, PART, STATES, HEADER, WORKER_TABLE,
                ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, SINKS,
                scale, softcap, q_row, q_head,
                HQ, G, DK, DV, W, CAUSAL, SOFTCAP, HAS_SINKS, HAS_LSE,
                BLOCK_M, BLOCK_N, LOOSE_STEPS, STAGES, PDL,
            )),
            (_fetch, (
                K, V, K_TILES, V_TILES, k_ring, v_ring, full, free,
                HEADER, WORKER_TABLE, TABLE, KEY_SLOTS, table_width,
                k_token, k_head, v_token, v_head,
                DK, DV, PAGE, BLOCK_N, LOOSE_STEPS, STAGES, PDL,
            )),
        ],
        [4, 4],
        [COMPUTE_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


def attend(
    query: Tensor,  # [R, Hq, Dk], the last dimension contiguous
    keys: Tensor,  # [P, page_size, Hkv, Dk], pages contiguous
    values: Tensor,  # [P, page_size, Hkv, Dv]
    out: Tensor,  # [R, Hq, Dv]
    lse: Tensor | None,  # [R, Hq] float32
    part: Tensor,  # [slots, M, Dv]
    states: Tensor,  # [slots, M, 2] float32
    schedule: Schedule,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # [Hq]
    fresh: int,  # 1 for the first user of the work list, which must not look at it early
) -> None:
    """Launches the kernel, which fills `out` and `lse` or leaves partial results.

    `tiles.choose` takes it for what it was checked with. Beyond that it has float16, chains, pages
    of any multiple of 64 tokens, soft caps, sinks and log-sum-exps, and no sliding window.
    """
    tiling = schedule.tiling
    heads, kv_heads = query.shape[1], keys.shape[2]
    attend_kernel[(schedule.programs,)](
        query, keys, values, _tiles(keys), _tiles(values),
        out, states if lse is None else lse, part, states,
        schedule.header, schedule.workers, schedule.page_table,
        schedule.key_slots, schedule.row_roots, schedule.row_tails, schedule.row_depths,
        states if schedule.words is None else schedule.words, states if sinks is None else sinks,
        scale, softcap or 1.0, schedule.page_table.shape[1], fresh,
        query.stride(0), query.stride(1),
        keys.stride(1), keys.stride(2), values.stride(1), values.stride(2),
        HQ=heads, G=heads // kv_heads, DK=query.shape[2], DV=values.shape[3],
        PAGE=schedule.page_size, W=1 if schedule.words is None else schedule.words.shape[1],
        CAUSAL=schedule.causal, SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None,
        HAS_LSE=lse is not None, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        LOOSE_STEPS=tiling.loose_steps, STAGES=tiling.stages, PDL=True,
        num_warps=4, enable_fp_fusion=True, launch_pdl=True,
    )  # fmt: skip


def _tiles(pages: Tensor) -> TensorDescriptor:
    """What the copy engine needs to know, see `flash._tiles`."""
    count, page_size, heads, dim = pages.shape
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[pages.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([PART_N.value, dim], dtype)
    shape, strides = [count * page_size, heads * dim], [pages.stride(1), 1]
    return TensorDescriptor(pages, shape, strides, [PART_N.value, dim], layout)
