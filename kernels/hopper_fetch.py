"""What the copying warps of `hopper.py` do: they bring keys and values in the order of their use.

They run ahead of the warps that compute, and, where keys are older than the work list, of the
launch before, too: while that one ends, the ring fills.

Letters: M packed rows of a block, N keys of a copy.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
)

from specdec.kernels.worklist import (
    BLOCKS,
    FIRST_ROW,
    KEY0,
    LOOSE,
    OWNER,
    SETTLED,
    START,
    STEP,
    STEPS,
    STOP,
    TILE0,
    TILES,
    TOKENS,
    WORKER_FIELDS,
    WORKERS,
)

# Triton 3.6 knows these by another name than later versions do.
_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_keys = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

PART_N = gl.constexpr(64)
"""Keys of a copy and of a product; a step has one or two."""

LANES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
"""One number for every thread of the four warps."""


@gluon.jit
def fetch(
    K, V, K_TILES, V_TILES, k_ring, v_ring, full, free,
    Q, HEADER, WORKER_TABLE, TABLE, KEY_SLOTS, table_width,
    q_row, q_head, k_token, k_head, v_token, v_head,
    HQ: gl.constexpr, G: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, PAGE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    LOOSE_STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings the keys and values of all pieces of this program.

    It has few registers, so it loads fields of its worker again where it needs them: short calls
    took up to 7 % longer where it spilled. With tiles of 64 keys, in pages of 32 and more, Triton
    3.6 gets along with 40.
    """
    PARTS: gl.constexpr = BLOCK_N // PART_N
    # Of keys and of values that are copied one by one; they have as many dimensions.
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DK, DK // 8], [4, 1], [1, 0])
    k_bytes: gl.constexpr = BLOCK_N * DK * K_TILES.dtype.primitive_bitwidth // 8
    v_bytes: gl.constexpr = BLOCK_N * DV * V_TILES.dtype.primitive_bitwidth // 8
    programs = gl.num_programs(0)
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
        settled = gl.load(at + SETTLED)
        while step < stop:
            column = (step - start) // steps
            begin = step - start - column * steps
            end = gl.minimum(steps, begin + stop - step)
            block, head = place_of(column, blocks, HQ // G)
            first = tile0 + gl.minimum(begin, tiles)
            last = tile0 + gl.minimum(end, tiles)
            # A stage takes a tile's keys with the values of the tile before, as they are used.
            pages = _pages(table, first, last, PAGE, BLOCK_N)
            if first < last:
                _until_written(first, settled)
                mbarrier.wait(free.index(stage), phase ^ 1)
                mbarrier.expect(full.index(stage), k_bytes)
                _copy(K_TILES, k_ring, full, stage, pages, first, head * DK, PAGE, BLOCK_N, PARTS)
                stage, phase = next_stage(stage, phase, STAGES)
                for t in range(first + 1, last):
                    before = pages
                    pages = _pages(table, t, last, PAGE, BLOCK_N)
                    _until_written(t, settled)
                    mbarrier.wait(free.index(stage), phase ^ 1)
                    mbarrier.expect(full.index(stage), k_bytes + v_bytes)
                    _copy(K_TILES, k_ring, full, stage, pages, t, head * DK, PAGE, BLOCK_N, PARTS)
                    _copy(
                        V_TILES, v_ring, full, stage, before, t - 1, head * DV, PAGE, BLOCK_N, PARTS
                    )
                    stage, phase = next_stage(stage, phase, STAGES)
                mbarrier.wait(free.index(stage), phase ^ 1)
                mbarrier.expect(full.index(stage), v_bytes)
                _copy(
                    V_TILES, v_ring, full, stage, pages, last - 1, head * DV, PAGE, BLOCK_N, PARTS
                )
                stage, phase = next_stage(stage, phase, STAGES)
            key0 = gl.load(at + KEY0)
            loose = gl.load(at + LOOSE)
            loose_begin, loose_end = loose_tiles(begin, end, tiles, loose, PARTS, LOOSE_STEPS)
            if (worker < programs) & (step == gl.load(at + STEP)):
                row0 = gl.load(at + FIRST_ROW)
                tokens = gl.load(at + TOKENS)
                lane = gl.arange(0, 128, layout=LANES)
                packed = block * BLOCK_M + lane
                row = (row0 + packed // G).to(gl.int64)
                mine = (lane < BLOCK_M) & (packed < tokens * G)
                _ask(Q, row * q_row + (head * G + packed % G) * q_head, mine, DK)
                key = key0 + loose_begin * PART_N + lane
                mine = (lane < PART_N) & (loose_begin < loose_end) & (key < key0 + loose)
                slot = gl.load(KEY_SLOTS + key, mask=mine, other=-1)
                _ask(K + head * k_head, slot.to(gl.int64) * k_token, slot >= 0, DK)
                _ask(V + head * v_head, slot.to(gl.int64) * v_token, slot >= 0, DV)
            tl.extra.cuda.gdc_wait()
            for t in range(loose_begin, loose_end):
                # All slots at once, and before the wait: or copies would wait for them one by one.
                slots = _slots(KEY_SLOTS, key0 + t * PART_N, key0 + loose, LINES)
                mbarrier.wait(free.index(stage), phase ^ 1)
                _gather(K + head * k_head, slots, k_ring.index(stage * PARTS), k_token, LINES)
                _gather(V + head * v_head, slots, v_ring.index(stage * PARTS), v_token, LINES)
                async_copy.commit_group()
                async_copy.wait_group(0)
                fence_async_shared()
                tl.debug_barrier()  # of every thread, before one of them tells the others
                mbarrier.arrive(full.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
            step += end - begin
        worker = next_worker(worker, gl.load(HEADER + WORKERS))


@gluon.jit
def next_worker(worker, workers):
    """See `flash.next_worker`."""
    programs = gl.num_programs(0)
    if workers > programs:
        worker = 2 * programs * (worker // programs + 1) - 1 - worker
        worker = gl.where(worker < workers, worker, -1)
    else:
        worker = -1
    return worker


@gluon.jit
def place_of(column, blocks, HEADS: gl.constexpr):
    """The block of rows and the key/value head of a column, see `worklist`."""
    run = gl.where(blocks > 0, blocks, HEADS)
    major = column // run
    minor = column - major * run
    return gl.where(blocks > 0, minor, major), gl.where(blocks > 0, major, minor)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage of the ring that follows, and the phase of its barriers."""
    stage += 1
    around = stage == STAGES
    return gl.where(around, 0, stage), gl.where(around, phase ^ 1, phase)


@gluon.jit
def loose_tiles(
    begin, end, tiles, loose,
    PARTS: gl.constexpr, LOOSE_STEPS: gl.constexpr,
):  # fmt: skip
    """The first tile of loose keys of a piece and the end of them, in tiles of `PART_N` keys."""
    first = (gl.maximum(begin - tiles, 0) + LOOSE_STEPS - 1) // LOOSE_STEPS
    last = (gl.maximum(end - tiles, 0) + LOOSE_STEPS - 1) // LOOSE_STEPS
    return first * PARTS, gl.minimum(last * PARTS, (loose + PART_N - 1) // PART_N)


@gluon.jit
def _until_written(t, settled):
    """Waits for the launch before if it may write the keys of tile `t`."""
    if t >= settled:
        tl.extra.cuda.gdc_wait()


@gluon.jit
def _pages(table, t, stop, PAGE: gl.constexpr, BLOCK_N: gl.constexpr):
    """The pages in which tile `t` lies, one for each copy."""
    COPY_N: gl.constexpr = min(PAGE, PART_N)
    pages = ()
    for copy in gl.static_range(BLOCK_N // COPY_N):
        at = (t * BLOCK_N + copy * COPY_N) // PAGE
        pages = pages + (gl.load(table + at, mask=t < stop, other=0).to(gl.int32),)
    return pages


@gluon.jit
def _copy(
    TILES, ring, full, stage, pages, t, dim,
    PAGE: gl.constexpr, BLOCK_N: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Starts the copies of tile `t`, one for each of its pages."""
    COPY_N: gl.constexpr = min(PAGE, PART_N)
    EACH: gl.constexpr = PART_N // COPY_N
    for copy in gl.static_range(BLOCK_N // COPY_N):
        within = (t * BLOCK_N + copy * COPY_N) % PAGE
        at = [pages[copy] * PAGE + within, dim]
        room = ring.index(stage * PARTS + copy // EACH)
        if EACH > 1:
            room = room.slice(copy % EACH * COPY_N, COPY_N, dim=0)
        _copy_tile(TILES, at, full.index(stage), room)


@gluon.jit
def _ask(BASE, rows, wanted, COUNT: gl.constexpr):
    """Asks for `COUNT` neighbouring elements behind each of `rows`, see `ahead.bring`."""
    SIZE: gl.constexpr = 128 // (BASE.dtype.element_ty.primitive_bitwidth // 8)
    for element in gl.static_range(0, COUNT, SIZE):
        at = (BASE + rows + element).to(gl.int64)
        gl.inline_asm_elementwise(
            "{ .reg .pred ask; setp.ne.s32 ask, $2, 0; @ask prefetch.global.L2 [$1]; "
            "mov.b32 $0, 0; }",
            "=r,l,r",
            [at, wanted.to(gl.int32)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def _slots(KEY_SLOTS, key, stop, LINES: gl.constexpr):
    """The slots [N] of the next `PART_N` keys, -1 from key `stop` on."""
    keys = key + gl.arange(0, PART_N, layout=gl.SliceLayout(1, LINES))
    return gl.load(KEY_SLOTS + keys, mask=keys < stop, other=-1)


@gluon.jit
def _gather(PAGES, slots, held, token, LINES: gl.constexpr):
    """Starts the copies of keys or values one by one: [N, D], zeros where the slot is -1."""
    slots = gl.expand_dims(slots, 1)
    dims = gl.expand_dims(gl.arange(0, held.shape[1], layout=gl.SliceLayout(0, LINES)), 0)
    at = PAGES + slots.to(gl.int64) * token + dims
    _copy_keys(held, at, mask=slots >= 0)
