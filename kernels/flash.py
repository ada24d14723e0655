"""Flash tree attention in Triton over the work list of `specdec.kernels.worklist`.

One persistent launch: each program works through its interval of steps. Prefix tiles need no mask;
only loose keys (the end of a prefix, and trees) are tested one by one. Rows are query tokens times
the heads of a group, so keys are read once for the whole group. Pieces of cut columns leave their
sums and their maximum. A second launch, which starts while the first one ends, gathers
them in a fixed order under their true maximum: the same inputs give the same bits.

Online softmax and merging: FlashAttention-2 (arXiv 2307.08691) and Flash-Decoding. Keys grouped
with all queries that see them: DeFT (arXiv 2404.00242) and ChunkAttention (arXiv 2402.15220).

Letters: R rows (query tokens), Hq/Hkv query and key/value heads, G = Hq / Hkv, DK/DV head dims,
P pages, M packed rows of a block, N keys of a tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from specdec.kernels.ahead import bring
from specdec.kernels.merge import LN2, LOG2E, NEVER, merge, state_of
from specdec.kernels.worklist import (
    ALONE,
    BLOCKS,
    FIRST_PAGE,
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


@triton.jit
def _scores(qk, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores, and the factor that is still to come before exp2 applies."""
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        scores = 1 - 2 / (tl.exp2(qk * (scale / softcap * 2 * LOG2E)) + 1)
        factor = softcap * LOG2E
    else:
        scores = qk
        factor = scale * LOG2E
    return scores, factor


