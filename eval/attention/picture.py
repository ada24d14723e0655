"""Draws how each mode cuts one prefix tree: `python -m specdec.eval.attention.picture FILE.svg`.

The cut is the planner's own, from `specdec.kernels.partition`. Needs matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specdec.kernels import partition
from specdec.kernels.partition import Item, Request, Shape

TITLES = {
    "sequence": "sequence: every request alone (Flash-Decoding)",
    "node": "node: a worker for each node (DeFT-Node)",
    "node_chunk": "node_chunk: nodes in chunks (DeFT-Node-Chunk)",
    "flatten": "flatten: all keys in a row, cut evenly (DeFT-Flatten)",
    "two_phase": "two_phase: shared chunks, then each request's rest (ChunkAttention)",
    "auto": "auto: even cuts, shared where blocks are saved, ends read together",
}
TILE = 8
SHAPE = Shape(
    TILE, block_m=64, block_n=TILE, groups=1, kv_heads=1, programs=8, loose_steps=1, start_steps=1
)


def example() -> list[Request]:
    """Four requests: 6 tiles are everybody's, 4 more the first two's; the last has a long end."""
    common = list(range(6))
    first = [*common, 6, 7, 8, 9]
    return [
        Request([*first, 10], 10 * TILE + 1, rows=3, places=3),
        Request([*first, 11], 10 * TILE + 2, rows=2, places=2),
        Request([*common, 12], 6 * TILE + 1, rows=2, places=2),
        Request([*common, 13, 14, 15, 16], 9 * TILE + 2, rows=3, places=3),
    ]


def draw(file: Path) -> None:
    """Writes the picture; the ending of the name chooses the format."""
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    requests = example()
    starts = [sum(r.rows for r in requests[:n]) for n in range(len(requests) + 1)]
    figure = Figure(figsize=(10, 12), layout="constrained")
    panels: Any = figure.subplots(len(TITLES), 1, sharex=True)
    palette: Any = colormaps["tab20"]  # one with a list of colours, which its type does not say
    colours = palette.colors
    columns = _columns(requests)
    for axes, (mode, title) in zip(panels, TITLES.items(), strict=True):
        found = partition.items(requests, mode, SHAPE)
        bounds = partition.workers(found, requests, mode, SHAPE)
        step = 0
        for item in found:
            low, high = starts[item.first], starts[item.last]
            for x, width in _cells(item, requests, columns):
                worker = next(n for n, (a, b) in enumerate(bounds) if a <= step < b)
                cell = Rectangle((x, low), width, high - low, ec="white", lw=0.8)
                cell.set_facecolor(colours[worker % len(colours)])
                axes.add_patch(cell)
                axes.text(x + width / 2, (low + high) / 2, str(worker), ha="center", va="center",
                          fontsize=7)  # fmt: skip
                step += 1
        for start in starts[1:-1]:
            axes.axhline(start, color="black", lw=0.5, ls=":")
        used = sum(b > a for a, b in bounds)
        axes.set_title(f"{title}: {step} steps, {used} workers", fontsize=10, loc="left")
        axes.set(ylim=(starts[-1], 0), ylabel="rows", yticks=[])
        axes.set_xlim(0, max(x for x, _ in columns.values()) + 1)
    panels[-1].set_xlabel(
        "tiles of keys, each node of the prefix tree once; narrow: ends of prefixes, and trees"
    )
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "specdec"}):
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _columns(requests: Sequence[Request]) -> dict[tuple[int, int], tuple[float, float]]:
    """Where each (request, tile) is drawn, and how wide; tile -1 are a request's loose keys."""
    places: dict[tuple[int, int], tuple[float, float]] = {}
    x = 0.0
    for item in _depth_first(partition.items(requests, "node", SHAPE)):
        for tile in range(item.tile0, item.tile0 + item.tiles):
            for request in range(item.first, item.last):
                places[request, tile] = (x, 1.0)
            x += 1
        for request in item.loose:
            places[request, -1] = (x, 0.7)
            x += 0.7
    return places


def _depth_first(found: Sequence[Item]) -> list[Item]:
    return sorted(found, key=lambda item: (item.first, item.tile0, item.leaf))


def _cells(
    item: Item, requests: Sequence[Request], columns: dict[tuple[int, int], tuple[float, float]]
) -> Iterator[tuple[float, float]]:
    """The steps of an item, in order, as (x, width)."""
    for tile in range(item.tile0, item.tile0 + item.tiles):
        yield columns[item.first, tile]
    if item.loose:
        ends = [columns[request, -1] for request in item.loose]
        # Short ends share one step; they are drawn as one cell from the first to the last.
        first, last = ends[0], ends[-1]
        assert item.steps(requests, SHAPE) == item.tiles + 1
        yield first[0], last[0] + last[1] - first[0]


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
