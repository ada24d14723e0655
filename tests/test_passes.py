"""Passes over buffers of a few sizes give what passes of their own size give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec.batch import TreeBatch
from specdec.passes import ROWS
from specdec.target import Target
from specdec.testing import TINY, RandomDrafter, tiny_model
from specdec.tree import TokenTree
from tests import plain_steps

VOCAB = TINY["vocab_size"]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def model_here() -> Any:
    model: Any = tiny_model("Llama")
    return model.to(DEVICE)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(model_here(), layers="fused")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        plain_steps.stand_in(monkeypatch)


def tokens(count: int) -> Tensor:
    return torch.randint(0, VOCAB, (count,), device=DEVICE)


def same(target: Target, rows: Tensor, plan: Any, keep: Any) -> None:
    """In three passes: the first compiles, the second is captured, the third is replayed."""
    expected = target.compute(rows, plan, keep)
    for _ in range(3):
        found = target.forward(rows, plan, keep)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = target.forward((rows + 1) % VOCAB, plan, keep)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg="it was overwritten")
    assert not torch.allclose(other, expected)


@pytest.mark.parametrize("lengths", [[1], [7], [130], [40, 3, 100], [1, 1, 1, 1, 17], [300, 2]])
@pytest.mark.parametrize("prefix", [0, 21])
def test_chains(target: Target, lengths: list[int], prefix: int) -> None:
    sequences = [target.cache.admit() for _ in lengths]
    target.prefill(sequences, [tokens(prefix) for _ in lengths])
    with target.cache.speculate(sequences, lengths) as lease:
        same(target, tokens(sum(lengths)), lease.plan_chains(), 1)
        ends = torch.tensor(lengths, device=DEVICE).cumsum(0) - 1
        same(target, tokens(sum(lengths)), lease.plan_chains(), ends)
    for sequence in sequences:
        target.cache.release(sequence)
    target.cache.check_integrity()


@pytest.mark.parametrize("sizes", [[9], [40], [1, 33, 12], [65, 3]])
def test_trees(target: Target, sizes: list[int]) -> None:
    parents = [[-1, *(int(torch.randint(node, ())) for node in range(1, size))] for size in sizes]
    trees = TreeBatch.pack(
        [TokenTree.from_lists(tokens(len(line)).tolist(), line) for line in parents],
        vocab_size=VOCAB,
        device=target.device,
    )
    sequences = [target.cache.admit() for _ in sizes]
    target.prefill(sequences, [tokens(5 + number) for number in sequences])
    with target.cache.speculate(sequences, trees.sizes) as lease:
        same(target, trees.tokens, lease.plan_trees(trees), 0)
    for sequence in sequences:
        target.cache.release(sequence)


def test_what_is_too_long_or_not_to_be_captured_goes_its_own_way(target: Target) -> None:
    model = specdec.wrap(model_here(), "ngram", layers="fused", capture=False)
    ids = tokens(20)[None]
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert not model._driven().passes._passes
    before = len(target.passes._passes)
    sequence = target.cache.admit()
    target.prefill([sequence], [tokens(ROWS[-1] + 1)], chunk=ROWS[-1] + 1)
    assert len(target.passes._passes) == before
    target.cache.release(sequence)


def test_a_new_place_for_the_cache_makes_new_passes(target: Target) -> None:
    first = target.cache.admit()
    target.prefill([first], [tokens(40)])
    table = target.cache.page_table
    many = [target.cache.admit() for _ in range(len(target.cache.lengths))]
    assert target.cache.page_table is not table
    with target.cache.speculate([first], [20]) as lease:
        same(target, tokens(20), lease.plan_chains(), 0)
    for sequence in [first, *many]:
        target.cache.release(sequence)


def test_warming_up_leaves_nothing_but_passes_and_steps(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = specdec.wrap(model_here(), "ngram", layers="fused", nodes=16)
    model.warm_up(progress=False)
    driven = model._driven()
    assert {size.rows for size in driven.passes._passes} == set(ROWS)
    assert {graph.step.trees.nodes for graph in driven.graphs._graphs.values()} == {1, 8, 16}
    assert not driven.graphs._budgets
    assert model.prefix_cache
    assert not model.cache.sequences
    assert model.cache.pool.num_free == model.cache.pool.num_pages
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="requests"):
        model.warm_up(0)
    passes, steps = dict(driven.passes._passes), dict(driven.graphs._graphs)
    ids = tokens(ROWS[-2])[None]
    options: dict[str, Any] = {"max_new_tokens": 40, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    assert out.stats.paths["captured"] > 0
    assert (driven.passes._passes, driven.graphs._graphs) == (passes, steps), "nothing was missing"


def test_steps_for_longer_texts_are_made_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("graphs.SHORTEST", "warmup.SHORTEST"):
        monkeypatch.setattr(f"specdec.{place}", 64)
    monkeypatch.setattr("specdec.warmup.ROWS", (16,))
    monkeypatch.setattr("specdec.warmup.NEW_TOKENS", 30)
    model: Any = specdec.wrap(model_here(), "ngram", layers="fused", nodes=8)
    model.prefix_cache = False  # or pages are kept, and the cache grows
    model.warm_up(longest=256, progress=False)
    steps = dict(model._driven().graphs._graphs)
    assert {graph.step.longest for graph in steps.values()} == {64, 128, 256, 512}
    for length in (20, 40, 100, 232):  # and their trees
        ids = tokens(length)[None]
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    assert model._driven().graphs._graphs == steps, "nothing was missing"
    with pytest.raises(ValueError, match="longest"):
        model.warm_up(longest=0)


@pytest.mark.gpu
def test_prompts_and_trees_from_the_host_are_replayed() -> None:
    hf_model = model_here()
    model: Any = specdec.wrap(hf_model, RandomDrafter(VOCAB), nodes=17, layers="fused")
    ids = torch.randint(1, VOCAB, (2, 30), device="cuda")
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    expected = hf_model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for _ in range(3):
        assert torch.equal(model.generate(ids, **options), expected)
        model.cache.prefixes.clear()
    assert len(model._driven().passes.captured) >= 2