@triton.jit
def _pages(AT, wanted, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """The pages of a tile, by its parts: one for each, or where a part has several, by key."""
    PART_N: tl.constexpr = BLOCK_N // PARTS
    pages = ()
    for part in tl.static_range(PARTS):
        at, mine = AT + part, wanted
        if PART_N > PAGE:
            key = tl.arange(0, PART_N)
            # Of numbers: the interpreter makes no mask of a truth value and a vector of them.
            at, mine = at + key // PAGE, key < tl.where(wanted, PART_N, 0)
        pages = pages + (tl.load(at, mask=mine, other=0),)
    return pages


@triton.jit
def _at(PAGES, slots, dims, token, NEAR: tl.constexpr):
    """Where keys or values lie: [N, DP]. `NEAR`: 32 bits hold the offset of any of them."""
    offset = slots * token if NEAR else slots.to(tl.int64) * token
    return PAGES + offset[:, None] + dims[None, :]


@triton.jit
def _dense(
    PAGES, TILES, page, offset, head, tile, dims, token,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BULK: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Keys or values of a part of a tile: [PART, DP], zeros behind dimension D."""
    # Narrowed here: a conversion right behind the load of the page ends Triton's pipeline.
    if BULK:
        x = TILES.load([page.to(tl.int32) * PAGE + offset, head * D])
    else:
        if tile.numel > PAGE:
            at = _at(PAGES, page.to(tl.int32) * PAGE + tile % PAGE, dims, token, NEAR)
        else:
            at = PAGES + (page * PAGE + offset) * token + (tile[:, None] * token + dims[None, :])
        x = tl.load(at) if D == DP else tl.load(at, mask=dims[None, :] < D, other=0.0)
    return x


@triton.jit
def _tile(
    PAGES, TILES, pages, offset, head, tile, dims, token,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BULK: tl.constexpr, NEAR: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Keys or values of a tile, by its parts."""
    parts = ()
    for part in tl.static_range(PARTS):
        x = _dense(
            PAGES, TILES, pages[part], offset, head, tile, dims, token, D, DP, PAGE, BULK, NEAR
        )
        parts = parts + (x,)
    return parts


@triton.jit
def _loose(PAGES, slots, dims, token, D: tl.constexpr, NEAR: tl.constexpr):
    """Keys or values one by one: [N, DP], zeros where the slot is -1."""
    at = _at(PAGES, slots, dims, token, NEAR)
    return tl.load(at, mask=(slots[:, None] >= 0) & (dims[None, :] < D), other=0.0)


@triton.jit
def _slots(KEY_SLOTS, key, end):
    """Slots of loose keys, -1 from `end` on."""
    return tl.load(KEY_SLOTS + key, mask=key < end, other=-1)


@triton.jit
def _words(WORDS, row, real, place, W: tl.constexpr, N: tl.constexpr):
    """The words of each row's ancestors that tell of `place` [M] and the next N: tuple of [M]."""
    words = ()
    for nth in tl.static_range((N + 31) // 32 + 1):
        word = (place >> 5) + nth
        inside = real & (word >= 0) & (word < W)
        words = words + (tl.load(WORDS + row * W + word, mask=inside, other=0),)
    return words


@triton.jit
def _seen(word, first, tail):
    """One of these words, whose first bit is for place `first` [M], with the row's tail filled in.

    Before the tree, which begins at place 0, a row sees the last `tail` [M] keys.
    """
    hidden = -tail - first  # bits that lie before the tail
    ones = tl.where(hidden < 32, -1 << tl.minimum(tl.maximum(hidden, 0), 31), 0)
    return tl.where(first < 0, ones, word).to(tl.uint32, bitcast=True)


@triton.jit
def _visible(words, place, tail, N: tl.constexpr):
    """Whether rows see the keys at `place` [M] and the next ones: [M, N]."""
    key = tl.arange(0, N)
    first, shift = place & -32, (place & 31).to(tl.uint32)
    found = tl.zeros([place.shape[0], N], tl.uint32)
    low = _seen(words[0], first, tail)
    for nth in tl.static_range((N + 31) // 32):
        high = _seen(words[nth + 1], first + 32 * (nth + 1), tail)
        bits = (low >> shift) | ((high << 1) << (31 - shift))
        found = tl.where((key // 32 == nth)[None, :], bits[:, None], found)
        low = high
    return (found & (1 << (key % 32).to(tl.uint32))[None, :]) != 0


@triton.jit
def _soften(peak, total, scores, factor, PARTS: tl.constexpr, MASKED: tl.constexpr):
    """The weights of some keys by online softmax, and what is left of those before.

    `scores` are a tuple of [M, N], -inf where a row does not see a key; times `factor` they and
    `peak` are in units of log 2. The product is left to the exponent, where it costs nothing.
    """
    largest = scores[0]
    for part in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, scores[part])
    new = tl.maximum(peak, tl.max(largest, 1) * factor)
    base = new
    if MASKED:  # a row that has seen nothing yet must not compute inf - inf
        base = tl.where(new == NEVER, 0.0, new)
    fade = tl.exp2(peak - base)
    weights = ()
    for part in tl.static_range(PARTS):
        weights = weights + (tl.exp2(scores[part] * factor - base[:, None]),)
    added = weights[0]
    for part in tl.static_range(1, PARTS):
        added = added + weights[part]
    return new, total * fade + tl.sum(added, 1), fade, weights


@triton.jit
def next_worker(worker, workers, programs):
    """The one that is dealt next to the program that had `worker`, or -1; see `partition.dealt`."""
    if workers > programs:
        worker = 2 * programs * (worker // programs + 1) - 1 - worker
        worker = tl.where(worker < workers, worker, -1)
    else:
        worker = -1
    return worker


@triton.jit(do_not_specialize=["table_width", "fresh"])
def _attend_kernel(
    Q,
    K,
    V,
    K_TILES,
    V_TILES,
    OUT,
    LSE,
    PART,
    STATES,
    HEADER,
    WORKER_TABLE,
    TABLE,
    KEY_SLOTS,
    ROW_ROOTS,
    ROW_TAILS,
    ROW_DEPTHS,
    ROW_POSITIONS,
    WORDS,
    SINKS,
    COUNTER,
    scale,
    softcap,
    table_width,
    fresh,
    q_row,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    HQ: tl.constexpr,
    G: tl.constexpr,
    DK: tl.constexpr,
    DKP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    PAGE: tl.constexpr,
    W: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOSE_N: tl.constexpr,
    LOOSE_STAGES: tl.constexpr,
    LOOSE_STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    COUNT: tl.constexpr,
    SAME_TOKEN: tl.constexpr,
    BULK: tl.constexpr,
    BRING: tl.constexpr,
    NEAR: tl.constexpr,
):
    if PDL:
        if fresh > 0:  # the launches before may be those that write the work list
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    programs = tl.num_programs(0)
    workers = tl.load(HEADER + WORKERS)
    q_dtype: tl.constexpr = Q.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if q_dtype == tl.float32 else "tf32"
    PARTS: tl.constexpr = max(1, BLOCK_N // PAGE) if BULK else 1
    PART_N: tl.constexpr = BLOCK_N // PARTS
    # Tiles of keys and values that are asked for side by side wait on one barrier, which steps of
    # many rows are glad of. Those of few rows wait for memory, and need values later than keys.
    TOGETHER: tl.constexpr = BLOCK_M > 16
    k_dims, v_dims = tl.arange(0, DKP), tl.arange(0, DVP)
    block_rows, tile = tl.arange(0, BLOCK_M), tl.arange(0, PART_N)
    loose_tile = tl.arange(0, LOOSE_N)

    # The table has a record for every program, so that none waits for the number of workers.
    worker = tl.program_id(0)
    while worker >= 0:
        at = WORKER_TABLE + worker * WORKER_FIELDS
        step = tl.load(at + STEP)
        stop = tl.load(at + STOP)
        start = tl.load(at + START)
        steps = tl.load(at + STEPS)
        blocks = tl.load(at + BLOCKS)
        run = tl.where(blocks > 0, blocks, HQ // G)
        row0 = tl.load(at + FIRST_ROW)
        tokens = tl.load(at + TOKENS)
        owner = tl.load(at + OWNER)
        tile0 = tl.load(at + TILE0)
        tiles = tl.load(at + TILES)
        key0 = tl.load(at + KEY0)
        loose = tl.load(at + LOOSE)
        alone = tl.load(at + ALONE)
        slot0 = tl.load(at + SLOT0)
        pieces = tl.load(at + PIECES)
        entry = step
        found = _pages(at + FIRST_PAGE, worker >= 0, PAGE, BLOCK_N, PARTS)
        pages_at_entry = ()
        for part in tl.static_range(PARTS):
            pages_at_entry = pages_at_entry + (found[part].to(tl.int64),)
        while step < stop:
            column = (step - start) // steps
            begin = step - start - column * steps
            end = tl.minimum(steps, begin + stop - step)
            major, minor = column // run, column % run  # see `worklist` for their order
            head, block = tl.where(blocks > 0, major, minor), tl.where(blocks > 0, minor, major)

            packed = block * BLOCK_M + block_rows
            row = row0 + packed // G
            query_head = head * G + packed % G
            real = packed < tokens * G
            table = TABLE + owner.to(tl.int64) * table_width
            first = tile0 + tl.minimum(begin, tiles)
            last = tile0 + tl.minimum(end, tiles)
            loose_begin = (tl.maximum(begin - tiles, 0) + LOOSE_STEPS - 1) // LOOSE_STEPS
            loose_end = (tl.maximum(end - tiles, 0) + LOOSE_STEPS - 1) // LOOSE_STEPS * BLOCK_N
            loose_begin = loose_begin * (BLOCK_N // LOOSE_N)
            loose_end = (tl.minimum(loose_end, loose) + LOOSE_N - 1) // LOOSE_N
            loose_next = key0 + loose_begin * LOOSE_N + loose_tile
            listed = key0 + tl.where(loose_begin < loose_end, loose, 0)
            # Here, since a division takes long, and there is something to wait for.
            slot = slot0 + column * pieces + begin // ((steps + pieces - 1) // pieces)
            if BULK:
                slots = _slots(KEY_SLOTS, loose_next, listed)
            if PDL:  # the work list is older than the launch before; queries and keys are not
                if BRING:  # noqa: SIM102 - known when the kernel is compiled
                    # What every piece needs first, before all programs ask for their tiles.
                    if (step == entry) & (worker < programs):
                        bring(Q, row.to(tl.int64) * q_row + query_head * q_head, real, DK)
                        if not CAUSAL:
                            for word in tl.static_range(W):
                                bring(WORDS, row * W + word, real & (listed > key0), 1)
                        if block == 0:  # the others read the same keys
                            near = (tile >= 0) & (first < last)
                            within = (first * BLOCK_N + tile) % PAGE
                            for part in tl.static_range(PARTS):
                                token = pages_at_entry[part] * PAGE + within
                                bring(K + head * k_head, token * k_token, near, DK)
                                bring(V + head * v_head, token * v_token, near, DV)
                            if not BULK:  # these stay here; registers are short
                                slots = _slots(KEY_SLOTS, loose_next, listed)
                            token = slots.to(tl.int64)
                            bring(K + head * k_head, token * k_token, slots >= 0, DK)
                            bring(V + head * v_head, token * v_token, slots >= 0, DV)
                tl.extra.cuda.gdc_wait()
            at_q = Q + row[:, None].to(tl.int64) * q_row + query_head[:, None] * q_head
            q = tl.load(
                at_q + k_dims[None, :], mask=real[:, None] & (k_dims[None, :] < DK), other=0.0
            )
            if WINDOW > 0:
                position = tl.load(ROW_POSITIONS + row, mask=real, other=0)
            acc = tl.zeros([BLOCK_M, DVP], tl.float32)
            peak = tl.full([BLOCK_M], NEVER, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            keys = K + head * k_head
            values = V + head * v_head
            if SAME_TOKEN:  # the compiler then works out where a tile lies once for both
                v_token = k_token

            # Prefix tiles: every row sees every key. The page is fetched one step ahead.
            pages = pages_at_entry
            if step > entry:
                pages = _pages(table + first * BLOCK_N // PAGE, first < last, PAGE, BLOCK_N, PARTS)
            for t in tl.range(first, last, num_stages=STAGES):
                now = pages
                next_page = table + (t + 1) * BLOCK_N // PAGE
                pages = _pages(next_page, t + 1 < last, PAGE, BLOCK_N, PARTS)
                within = t * BLOCK_N % PAGE
                ks = _tile(
                    keys, K_TILES, now, within, head, tile, k_dims, k_token,
                    DK, DKP, PAGE, BULK, NEAR, PARTS,
                )  # fmt: skip
                if TOGETHER:
                    vs = _tile(
                        values, V_TILES, now, within, head, tile, v_dims, v_token,
                        DV, DVP, PAGE, BULK, NEAR, PARTS,
                    )  # fmt: skip
                scores = ()
                for part in tl.static_range(PARTS):
                    qk = tl.dot(q, tl.trans(ks[part]).to(q_dtype), input_precision=PRECISION)
                    score, factor = _scores(qk, scale, softcap, SOFTCAP)
                    if WINDOW > 0:
                        key = t * BLOCK_N + part * PART_N + tile
                        far = position[:, None] - key[None, :] >= WINDOW
                        score = tl.where(far, NEVER, score)
                    scores = scores + (score,)
                if not TOGETHER:
                    vs = _tile(
                        values, V_TILES, now, within, head, tile, v_dims, v_token,
                        DV, DVP, PAGE, BULK, NEAR, PARTS,
                    )  # fmt: skip
                peak, total, fade, p = _soften(peak, total, scores, factor, PARTS, WINDOW > 0)
                acc = acc * fade[:, None]
                for part in tl.static_range(PARTS):
                    acc = tl.dot(
                        p[part].to(q_dtype), vs[part].to(q_dtype), acc, input_precision=PRECISION
                    )
            if COUNT:
                tl.atomic_add(COUNTER, (tl.maximum(last - first, 0) * BLOCK_N).to(tl.int64))

            # Loose keys: ends of prefixes and trees. They, too, are looked up one turn ahead.
            root = tl.load(ROW_ROOTS + row, mask=real, other=0)
            tail = tl.load(ROW_TAILS + row, mask=real, other=0)
            for t in tl.range(loose_begin, loose_end, num_stages=LOOSE_STAGES):
                key = key0 + t * LOOSE_N + loose_tile
                if BULK:
                    slots_now = slots
                    loose_next += LOOSE_N
                    slots = _slots(KEY_SLOTS, loose_next, listed)
                else:  # registers are short
                    slots_now = _slots(KEY_SLOTS, key, listed)
                behind = key0 + t * LOOSE_N - root  # place of the first key
                if not CAUSAL:
                    words = _words(WORDS, row, real, behind, W, LOOSE_N)
                k = _loose(keys, slots_now, k_dims, k_token, DK, NEAR)
                v = _loose(values, slots_now, v_dims, v_token, DV, NEAR)
                qk = tl.dot(q, tl.trans(k).to(q_dtype), input_precision=PRECISION)
                scores, factor = _scores(qk, scale, softcap, SOFTCAP)
                if CAUSAL:
                    depth = tl.load(ROW_DEPTHS + row, mask=real, other=-1)
                    least = -tail
                    if WINDOW > 0:
                        least = tl.maximum(least, depth - WINDOW + 1)
                    place = behind[:, None] + loose_tile[None, :]
                    sees = (place >= least[:, None]) & (place <= depth[:, None])
                else:
                    sees = _visible(words, behind, tail, LOOSE_N)
                scores = tl.where(sees, scores, NEVER)
                peak, total, fade, p = _soften(peak, total, (scores,), factor, 1, True)
                acc = tl.dot(
                    p[0].to(q_dtype), v.to(q_dtype), acc * fade[:, None], input_precision=PRECISION
                )
                if COUNT:
                    tl.atomic_add(COUNTER, tl.sum((slots_now >= 0).to(tl.int64), 0))

            if (begin == 0) & (end == steps) & (alone > 0):
                if HAS_LSE:
                    lse = (peak + tl.log2(total)) * LN2
                    tl.store(LSE + row * HQ + query_head, lse, mask=real)
                if HAS_SINKS:
                    sink = tl.load(SINKS + query_head, mask=real, other=0.0).to(tl.float32) * LOG2E
                    new = tl.maximum(peak, sink)
                    fade = tl.exp2(peak - new)
                    total = total * fade + tl.exp2(sink - new)
                    acc = acc * fade[:, None]
                at_out = OUT + (row * HQ + query_head)[:, None].to(tl.int64) * DV + v_dims[None, :]
                out = acc * (1 / total)[:, None]
                mask_out = real[:, None] & (v_dims[None, :] < DV)
                tl.store(at_out, out.to(OUT.dtype.element_ty), mask=mask_out)
            else:
                high, both, shrink = state_of(peak, total, tl.max(tl.abs(acc), 1))
                state = tl.join(high, both)
                line = slot * BLOCK_M + block_rows
                at_state = STATES + line[:, None] * 2 + tl.arange(0, 2)[None, :]
                tl.store(at_state, state, mask=real[:, None])
                left = (acc * shrink[:, None]).to(PART.dtype.element_ty)
                at_part = PART + line[:, None].to(tl.int64) * DV + v_dims[None, :]
                tl.store(at_part, left, mask=real[:, None] & (v_dims[None, :] < DV))
            step += end - begin
        worker = next_worker(worker, workers, programs)


def tree_attention(
    query: Tensor,  # [R, Hq, Dk], the last dimension contiguous
    keys: Tensor,  # [P, page_size, Hkv, Dk], pages contiguous
    values: Tensor,  # [P, page_size, Hkv, Dv]
    schedule: Schedule,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # [Hq]
    lse: Tensor | None = None,  # [R, Hq] float32, filled
    counter: Tensor | None = None,  # [1] int64, grows by the keys that all programs load
) -> Tensor:  # [R, Hq, Dv]
    """See `reference.tree_attention`, the definition."""
    rows, heads, dk = query.shape
    kv_heads, dv = values.shape[2:]
    tiling = schedule.tiling
    out = query.new_empty(rows, heads, dv)
    half = torch.float32 if query.dtype == torch.float32 else torch.float16
    part = query.new_empty(schedule.slots, tiling.block_m, dv, dtype=half)
    states = query.new_empty(schedule.slots, tiling.block_m, 2, dtype=torch.float32)
    # Dependent launch: a kernel starts while the one before ends, and waits where it needs it.
    # What that rests on: the work list must be complete by then, so its first user waits before it
    # looks; attention stores nothing before it waits; every program of the merge waits, and
    # with it everything that comes later, such as the next layer's partials. Hopper's kernel also
    # reads committed keys early, which are as old as the work list.
    dependent = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (9, 0)
    fresh = int(not schedule.used)
    schedule.used = True
    same = {
        "HQ": heads, "G": heads // kv_heads, "DV": dv, "DVP": max(16, triton.next_power_of_2(dv)),
        "BLOCK_M": tiling.block_m, "HAS_SINKS": sinks is not None, "HAS_LSE": lse is not None,
        "PDL": dependent,
    }  # fmt: skip
    nothing = states
    if tiling.roles and counter is None:
        from specdec.kernels import hopper  # needs Gluon

        hopper.attend(
            query, keys, values, out, lse, part, states, schedule, scale, softcap, sinks, fresh
        )
    else:
        _attend_kernel[(schedule.programs,)](
            query, keys, values,
            *(_tiles(p, schedule) if tiling.bulk else p for p in (keys, values)),
            out, nothing if lse is None else lse, part, states,
            schedule.header, schedule.workers,
            schedule.page_table, schedule.key_slots, schedule.row_roots,
            schedule.row_tails, schedule.row_depths, schedule.row_positions,
            nothing if schedule.words is None else schedule.words,
            nothing if sinks is None else sinks, nothing if counter is None else counter,
            scale, softcap or 1.0, schedule.page_table.shape[1], fresh,
            query.stride(0), query.stride(1),
            keys.stride(1), keys.stride(2), values.stride(1), values.stride(2),
            DK=dk, DKP=max(16, triton.next_power_of_2(dk)), PAGE=schedule.page_size,
            W=1 if schedule.words is None else schedule.words.shape[1],
            CAUSAL=schedule.causal, WINDOW=schedule.window or 0, SOFTCAP=softcap is not None,
            BLOCK_N=tiling.block_n, LOOSE_N=tiling.loose_n,
            LOOSE_STAGES=tiling.loose_stages, LOOSE_STEPS=tiling.loose_steps, STAGES=tiling.stages,
            COUNT=counter is not None, SAME_TOKEN=keys.stride(1) == values.stride(1),
            BULK=tiling.bulk, BRING=tiling.bring and dependent,
            NEAR=max(p.shape[0] * p.stride(0) for p in (keys, values)) < 1 << 31, **same,
            num_warps=tiling.warps, enable_fp_fusion=True,
            **({"launch_pdl": True} if dependent else {}),
        )  # fmt: skip
    merge(out, lse, part, states, schedule, sinks, fresh, same)
    return out


def _tiles(pages: Tensor, schedule: Schedule) -> TensorDescriptor:
    """What the copy engine needs to know: pages as rows of all heads, read in tiles of one head."""
    count, size, heads, dim = pages.shape
    shape, strides = [count * size, heads * dim], [pages.stride(1), 1]
    return TensorDescriptor(pages, shape, strides, [min(schedule.tiling.block_n, size), dim])
