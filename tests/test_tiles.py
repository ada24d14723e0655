"""Which tiles tree attention runs with on an H100, asked without one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specdec.eval.attention.cases import Case, private, shared

pytest.importorskip("triton")

from specdec.kernels import merge, tiles
from specdec.kernels.worklist import Tiling


class Shaped:
    """As much of a bfloat16 tensor on a GPU as the rules look at."""

    device, dtype = torch.device("cuda", 0), torch.bfloat16

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        return 0

    def stride(self, dim: int) -> int:
        return int(torch.Size(self.shape[dim + 1 :]).numel())


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        major=9, multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def chosen(case: Case, *, gluon: bool = False) -> tuple[Tiling, int]:
    query: Any = Shaped(case.requests * case.rows, case.heads, case.dim)
    pages: Any = Shaped(100, case.page_size, case.kv_heads, case.dim)
    return tiles.choose(
        query,
        pages,
        pages,
        case.rows,
        case.prefix,
        len(case.levels) > 1,
        causal=case.tree == "chain",
        gluon=gluon,
    )


def test_one_query_of_few_requests_is_copied_by_the_engine_and_of_many_by_their_programs() -> None:
    """A block of 16 rows holds one request, however few of its rows that are."""
    one, programs = chosen(private(1, 1024, 1))
    assert (one.bulk, one.ctas, programs) == (True, 3, 396)
    for batch in (8, 32):
        many, programs = chosen(private(1, 4096, batch))
        assert (many.bulk, many.block_n, many.ctas, programs) == (False, 64, 2, 264)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (private(64, 4096, 8), "wide"),
        (private(64, 4096, 8, tree="chain"), "wide"),
        (private(64, 1024, 8), "narrow"),
        (private(64, 1024, 8, page_size=16), "narrow"),
        (private(40, 4096, 32), "narrow"),  # wide blocks would leave a quarter of the last empty
        (private(1, 4096, 8), "narrow"),
        (shared(16, 4096, 256, 8), "narrow"),
        (private(32, 1024, 1), "narrow"),
        (private(32, 4096, 8), ""),  # two blocks of a request would drift apart
        (private(17, 4096, 8), ""),  # also where the second holds four rows
        (private(32, 65536, 8), "wide"),
        (private(128, 4096, 1, tree="chain"), ""),  # longer chains were not measured
        (private(64, 4096, 8, dim=96), ""),
    ],
    ids=lambda given: given.label if isinstance(given, Case) else given or "triton",
)
def test_what_hoppers_kernel_is_asked_for(case: Case, wanted: str) -> None:
    assert not chosen(case)[0].roles, "only who asks for it gets it"
    tiling, _ = chosen(case, gluon=True)
    rows = {"narrow": 64, "wide": 128}.get(wanted)
    assert (tiling.block_m if tiling.roles else None) == rows


def test_batches_that_share_nothing_leave_room_beside_the_merge() -> None:
    """Hopper's kernel fetches the keys of the next call while this one merges."""
    for case, merges in (
        (private(16, 1024, 8), 8),
        (private(64, 4096, 8), 8),
        (private(128, 1024, 1), 16),
        (shared(8, 4096, 256, 32), 16),
    ):
        assert chosen(case, gluon=True)[0].merges == merges, case
    assert chosen(private(16, 1024, 8))[0].merges == 16


def test_a_program_of_the_merge_takes_eight_of_many_results_unless_heads_are_wide() -> None:
    """Of 256 values each, eight spill: compiled with Triton 3.6 for sm_90."""
    for results, width, rows in ((8191, 128, 2), (8192, 64, 8), (8192, 128, 8), (8192, 256, 2)):
        for known in (True, False):
            assert merge._shape(results, 2, width, known=known)[0] == rows, (results, width)
    assert merge._shape(8192, 32, 128, known=True) == (8, 4)


def test_few_columns_take_fewer_programs() -> None:
    assert chosen(private(16, 4096, 1))[1] == 176
    assert chosen(private(64, 1024, 1))[1] == 132
    assert chosen(private(64, 4096, 1))[1] == 264
    assert chosen(private(32, 4096, 1))[1] == 132
    assert chosen(private(32, 2048, 1), gluon=True)[1] == 132
    assert chosen(private(32, 4096, 1), gluon=True)[1] == 198
    assert chosen(private(64, 2048, 1), gluon=True)[1] == 264
    assert chosen(shared(1, 4096, 256, 8), gluon=True)[1] == 176
    assert chosen(shared(1, 4096, 256, 32), gluon=True)[1] == 264
    assert chosen(shared(1, 1024, 1024, 32, kv_heads=32), gluon=True)[1] == 264
    assert chosen(private(8, 1024, 8), gluon=True)[1] == 264
    assert chosen(private(16, 16384, 1), gluon=True)[1] == 176
    assert chosen(private(16, 65536, 1), gluon=True)[1] == 264
