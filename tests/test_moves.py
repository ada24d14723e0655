"""Writes, rotations and moves of K and V in Triton, against torch and transformers, bit by bit.

Without a GPU the kernels run in Triton's interpreter, which cannot round to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama import modeling_llama as llama
from transformers.models.phi3 import modeling_phi3 as phi3

from specdec.cache import TreeKVCache
from specdec.pages import LayerShape, PagePool

moves: Any = pytest.importorskip("specdec.kernels.moves", reason="needs Triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = [torch.float32, torch.float16]
ALL_FLOATS = [
    *FLOATS,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (24, 20)]
PAGES, PAGE = 7, 4


def randn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device=DEVICE).to(dtype)


def poisoned(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(size, torch.nan, device=DEVICE).to(dtype)


def some_slots(rows: int) -> Tensor:
    return torch.randperm(PAGES * PAGE, device=DEVICE)[:rows]


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


def written(pages: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """A copy of the pages with the rows in it, by plain indexing."""
    out = pages.clone()
    out.flatten(0, 1).view(torch.uint8)[slots] = rows.to(pages.dtype).contiguous().view(torch.uint8)
    return out


@pytest.mark.parametrize(("dk", "dv"), DIMS)
@pytest.mark.parametrize("heads", [1, 3, 32])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_rows_are_written_and_nothing_else_is(
    heads: int, dk: int, dv: int, dtype: torch.dtype
) -> None:
    rows = 5
    slots = some_slots(rows)
    keys = randn(heads, rows, dk, dtype=dtype).transpose(0, 1)  # as the model hands them over
    values = randn(rows, heads, dk + dv, dtype=dtype)[:, :, dk:]  # a part of something wider
    key_pages = poisoned(PAGES, PAGE, heads, dk, dtype=dtype)
    value_pages = poisoned(PAGES, PAGE, heads, dv, dtype=dtype)
    expected = written(key_pages, slots, keys), written(value_pages, slots, values)
    moves.write_rows(key_pages, value_pages, slots, keys, values)
    assert same_bits(key_pages, expected[0])
    assert same_bits(value_pages, expected[1])


@pytest.mark.parametrize(
    "pages_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_rows_are_cast_to_the_dtype_of_the_pages(pages_dtype: torch.dtype) -> None:
    # Eighths up to 1 are exact in every dtype; on a GPU rounding is tested as well.
    keys = randn(6, 2, 80) if DEVICE.type == "cuda" else torch.randint(-8, 9, (6, 2, 80)) / 8
    slots = some_slots(6)
    key_pages = poisoned(PAGES, PAGE, 2, 80, dtype=pages_dtype)
    value_pages = key_pages.clone()
    expected = written(key_pages, slots, keys)
    moves.write_rows(key_pages, value_pages, slots, keys, keys)
    assert same_bits(key_pages, expected)
    assert same_bits(value_pages, expected)


def rotary_inputs(
    heads: int, kv_heads: int, dk: int, dv: int, rotary: int, dtype: torch.dtype, rows: int = 5
) -> dict[str, Tensor]:
    # The two halves of cosines and sines agree in models; here they differ.
    angles = randn(rows, rotary) * 10
    return {
        "query": randn(heads, rows, dk, dtype=dtype).transpose(0, 1),
        "key_pages": poisoned(PAGES, PAGE, kv_heads, dk, dtype=dtype),
        "value_pages": poisoned(PAGES, PAGE, kv_heads, dv, dtype=dtype),
        "slots": some_slots(rows),
        "keys": randn(kv_heads, rows, dk, dtype=dtype).transpose(0, 1),
        "values": randn(kv_heads, rows, dv, dtype=dtype).transpose(0, 1),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
    }


def rotated_by_transformers(given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The rotated query, and both pages."""
    partial = given["cos"].shape[1] < given["query"].shape[2]
    rotate: Any = (phi3 if partial else llama).apply_rotary_pos_emb
    query, keys = rotate(given["query"], given["keys"], given["cos"], given["sin"], unsqueeze_dim=1)
    return (
        query,
        written(given["key_pages"], given["slots"], keys),
        written(given["value_pages"], given["slots"], given["values"]),
    )


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dk", "dv", "rotary"),
    [
        (4, 4, 64, 64, 64),
        (32, 8, 80, 80, 80),
        (32, 32, 80, 80, 32),  # Phi-2 rotates a part
        (6, 2, 96, 96, 72),
        (32, 8, 128, 128, 128),
        (9, 3, 128, 128, 64),
        (16, 1, 256, 256, 256),
        (3, 1, 24, 20, 6),
    ],
)
def test_rotation_equals_that_of_transformers_to_the_bit(
    heads: int, kv_heads: int, dk: int, dv: int, rotary: int, dtype: torch.dtype
) -> None:
    given = rotary_inputs(heads, kv_heads, dk, dv, rotary, dtype)
    query, key_pages, value_pages = rotated_by_transformers(given)
    assert same_bits(moves.rotate_and_write(**given), query)
    assert same_bits(given["key_pages"], key_pages)
    assert same_bits(given["value_pages"], value_pages)


