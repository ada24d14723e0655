"""What the computing warps of `hopper.py` do: blocks of 64 packed rows, from a ring of tiles.

A group starts the scores of a tile, then the product with the values of the tile before, and does
the softmax of the first while the second runs. While it waits, another group has the matrix unit:
one of the same program, which takes turns with it, or of the multiprocessor's other program.

Overlap within a group and two groups that take turns: FlashAttention-3 (arXiv 2407.08608).

Letters: M packed rows of a group, N keys of a product, W words of ancestor bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from specdec.kernels.hopper_fetch import PART_N, loose_tiles, next_stage, next_worker, place_of
from specdec.kernels.merge import FRACTION, LN2, LOG2E, NEVER
from specdec.kernels.worklist import (
    ALONE,
    BLOCKS,
    FIRST_ROW,
    KEY0,
    LOOSE,
    PIECES,
    SLOT0,
    START,
    STEP,
    STEPS,
    STOP,
    TILES,
    TOKENS,
    WORKER_FIELDS,
    WORKERS,
)

GROUP_M = gl.constexpr(64)
"""Rows of a group of four warps."""


@gluon.jit
def compute(
    GROUP: gl.constexpr,
    q_held, k_ring, v_ring, full, free,
    Q, OUT, LSE, PART, STATES, HEADER, WORKER_TABLE,
    ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, SINKS,
    scale, softcap, q_row, q_head,
    HQ: gl.constexpr, G: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, W: gl.constexpr,
    CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr, HAS_SINKS: gl.constexpr,
    HAS_LSE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    LOOSE_STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A group's rows of all pieces of this program."""
    M: gl.constexpr = GROUP_M
    GROUPS: gl.constexpr = BLOCK_M // GROUP_M
    # Two products' worth of scores leave no registers for what a mask needs.
    EARLY: gl.constexpr = GROUPS == 1
    dtype: gl.constexpr = Q.dtype.element_ty
    PARTS: gl.constexpr = BLOCK_N // PART_N
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART_N, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, RESULT)
    Q_LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DK, DK // 8], [4, 1], [1, 0])
    OUT_LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])

    if GROUP == 1:
        _give_turn(GROUP)
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
            block, head = place_of(column, blocks, HQ // G)
            packed0 = block * BLOCK_M + GROUP * M
            loose_begin, loose_end = loose_tiles(begin, end, tiles, loose, PARTS, LOOSE_STEPS)
            looks = loose_begin < loose_end
            first_key = key0 + loose_begin * PART_N
            if EARLY:
                row, masked, behind, tail, shown = _shown(
                    packed0, row0, tokens, looks, first_key,
                    ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, G, W, CAUSAL, ROWS,
                )  # fmt: skip
            # The work list is older than the launch before; queries and keys are not.
            tl.extra.cuda.gdc_wait()

            mine = packed0 + gl.arange(0, M, layout=gl.SliceLayout(1, Q_LINES))
            at_q = Q + (row0 + mine // G).to(gl.int64) * q_row + (head * G + mine % G) * q_head
            dims = gl.arange(0, DK, layout=gl.SliceLayout(0, Q_LINES))
            q = gl.load(
                gl.expand_dims(at_q, 1) + gl.expand_dims(dims, 0),
                mask=gl.expand_dims(mine < tokens * G, 1),
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
                stage, phase = next_stage(stage, phase, STAGES)
                peak, total, fade, p = _weights(
                    qk, peak, total, scale, softcap, PARTS, SOFTCAP, dtype, WEIGHTS
                )
                for _ in range(1, dense):
                    mbarrier.wait(full.index(stage), phase)
                    if GROUPS == 2:
                        _take_turn(GROUP)
                    qk = _start_scores(q_held, k_ring, stage, blank, PARTS)
                    product = _start_product(p, v_ring, stage, acc, PARTS)
                    if GROUPS == 2:
                        _give_turn(GROUP)
                    qk = _all(warpgroup_mma_wait(PARTS, deps=qk), PARTS)
                    peak, total, fade, p = _weights(
                        qk, peak, total, scale, softcap, PARTS, SOFTCAP, dtype, WEIGHTS
                    )
                    _stay(dense)
                    waited = warpgroup_mma_wait(0, deps=(product,) + p)
                    acc, p = waited[0], waited[1:]
                    mbarrier.arrive(free.index(stage))
                    stage, phase = next_stage(stage, phase, STAGES)
                    acc = acc * gl.expand_dims(gl.convert_layout(fade, OUT_ROWS), 1)

            # Loose keys: ends of prefixes and trees.
            if not EARLY:
                row, masked, behind, tail, shown = _shown(
                    packed0, row0, tokens, looks, first_key,
                    ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS, G, W, CAUSAL, ROWS,
                )  # fmt: skip
            if dense > 0:
                mbarrier.wait(full.index(stage), phase)
                product = _start_product(p, v_ring, stage, acc, PARTS)
                acc = warpgroup_mma_wait(0, deps=(product,))
                mbarrier.arrive(free.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)

            for _ in range(loose_begin, loose_end):
                mbarrier.wait(full.index(stage), phase)
                qk = _start_scores(q_held, k_ring, stage * PARTS, blank, 1)
                qk = warpgroup_mma_wait(0, deps=qk)
                scores, factor = _scores(qk, scale, softcap, SOFTCAP)
                if CAUSAL:
                    key = gl.arange(0, PART_N, layout=gl.SliceLayout(0, SCORES))
                    key = gl.expand_dims(behind, 1) + gl.expand_dims(key, 0)
                    sees = key >= -gl.expand_dims(tail, 1)
                    sees = sees & (key <= gl.expand_dims(shown[0], 1))
                else:
                    sees = _visible(shown, behind, tail, SCORES)
                scores = gl.where(sees, scores, NEVER)
                behind += PART_N
                if not CAUSAL:
                    shown = _words(WORDS, row, masked, behind, W)
                peak, total, fade, weights = _soften(peak, total, (scores,), factor, 1, True)
                acc = acc * gl.expand_dims(gl.convert_layout(fade, OUT_ROWS), 1)
                loose_p = (gl.convert_layout(weights[0].to(dtype), WEIGHTS),)
                product = _start_product(loose_p, v_ring, stage * PARTS, acc, 1)
                acc = warpgroup_mma_wait(0, deps=(product,))
                mbarrier.arrive(free.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)

            result = packed0 + gl.arange(0, M, layout=OUT_ROWS)
            query_head = head * G + result % G
            real = result < tokens * G
            peak = gl.convert_layout(peak, OUT_ROWS)
            total = gl.convert_layout(total, OUT_ROWS)
            rows = gl.arange(0, M, layout=gl.SliceLayout(1, OUT_LINES))
            in_all = packed0 + rows
            if (begin == 0) & (end == steps) & (alone > 0):
                if HAS_LSE:
                    lse = (peak + gl.log2(total)) * LN2
                    gl.store(LSE + (row0 + result // G) * HQ + query_head, lse, mask=real)
                if HAS_SINKS:
                    sink = gl.load(SINKS + query_head, mask=real, other=0.0).to(gl.float32) * LOG2E
                    new = gl.maximum(peak, sink)
                    fade = _exp2(peak - new)
                    total = total * fade + _exp2(sink - new)
                    acc = acc * gl.expand_dims(fade, 1)
                out = acc * gl.expand_dims(1 / total, 1)
                line = (row0 + in_all // G) * HQ + head * G + in_all % G
                _store(OUT, q_held, out, line, in_all < tokens * G, OUT_LINES)
            else:
                high, both, shrink = _state_of(peak, total, gl.max(gl.abs(acc), 1))
                slot = slot0 + column * pieces + begin // ((steps + pieces - 1) // pieces)
                place = slot * BLOCK_M + GROUP * M + gl.arange(0, M, layout=OUT_ROWS)
                gl.store(STATES + place * 2, high, mask=real)
                gl.store(STATES + place * 2 + 1, both, mask=real)
                left = acc * gl.expand_dims(shrink, 1)
                line = slot * BLOCK_M + GROUP * M + rows
                _store(PART, q_held, left, line, in_all < tokens * G, OUT_LINES)
            step += end - begin
        worker = next_worker(worker, workers)


@gluon.jit
def _shown(
    packed0, row0, tokens, looks, first_key, ROW_ROOTS, ROW_TAILS, ROW_DEPTHS, WORDS,
    G: gl.constexpr, W: gl.constexpr, CAUSAL: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """What says which loose keys the group's rows see, from entry `first_key` of the table on.

    Returns:
        The rows [M] and which of them see any, that entry's place in their trees [M], their
        tails [M], and a tuple of [M]: the depths of chains, for trees see `flash._words`.
    """
    packed = packed0 + gl.arange(0, GROUP_M, layout=ROWS)
    row = row0 + packed // G
    masked = looks & (packed < tokens * G)
    tail = gl.load(ROW_TAILS + row, mask=masked, other=0)
    behind = first_key - gl.load(ROW_ROOTS + row, mask=masked, other=0)
    if CAUSAL:
        shown = (gl.load(ROW_DEPTHS + row, mask=masked, other=-1),)
    else:
        shown = _words(WORDS, row, masked, behind, W)
    return row, masked, behind, tail, shown


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
def _store(BASE, room, x, line, real, LINES: gl.constexpr):
    """Stores `x` [M, D], rounded, at the lines `line` of `BASE` [.., D].

    By way of shared memory of that shape, so that a warp writes whole lines: in the layout of a
    product it would write 16 bytes of each of eight.
    """
    D: gl.constexpr = x.shape[1]
    dtype: gl.constexpr = BASE.dtype.element_ty
    tl.debug_barrier()
    room.store(x.to(dtype).to(room.dtype, bitcast=True))
    tl.debug_barrier()
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, LINES))
    at = BASE + gl.expand_dims(line.to(gl.int64) * D, 1) + gl.expand_dims(dims, 0)
    x = room.load(LINES).to(dtype, bitcast=True)
    gl.store(at, x, mask=gl.expand_dims(real, 1))


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )
