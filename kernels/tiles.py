"""Which tile sizes the Triton tree attention runs with. Nothing is tuned at run time.

Half precision and head dims 64 and 128 were measured on an H100 (docs/tree-attention.md), the rest
was not. What the table asks of shared memory is cut down to what the GPU at hand has.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
from packaging.version import Version
from torch import Tensor

from specdec.kernels.worklist import MAX_PARTS, Tiling

INTERPRETED = Tiling(16, 16, 4, 1, 1, loose_n=16)
NARROW = Tiling(64, 64, 4, 3, 2, loose_n=64, bulk=True, roles=True)
WIDE = Tiling(128, 128, 8, 3, 1, loose_n=64, bulk=True, roles=True)
SHORT, LONG = 2048, 32768  # keys
HEAVY = 1 << 27  # packed rows times keys: 32 requests of 64 nodes and 16,384 keys, for a group of 4
RESERVED = 1024  # bytes of shared memory that the system keeps for each program


def choose(
    query: Tensor,  # [R, Hq, Dk]
    keys: Tensor,  # [P, page_size, Hkv, Dk]
    values: Tensor,  # [P, page_size, Hkv, Dv]
    max_rows: int,
    max_prefix: int,
    shared: bool,
    *,
    causal: bool,
    gluon: bool = False,
) -> tuple[Tiling, int]:
    """The tiling for a forward, and the number of programs of its launch.

    Args:
        max_rows: query tokens of the largest request.
        max_prefix: committed keys of the longest, at most.
        shared: whether requests share pages, so that a block may hold rows of several.
        causal: whether rows are chains.
        gluon: whether `hopper.attend` may do it.
    """
    if query.device.type != "cuda":
        return INTERPRETED, 6
    properties = torch.cuda.get_device_properties(query.device)
    processors = properties.multi_processor_count
    kv_heads = keys.shape[2]
    groups = query.shape[1] // kv_heads
    requests = len(query) // max(1, max_rows)
    blocks = triton.cdiv(len(query) * groups, 64)
    measured = not causal or max_rows <= 64
    if gluon and measured and _copied_by_roles(query, keys, values):
        tiling = by_roles(len(query) * groups, max_rows * groups, kv_heads, max_prefix)
        if tiling is not None:
            if tiling == NARROW and max_rows > 16 and not causal:
                tiling = replace(tiling, loose_steps=3)
            if requests > 1 and not shared:  # the next launch fetches keys while this one merges
                tiling = replace(tiling, merges=8)
            # Of the leaves; where requests have unlike numbers of rows, at least.
            columns = max(requests * triton.cdiv(max_rows * groups, 64), blocks) * kv_heads
            # A shared block is cut for all programs: more only make more partial results.
            most = processors if shared else processors // 4
            few = columns <= most and (blocks == 1 or not shared)
            # In the end every multiprocessor should have had the same to read.
            few = few and max_prefix < LONG
            return tiling, _programs(tiling, processors, blocks, max_prefix, few=few)
    several = blocks if max_rows * groups > 16 else requests  # blocks of 16 rows hold one each
    few = several * kv_heads <= processors // 4 and not shared
    width = max(triton.next_power_of_2(keys.shape[3]), triton.next_power_of_2(values.shape[3]))
    element = query.element_size()
    rows = len(query) if shared else max_rows
    # Copying many small pages costs more barriers than it saves instructions.
    bulk = properties.major >= 9 and element == 2 and keys.shape[1] >= 32
    bulk = bulk and _copyable(keys) and _copyable(values)
    tiling = wanted(
        rows * groups,
        max_rows * groups,
        width,
        element,
        bulk=bulk,
        few=few,
        long=max_prefix > SHORT,
        heavy=len(query) * groups * max_prefix >= HEAVY,
    )
    most = MAX_PARTS * keys.shape[1]
    if tiling.block_n > most:
        tiling = replace(tiling, block_n=most, loose_n=min(most, tiling.loose_n))
    tiling = fit(tiling, width, element, properties.shared_memory_per_multiprocessor)
    full, columns = max_rows * groups >= tiling.block_m, requests * kv_heads
    # Where requests share pages, those that fill blocks of their own would all ask for the same,
    # and to ask for many short columns costs more than it brings. Elsewhere long chains lose by it.
    room = processors * tiling.ctas
    bring = not full and columns <= room if shared else not (causal and max_rows > 16)
    tiling = replace(tiling, bring=bring)
    if tiling.block_m == 64 and not causal:
        # A turn of 64 loose keys takes about as long as two of 32, so only trees that fill it take
        # it: with copied tiles in pages of 64 and more, and unless many take turns at once. Where
        # tiles are not copied, a turn waits for the slots of its keys, too.
        crowded = shared and (full or columns > processors)
        wide = max_rows > 32 and keys.shape[1] >= 64 and not crowded
        if wide or (not bulk and (max_rows > 16 or max_prefix > SHORT)):
            tiling = replace(tiling, loose_n=tiling.block_n)
        if max_rows > 16:
            tiling = replace(tiling, loose_steps=3)
    return tiling, _programs(tiling, processors, blocks, max_prefix, few=few)


def _programs(tiling: Tiling, processors: int, blocks: int, prefix: int, *, few: bool) -> int:
    """The programs of a launch: what there is room for, or fewer where columns are `few`.

    Memory keeps up with fewer programs. More of them make more partial results, and leave no room
    for the programs of the merge to wait beside them. Blocks that read the same keys are arithmetic
    sooner.
    """
    room = processors * tiling.ctas
    if tiling.block_m != 64 or not few:
        return room
    if blocks == 1:
        return min(room, processors * 4 // 3)
    if blocks * prefix <= (2 if tiling.roles else 4) * SHORT:
        return min(room, processors)
    return min(room, processors * 3 // 2) if tiling.roles and blocks < 4 else room


def _copied_by_roles(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `hopper.attend` may be for these, by what it was checked with."""
    return (
        query.dtype == keys.dtype == values.dtype == torch.bfloat16
        and keys.shape[3] == values.shape[3] in (64, 128)
        and keys.shape[1] in (16, 32, 64, 128)
        and _copyable(keys)
        and _copyable(values)
    )


