"""The Triton backend against the definition, in Triton's interpreter where there is no GPU.

The interpreter rounds bfloat16 products wrongly, so that dtype is tested on a GPU only.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec.attention import AttentionPlan, tree_attention
from specdec.batch import TreeBatch
from specdec.cache import TreeKVCache
from specdec.pages import LayerPages, LayerShape, PagePool
from specdec.tree import TokenTree

pytest.importorskip("triton")

import triton

from specdec.kernels import flash, tiles, worklist
from specdec.kernels.partition import MODES, Mode
from specdec.kernels.worklist import Tiling

# numpy, below the interpreter, remarks on rows that have seen no key yet.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero"),
    pytest.mark.filterwarnings("ignore:invalid value"),
]

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BULK = not GPU or torch.cuda.get_device_capability() >= (9, 0)
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
BRANCHES = TokenTree.from_lists([0] * 8, [-1, 0, 0, 1, 1, 2, 5, 3])
WORDS = TokenTree.from_lists([0] * 34, [-1, *range(31), 30, 31])  # bit 31, and a second word
PREFIXES = [0, 15, 17, 33]


class Scene:
    """Sequences that share prefixes, a tree below each, and NaN wherever nothing was written.

    `forks` gives for each sequence the one it continues and how many tokens they share.
    """

    def __init__(
        self,
        prefixes: list[int],
        trees: list[TokenTree],
        forks: list[tuple[int, int] | None] | None = None,
        *,
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 16,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        page_size: int = 16,
        chains: bool = False,
    ) -> None:
        shape = LayerShape(kv_heads, dim, value_dim or dim, stored or dtype, DEVICE)
        cache = TreeKVCache(PagePool([shape], page_size=page_size), DEVICE)
        sequences = [cache.admit() for _ in prefixes]
        for place, (sequence, prefix) in enumerate(zip(sequences, prefixes, strict=True)):
            if prefix:
                with cache.speculate([sequence], [prefix]) as lease:
                    lease.commit()
            if forks and forks[place]:
                other, tokens = forks[place]  # type: ignore[misc]
                pages = tokens // page_size
                mine = cache._sequences[sequence].pages
                theirs = cache._sequences[sequences[other]].pages[:pages]
                cache.pool.share(theirs)
                cache.pool.free(mine[:pages])
                mine[:pages] = theirs
                cache.page_table[sequence, :pages] = torch.tensor(theirs, device=DEVICE)
        if chains:
            self.lease = cache.speculate(sequences, [len(tree) for tree in trees])
            self.plan = self.lease.plan_chains()
        else:
            batch = TreeBatch.pack(trees, vocab_size=9, device=DEVICE)
            self.lease = cache.speculate(sequences, batch.sizes)
            self.plan = self.lease.plan_trees(batch)
        cache.check_integrity()
        generator = torch.Generator().manual_seed(3)
        self.pages = cache.pool.layer(0)
        rows = len(self.plan.slots)
        prefix_slots = [
            cache.slots(torch.full((n,), s, device=DEVICE), torch.arange(n, device=DEVICE))
            for s, n in zip(sequences, prefixes, strict=True)
        ]
        slots = torch.cat([*prefix_slots, self.plan.slots])
        for pages in (self.pages.keys, self.pages.values):
            pages.fill_(torch.nan)
            new = torch.randn(len(slots), *pages.shape[2:], generator=generator)
            flat = pages.flatten(0, 1)
            flat[slots] = new.to(DEVICE, pages.dtype)
        self.query = torch.randn(rows, heads, dim, generator=generator).to(DEVICE, dtype)

    def run(self, mode: Mode = "auto", plan: AttentionPlan | None = None, **options: Any) -> Tensor:
        return tree_attention(
            self.query, self.pages, plan or self.plan, backend="triton", mode=mode, **options
        )

    def tiled(self, mode: Mode, tiling: Tiling, programs: int = 5) -> Tensor:
        heads, kv_heads = self.query.shape[1], self.pages.keys.shape[2]
        built = self.plan.schedule(heads, kv_heads, None, mode, tiling, programs)
        scale = self.query.shape[2] ** -0.5
        return flash.tree_attention(
            self.query, self.pages.keys, self.pages.values, built, scale, None, None
        )

    def exact(self, **options: Any) -> Tensor:
        double = LayerPages(self.pages.keys.double(), self.pages.values.double())
        query = self.query.double()
        return tree_attention(query, double, self.plan, backend="reference", **options)

    def check(self, out: Tensor, **options: Any) -> None:
        exact = self.exact(**options)
        assert torch.isfinite(out).all()
        # For each row and head: an average would hide a wrong row.
        error = (out.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(0.1)
        assert float(error.max()) < 4 * TOLERANCE[out.dtype]
        assert float((out.double() - exact).norm() / exact.norm()) < TOLERANCE[out.dtype]


def private(**options: Any) -> Scene:
    return Scene(PREFIXES, [BRANCHES, TokenTree.root(0), WORDS, BRANCHES], **options)


def shared(**options: Any) -> Scene:
    """Two levels: all share 32 tokens, then pairs share 48; one request shares nothing."""
    forks = [None, (0, 32), (1, 48), None, (3, 48), None]
    prefixes = [40, 60, 70, 48, 50, 20]
    return Scene(prefixes, [BRANCHES] * 5 + [TokenTree.root(0)], forks, **options)


SINKS = torch.linspace(-2, 2, 6)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 5, "softcap": 2.0},
    {"window": 17, "sinks": SINKS},
]
# Every mode plainly, and every option in the mode that people run.
CALLS = [(mode, OPTIONS[0]) for mode in MODES] + [("auto", options) for options in OPTIONS[1:]]


@pytest.mark.parametrize(("mode", "options"), CALLS, ids=str)
def test_private_prefixes(mode: Mode, options: dict[str, Any]) -> None:
    scene = private()
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    scene.check(scene.run(mode, **options), **options)


@pytest.mark.parametrize(("mode", "window"), [*((m, None) for m in MODES), ("flatten", 21)])
def test_shared_prefixes(mode: Mode, window: int | None) -> None:
    scene = shared()
    assert scene.plan.shared
    scene.check(scene.run(mode, window=window), window=window)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"),
    [(9, 3, 64, 64), (4, 4, 80, 80), (8, 1, 96, 96), (8, 2, 128, 128), (4, 2, 256, 256),
     (6, 2, 96, 64), (4, 1, 64, 128)],
)  # fmt: skip
def test_head_shapes(heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
    scene = Scene(
        [17, 33],
        [BRANCHES, TokenTree.root(0)],
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        value_dim=value_dim,
    )
    scene.check(scene.run())


@pytest.mark.parametrize(
    ("page_size", "block_n"), [(16, 64), (32, 32), (64, 16), (128, 64), (64, 128)]
)
def test_pages_and_tiles_of_different_sizes(page_size: int, block_n: int) -> None:
    scene = Scene([150, 200, 65], [BRANCHES] * 3, [None, (0, 128), None], page_size=page_size)
    for mode in ("sequence", "auto"):
        for bulk in (False, True) if BULK else (False,):
            for bring in (False, True) if GPU else (False,):
                for block_m, loose_n in ((16, 16), (64, block_n)):
                    tiling = Tiling(
                        block_m, block_n, 4, 2, 1, loose_n=loose_n, loose_steps=3,
                        bulk=bulk, bring=bring,
                    )  # fmt: skip
                    scene.check(scene.tiled(mode, tiling))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mode", ["auto", "node_chunk"])
def test_half_precision(dtype: torch.dtype, mode: Mode) -> None:
    for scene in (private(dtype=dtype), shared(dtype=dtype)):
        scene.check(scene.run(mode))


@pytest.mark.skipif(GPU and torch.cuda.get_device_capability() < (8, 9), reason="no float8")
def test_float8_pages() -> None:
    scene = private(dtype=torch.float16, stored=torch.float8_e4m3fn)
    scene.check(scene.run())


@pytest.mark.parametrize("window", [None, 7])
def test_chains_of_any_length_are_causal(window: int | None) -> None:
    trees = [TokenTree.chain(0, [1] * 50), TokenTree.root(0), TokenTree.chain(0, [1] * 20)]
    scene = Scene([0, 33, 20], trees, chains=True)
    assert scene.plan.ancestors is None
    scene.check(scene.run(window=window), window=window)


@pytest.mark.parametrize("mode", ["node_chunk", "auto"])
def test_log_sum_exp(mode: Mode) -> None:
    scene = shared()
    lse, expected = (torch.empty(scene.query.shape[:2], device=DEVICE) for _ in range(2))
    scene.run(mode, lse=lse)
    double = LayerPages(scene.pages.keys.double(), scene.pages.values.double())
    tree_attention(scene.query.double(), double, scene.plan, lse=expected, backend="reference")
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


def test_rows_whose_scores_are_all_very_negative() -> None:
    """A maximum that starts at zero would lose them."""
    scene = private()
    scene.query.copy_(scene.query.abs() + 2)
    scene.pages.keys.copy_(-(scene.pages.keys.abs() + 4))
    lse = torch.empty(scene.query.shape[:2], device=DEVICE)
    scene.check(scene.run("node_chunk", lse=lse))
    assert float(lse.max()) < -20


SIZES = [(torch.float32, 2.0**80), (torch.float32, 2.0**-80), (torch.float16, 2.0**13)]


@pytest.mark.parametrize(("dtype", "size"), SIZES)
def test_values_of_any_size_survive_the_merge(dtype: torch.dtype, size: float) -> None:
    """Sums of values of 2^13 do not fit in half precision as they are."""
    scene = shared(dtype=dtype)
    scene.pages.values.abs_().mul_(size)
    out = scene.run("node_chunk")
    scene.pages.values.div_(size)
    scene.check(out / size)
    scene.pages.values.nan_to_num_(0).zero_()
    assert not scene.run("node_chunk").any()


def test_pieces_without_values_weigh_as_much_as_others() -> None:
    """Zeros beside very large values: the scale of values must not reach the sum of weights."""
    scene = Scene([64], [TokenTree.root(0)], heads=2, kv_heads=1, dim=16)
    zeros = scene.plan.page_table[scene.plan.sequence[0], :2]
    scene.pages.values.mul_(2.0**80)
    scene.pages.values[zeros] = 0
    out = scene.run("node_chunk")
    scene.pages.values.div_(2.0**80)
    scene.check(out / 2.0**80)


@pytest.mark.parametrize("mode", ["sequence", "two_phase"])
def test_non_ancestors_are_bitwise_irrelevant(mode: Mode) -> None:
    scene = private()
    before = scene.run(mode)
    node, hidden = 7, [2, 4, 5, 6]  # node 7 hangs below 3, 1, 0
    for pages in (scene.pages.keys, scene.pages.values):
        flat = pages.flatten(0, 1)
        flat[scene.plan.slots[hidden]] = 1e30
    assert torch.equal(scene.run(mode)[node], before[node])


def test_places_that_no_row_sees_may_hold_anything() -> None:
    scene = private()
    kept = [0, 1, 3]  # rows of the first tree; the other places become NaN
    before = scene.run()[kept]
    for pages in (scene.pages.keys, scene.pages.values):
        flat = pages.flatten(0, 1)
        flat[scene.plan.slots[[2, 4, 5, 6, 7]]] = torch.nan
    nodes = torch.tensor(kept, device=DEVICE)
    words = torch.tensor([[0b1], [0b11], [0b1011]], dtype=torch.int32, device=DEVICE)
    counts = [3] + [0] * (len(PREFIXES) - 1)
    scene.query = scene.query[kept]
    out = scene.run(plan=scene.lease.plan(counts, nodes, nodes, words))
    torch.testing.assert_close(out, before, rtol=1e-5, atol=1e-5)


def test_padding_rows_see_themselves() -> None:
    scene = private()
    words = scene.plan.ancestors
    assert words is not None
    before, pads = scene.run(), 3
    own = torch.zeros(pads, words.shape[1], dtype=torch.int32, device=DEVICE)
    own[:, 0] = torch.tensor([1, 2, 4])
    index = torch.arange(pads, device=DEVICE)
    plan = scene.lease.plan(
        scene.lease.rows,
        torch.cat([scene.plan.nodes, index]),
        torch.cat([scene.plan.nodes, torch.zeros_like(index)]),
        torch.cat([words, own]),
    )
    values = scene.pages.values.flatten(0, 1)
    scene.pages.keys.flatten(0, 1)[:pads] = torch.randn(pads, 2, 16, device=DEVICE)
    values[:pads] = torch.randn(pads, 2, 16, device=DEVICE)
    scene.query = torch.cat([scene.query, torch.randn(pads, 6, 16, device=DEVICE)])
    out = scene.run(plan=plan)
    torch.testing.assert_close(out[:-pads], before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[-pads:], values[:pads].repeat_interleave(3, 1))


trees = st.lists(st.integers(0, 10**6), max_size=40).map(
    lambda draws: TokenTree.from_lists(
        [0] * (len(draws) + 1), [-1, *(d % (n + 1) for n, d in enumerate(draws))]
    )
)


@settings(max_examples=60 if GPU else 20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 70), trees), min_size=1, max_size=4),
    st.sampled_from(MODES),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_random_trees_and_batches(
    drawn: list[tuple[int, TokenTree]], mode: Mode, dtype: torch.dtype
) -> None:
    scene = Scene([p for p, _ in drawn], [t for _, t in drawn], dtype=dtype, dim=16)
    scene.check(scene.run(mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_long_chain_without_a_prefix(mode: Mode) -> None:
    """All of its keys are loose: the most pieces that a bound by tiles could miss."""
    scene = Scene([0], [TokenTree.chain(0, [1] * 79)], chains=True, heads=2, kv_heads=1)
    scene.check(scene.run(mode))
    (built,) = scene.plan._schedules.values()
    assert int(built.header[worklist.WORKERS.value]) <= len(built.workers)


def test_strided_inputs() -> None:
    scene = private()
    expected = scene.run()
    wide = torch.empty(*scene.query.shape[:2], 2 * scene.query.shape[2], device=DEVICE)
    wide[:, :, ::2] = scene.query
    scene.query = wide[:, :, ::2]
    assert torch.equal(scene.run(), expected)


def test_wrong_arguments_are_named() -> None:
    scene = private()
    with pytest.raises(ValueError, match=r"sinks: expected \[6\], got \[1\]"):
        scene.run(sinks=torch.zeros(1, device=DEVICE))
    with pytest.raises(ValueError, match="lse: expected a contiguous tensor"):
        scene.run(lse=torch.empty(6, len(scene.query), device=DEVICE).T)
    with pytest.raises(ValueError, match="pages of at least 16 tokens, got 8"):
        private(page_size=8).run()
    with pytest.raises(ValueError, match=r"mode: expected sequence, node, .*got 'best'"):
        scene.run("best")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_replays_of_a_captured_plan_and_attention_have_the_same_bits(mode: Mode) -> None:
    """Planning, attention and merging in one graph, without any synchronisation."""
    prefixes = [3000, 2900, 100, 2048]
    forks = [None, (0, 2048), None, (0, 2048)]
    sizes = [TokenTree.chain(0, [1] * n) for n in (63, 20, 255, 1)]
    scene = Scene(
        prefixes, sizes, forks, heads=32, kv_heads=8, dim=128, dtype=torch.bfloat16, page_size=64
    )
    before = scene.run(mode)
    scene.check(before)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scene.plan._schedules.clear()
        out = scene.run(mode)
    [built] = scene.plan._schedules.values()
    for _ in range(50):
        out.fill_(torch.nan)
        for table in (built.header, built.items, built.workers, built.rows, built.key_slots):
            table.zero_()  # of the replay before
        graph.replay()
        assert torch.equal(out, before)


@pytest.mark.gpu
def test_all_layers_of_a_forward_run_the_same_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of them, which waits for its work list, takes as long to compile as any."""
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda src, **_: compiled.append(src.name)
    )
    scene = Scene([700], [TokenTree.chain(0, [1] * 8)], heads=11, kv_heads=11, dim=64, page_size=64)
    for _ in range(3):
        scene.check(scene.run())
    assert compiled.count("_attend_kernel") == 1
    assert compiled.count("_merge_kernel") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 256])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tiling_on_the_device(rows: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    parents = [-1, *(int(torch.randint(0, n, (), generator=generator)) for n in range(1, rows))]
    tree = TokenTree.from_lists([0] * rows, parents)
    # Tiles of several pages, and tiles that the copy engine fetches; one request, and several.
    cases: list[tuple[list[int], list[tuple[int, int] | None] | None]] = [
        ([700, 900, 63], None), ([700, 900, 63], [None, (0, 512), None]), ([2900], None),
    ]  # fmt: skip
    for page_size in (16, 64) if dtype == torch.bfloat16 else (16,):
        for prefixes, forks in cases:
            scene = Scene(
                prefixes, [tree] * len(prefixes), forks,
                heads=16, kv_heads=4, dim=dim, dtype=dtype, page_size=page_size,
            )  # fmt: skip
            scene.check(scene.run())


@pytest.mark.gpu
def test_as_close_as_torch_flash_attention() -> None:
    """On the densified case: at most 1.3 times its error, for every head."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    scene = Scene(
        [2000], [TokenTree.chain(0, [1] * 63)],
        heads=32, kv_heads=8, dim=128, dtype=torch.bfloat16, chains=True,
    )  # fmt: skip
    exact, ours = scene.exact(), scene.run()
    place = torch.arange(2064, device=DEVICE)
    slots = scene.plan.page_table[1, place // 16] * 16 + place % 16
    k, v = (x.flatten(0, 1)[slots].transpose(0, 1)[None] for x in (
        scene.pages.keys, scene.pages.values,
    ))  # fmt: skip
    # Causal attention of torch's flash kernel ends at the last key, as ours does.
    q = torch.zeros(1, 32, 2064, 128, device=DEVICE, dtype=torch.bfloat16)
    q[0, :, -64:] = scene.query.transpose(0, 1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        theirs = scaled_dot_product_attention(q, k, v, is_causal=True)[0, :, -64:].transpose(0, 1)
    errors = [
        (out.double() - exact).norm(dim=(0, 2)) / exact.norm(dim=(0, 2)) for out in (ours, theirs)
    ]
    assert float((errors[0] / errors[1]).max()) < 1.3


@pytest.mark.gpu
def test_auto_is_triton_on_a_device() -> None:
    scene = private()
    assert torch.equal(tree_attention(scene.query, scene.pages, scene.plan), scene.run())


@pytest.mark.parametrize("available", [228, 164, 100])  # KiB: H100, A100, RTX 4090
@pytest.mark.parametrize("element", [2, 4])
def test_tilings_fit_in_shared_memory(available: int, element: int) -> None:
    for width in (64, 128, 256, 512):
        for packed in (4, 64, 256):
            for flags in product([False, True], repeat=4):
                options = dict(zip(("bulk", "few", "long", "heavy"), flags, strict=True))
                wanted = tiles.wanted(packed, packed, width, element, **options)
                tiling = tiles.fit(wanted, width, element, available << 10)
                held = (tiling.block_m + 2 * tiling.stages * tiling.block_n) * width * element
                assert tiling.ctas * held < available << 10
                assert tiling.block_n >= 16
                assert tiling.block_m >= 16
                assert tiling.block_n % tiling.loose_n == 0


def test_heads_that_cannot_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="heads of 4096 values of 4 bytes do not fit"):
        tiles.fit(tiles.wanted(4, 4, 4096, 4), 4096, 4, 100 << 10)
