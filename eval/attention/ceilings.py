"""What the device can do at best, measured: reading, copying, multiplying, and doing nothing.

The paged read does what attention must do before any maths: tiles of one page and one head, pages
in random order. Sets of pages are used in turn, so that the L2 cache is cold, as in the cases.
"""

from __future__ import annotations

import math
import time

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.eval.attention import clock
from specdec.eval.attention.report import Ceilings, Read

PAGE_SIZE, HEADS, DIM = 64, 8, 128
PAGE_BYTES = 2 * 2 * PAGE_SIZE * HEADS * DIM  # keys and values in bfloat16
SIZES = [2**20 * megabytes for megabytes in (4, 16, 64, 256, 1024, 2048)]
PROGRAMS = (1, 2, 4, 8)  # for each multiprocessor
COPY_BYTES = 2**30
MATMUL_SIDE = 8192


@triton.jit  # type: ignore[untyped-decorator]
def _read_pages(  # type: ignore[no-untyped-def]
    KEYS,
    VALUES,
    ORDER,
    OUT,
    pages,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Loads every tile once; the maximum only keeps the loads from being left out."""
    token, word = tl.arange(0, PAGE), tl.arange(0, WORDS)
    tile = token[:, None] * (HEADS * WORDS) + word[None, :]
    found = tl.full([PAGE, WORDS], 0, tl.int32)
    for index in tl.range(tl.program_id(0), pages * HEADS, tl.num_programs(0)):
        page = tl.load(ORDER + index // HEADS).to(tl.int64)
        at = page * (PAGE * HEADS * WORDS) + index % HEADS * WORDS
        found = tl.maximum(found, tl.load(KEYS + at + tile) ^ tl.load(VALUES + at + tile))
    tl.store(OUT + tl.program_id(0), tl.max(tl.max(found, 1), 0))


@triton.jit
def _nothing(OUT):  # type: ignore[no-untyped-def]
    pass


def measure(device: torch.device) -> Ceilings:
    """All ceilings of a CUDA device; takes some seconds and about 4 GB."""
    reads = measure_reads(device)
    return Ceilings(
        copy_tbps=_copy(device),
        read_tbps=max(read.tbps for read in reads),
        matmul_tflops=_matmul(device),
        null_us=_null(device),
        reads=reads,
    )


def read_pages(keys: Tensor, values: Tensor, order: Tensor, programs: int) -> Tensor:
    """Reads pages and keeps next to nothing.

    Args:
        keys, values: [pages, page_size, Hkv, words] int32, two bfloat16 in a word.
        order: [n] the pages to read.

    Returns:
        [programs] int32, a maximum over the words that each program read.
    """
    _, size, heads, words = keys.shape
    out = torch.empty(programs, dtype=torch.int32, device=keys.device)
    _read_pages[(programs,)](
        keys, values, order, out, len(order), PAGE=size, HEADS=heads, WORDS=words
    )
    return out


def measure_reads(device: torch.device) -> list[Read]:
    """The paged read of every size."""
    properties = torch.cuda.get_device_properties(device)
    pages = SIZES[-1] // PAGE_BYTES
    shape = (pages, PAGE_SIZE, HEADS, DIM // 2)
    keys, values = (torch.randint(2**30, shape, dtype=torch.int32, device=device) for _ in "kv")
    order = torch.randperm(pages, device=device)
    reads = []
    for size in SIZES:
        count = size // PAGE_BYTES
        sets = min(pages // count, math.ceil(4 * properties.L2_cache_size / size))
        parts = order[: sets * count].view(sets, count)
        timed = []
        for each in PROGRAMS:
            programs = min(count * HEADS, each * properties.multi_processor_count)

            def run(index: int, parts: Tensor = parts, programs: int = programs) -> Tensor:
                return read_pages(keys, values, parts[index], programs)

            timed.append((_steady(run, sets), programs))
        us, programs = min(timed)
        reads.append(Read(size / 1e6, programs, us, size / us / 1e6))
    return reads


def _copy(device: torch.device) -> float:
    """1e12 bytes a second, read and written."""
    source, target = torch.ones(2, COPY_BYTES // 4, dtype=torch.int32, device=device)
    # Not `copy_`: in a graph that is a node for the copy engine, which is slower than a kernel.
    return 2 * COPY_BYTES / _steady(lambda _: torch.add(source, 1, out=target), 1) / 1e6


def _matmul(device: torch.device) -> float:
    """1e12 operations a second of a burst too short for the clocks to fall."""
    shape = (MATMUL_SIDE, MATMUL_SIDE)
    a, b = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "ab")
    out = torch.empty_like(a)
    timed = clock.capture(lambda _: torch.matmul(a, b, out=out), 1)
    time.sleep(0.5)
    return 2 * MATMUL_SIDE**3 / min(timed.replay(4)) / 1e6


def _null(device: torch.device) -> float:
    """Microseconds of a graph's node."""
    out = torch.empty(1, device=device)

    def run(_: int) -> Tensor:
        _nothing[(1,)](out)
        return out

    return _steady(run, 1)


def _steady(run: clock.Run, sets: int) -> float:
    """Median microseconds of a call after a short warm-up."""
    timed = clock.capture(run, sets)
    timed.measure(5e3, 10e3)
    return timed.us
