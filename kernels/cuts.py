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
def _needed(inner_steps, inner_columns, leaf_steps, leaf_columns, cost, start_steps):
    """How many workers there are if none costs more than `cost`."""
    pieces, takes = _cut(inner_steps, inner_columns, cost, start_steps)
    few = tl.sum(workers_of(inner_columns, pieces, takes), 0)
    pieces, takes = _cut(leaf_steps, leaf_columns, cost, start_steps)
    return few + tl.sum(workers_of(leaf_columns, pieces, takes), 0)


@triton.jit
def even_cuts(
    inner_steps, inner_columns, leaf_steps, leaf_columns, programs, start_steps
):  # fmt: skip
    """Pieces and columns of a worker, for inner items and leaves; see `partition.even_cuts`."""
    work = tl.sum(inner_steps * inner_columns, 0) + tl.sum(leaf_steps * leaf_columns, 0)
    items = tl.sum((inner_steps * inner_columns > 0).to(tl.int32), 0)
    items += tl.sum((leaf_steps * leaf_columns > 0).to(tl.int32), 0)
    rounds = tl.maximum(cdiv(items, programs), 1)
    most = rounds * programs
    low = tl.maximum(cdiv(work, most), 1)
    high = low
    # The least cost that is enough lies between `low` and `high`.
    while _needed(inner_steps, inner_columns, leaf_steps, leaf_columns, high, start_steps) > most:
        low = high + 1
        high = 2 * high
    while low < high:
        middle = (low + high) // 2
        few = _needed(inner_steps, inner_columns, leaf_steps, leaf_columns, middle, start_steps)
        high = tl.where(few <= most, middle, high)
        low = tl.where(few <= most, low, middle + 1)
    longest = tl.maximum(
        tl.max(tl.where(inner_columns > 0, inner_steps, 0), 0),
        tl.max(tl.where(leaf_columns > 0, leaf_steps, 0), 0),
    )
    longest += start_steps
    few = _needed(inner_steps, inner_columns, leaf_steps, leaf_columns, longest, start_steps)
    in_rounds = 16 * cdiv(few, programs) * longest <= 17 * rounds * high
    cost = tl.where(in_rounds, longest, high)
    inner_pieces, inner_takes = _cut(inner_steps, inner_columns, cost, start_steps)
    leaf_pieces, leaf_takes = _cut(leaf_steps, leaf_columns, cost, start_steps)
    return inner_pieces, inner_takes, leaf_pieces, leaf_takes
