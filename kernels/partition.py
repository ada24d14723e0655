"""What each mode of tree attention means, in plain Python.

`specdec.kernels.schedule` does the same on the device; a test compares the two. This is the place
to read, and to change first. No speed is intended.

A prefix is read in *tiles* of `block_n` keys. A *dense* tile lies in the prefix whole, so every row
below it sees all of it; what is left of a prefix and the tree behind it are *loose* keys, tested
one by one. An *item* is one node of the prefix tree: the tiles that exactly some neighbouring
requests share, for all of their rows. Rows are query tokens times `groups`, cut into blocks of
`block_m`. A *column* is one block of rows against all keys of its item, for one key/value head
(`worklist` says in which order); its *steps* are numbered on from those of the column before, and a
*worker* takes an interval of them: some columns of one item, or a part of a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

Mode = Literal["sequence", "node", "node_chunk", "flatten", "two_phase", "auto"]
MODES: tuple[Mode, ...] = ("sequence", "node", "node_chunk", "flatten", "two_phase", "auto")

EVEN_MODES: tuple[Mode, ...] = ("sequence", "flatten", "auto")  # see `workers`

CHUNK = 2  # steps of a chunk


@dataclass(frozen=True)
class Request:
    """The rows of one sequence."""

    pages: Sequence[int]
    prefix: int  # committed keys
    rows: int
    places: int  # keys behind the prefix that its rows may see


@dataclass(frozen=True)
class Shape:
    """What the cut depends on besides the requests."""

    page_size: int
    block_m: int
    block_n: int
    groups: int
    kv_heads: int
    programs: int
    loose_steps: int = 2  # a tile of loose keys counts as so many steps
    start_steps: int = 4  # so does beginning a column
    window: int | None = None

    def blocks(self, rows: int) -> int:
        return -(-rows * self.groups // self.block_m)

    def loose(self, request: Request) -> int:
        return request.prefix % self.block_n + request.places

    def loose_work(self, keys: int) -> int:
        """What so many loose keys count, in steps."""
        return -(-keys // self.block_n) * self.loose_steps


@dataclass(frozen=True)
class Item:
    """One node of the prefix tree, or a part of it that is computed at once."""

    first: int  # requests [first, last)
    last: int
    tile0: int
    tiles: int
    loose: tuple[int, ...]  # the requests whose loose keys it takes
    leaf: bool

    def steps(self, requests: Sequence[Request], shape: Shape) -> int:
        keys = sum(shape.loose(requests[r]) for r in self.loose)
        return self.tiles + shape.loose_work(keys)

    def columns(self, requests: Sequence[Request], shape: Shape) -> int:
        if not self.steps(requests, shape):
            return 0
        return shape.blocks(sum(r.rows for r in requests[self.first : self.last])) * shape.kv_heads


def items(requests: Sequence[Request], mode: str, shape: Shape) -> list[Item]:
    """The items of a forward: inner nodes from the top down, then what each request has alone.

    `sequence` shares nothing. Every other mode shares each tile among neighbours with equal pages,
    `auto` only where their rows then need fewer blocks.
    """
    common = [0] * len(requests)  # tiles that a request shares with the one before
    for r in range(1, len(requests)):
        if mode != "sequence":
            common[r] = _common(requests[r - 1], requests[r], shape)
        if mode == "auto":
            apart = sum(shape.blocks(requests[q].rows) for q in (r - 1, r))
            if shape.blocks(requests[r - 1].rows + requests[r].rows) >= apart:
                common[r] = 0
    inner: list[Item] = []
    leaves: list[Item] = []

    def split(first: int, last: int, depth: int) -> None:
        if last == first + 1:
            tiles = requests[first].prefix // shape.block_n - depth if requests[first].rows else 0
            own = (first,) if requests[first].rows else ()
            leaves.append(Item(first, last, depth, tiles, own, leaf=True))
            return
        shared = min(common[first + 1 : last])
        if shared > depth:
            inner.append(Item(first, last, depth, shared - depth, (), leaf=False))
        starts = [first, *(r for r in range(first + 1, last) if common[r] == shared), last]
        for a, b in pairwise(starts):
            split(a, b, shared)

    split(0, len(requests), 0)
    if mode in ("flatten", "auto"):
        inner, leaves = _absorb(requests, mode, shape, inner, leaves)
    return [_in_window(item, requests, shape) for item in [*inner, *leaves]]


def _common(a: Request, b: Request, shape: Shape) -> int:
    """Tiles that two requests share: full pages, from the first on."""
    if not a.rows or not b.rows:
        return 0
    pages = 0
    full = min(a.prefix, b.prefix) // shape.page_size
    while pages < full and a.pages[pages] == b.pages[pages]:
        pages += 1
    return pages * shape.page_size // shape.block_n


def _absorb(
    requests: Sequence[Request], mode: str, shape: Shape, inner: list[Item], leaves: list[Item]
) -> tuple[list[Item], list[Item]]:
    """Lets nodes take the loose keys of the requests right below them, if all end there.

    In `flatten` if none of these has a dense tile of its own (short nodes share an item). In `auto`
    if that makes less than half of the steps, since they then follow each other in few columns;
    what it costs to begin a column that is saved counts, too.
    """
    result = []
    for node in inner:
        below = leaves[node.first : node.last]
        direct = all(leaf.tile0 == node.tile0 + node.tiles for leaf in below)
        if mode == "flatten":
            pays = not any(leaf.tiles for leaf in below)
        else:
            own = [requests[leaf.first] for leaf in below]
            keys = [shape.loose(request) for request in own]
            together = shape.loose_work(sum(keys)) * shape.blocks(sum(r.rows for r in own))
            apart = sum(
                (shape.loose_work(n) + (0 if leaf.tiles else shape.start_steps))
                * shape.blocks(request.rows)
                for n, leaf, request in zip(keys, below, own, strict=True)
            )
            pays = 2 * together < apart
        if direct and pays:
            node = replace(node, loose=tuple(range(node.first, node.last)))
            for r in node.loose:
                leaves[r] = replace(leaves[r], loose=())
        result.append(node)
    return result, leaves


def _in_window(item: Item, requests: Sequence[Request], shape: Shape) -> Item:
    """The item without the tiles that lie out of the window of all of its rows."""
    if shape.window is None:
        return item
    shortest = min(r.prefix for r in requests[item.first : item.last])
    start = max(0, shortest - shape.window + 1) // shape.block_n
    cut = min(max(0, start - item.tile0), item.tiles)
    return replace(item, tile0=item.tile0 + cut, tiles=item.tiles - cut)


def workers(
    found: Sequence[Item], requests: Sequence[Request], mode: str, shape: Shape
) -> list[tuple[int, int]]:
    """The interval of steps of each worker: some whole columns of one item, or a part of a column.

    `node` gives each column to one worker; `node_chunk` cuts columns into chunks; `two_phase` cuts
    those of shared nodes only. The others cut evenly, see `even_cuts`. If there are more workers
    than programs, those of costly items come first, see `dealt`. Of an item that is cut, the first
    pieces of all columns come first: the last ones, which are what is left, then fall to the
    programs that find room last.
    """
    work = [(item.steps(requests, shape), item.columns(requests, shape)) for item in found]
    if mode in EVEN_MODES:
        cuts = even_cuts(work, shape)
    else:
        chunked = {"node": (), "node_chunk": (False, True), "two_phase": (False,)}[mode]
        cuts = [
            (max(1, -(-steps // CHUNK)) if item.leaf in chunked else 1, 1)
            for item, (steps, _) in zip(found, work, strict=True)
        ]
    intervals: list[list[tuple[int, int]]] = []
    start = 0
    for (steps, columns), (pieces, takes) in zip(work, cuts, strict=True):
        span = -(-steps // pieces)
        ends = [start + steps * column for column in range(columns + 1)]
        if pieces == 1:
            own = [(ends[c], ends[min(c + takes, columns)]) for c in range(0, columns, takes)]
        else:
            own = [
                (begin + piece * span, min(begin + (piece + 1) * span, end))
                for piece in range(pieces)
                for begin, end in pairwise(ends)
            ]
        intervals.append(own)
        start += steps * columns
    each = [_each(*size, *cut, shape.start_steps) for size, cut in zip(work, cuts, strict=True)]
    order = [*range(len(found))]
    if sum(count for _, count in each) > shape.programs:
        order.sort(key=lambda nth: -each[nth][0])
    return [interval for nth in order for interval in intervals[nth]]


def dealt(workers: int, programs: int) -> list[list[int]]:
    """The workers of each program, in order: dealt out forwards, then backwards, and so on.

    As workers of costly items come first, a program with a costly one then gets a cheap one.
    """
    hands: list[list[int]] = [[] for _ in range(programs)]
    for worker in range(workers):
        turn, place = divmod(worker, programs)
        hands[place if turn % 2 == 0 else programs - 1 - place].append(worker)
    return hands


def even_cuts(work: Sequence[tuple[int, int]], shape: Shape) -> list[tuple[int, int]]:
    """Cuts for the programs of one launch, so that the last of them ends early.

    A worker costs its steps, and `start_steps` for each column that it begins. Every program gets
    one worker, whose cost is the least that leaves none over; or, where that costs about the same,
    several workers of one long column each, one after the other: then neighbours read the same
    keys at the same time, and columns are not cut. Where items are so unlike, or columns go into
    programs so badly, that one worker for each leaves some idle for an eighth of the time, two
    smaller ones are dealt to each.

    Args:
        work: of each item, the steps of a column and its columns.

    Returns:
        Of each item, in how many pieces a column is cut, or how many columns a worker takes: one
        of the two is 1.
    """
    programs, start = shape.programs, shape.start_steps
    rounds = max(1, -(-sum(steps * columns > 0 for steps, columns in work) // programs))

    def cut(cost: int) -> list[tuple[int, int]]:
        return [_cut(steps, columns, cost, start) for steps, columns in work]

    def each(cost: int) -> list[tuple[int, int]]:
        return [_each(*size, *how, start) for size, how in zip(work, cut(cost), strict=True)]

    def needed(cost: int) -> int:
        return sum(count for _, count in each(cost))

    def least(rounds: int) -> int:
        cost = max(1, -(-sum(s * c for s, c in work) // (rounds * programs)))
        while needed(cost) > rounds * programs:
            cost += 1
        return cost

    cost = least(rounds)
    longest = max(steps for steps, _ in work) + start
    if 16 * -(-needed(longest) // programs) * longest <= 17 * rounds * cost:
        cost = longest
    # Else no two workers end an eighth earlier: the mean is what they could reach at best.
    idle = 8 * (sum(s * c for s, c in work) // programs + start) <= 7 * cost
    if idle and needed(cost) <= programs:
        two = least(2)
        if 8 * _busiest(each(two), programs) <= 7 * cost:
            cost = two
    return cut(cost)


def _busiest(each: Sequence[tuple[int, int]], programs: int) -> int:
    """What the program with most work has, at most, if at most two workers are dealt to each.

    Args:
        each: of each item, the cost of a worker and their number.
    """
    ranges = []
    before = 0
    for cost, count in sorted(each, reverse=True):
        ranges.append((cost, before, before + count))
        before += count
    most = 0
    for cost, first, last in ranges:
        if first < min(last, programs):
            other = 2 * programs - min(last, programs)  # of the last program that has one of these
            most = max(most, cost + sum(c for c, a, b in ranges if a <= other < b))
    return most


def _each(steps: int, columns: int, pieces: int, takes: int, start: int) -> tuple[int, int]:
    """The cost of a worker of an item, unless it is a last one, and their number."""
    if not steps * columns:
        return 0, 0
    if pieces > 1:
        return -(-steps // pieces) + start, columns * pieces
    return takes * (steps + start), -(-columns // takes)


def _cut(steps: int, columns: int, cost: int, start: int) -> tuple[int, int]:
    """Pieces and columns of a worker, see `even_cuts`, if it may have that cost.

    Pieces are of one size, except for the last, which is what is left: there are the loose keys.
    """
    if not steps:
        return 1, 1
    if steps + start > cost:
        pieces = -(-steps // max(1, cost - start))
        return -(-steps // -(-steps // pieces)), 1
    workers = -(-columns // (cost // (steps + start)))
    return 1, -(-columns // workers)
