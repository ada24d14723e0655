"""The Gluon kernel for Hopper against the Triton kernel, on the same work lists."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.attention import tree_attention
from specdec.eval.attention.cases import Case, private, shared
from specdec.eval.attention.data import Data
from specdec.kernels.worklist import Schedule, Tiling

pytest.importorskip("triton.experimental.gluon")

import triton
import triton.language as tl

from specdec.kernels import flash, moves, tiles

SHAPES = {
    "narrow": tiles.NARROW,
    "wide": tiles.WIDE,
    "short tiles": replace(tiles.WIDE, block_n=64, stages=6),
}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

CASES = [
    private(64, 1024, 2),  # partial results of cut columns
    private(64, 3000, 5),  # loose ends of prefixes, whole columns
    private(33, 100, 5),  # nearly nothing but loose keys
    private(1, 60, 3),  # nothing else
    private(40, 1000, 3, ragged=True),
    private(64, 2000, 2, tree="chain"),
    private(128, 3000, 1),  # four words of ancestor bits
    private(64, 1024, 2, page_size=128),
    private(40, 1000, 2, page_size=32),
    shared(1, 1024, 200, 6, page_size=16),
    private(20, 1000, 2, heads=9, kv_heads=3, dim=64, page_size=16),
    private(48, 900, 3, heads=9, kv_heads=3, dim=64),
    shared(16, 1024, 256, 4),
    private(64, 4096, 32),  # several workers for a program
    private(64, 1500, 6, ragged=True),  # so many results that a program merges eight
    shared(1, 1024, 40, 260),
]
HEADS = 32


def both(data: Data, tiling: Tiling, programs: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The results of Hopper's kernel and of Triton's, on work lists of their own."""
    found: list[Tensor] = []
    for each in (tiling, replace(tiling, roles=False, bulk=False, stages=2)):
        built: Schedule = data.plan.schedule(
            data.case.heads, data.case.kv_heads, None, "auto", each, programs
        )
        query, pool = data.queries[0], data.pools[0]
        arguments: dict[str, Any] = {"softcap": None, "sinks": None, "lse": None, **options}
        if arguments["lse"] is not None:
            arguments["lse"] = arguments["lse"][len(found)]
        found.append(
            flash.tree_attention(
                query, pool.keys, pool.values, built, query.shape[2] ** -0.5, **arguments
            )
        )
    return found[0], found[1]


def spoil(data: Data) -> None:
    """NaN wherever no request has a key."""
    keys = torch.cat([data.keys_of(request) for request in range(data.case.requests)])
    for pages in (data.pools[0].keys, data.pools[0].values):
        free = torch.ones(pages.shape[0] * pages.shape[1], dtype=torch.bool, device=pages.device)
        free[keys] = False
        pages.flatten(0, 1)[free] = torch.nan


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.tree} {case.dim}")
def test_as_exact_as_the_triton_kernel(case: Case, shape: str) -> None:
    tiling = SHAPES[shape]
    data = Data(case, "cuda", torch.bfloat16, sets=1)
    spoil(data)
    exact = data.exact(0)
    programs = 132 * tiling.ctas
    ours, triton = both(data, tiling, programs)
    assert data.error(ours, exact) < 3e-3
    assert data.error(ours, exact) < 1.05 * data.error(triton, exact)
    for _ in range(5):
        assert torch.equal(both(data, tiling, programs)[0], ours)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("shape", ["narrow", "wide"])
@pytest.mark.parametrize("programs", [5, 132])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_every_option(programs: int, softcap: float | None, shape: str) -> None:
    data = Data(private(64, 1000, 2), "cuda", torch.float16, sets=1)
    sinks = torch.linspace(-2, 2, HEADS, device="cuda")
    lse = torch.full((2, 128, HEADS), torch.nan, device="cuda")
    ours, triton = both(data, SHAPES[shape], programs, softcap=softcap, sinks=sinks, lse=lse)
    torch.testing.assert_close(ours, triton, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(lse[0], lse[1], rtol=1e-5, atol=1e-5)


@triton.jit
def _dawdle(OUT, nanoseconds):  # type: ignore[no-untyped-def]
    """Lets what follows start at once, and ends much later."""
    tl.extra.cuda.gdc_launch_dependents()
    begin = tl.extra.cuda.globaltimer()
    now = begin
    while now - begin < nanoseconds:
        now = tl.extra.cuda.globaltimer()
    tl.store(OUT, now)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_keys_that_the_launch_before_writes_are_waited_for() -> None:
    """Parts of a chain whose earlier parts are prefix to them, but not committed yet.

    What writes them waits for something slow, so that attention is there before it.
    """
    # A dense tile of the second part, keys 960 to 1023, holds four keys of the first. What writes
    # so few rows leaves multiprocessors free for all programs of attention.
    data = Data(private(16, 1020, 1, tree="chain"), "cuda", torch.bfloat16, sets=1)
    pool, query, slots = data.pools[0], data.queries[0], data.plan.slots
    starts = torch.tensor([0, 8, 16], dtype=torch.int32, device="cuda")
    plan = replace(data.plan, row_starts=starts, max_rows=8)
    stores = [pool.keys.flatten(0, 1), pool.values.flatten(0, 1)]
    keys, values = (store[slots] for store in stores)
    exact = data.exact(0)
    angle = torch.zeros(16, 128, device="cuda", dtype=torch.bfloat16)
    clock = torch.zeros(1, dtype=torch.int64, device="cuda")

    def layer() -> Tensor:
        """Writes keys and values as a model does, rotated by nothing, then attends to them."""
        for store in stores:
            store.index_fill_(0, slots, torch.nan)
        _dawdle[(1,)](clock, 100_000)
        rotated = moves.rotate_and_write(
            query, pool.keys, pool.values, slots, keys, values, turned, angle
        )
        return tree_attention(rotated, pool, plan, backend="gluon")

    turned = angle + 1
    layer()
    (built,) = plan._schedules.values()
    assert built.tiling.roles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    for _ in range(5):
        graph.replay()
        assert data.error(out, exact) < 3e-3


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_which_cases_take_it() -> None:
    cases = {
        private(64, 4096, 8): "wide",
        private(64, 1024, 1): "narrow",
        private(1, 4096, 8): "narrow",
        private(32, 1024, 1): "narrow",
        private(32, 4096, 8): "",  # two blocks of a request would drift apart
        private(64, 4096, 8, tree="chain"): "wide",
        private(64, 1024, 8, page_size=16): "narrow",
    }
    for case, wanted in cases.items():
        data = Data(case, "cuda", torch.bfloat16, sets=1)
        for backend in ("triton", "gluon"):
            plan = data.new_plan()
            tree_attention(data.queries[0], data.pools[0], plan, backend=backend)
            (built,) = plan._schedules.values()
            rows = {"wide": 128, "narrow": 64}.get(wanted)
            if backend == "triton" or rows is None:
                assert not built.tiling.roles, case
            else:
                assert built.tiling.roles, case
                assert built.tiling.block_m == rows, case


@pytest.mark.skipif(HOPPER, reason="it runs there")
def test_it_is_refused_where_it_cannot_run() -> None:
    data = Data(private(1, 16, 1), "cpu", torch.float32, sets=1)
    with pytest.raises(ValueError, match=r"gluon needs a Hopper GPU and Triton .*, got cpu"):
        tree_attention(data.queries[0], data.pools[0], data.plan, backend="gluon")
