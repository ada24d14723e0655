"""How a planner of one program cuts the columns of all items evenly; see `partition.even_cuts`.

Letters: B items of either kind. Vectors are over items: those that requests share (inner), and what
each has for itself (leaves).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def cdiv(a, b):
    b = tl.maximum(b, 1)
    return (a + b - 1) // b


@triton.jit
def _cut(steps, columns, cost, start_steps):
    """Pieces of a column and columns of a worker that has at most that cost."""
    length = steps + start_steps
    whole = length <= cost
    pieces = cdiv(steps, cdiv(steps, cdiv(steps, cost - start_steps)))
    pieces = tl.where(whole, 1, pieces)
    takes = tl.where(whole, cdiv(columns, cdiv(columns, cost // length)), 1)
    return tl.maximum(pieces, 1), tl.maximum(takes, 1)


@triton.jit
def workers_of(columns, pieces, takes):
    """How many workers an item has."""
    return tl.where(pieces > 1, columns * pieces, cdiv(columns, takes))


@triton.jit
def cost_of(steps, pieces, takes, start_steps):
    """What a worker of an item costs, unless it is a last one."""
    return tl.where(pieces > 1, cdiv(steps, pieces) + start_steps, takes * (steps + start_steps))


@triton.jit
def _needed(inner_steps, inner_columns, leaf_steps, leaf_columns, cost, start_steps):
    """How many workers there are if none costs more than `cost`."""
    pieces, takes = _cut(inner_steps, inner_columns, cost, start_steps)
    few = tl.sum(workers_of(inner_columns, pieces, takes), 0)
    pieces, takes = _cut(leaf_steps, leaf_columns, cost, start_steps)
    return few + tl.sum(workers_of(leaf_columns, pieces, takes), 0)


@triton.jit
def _least(inner_steps, inner_columns, leaf_steps, leaf_columns, most, start_steps):
    """The least cost of a worker with which there are no more than `most`."""
    work = tl.sum(inner_steps * inner_columns, 0) + tl.sum(leaf_steps * leaf_columns, 0)
    low = tl.maximum(cdiv(work, most), 1)
    high = low
    while _needed(inner_steps, inner_columns, leaf_steps, leaf_columns, high, start_steps) > most:
        low = high + 1
        high = 2 * high
    while low < high:
        middle = (low + high) // 2
        few = _needed(inner_steps, inner_columns, leaf_steps, leaf_columns, middle, start_steps)
        high = tl.where(few <= most, middle, high)
        low = tl.where(few <= most, low, middle + 1)
    return high


@triton.jit
def first_workers(
    inner_cost, inner_workers, leaf_cost, leaf_workers, SCRATCH, B: tl.constexpr
):  # fmt: skip
    """The number of each item's first worker: those of costly items come first.

    Leaves behind it in `SCRATCH` the costs of all 2B items, how many workers they have, and these
    numbers.
    """
    SOME: tl.constexpr = 16  # rows of the comparison at a time: all would not fit in registers
    k, column = tl.arange(0, B), tl.arange(0, 2 * B)
    tl.debug_barrier()
    tl.store(SCRATCH + k, inner_cost)
    tl.store(SCRATCH + B + k, leaf_cost)
    tl.store(SCRATCH + 2 * B + k, inner_workers)
    tl.store(SCRATCH + 3 * B + k, leaf_workers)
    tl.debug_barrier()
    cost, workers = tl.load(SCRATCH + column)[None, :], tl.load(SCRATCH + 2 * B + column)[None, :]
    for start in range(0, 2 * B, SOME):
        row = start + tl.arange(0, SOME)
        mine = tl.load(SCRATCH + row)[:, None]
        before = (cost > mine) | ((cost == mine) & (column[None, :] < row[:, None]))
        tl.store(SCRATCH + 4 * B + row, tl.sum(tl.where(before, workers, 0), 1))
    tl.debug_barrier()
    return tl.load(SCRATCH + 4 * B + k), tl.load(SCRATCH + 5 * B + k)


@triton.jit
def _busiest(SCRATCH, programs, B: tl.constexpr):
    """See `partition._busiest`, from what `first_workers` left."""
    SOME: tl.constexpr = 16
    column = tl.arange(0, 2 * B)
    cost, first = tl.load(SCRATCH + column)[None, :], tl.load(SCRATCH + 4 * B + column)[None, :]
    end = first + tl.load(SCRATCH + 2 * B + column)[None, :]
    most = 0
    for start in range(0, 2 * B, SOME):
        at = SCRATCH + start + tl.arange(0, SOME)
        begin = tl.load(at + 4 * B)
        last = tl.minimum(begin + tl.load(at + 2 * B), programs)
        other = (2 * programs - last)[:, None]
        both = tl.load(at) + tl.sum(tl.where((first <= other) & (other < end), cost, 0), 1)
        most = tl.maximum(most, tl.max(tl.where(begin < last, both, 0), 0))
    return most


@triton.jit
def even_cuts(
    inner_steps, inner_columns, leaf_steps, leaf_columns, programs, start_steps, SCRATCH,
    B: tl.constexpr,
):  # fmt: skip
    """Pieces and columns of a worker, for inner items and leaves; see `partition.even_cuts`."""
    items = tl.sum((inner_steps * inner_columns > 0).to(tl.int32), 0)
    items += tl.sum((leaf_steps * leaf_columns > 0).to(tl.int32), 0)
    rounds = tl.maximum(cdiv(items, programs), 1)
    cost = _least(
        inner_steps, inner_columns, leaf_steps, leaf_columns, rounds * programs, start_steps
    )
    longest = tl.maximum(
        tl.max(tl.where(inner_columns > 0, inner_steps, 0), 0),
        tl.max(tl.where(leaf_columns > 0, leaf_steps, 0), 0),
    )
    longest += start_steps
    few = _needed(inner_steps, inner_columns, leaf_steps, leaf_columns, longest, start_steps)
    if 16 * cdiv(few, programs) * longest <= 17 * rounds * cost:
        cost = longest
    if _needed(inner_steps, inner_columns, leaf_steps, leaf_columns, cost, start_steps) <= programs:
        two = _least(
            inner_steps, inner_columns, leaf_steps, leaf_columns, 2 * programs, start_steps
        )
        inner_pieces, inner_takes = _cut(inner_steps, inner_columns, two, start_steps)
        leaf_pieces, leaf_takes = _cut(leaf_steps, leaf_columns, two, start_steps)
        first_workers(
            cost_of(inner_steps, inner_pieces, inner_takes, start_steps),
            workers_of(inner_columns, inner_pieces, inner_takes),
            cost_of(leaf_steps, leaf_pieces, leaf_takes, start_steps),
            workers_of(leaf_columns, leaf_pieces, leaf_takes),
            SCRATCH, B,
        )  # fmt: skip
        if 16 * _busiest(SCRATCH, programs, B) <= 15 * cost:
            cost = two
    inner_pieces, inner_takes = _cut(inner_steps, inner_columns, cost, start_steps)
    leaf_pieces, leaf_takes = _cut(leaf_steps, leaf_columns, cost, start_steps)
    return inner_pieces, inner_takes, leaf_pieces, leaf_takes
