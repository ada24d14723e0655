"""Builds the work list of the Triton tree attention on the device, in three small launches.

`specdec.kernels.partition` states in plain Python what each mode means; this is the same thing from
device tensors with static shapes, so that it never waits for the host and can be captured.

Letters: B requests, R rows, W words of ancestor bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.cuts import cdiv, even_cuts, first_workers, workers_of
from specdec.kernels.partition import CHUNK, EVEN_MODES, MODES, Mode
from specdec.kernels.prefix_tree import over, pick, prefix_tree
from specdec.kernels.worklist import (
    ALONE,
    AUTO,
    BLOCKS,
    COMMON,
    FIRST_PAGE,
    FIRST_ROW,
    FLATTEN,
    ITEM_FIELDS,
    KEY0,
    KEYS,
    LOOSE,
    NODE,
    NODE_CHUNK,
    OWNER,
    PARENT,
    PARTIALS,
    PIECES,
    PREFIX,
    REQUEST_FIELDS,
    ROW0,
    ROWS,
    SEQUENCE,
    SEQUENCE_MODE,
    SETTLED,
    SLOT0,
    START,
    STEP,
    STEPS,
    STOP,
    TAKES,
    TILE0,
    TILES,
    TOKENS,
    UNLIMITED,
    WORKER0,
    WORKER_FIELDS,
    WORKERS,
    Schedule,
    Tiling,
)

MAX_REQUESTS = 2048
"""One program lays them all out."""


@triton.jit
def _popcount(x):
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _either(a, b):
    return a | b


# What changes from call to call must not make the compiler specialise.
@triton.jit(do_not_specialize=["table_width"])
def _requests(
    ROW_STARTS,
    SEQUENCES,
    NODES,
    ANCESTORS,
    PREFIX_LENS,
    TABLE,
    table_width,
    REQUESTS,
    DEPTHS,
    POSITIONS,
    WINDOWED,
    SEEN,
    W: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGES: tl.constexpr,
):
    """One program a request: its facts, its rows' depths, what it shares with the one before."""
    request = tl.program_id(0)
    row0 = tl.load(ROW_STARTS + request).to(tl.int32)
    end = tl.load(ROW_STARTS + request + 1).to(tl.int32)
    sequence = tl.load(SEQUENCES + row0, mask=row0 < end, other=0).to(tl.int32)
    prefix = tl.load(PREFIX_LENS + sequence).to(tl.int32)
    prefix = tl.where(row0 < end, prefix, 0)
    keys = 0
    base = 0
    if CAUSAL:  # to a part of a chain, what comes before it is prefix, too
        base = tl.load(NODES + row0, mask=row0 < end, other=0).to(tl.int32)
        prefix += base
    if not CAUSAL:
        for word in range(W):
            seen = tl.zeros([BLOCK], tl.int32)
            for first in range(row0, end, BLOCK):
                rows = first + tl.arange(0, BLOCK)
                seen |= tl.load(ANCESTORS + rows * W + word, mask=rows < end, other=0)
            tl.store(SEEN + request * W + word, tl.reduce(seen, 0, _either))
    for first in range(row0, end, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        mine = rows < end
        nodes = tl.load(NODES + rows, mask=mine, other=-1).to(tl.int32)
        nodes = tl.where(mine, nodes - base, -1)
        keys = tl.maximum(keys, tl.max(nodes, 0) + 1)
        if CAUSAL:
            depths = nodes
        else:
            depths = tl.full([BLOCK], -1, tl.int32)
            for word in range(W):
                depths += _popcount(tl.load(ANCESTORS + rows * W + word, mask=mine, other=0))
            if WINDOW > 0:
                # Ancestors stand in order of position, so those out of the window come first.
                excess = depths + 1 - WINDOW
                for word in range(W):
                    bits = tl.load(ANCESTORS + rows * W + word, mask=mine, other=0)
                    drop = tl.minimum(tl.maximum(excess, 0), _popcount(bits))
                    excess -= drop
                    while tl.max(drop, 0) > 0:
                        bits = tl.where(drop > 0, bits & (bits - 1), bits)
                        drop -= 1
                    tl.store(WINDOWED + rows * W + word, bits, mask=mine)
        tl.store(DEPTHS + rows, depths, mask=mine)
        tl.store(POSITIONS + rows, prefix + depths, mask=mine)
    common = 0
    if SHARED:
        if (request > 0) & (row0 < end):
            before = tl.load(ROW_STARTS + request - 1).to(tl.int32)
            if before < row0:
                other = tl.load(SEQUENCES + before).to(tl.int32)
                pages = tl.minimum(prefix, tl.load(PREFIX_LENS + other).to(tl.int32)) // PAGE
                equal = pages
                for first in range(0, pages, PAGES):
                    page = first + tl.arange(0, PAGES)
                    mine = tl.load(
                        TABLE + sequence * table_width + page, mask=page < pages, other=0
                    )
                    theirs = tl.load(TABLE + other * table_width + page, mask=page < pages, other=0)
                    equal = tl.minimum(equal, tl.min(tl.where(mine != theirs, page, pages), 0))
                common = equal * PAGE // BLOCK_N
    at = REQUESTS + request * REQUEST_FIELDS
    tl.store(at + ROW0, row0)
    tl.store(at + ROWS, end - row0)
    tl.store(at + SEQUENCE, sequence)
    tl.store(at + PREFIX, prefix)
    tl.store(at + KEYS, keys)
    tl.store(at + COMMON, common)


# One compilation serves all tilings and heads: whoever starts waits for it.
@triton.jit(
    do_not_specialize=[
        "requests",
        "programs",
        "chunk",
        "columns_limit",
        "groups",
        "kv_heads",
        "block_m",
        "block_n",
        "loose_steps",
        "start_steps",
    ]
)
def _items(
    REQUESTS,
    HEADER,
    ITEMS,
    SCRATCH,
    requests,
    programs,
    chunk,
    columns_limit,
    groups,
    kv_heads,
    block_m,
    block_n,
    loose_steps,
    start_steps,
    B: tl.constexpr,
    WINDOW: tl.constexpr,
    TREE: tl.constexpr,
    MODE: tl.constexpr,
):
    """One program: the prefix tree, its items, and their steps in order."""
    k = tl.arange(0, B)
    real = k < requests
    at = REQUESTS + k * REQUEST_FIELDS
    row0 = tl.load(at + ROW0, mask=real, other=0)
    rows = tl.load(at + ROWS, mask=real, other=0)
    sequence = tl.load(at + SEQUENCE, mask=real, other=0)
    prefix = tl.load(at + PREFIX, mask=real, other=0)
    keys = tl.load(at + KEYS, mask=real, other=0)
    tiles = prefix // block_n
    loose = prefix % block_n + keys
    key0 = tl.cumsum(loose, 0) - loose

    if TREE:
        common = tl.load(at + COMMON, mask=real, other=0)
        first, last, depth, node_tiles, above, shortest, leaf_depth, leaf_above, absorbs = (
            prefix_tree(
                common, row0, rows, loose, prefix, tiles, requests, columns_limit, SCRATCH,
                groups, kv_heads, block_m, block_n, loose_steps, start_steps, B, WINDOW, MODE,
            )
        )  # fmt: skip
        absorbed = tl.where(leaf_above >= 0, pick(absorbs, leaf_above, B), 0)
        inner_row0 = pick(row0, first, B)
        inner_end = tl.where(last < requests, pick(row0, last, B), tl.sum(rows, 0))
        inner_key0 = pick(key0, first, B)
        inner_loose = tl.where(absorbs > 0, over(loose, first, last, B), 0)
        inner_owner = pick(sequence, first, B)
        if WINDOW > 0:
            # Tiles that are out of every row's window; a root stands at the end of its prefix.
            start = tl.maximum(shortest - WINDOW + 1, 0) // block_n
            cut = tl.minimum(tl.maximum(start - depth, 0), node_tiles)
            depth += cut
            node_tiles -= cut
    else:
        nothing = tl.zeros([B], tl.int32)
        depth, node_tiles, inner_loose, inner_owner = nothing, nothing, nothing, nothing
        inner_row0, inner_end, inner_key0, absorbs, absorbed = row0, row0, key0, nothing, nothing
        leaf_depth = nothing
        above, leaf_above = nothing - 1, nothing - 1
    leaf_tiles = tl.where(rows > 0, tiles - leaf_depth, 0)
    leaf_tile0 = leaf_depth
    if WINDOW > 0:
        start = tl.maximum(prefix - WINDOW + 1, 0) // block_n
        cut = tl.minimum(tl.maximum(start - leaf_tile0, 0), leaf_tiles)
        leaf_tile0 += cut
        leaf_tiles -= cut
    inner_steps = node_tiles + (inner_loose + block_n - 1) // block_n * loose_steps
    inner_tokens = inner_end - inner_row0
    inner_blocks = tl.where(inner_steps > 0, (inner_tokens * groups + block_m - 1) // block_m, 0)

    # Leaves: what a request has for itself.
    leaf_loose = tl.where((absorbed > 0) | (rows == 0), 0, loose)
    leaves = tl.zeros([B], tl.int32)  # what the requests of a node keep for themselves
    if TREE:
        leaves = over(tl.where(real, leaf_tiles + leaf_loose, 0), first, last, B)
    leaf_steps = leaf_tiles + (leaf_loose + block_n - 1) // block_n * loose_steps
    leaf_blocks = tl.where(leaf_steps > 0, (rows * groups + block_m - 1) // block_m, 0)

    inner_columns = inner_blocks * kv_heads
    leaf_columns = leaf_blocks * kv_heads
    steps, columns = tl.join(inner_steps, leaf_steps), tl.join(inner_columns, leaf_columns)
    if (MODE == SEQUENCE_MODE) | (MODE == FLATTEN) | (MODE == AUTO):
        pieces, takes = even_cuts(steps, columns, programs, start_steps, SCRATCH, B)
    else:
        leaf = tl.arange(0, 2)[None, :] > 0
        takes = tl.full([B, 2], 1, tl.int32)
        pieces = takes
        if MODE == NODE_CHUNK:
            pieces = cdiv(steps, chunk)
        elif MODE != NODE:
            pieces = tl.where(leaf, 1, cdiv(steps, chunk))
    # In the order of items; where programs take several workers, costly ones come first.
    workers = workers_of(columns, pieces, takes)
    inner_workers, leaf_workers = tl.split(workers)
    inner_worker0 = tl.cumsum(inner_workers, 0) - inner_workers
    leaf_worker0 = tl.sum(inner_workers, 0) + tl.cumsum(leaf_workers, 0) - leaf_workers
    if tl.sum(workers) > programs:
        worker0 = first_workers(steps, columns, pieces, takes, start_steps, SCRATCH, B)
        inner_worker0, leaf_worker0 = tl.split(worker0)
    inner_pieces, leaf_pieces = tl.split(pieces)
    inner_takes, leaf_takes = tl.split(takes)

    inner_work, leaf_work = inner_steps * inner_columns, leaf_steps * leaf_columns
    inner_start = tl.cumsum(inner_work, 0) - inner_work
    leaf_start = tl.sum(inner_work, 0) + tl.cumsum(leaf_work, 0) - leaf_work
    inner_slots, leaf_slots = inner_pieces * inner_columns, leaf_pieces * leaf_columns
    inner_slot0 = tl.cumsum(inner_slots, 0) - inner_slots
    leaf_slot0 = tl.sum(inner_slots, 0) + tl.cumsum(leaf_slots, 0) - leaf_slots
    inner_alone = ((above < 0) & (absorbs > 0) & (leaves == 0)).to(tl.int32)
    leaf_alone = (leaf_above < 0).to(tl.int32)
    partials = tl.sum(tl.where((inner_pieces > 1) | (inner_alone == 0), inner_slots, 0), 0)
    partials += tl.sum(tl.where((leaf_pieces > 1) | (leaf_alone == 0), leaf_slots, 0), 0)
    tl.store(HEADER + WORKERS, tl.sum(workers))
    tl.store(HEADER + PARTIALS, partials)

    at = ITEMS + k * ITEM_FIELDS
    tl.store(at + START, inner_start)
    tl.store(at + STEPS, inner_steps)
    tl.store(at + BLOCKS, tl.where(inner_takes > 1, -inner_blocks, inner_blocks))
    tl.store(at + FIRST_ROW, inner_row0)
    tl.store(at + TOKENS, inner_tokens)
    tl.store(at + OWNER, inner_owner)
    tl.store(at + TILE0, depth)
    tl.store(at + TILES, node_tiles)
    tl.store(at + KEY0, inner_key0)
    tl.store(at + LOOSE, inner_loose)
    tl.store(at + PARENT, above)
    tl.store(at + ALONE, inner_alone)
    tl.store(at + SLOT0, inner_slot0)
    tl.store(at + WORKER0, inner_worker0)
    tl.store(at + PIECES, inner_pieces)
    tl.store(at + TAKES, inner_takes)

    at = ITEMS + (B + k) * ITEM_FIELDS
    tl.store(at + START, leaf_start)
    tl.store(at + STEPS, leaf_steps)
    tl.store(at + BLOCKS, tl.where(leaf_takes > 1, -leaf_blocks, leaf_blocks))
    tl.store(at + FIRST_ROW, row0)
    tl.store(at + TOKENS, rows)
    tl.store(at + OWNER, sequence)
    tl.store(at + TILE0, leaf_tile0)
    tl.store(at + TILES, leaf_tiles)
    tl.store(at + KEY0, key0)
    tl.store(at + LOOSE, leaf_loose)
    tl.store(at + PARENT, leaf_above)
    tl.store(at + ALONE, leaf_alone)
    tl.store(at + SLOT0, leaf_slot0)
    tl.store(at + WORKER0, leaf_worker0)
    tl.store(at + PIECES, leaf_pieces)
    tl.store(at + TAKES, leaf_takes)


@triton.jit(do_not_specialize=["table_width", "max_workers", "max_keys", "total_rows", "requests"])
def _tables(
    REQUESTS,
    HEADER,
    ITEMS,
    PREFIX_LENS,
    TABLE,
    table_width,
    WORKER_TABLE,
    max_workers,
    KEY_SLOTS,
    max_keys,
    ROW_TABLE,
    ROW_ROOTS,
    ROW_TAILS,
    DEPTHS,
    total_rows,
    requests,
    SEEN,
    B: tl.constexpr,
    HKV: tl.constexpr,
    PAGE: tl.constexpr,
    W: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loose keys, rows and workers, each looked up in the prefix sums before it."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, B)
    real = k < requests
    at = REQUESTS + k * REQUEST_FIELDS
    row0 = tl.load(at + ROW0, mask=real, other=UNLIMITED)
    prefix = tl.load(at + PREFIX, mask=real, other=0)
    keys = tl.load(at + KEYS, mask=real, other=0)
    loose = tl.where(real, prefix % BLOCK_N + keys, 0)
    ends = tl.cumsum(loose, 0)
    roots = ends - keys  # where each request's tree begins

    # Loose keys: the end of each prefix and the tree behind it.
    owner = tl.sum((ends[None, :] <= index[:, None]).to(tl.int32), 1)
    found = (owner < requests) & (index < max_keys)
    owner = tl.minimum(owner, requests - 1)
    at = REQUESTS + owner * REQUEST_FIELDS
    length = tl.load(at + PREFIX)
    place = index - pick(roots, owner, B)
    position = tl.where(found, length + place, 0)
    page = tl.minimum(position // PAGE, table_width - 1)
    sequence = tl.load(at + SEQUENCE)
    page = tl.load(TABLE + sequence.to(tl.int64) * table_width + page).to(tl.int32)
    mask = index < max_keys
    if not CAUSAL:  # a place that no row sees may never have been written
        tree = found & (place >= 0)
        seen = tl.load(SEEN + owner * W + place // 32, mask=tree, other=0)
        found = found & ((place < 0) | (((seen >> (place % 32)) & 1) != 0))
    slot = tl.where(found, page * PAGE + position % PAGE, -1)
    tl.store(KEY_SLOTS + index, slot, mask=mask)

    # Rows.
    request = tl.sum((row0[None, :] <= index[:, None]).to(tl.int32), 1) - 1
    # Requests without rows start where the next one does; the last of equals has the rows.
    mask = index < total_rows
    item = B + request  # what the request has for itself comes first
    tail = tl.load(REQUESTS + request * REQUEST_FIELDS + PREFIX, mask=mask, other=0) % BLOCK_N
    if WINDOW > 0:
        depth = tl.load(DEPTHS + index, mask=mask, other=0)
        tail = tl.minimum(tail, tl.maximum(WINDOW - 1 - depth, 0))
    tl.store(ROW_ROOTS + index, pick(roots, request, B), mask=mask)
    tl.store(ROW_TAILS + index, tail, mask=mask)
    for field in tl.static_range(ITEM_FIELDS):
        value = tl.load(ITEMS + item * ITEM_FIELDS + field, mask=mask, other=0)
        tl.store(ROW_TABLE + index * ITEM_FIELDS + field, value, mask=mask)

    # Workers.
    x = tl.arange(0, 2 * B)
    at = ITEMS + x * ITEM_FIELDS
    columns = tl.abs(tl.load(at + BLOCKS)) * HKV
    firsts = tl.load(at + WORKER0)
    ends = firsts + workers_of(columns, tl.load(at + PIECES), tl.load(at + TAKES))
    own = (firsts[None, :] <= index[:, None]) & (index[:, None] < ends[None, :])
    item = tl.max(tl.where(own, x[None, :], -1), 1)
    inside = item >= 0
    item_at = ITEMS + item * ITEM_FIELDS
    steps = tl.load(item_at + STEPS, mask=inside, other=1)
    columns = tl.abs(tl.load(item_at + BLOCKS, mask=inside, other=0)) * HKV
    pieces = tl.load(item_at + PIECES, mask=inside, other=1)
    takes = tl.load(item_at + TAKES, mask=inside, other=1)
    nth = index - tl.load(item_at + WORKER0, mask=inside, other=0)
    # The last pieces of all columns come last, see `partition.workers`.
    whole = pieces == 1
    column = tl.where(whole, nth * takes, nth % tl.maximum(columns, 1))
    piece = tl.where(whole, 0, nth // tl.maximum(columns, 1))
    span = cdiv(steps, pieces)
    step = column * steps + piece * span
    stop = tl.where(pieces > 1, tl.minimum(step + span, (column + 1) * steps), step + takes * steps)
    stop = tl.minimum(stop, columns * steps)
    mask = index < max_workers
    at = WORKER_TABLE + index * WORKER_FIELDS
    for field in tl.static_range(ITEM_FIELDS):
        value = tl.load(item_at + field, mask=mask & inside, other=0)
        tl.store(at + field, value, mask=mask)
    start = tl.load(item_at + START, mask=inside, other=0)
    tl.store(at + STEP, tl.where(inside, start + step, 0), mask=mask)
    tl.store(at + STOP, tl.where(inside, start + stop, 0), mask=mask)
    tile = tl.load(item_at + TILE0, mask=inside, other=0) + step % steps
    owner = tl.load(item_at + OWNER, mask=inside, other=0).to(tl.int64)
    for part in tl.static_range(PARTS):
        page = tl.minimum(tile * BLOCK_N // PAGE + part, table_width - 1)
        page = tl.load(TABLE + owner * table_width + page, mask=mask & inside, other=0)
        tl.store(at + FIRST_PAGE + part, page.to(tl.int32), mask=mask)
    # What comes before a part of a chain may be another part, which this very forward computes.
    committed = tl.load(PREFIX_LENS + owner, mask=mask & inside, other=0).to(tl.int32)
    tl.store(at + SETTLED, committed // BLOCK_N, mask=mask)


def build(
    page_table: Tensor,  # [S, pages] int64
    prefix_lens: Tensor,  # [S] int64
    page_size: int,
    row_starts: Tensor,  # [B + 1] int32, first row of each request
    sequence: Tensor,  # [R]
    nodes: Tensor,  # [R]
    ancestors: Tensor | None,  # [R, W] int32; None: causal chains
    *,
    max_places: int,
    max_prefix: int,
    shared: bool,
    groups: int,
    kv_heads: int,
    window: int | None,
    mode: Mode,
    tiling: Tiling,
    programs: int,
) -> Schedule:
    """Cuts the work of one forward into items, columns and workers, without asking the device.

    Args:
        row_starts: rows of request b are `row_starts[b]:row_starts[b + 1]`, all of one sequence.
            A causal chain may be cut into several requests, parts of nodes that follow each other.
            Sharing is found between neighbours, so requests with a common prefix should be.
        max_places: an upper bound of the keys behind all prefixes together.
        max_prefix: an upper bound of the prefix lengths; only cuts at equal spans need it.
        shared: whether prefixes may share pages; False spares looking.
        groups: query heads of a key/value head.
        window: as in `tree_attention`.
        programs: of the launch; also the workers of an even cut.
    """
    requests, rows = len(row_starts) - 1, len(sequence)
    if requests >= MAX_REQUESTS:
        raise ValueError(f"plan: expected fewer than {MAX_REQUESTS} requests, got {requests}")
    device = sequence.device
    sequence, nodes = sequence.contiguous(), nodes.contiguous()
    ancestors = None if ancestors is None else ancestors.contiguous()
    width = 1 if ancestors is None else ancestors.shape[1]
    slots_per_request = max(16, triton.next_power_of_2(requests))
    blocks = triton.cdiv(rows * groups, tiling.block_m)
    columns = (blocks + requests) * kv_heads  # of the leaves
    shared = shared and mode != "sequence"
    limit = 0
    if shared:
        limit = (3 * blocks + requests) * kv_heads
    columns += limit
    even = mode in EVEN_MODES
    max_keys = requests * (tiling.block_n - 1) + max_places
    # Two rounds, or as many as every item has a worker in, or every column.
    workers = max(2 * programs, programs + 2 * requests, columns)
    if not even:
        steps = triton.cdiv(max_prefix, tiling.block_n)
        steps += triton.cdiv(max_keys, tiling.block_n) * tiling.loose_steps
        workers = columns * (1 if mode == "node" else triton.cdiv(steps, CHUNK))
        workers = max(workers, programs)  # each program looks at the record of its number

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    header, items = empty(16), empty(2 * slots_per_request, 16)
    table = empty(slots_per_request, 8)
    worker_table = empty(workers, 32)
    key_slots, row_table = empty(max_keys), empty(rows, 16)
    row_roots, row_tails = empty(rows), empty(rows)
    row_depths, row_positions = empty(rows), empty(rows)
    seen, scratch = empty(requests, width), empty(6, slots_per_request)
    given = row_depths if ancestors is None else ancestors
    words = empty(rows, width) if window and ancestors is not None else given
    number = MODES.index(mode)
    shape = {"PAGE": page_size, "BLOCK_N": tiling.block_n}
    _requests[(requests,)](
        row_starts, sequence, nodes, given, prefix_lens, page_table, page_table.shape[1],
        table, row_depths, row_positions, words, seen,
        W=width, CAUSAL=ancestors is None, WINDOW=window or 0, SHARED=shared,
        BLOCK=128, PAGES=1024, **shape,
    )  # fmt: skip
    _items[(1,)](
        table, header, items, scratch, requests, programs, CHUNK, limit,
        groups, kv_heads, tiling.block_m, tiling.block_n, tiling.loose_steps, tiling.start_steps,
        B=slots_per_request, WINDOW=window or 0, TREE=shared, MODE=number,
        num_warps=4 if slots_per_request <= 32 else 8,
    )  # fmt: skip
    block = max(16, min(128, 16384 // slots_per_request))  # it meets every request
    _tables[(triton.cdiv(max(max_keys, rows, workers), block),)](
        table, header, items, prefix_lens, page_table, page_table.shape[1],
        worker_table, workers, key_slots, max_keys,
        row_table, row_roots, row_tails, row_depths, rows, requests, seen,
        B=slots_per_request, HKV=kv_heads, W=width, CAUSAL=ancestors is None, WINDOW=window or 0,
        PARTS=max(1, tiling.block_n // page_size), BLOCK=block, **shape,
    )  # fmt: skip
    return Schedule(
        mode, tiling, window, ancestors is None, programs, requests, header, items, worker_table,
        key_slots, row_table, row_roots, row_tails, row_depths, row_positions,
        None if ancestors is None else words, page_table, prefix_lens, page_size, columns + workers,
    )  # fmt: skip
