"""How a planner of one program cuts the columns of all items evenly; see `partition.even_cuts`.

Letters: B items of either kind. Tensors are [B, 2]: items that requests share, and what each has
for itself.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

SOME = tl.constexpr(16)
"""Items that are compared with all others at a time: all would not fit in registers."""


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
def _needed(steps, columns, cost, start_steps):
    """How many workers there are if none costs more than `cost`."""
    pieces, takes = _cut(steps, columns, cost, start_steps)
    return tl.sum(workers_of(columns, pieces, takes))


@triton.jit
def _least(steps, columns, most, start_steps):
    """The least cost of a worker with which there are no more than `most`."""
    low = tl.maximum(cdiv(tl.sum(steps * columns), most), 1)
    high = low
    found = low < 0  # whether `high` is known to be enough: not yet
    while (found == 0) | (low < high):
        cost = tl.where(found, (low + high) // 2, high)
        enough = _needed(steps, columns, cost, start_steps) <= most
        low = tl.where(enough, low, cost + 1)
        high = tl.where(enough, cost, tl.where(found, high, 2 * cost))
        found = found | enough
    return high


@triton.jit
def first_workers(steps, columns, pieces, takes, start_steps, SCRATCH, B: tl.constexpr):
    """The number of each item's first worker: those of costly items come first.

    Leaves in `SCRATCH` the costs of workers that are not a last one, how many each item has, and
    these numbers.
    """
    whole = takes * (steps + start_steps)
    cost = tl.where(pieces > 1, cdiv(steps, pieces) + start_steps, whole)
    place = SCRATCH + tl.arange(0, B)[:, None] + B * tl.arange(0, 2)[None, :]
    tl.debug_barrier()
    tl.store(place, cost)
    tl.store(place + 2 * B, workers_of(columns, pieces, takes))
    tl.debug_barrier()
    item = tl.arange(0, 2 * B)
    cost, workers = tl.load(SCRATCH + item)[None, :], tl.load(SCRATCH + 2 * B + item)[None, :]
    for start in range(0, 2 * B, SOME):
        row = start + tl.arange(0, SOME)
        mine = tl.load(SCRATCH + row)[:, None]
        before = (cost > mine) | ((cost == mine) & (item[None, :] < row[:, None]))
        tl.store(SCRATCH + 4 * B + row, tl.sum(tl.where(before, workers, 0), 1))
    tl.debug_barrier()
    return tl.load(place + 4 * B)


@triton.jit
def _busiest(SCRATCH, programs, B: tl.constexpr):
    """See `partition._busiest`, from what `first_workers` left."""
    item = tl.arange(0, 2 * B)
    cost, first = tl.load(SCRATCH + item)[None, :], tl.load(SCRATCH + 4 * B + item)[None, :]
    end = first + tl.load(SCRATCH + 2 * B + item)[None, :]
    most = 0
    for start in range(0, 2 * B, SOME):
        at = SCRATCH + start + tl.arange(0, SOME)
        begin = tl.load(at + 4 * B)
        last = tl.minimum(begin + tl.load(at + 2 * B), programs)
        other = (2 * programs - last)[:, None]
        both = tl.load(at) + tl.sum(tl.where((first <= other) & (other < end), cost, 0), 1)
        most = tl.maximum(most, tl.max(tl.where(begin < last, both, 0)))
    return most


@triton.jit
def even_cuts(steps, columns, programs, start_steps, SCRATCH, B: tl.constexpr):
    """Pieces and columns of a worker; see `partition.even_cuts`."""
    work = steps * columns
    rounds = tl.maximum(cdiv(tl.sum((work > 0).to(tl.int32)), programs), 1)
    cost = _least(steps, columns, rounds * programs, start_steps)
    longest = tl.max(tl.where(columns > 0, steps, 0)) + start_steps
    few = _needed(steps, columns, longest, start_steps)
    if 16 * cdiv(few, programs) * longest <= 17 * rounds * cost:
        cost = longest
    # Else no two workers end an eighth earlier: the mean is what they could reach at best.
    idle = 8 * (tl.sum(work) // programs + start_steps) <= 7 * cost
    if idle & (_needed(steps, columns, cost, start_steps) <= programs):
        two = _least(steps, columns, 2 * programs, start_steps)
        pieces, takes = _cut(steps, columns, two, start_steps)
        first_workers(steps, columns, pieces, takes, start_steps, SCRATCH, B)
        if 8 * _busiest(SCRATCH, programs, B) <= 7 * cost:
            cost = two
    return _cut(steps, columns, cost, start_steps)
