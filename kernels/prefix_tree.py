"""Finds which requests share which tiles of their prefixes, inside a planner of one program.

No tree is built: `common[k]` is the number of leading tiles that request k shares with request
k - 1. The nodes of the prefix tree are the intervals of requests between nearest smaller values of
that array, as in a suffix array. Vectors over requests are held in registers.

Letters: B requests, rounded up to a power of two of at least 16.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from specdec.kernels.worklist import AUTO, FLATTEN, UNLIMITED


@triton.jit
def pick(table, index, B: tl.constexpr):
    """table[index] for vectors held in registers; anything where the index is out of range."""
    return tl.gather(table, tl.minimum(tl.maximum(index, 0), B - 1), 0)


@triton.jit
def _intervals(common, prefix, requests, SCRATCH, B: tl.constexpr, WINDOW: tl.constexpr):
    """For every request k the requests around it that share at least what it shares with k - 1.

    Returns [B] vectors: the interval [first, last), the first number in it that shares no more
    than k, the most that two neighbours in it share, and the shortest prefix.
    """
    SOME: tl.constexpr = 16  # rows of the comparison at a time: all would not fit in registers
    column = tl.arange(0, B)[None, :]
    tl.store(SCRATCH + tl.arange(0, B), common)
    tl.debug_barrier()
    for start in range(0, B, SOME):
        k = start + tl.arange(0, SOME)
        mine, row = tl.load(SCRATCH + k)[:, None], k[:, None]
        smaller = common[None, :] < mine
        first = tl.max(tl.where(smaller & (column < row), column, 0), 1)
        last = tl.min(tl.where(smaller & (column > row), column, requests), 1)
        within = (column > first[:, None]) & (column < last[:, None])
        same = within & (common[None, :] == mine)
        tl.store(SCRATCH + B + k, first)
        tl.store(SCRATCH + 2 * B + k, last)
        tl.store(SCRATCH + 3 * B + k, tl.min(tl.where(same, column, row), 1))
        tl.store(SCRATCH + 4 * B + k, tl.max(tl.where(within, common[None, :], -1), 1))
        if WINDOW > 0:
            inside = (column >= first[:, None]) & (column < last[:, None])
            shortest = tl.min(tl.where(inside, prefix[None, :], UNLIMITED), 1)
            tl.store(SCRATCH + 5 * B + k, shortest)
    tl.debug_barrier()
    at = SCRATCH + tl.arange(0, B)
    shortest = tl.load(at + 5 * B) if WINDOW > 0 else common
    return (
        tl.load(at + B), tl.load(at + 2 * B), tl.load(at + 3 * B), tl.load(at + 4 * B), shortest,
    )  # fmt: skip


@triton.jit
def prefix_tree(
    common, row0, rows, loose, prefix, tiles, requests, columns_limit, SCRATCH,
    groups, kv_heads, block_m, block_n, loose_steps, start_steps,
    B: tl.constexpr, WINDOW: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """The nodes that several requests share, each under the number of a request that opens it.

    Returns [B] vectors: of the node the requests [first, last), the tiles above it, its own tiles
    (0 if the number opens none), the number of the node above it (-1 for none) and the shortest
    prefix in it; of the leaf the tiles above it and the number of the node above it; and whether
    the node takes the loose keys of its requests, which then all part right below it.
    """
    k = tl.arange(0, B)
    real = k < requests
    blocks = (rows * groups + block_m - 1) // block_m
    if MODE == AUTO:
        # Rows that fill a block of their own gain nothing from a block with others.
        both = ((rows + pick(rows, k - 1, B)) * groups + block_m - 1) // block_m
        common = tl.where(both < blocks + pick(blocks, k - 1, B), common, 0)
    common = tl.where((k > 0) & real, common, -1)
    first, last, lead, deepest, shortest = _intervals(common, prefix, requests, SCRATCH, B, WINDOW)
    end = tl.where(last < requests, pick(row0, last, B), tl.sum(rows, 0))
    together = ((end - pick(row0, first, B)) * groups + block_m - 1) // block_m
    inner = (lead == k) & (common > 0)
    columns = tl.sum(tl.where(inner, together, 0), 0) * kv_heads
    if columns > columns_limit:  # no room for the partials
        common = tl.minimum(common, 0)
        inner = common > 0
    at_first = pick(common, first, B)
    at_last = tl.where(last < requests, pick(common, last, B), -1)
    depth = tl.maximum(tl.maximum(at_first, at_last), 0)
    node_tiles = tl.where(inner, common - depth, 0)
    above = tl.where(at_first >= at_last, pick(lead, first, B), last)
    above = tl.where(inner & (depth > 0), above, -1)
    after = tl.where(k + 1 < requests, pick(common, k + 1, B), -1)
    leaf_depth = tl.maximum(tl.maximum(common, after), 0)
    leaf_above = tl.where(common >= after, lead, k + 1)
    leaf_above = tl.where(leaf_depth > 0, leaf_above, -1)
    absorbs = tl.zeros([B], tl.int32)
    if (MODE == FLATTEN) | (MODE == AUTO):
        # A node whose requests part right below it may take their loose keys into its own item,
        # where all of them share tiles under a mask.
        own = tl.where(real, tiles - leaf_depth, 0)
        if MODE == AUTO:
            turns = (over(loose, first, last, B) + block_n - 1) // block_n
            alone = (loose + block_n - 1) // block_n * loose_steps
            alone += tl.where(own == 0, start_steps, 0)
            pays = 2 * turns * together * loose_steps < over(alone * blocks, first, last, B)
        else:
            pays = over(own, first, last, B) == 0
        absorbs = (inner & (deepest == common) & pays).to(tl.int32)
    return first, last, depth, node_tiles, above, shortest, leaf_depth, leaf_above, absorbs


@triton.jit
def over(values, first, last, B: tl.constexpr):
    """The sum of `values` over each interval of requests."""
    sums = tl.cumsum(values, 0)
    return pick(sums, last - 1, B) - tl.where(first > 0, pick(sums, first - 1, B), 0)
