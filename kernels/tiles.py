"""Which tile sizes the Triton tree attention runs with. Nothing is tuned at run time.

Half precision and head dims up to 128 were measured on an H200 (docs/tree-attention.md), the rest
was not. What the table asks of shared memory is cut down to what the GPU at hand has.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
from torch import Tensor

from specdec.kernels.worklist import Tiling

INTERPRETED = Tiling(16, 16, 4, 1, 1, loose_n=16)
RESERVED = 1024  # bytes of shared memory that the system keeps for each program


def choose(
    query: Tensor,  # [R, Hq, Dk]
    keys: Tensor,  # [P, page_size, Hkv, Dk]
    values: Tensor,  # [P, page_size, Hkv, Dv]
    max_rows: int,
    shared: bool,
) -> tuple[Tiling, int]:
    """The tiling for a forward, and the number of programs of its launch.

    Args:
        max_rows: query tokens of the largest request.
        shared: whether requests share pages, so that a block may hold rows of several.
    """
    if query.device.type != "cuda":
        return INTERPRETED, 6
    properties = torch.cuda.get_device_properties(query.device)
    groups = query.shape[1] // keys.shape[2]
    width = max(triton.next_power_of_2(keys.shape[3]), triton.next_power_of_2(values.shape[3]))
    rows = len(query) if shared else max_rows
    tiling = fit(
        wanted(rows * groups, max_rows * groups, width, query.element_size()),
        width,
        query.element_size(),
        properties.shared_memory_per_multiprocessor,
    )
    return tiling, properties.multi_processor_count * tiling.ctas


@functools.cache
def wanted(packed: int, largest: int, width: int, element: int) -> Tiling:
    """The best tiling where shared memory does not matter.

    Args:
        packed: rows times group that one block could hold.
        largest: rows times group of the largest request.
        width: head dim, rounded up to a power of two.
        element: bytes of a query element.
    """
    if element == 4:  # IEEE products run on the ordinary units, whatever the tile
        return Tiling(16, 32 if width <= 128 else 16, 4, 2, 2, loose_n=16)
    if width > 128:
        return Tiling(16 if packed <= 16 else 64, 32, 4 if packed <= 16 else 8, 2, 1)
    if packed <= 16:
        return Tiling(16, 64, 4, 3, 2)
    if largest > 128 and width == 128:
        return Tiling(128, 64, 8, 3, 1, loose_n=64, loose_stages=2)
    return Tiling(64, 64, 4, 3, 2)


@functools.cache
def fit(tiling: Tiling, width: int, element: int, available: int) -> Tiling:
    """The tiling with fewer programs, stages, keys or rows, until it fits in `available` bytes.

    A program holds its queries and `stages` tiles of keys and of values.
    """

    def need(t: Tiling) -> int:
        held = (t.block_m + 2 * t.stages * t.block_n) * width * element
        return t.ctas * (held + RESERVED)

    while need(tiling) > available:
        if tiling.ctas > 1:
            tiling = replace(tiling, ctas=tiling.ctas - 1)
        elif tiling.stages > 2:
            tiling = replace(tiling, stages=tiling.stages - 1)
        elif tiling.block_n > 16:
            half = tiling.block_n // 2
            tiling = replace(tiling, block_n=half, loose_n=min(half, tiling.loose_n))
        elif tiling.block_m > 16:
            tiling = replace(tiling, block_m=tiling.block_m // 2)
        elif tiling.stages > 1:
            tiling = replace(tiling, stages=1)
        else:
            raise ValueError(
                f"backend: heads of {width} values of {element} bytes do not fit in the "
                f"{available} bytes of this GPU's shared memory; use sdpa"
            )
    return tiling