def by_roles(packed: int, largest: int, kv_heads: int, prefix: int) -> Tiling | None:
    """The tiling of `hopper.attend`, None where the Triton kernel is faster (docs/benchmarks.md).

    Args:
        packed: rows times group of all requests.
        largest: rows times group of the largest request.
        kv_heads: key/value heads.
        prefix: committed keys of the longest.
    """
    blocks = triton.cdiv(largest, 64)  # of a request
    work = packed * prefix
    if blocks % 2 == 0:  # else the last pair of blocks would be half empty
        if blocks > 2 and prefix >= 1 << 12 and work >= 1 << 23:
            return WIDE
        if prefix >= 1 << 14 and work >= 1 << 24:
            return WIDE
    # Two blocks that read the same keys drift apart where memory is what they wait for.
    if blocks == 2 and packed // largest * blocks * kv_heads > 64:
        return None
    return NARROW


def check_gluon(device: torch.device) -> None:
    """Refuses what `hopper.attend` cannot run on: its Gluon is not settled yet.

    It was run with Triton 3.6 and compiled with 3.9.

    Raises:
        ValueError: another GPU, or another Triton.
    """
    known = Version("3.6") <= Version(triton.__version__) < Version("3.10")
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if not (known and hopper):
        raise ValueError(
            f"backend: gluon needs a Hopper GPU and Triton 3.6 to 3.9, got {device} and "
            f"{triton.__version__}; use triton"
        )


def _copyable(pages: Tensor) -> bool:
    """Whether the copy engine can read tiles of one head, which it cannot pad."""
    dim, size = pages.shape[3], pages.element_size()
    aligned = pages.data_ptr() % 16 == 0 and pages.stride(1) * size % 16 == 0
    return aligned and dim >= 16 and dim == triton.next_power_of_2(dim)


@functools.cache
def wanted(
    packed: int,
    largest: int,
    width: int,
    element: int,
    *,
    bulk: bool = False,
    few: bool = False,
    long: bool = False,
    heavy: bool = False,
) -> Tiling:
    """The best tiling where shared memory does not matter.

    Args:
        packed: rows times group that one block could hold.
        largest: rows times group of the largest request.
        width: head dim, rounded up to a power of two.
        element: bytes of a query element.
        bulk: whether the copy engine can be used.
        few: whether there are few columns, each cut into many pieces.
        long: whether prefixes are.
        heavy: whether the launch is so long that the clocks fall.
    """
    if element == 4:  # IEEE products run on the ordinary units, whatever the tile
        return Tiling(16, 32 if width <= 128 else 16, 4, 2, 2, loose_n=16)
    if width > 128:
        return Tiling(16 if packed <= 16 else 64, 32, 4 if packed <= 16 else 8, 2, 1, bulk=bulk)
    if packed <= 16:
        if not (bulk and few):
            return Tiling(16, 64, 4, 3, 2)
        return Tiling(16, 128, 4, 3, 1, bulk=True) if long else Tiling(16, 64, 4, 2, 3, bulk=True)
    if largest > 128 and width == 128 and (heavy or not bulk):
        stages = 4 if bulk else 3
        return Tiling(128, 64, 8, stages, 1, loose_n=64, loose_stages=2, bulk=bulk)
    return Tiling(64, 64, 4, 3, 2, bulk=bulk)


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
