"""What each mode of tree attention means, in plain Python.

`specdec.kernels.schedule` does the same on the device; a test compares the two. This is the place
to read, and to change first. No speed is intended.

A prefix is read in *tiles* of `block_n` keys. A *dense* tile lies in the prefix whole, so every row
below it sees all of it; what is left of a prefix and the tree behind it are *loose* keys, tested
one by one. An *item* is one node of the prefix tree: the tiles that exactly some neighbouring
requests share, for all of their rows. Rows are query tokens times `groups`, cut into blocks of
`block_m`. A *column* is one block of rows against all keys of its item, for one key/value head; its
*steps* are numbered on from those of the column before, and a *worker* takes an interval of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

Mode = Literal["sequence", "node", "node_chunk", "flatten", "two_phase", "auto"]
MODES: tuple[Mode, ...] = ("sequence", "node", "node_chunk", "flatten", "two_phase", "auto")

CHUNK = 2  # steps of a chunk
UNLIMITED = 1 << 30


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
    window: int | None = None

    def blocks(self, rows: int) -> int:
        return -(-rows * self.groups // self.block_m)

    def loose(self, request: Request) -> int:
        return request.prefix % self.block_n + request.places


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
        return self.tiles + -(-keys // shape.block_n) * shape.loose_steps

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

    In `flatten` if none of these has a dense tile of its own (short nodes share an item); in `auto`
    if that makes fewer steps.
    """
    result = []
    for node in inner:
        below = leaves[node.first : node.last]
        direct = all(leaf.tile0 == node.tile0 + node.tiles for leaf in below)
        if mode == "flatten":
            pays = not any(leaf.tiles for leaf in below)
        else:
            loose = [shape.loose(requests[leaf.first]) for leaf in below]
            rows = [requests[leaf.first].rows for leaf in below]
            together = -(-sum(loose) // shape.block_n) * shape.blocks(sum(rows))
            apart = sum(
                -(-keys // shape.block_n) * shape.blocks(n)
                for keys, n in zip(loose, rows, strict=True)
            )
            pays = together < apart
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
    """The interval of steps of each worker.

    `node` gives each column to one worker; `node_chunk` cuts columns into chunks; `two_phase` cuts
    those of shared nodes only. The others cut evenly for the programs of one launch: each column
    by itself if the intervals get little longer by that, else all steps without regard to columns.
    """
    steps = [(item.steps(requests, shape), item.columns(requests, shape)) for item in found]
    total = sum(s * c for s, c in steps)
    if mode in ("sequence", "flatten", "auto"):
        quota = max(1, -(-total // shape.programs))
        for span in range(quota, quota + 4 + quota // 16):
            if sum(-(-s // span) * c for s, c in steps) <= shape.programs:
                return list(_by_column(steps, [span] * len(steps)))
        bounds = [min(total, w * quota) for w in range(shape.programs + 1)]
        return list(pairwise(bounds))
    chunked = {"node": (), "node_chunk": (False, True), "two_phase": (False,)}[mode]
    spans = [CHUNK if item.leaf in chunked else UNLIMITED for item in found]
    return list(_by_column(steps, spans))


def _by_column(steps: Sequence[tuple[int, int]], spans: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for (count, columns), span in zip(steps, spans, strict=True):
        for _ in range(columns):
            for begin in range(0, count, span):
                yield start + begin, start + min(begin + span, count)
            start += count
