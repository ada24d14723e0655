"""Tree attention: the backends against the definition, and the definition against a dense mask."""

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.attention import AttentionPlan, Backend, tree_attention
from specdec.batch import TreeBatch
from specdec.cache import TreeKVCache
from specdec.pages import LayerShape, PagePool
from specdec.tree import TokenTree

CPU = torch.device("cpu")
PREFIXES = [0, 1, 15, 16, 17, 40]
TREES = [
    TokenTree.root(0),
    TokenTree.chain(0, [1] * 7),
    TokenTree.star(0, [1] * 5),
    TokenTree.from_lists([0] * 8, [-1, 0, 0, 1, 1, 2, 5, 3]),
    TokenTree.chain(0, [1] * 39),  # more than one word of ancestor bits
    TokenTree.from_lists([0] * 34, [-1, *range(31), 30, 31]),
]


class Case:
    """Sequences with committed prefixes, one open tree each, and poison everywhere else."""

    def __init__(
        self,
        heads: int = 6,
        kv_heads: int = 2,
        key_dim: int = 32,
        value_dim: int = 32,
        dtype: torch.dtype = torch.float64,
        shuffle: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        shape = LayerShape(kv_heads, key_dim, value_dim, dtype, CPU)
        self.cache = TreeKVCache(PagePool([shape], page_size=16))
        self.pages = self.cache.pool.layer(0)
        # Filling in turns scatters the pages of each sequence over the pool.
        sequences = [self.cache.admit() for _ in PREFIXES]
        for start in range(0, max(PREFIXES), 16 if shuffle else 10**6):
            grow = [
                (s, min(p - start, 16 if shuffle else p))
                for s, p in zip(sequences, PREFIXES, strict=True)
                if p > start
            ]
            with self.cache.speculate([s for s, _ in grow], [n for _, n in grow]) as lease:
                lease.commit()
        batch = TreeBatch.pack(TREES, vocab_size=9)
        self.lease = self.cache.speculate(sequences, batch.sizes)
        self.plan = self.lease.plan_trees(batch)
        self.pages = self.cache.pool.layer(0)
        for tensor in (self.pages.keys, self.pages.values):
            tensor.fill_(torch.nan)
        self.prefix_slots = [
            self.cache.slots(torch.full((p,), s), torch.arange(p))
            for s, p in zip(sequences, PREFIXES, strict=True)
        ]
        for slots in (*self.prefix_slots, self.plan.slots):
            for tensor in (self.pages.keys, self.pages.values):
                flat = tensor.flatten(0, 1)
                new = torch.randn(len(slots), *flat.shape[1:], generator=generator).to(dtype)
                flat[slots] = new
        rows = len(batch.tokens)
        self.query = torch.randn(rows, heads, key_dim, generator=generator).to(dtype)
        self.batch = batch

    def run(self, backend: Backend, plan: AttentionPlan | None = None, **options: Any) -> Tensor:
        return tree_attention(
            self.query,
            self.pages,
            plan or self.plan,
            backend=backend,
            **options,
        )

    def dense(
        self, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """One row after the other from the parents alone, with none of the code under test."""
        keys, values = self.pages.keys.flatten(0, 1), self.pages.values.flatten(0, 1)
        groups = self.query.shape[1] // keys.shape[1]
        outs = []
        first = 0
        for tree, prefix in zip(TREES, self.prefix_slots, strict=True):
            parents = tree.parents.tolist()
            for node in range(len(tree)):
                path: list[int] = []
                at = node
                while at >= 0:
                    path.insert(0, int(self.plan.slots[first + at]))
                    at = parents[at]
                slots = [*prefix.tolist(), *path]
                position = len(slots) - 1
                seen = [
                    slot
                    for index, slot in enumerate(slots)
                    if window is None or position - index < window
                ]
                out = []
                for head in range(self.query.shape[1]):
                    k, v = keys[seen, head // groups], values[seen, head // groups]
                    score = k @ self.query[first + node, head] / math.sqrt(k.shape[1])
                    if softcap is not None:
                        score = torch.tanh(score / softcap) * softcap
                    top = score.exp()
                    bottom = top.sum() + (0 if sinks is None else sinks[head].exp())
                    out.append((top / bottom) @ v)
                outs.append(torch.stack(out))
            first += len(tree)
        return torch.stack(outs)


SINKS = torch.linspace(-2, 2, 6, dtype=torch.float64)
OPTIONS = [
    {},
    {"window": 1},
    {"window": 5},
    {"window": 17},
    {"softcap": 2.0},
    {"sinks": SINKS},
    {"window": 5, "softcap": 2.0, "sinks": SINKS},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_every_row_sees_its_prefix_and_its_ancestors(
    backend: Backend, options: dict[str, Any]
) -> None:
    case = Case()
    expected = case.dense(**options)
    torch.testing.assert_close(case.run(backend, **options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "dims", [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (96, 64), (64, 128)]
)
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 1)])
def test_sdpa_equals_the_reference_for_all_head_shapes(
    dims: tuple[int, int], heads: tuple[int, int]
) -> None:
    case = Case(*heads, *dims, dtype=torch.float32)
    torch.testing.assert_close(case.run("sdpa"), case.run("reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_its_rounding(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    exact = Case(dtype=torch.float64)
    exact.query = case.query.double()
    exact.pages.keys.copy_(case.pages.keys.double())
    exact.pages.values.copy_(case.pages.values.double())
    expected = exact.run("reference")
    for backend in ("reference", "sdpa"):
        error = (case.run(backend).double() - expected).norm() / expected.norm()
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shuffle", [True, False])
def test_chains_of_any_length_are_causal(shuffle: bool) -> None:
    case = Case(shuffle=shuffle)
    case.lease.rollback()
    sequences = case.lease.sequences
    lease = case.cache.speculate(sequences, [40] * len(sequences))
    case.pages = case.cache.pool.layer(0)
    plan = lease.plan_chains()
    for tensor in (case.pages.keys, case.pages.values):
        flat = tensor.flatten(0, 1)
        flat[plan.slots] = torch.randn(len(plan.slots), *flat.shape[1:]).double()
    case.query = torch.randn(len(plan.slots), 6, 32).double()
    chain = TreeBatch.pack([TokenTree.chain(0, [1] * 39)] * len(sequences), vocab_size=9)
    by_bits = case.run("reference", lease.plan_trees(chain))
    for backend in ("reference", "sdpa"):
        out = case.run(backend, plan)
        torch.testing.assert_close(out, by_bits, rtol=1e-12, atol=1e-12)


def test_sdpa_agrees_with_torch_on_a_plain_causal_text() -> None:
    cache = TreeKVCache(PagePool([LayerShape(2, 32, 32, torch.float32, CPU)]))
    with cache.speculate([cache.admit()], [50]) as lease:
        plan = lease.plan_chains()
        pages = cache.pool.layer(0)
        q, k, v = (torch.randn(50, 2, 32) for _ in range(3))
        pages.keys.flatten(0, 1)[plan.slots] = k
        pages.values.flatten(0, 1)[plan.slots] = v
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
        out = tree_attention(q.transpose(0, 1), pages, plan)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_non_ancestors_are_bitwise_irrelevant(backend: Backend) -> None:
    case = Case(dtype=torch.float32)
    before = case.run(backend)
    first = sum(len(tree) for tree in TREES[:3])
    node, hidden = first + 7, [first + n for n in (2, 4, 5, 6)]  # node 7 hangs below 3, 1, 0
    for tensor in (case.pages.keys, case.pages.values):
        tensor.flatten(0, 1)[case.plan.slots[hidden]] = 1e30
    assert torch.equal(case.run(backend)[node], before[node])


def test_wrong_arguments_are_named() -> None:
    case = Case()
    with pytest.raises(
        ValueError, match="backend: expected auto, reference, sdpa, triton, gluon, got 'flash'"
    ):
        case.run("flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window: expected at least 1 position, got 0"):
        case.run("auto", window=0)
    case.query = case.query[:, :5]
    with pytest.raises(ValueError, match="Hq a multiple of 2"):
        case.run("auto")
    case.query = torch.randn(3, 6, 32).double()
    with pytest.raises(ValueError, match=r"the plan has \d+ rows, got 3"):
        case.run("auto")


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_padding_rows_see_themselves_and_change_nothing(backend: Backend) -> None:
    case = Case(dtype=torch.float32)
    before = case.run(backend)
    batch, pads = case.batch, 3
    own = torch.zeros(pads, batch.ancestors.shape[1], dtype=torch.int32)
    own[:, 0] = torch.tensor([1, 2, 4])
    plan = case.lease.plan(
        batch.sizes,
        torch.cat([batch.nodes, torch.arange(pads)]),
        torch.cat([batch.depths, torch.zeros(pads, dtype=torch.int64)]),
        torch.cat([batch.ancestors, own]),
    )
    assert plan.slots[-pads:].tolist() == [0, 1, 2], "in the trash page"
    values = case.pages.values.flatten(0, 1)
    case.pages.keys.flatten(0, 1)[:pads] = torch.randn(pads, 2, 32)
    values[:pads] = torch.randn(pads, 2, 32)
    case.query = torch.cat([case.query, torch.randn(pads, 6, 32)])
    out = case.run(backend, plan)
    assert torch.equal(out[:-pads], before)
    assert torch.equal(out[-pads:], values[:pads].repeat_interleave(3, 1))


@pytest.mark.parametrize("prompt", [300, 32])  # the last page is copied, or there is none to copy
def test_the_example_agrees_with_torch(prompt: int) -> None:
    example = Path(__file__).parent.parent / "examples" / "tree_attention.py"
    ours, torchs, cache = runpy.run_path(str(example))["verify"](prompt, CPU)
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
    assert cache.lengths[cache.sequences].tolist() == [prompt + 3, prompt + 1]
    cache.check_integrity()