@pytest.mark.parametrize("rotary", [7, 0, 66])
def test_a_rotary_width_that_does_not_fit_is_refused(rotary: int) -> None:
    given = rotary_inputs(2, 1, 64, 64, rotary, torch.float32)
    with pytest.raises(ValueError, match=f"cos: expected an even width of 2 to 64, got {rotary}"):
        moves.rotate_and_write(**given)


def test_rotation_in_two_dtypes_is_refused() -> None:
    given = rotary_inputs(2, 1, 64, 64, 64, torch.float16)
    with pytest.raises(TypeError, match=r"cos, sin: expected torch.float16, .*got .*float32"):
        moves.rotate_and_write(**given | {"cos": given["cos"].float()})


class Paths:
    """Paths that a commit may move: rising rows behind the committed end of each sequence."""

    def __init__(self, page_size: int, sequences: list[tuple[int, list[int]]]) -> None:
        """`sequences` holds the committed length and the kept rows of each."""
        needed = [(length + max(rows, default=0)) // page_size + 1 for length, rows in sequences]
        self.pages = 1 + sum(needed)
        self.page_size = page_size
        scattered = (torch.randperm(self.pages - 1) + 1).split(needed)
        width = max(len(rows) for _, rows in sequences)
        self.sources = torch.zeros(len(sequences), width, dtype=torch.int64)  # in the trash page
        self.targets = torch.zeros_like(self.sources)
        for path, ((length, rows), table) in enumerate(zip(sequences, scattered, strict=True)):

            def slots(positions: Tensor, table: Tensor = table) -> Tensor:
                return table[positions // page_size] * page_size + positions % page_size

            count = len(rows)
            self.sources[path, :count] = slots(length + torch.tensor(rows, dtype=torch.int64))
            self.targets[path, :count] = slots(length + torch.arange(count))

    def check(self, layers: int, heads: int, dk: int, dv: int, dtype: torch.dtype) -> None:
        """Moves random rows, and compares every bit with a gather followed by a scatter."""
        size = (layers, self.pages, self.page_size, heads)
        keys, values = randn(*size, dk, dtype=dtype), randn(*size, dv, dtype=dtype)
        sources, targets = self.sources.to(DEVICE), self.targets.to(DEVICE)
        expected = []
        for pages in (keys, values):
            flat = pages.clone().flatten(1, 2)
            flat[:, targets.flatten()] = flat[:, sources.flatten()]
            expected.append(flat.view(pages.shape))
        moves.move_rows(keys, values, sources, targets)
        assert same_bits(keys, expected[0])
        assert same_bits(values, expected[1])


drawn_paths = st.builds(
    Paths,
    st.sampled_from([1, 4, 16]),
    st.lists(
        st.tuples(st.integers(0, 20), st.sets(st.integers(0, 45), max_size=40).map(sorted)),
        min_size=1,
        max_size=4,
    ),
)


@settings(max_examples=60, deadline=None)
@given(drawn_paths, st.sampled_from([(1, 3, 5, 7), (2, 2, 80, 80), (3, 1, 24, 20)]))
def test_rows_move_as_if_all_were_read_first(
    paths: Paths, shape: tuple[int, int, int, int]
) -> None:
    paths.check(*shape, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
@pytest.mark.parametrize(("dk", "dv"), DIMS)
@pytest.mark.parametrize("heads", [1, 8])
def test_rows_of_every_width_move(heads: int, dk: int, dv: int, dtype: torch.dtype) -> None:
    sequences = [(3, [0, 1, 4, 5, 9]), (0, [2]), (7, []), (6, list(range(1, 20)))]
    Paths(4, sequences).check(3, heads, dk, dv, dtype)


def test_a_path_of_256_rows_moves_over_itself() -> None:
    Paths(16, [(5, list(range(1, 257))), (0, list(range(0, 512, 2)))]).check(
        2, 1, 80, 24, torch.float32
    )


@pytest.mark.gpu
def test_commits_on_the_device_equal_those_on_the_host() -> None:
    caches = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        layers = [LayerShape(2, 80, 64, torch.bfloat16, device)] * 3
        layers.append(LayerShape(1, 24, 20, torch.bfloat16, device))
        cache = TreeKVCache(PagePool(layers, 4), device)
        sequences = [cache.admit(), cache.admit()]
        generator = torch.Generator().manual_seed(5)
        for _ in range(20):
            with cache.speculate(sequences, [30, 30]) as lease:
                slots = lease.plan_chains().slots
                for group in cache.pool.groups:
                    for pages in (group.keys, group.values):
                        flat = pages.flatten(1, 2)
                        size = (len(flat), len(slots), *flat.shape[2:])
                        rows = torch.randn(size, generator=generator).bfloat16()
                        flat[:, slots] = rows.to(device)
                paths = torch.full((2, 20), -1)
                for path in paths:
                    count = int(torch.randint(1, 20, (), generator=generator))
                    path[:count] = torch.randperm(30, generator=generator)[:count].sort().values
                lease.commit(paths.to(device))
        caches.append(cache)
    host, device_cache = caches
    assert torch.equal(host.lengths[sequences], device_cache.lengths[sequences].cpu())
    for sequence in sequences:
        length = int(host.lengths[sequence])
        slots = host.slots(torch.full((length,), sequence), torch.arange(length))
        for left, right in zip(host.pool.groups, device_cache.pool.groups, strict=True):
            for one, other in ((left.keys, right.keys), (left.values, right.values)):
                other = other.cpu()
                assert same_bits(one.flatten(1, 2)[:, slots], other.flatten(1, 2)[:, slots])


@contextmanager
def synchronisation_forbidden() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of the launch, which has run once before, for its kernel to be compiled."""
    launch()
    with synchronisation_forbidden():
        launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_writing_is_captured_and_does_not_wait(dtype: torch.dtype) -> None:
    given = rotary_inputs(32, 8, 128, 128, 128, dtype)
    arguments = [given[n] for n in ("key_pages", "value_pages", "slots", "keys", "values")]
    graph = captured(lambda: moves.write_rows(*arguments))
    key_pages, value_pages, slots, keys, values = arguments
    for pages in (key_pages, value_pages):
        pages.copy_(poisoned(*pages.shape, dtype=dtype))
    keys.normal_()
    slots.copy_(some_slots(len(slots)))
    graph.replay()
    assert same_bits(key_pages, written(poisoned(*key_pages.shape, dtype=dtype), slots, keys))
    assert same_bits(value_pages, written(poisoned(*value_pages.shape, dtype=dtype), slots, values))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_rotating_is_captured_and_does_not_wait(dtype: torch.dtype) -> None:
    given = rotary_inputs(32, 8, 128, 128, 128, dtype)
    out = torch.empty_like(given["query"])
    graph = captured(lambda: out.copy_(moves.rotate_and_write(**given)))
    for name in ("key_pages", "value_pages"):
        given[name].fill_(torch.nan)
    for name in ("query", "keys", "values"):
        given[name].normal_()
    given["slots"].copy_(some_slots(len(given["slots"])))
    query, key_pages, value_pages = rotated_by_transformers(given)
    graph.replay()
    assert same_bits(out, query)
    assert same_bits(given["key_pages"], key_pages)
    assert same_bits(given["value_pages"], value_pages)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
def test_moving_is_captured_and_does_not_wait(dtype: torch.dtype) -> None:
    first, second = (
        Paths(4, [(length, rows), (8, [1, 2, 3, 4])])
        for length, rows in ((4, [0, 1, 2, 7]), (5, [1, 3, 4, 6]))
    )
    keys = randn(3, first.pages, 4, 8, 80, dtype=dtype)
    values = randn(3, first.pages, 4, 8, 80, dtype=dtype)
    sources, targets = first.sources.to(DEVICE), first.targets.to(DEVICE)
    graph = captured(lambda: moves.move_rows(keys, values, sources, targets))
    sources.copy_(second.sources)
    targets.copy_(second.targets)
    expected = []
    for pages in (keys, values):
        flat = pages.clone().flatten(1, 2)
        flat[:, targets.flatten()] = flat[:, sources.flatten()]
        expected.append(flat.view(pages.shape))
    graph.replay()
    assert same_bits(keys, expected[0])
    assert same_bits(values, expected[1])
