"""Views of some pages of a sequence, through every backend that runs here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from specdec import views
from specdec.attention import tree_attention
from specdec.cache import TreeKVCache
from specdec.kernels import cache as kernels
from specdec.pages import LayerShape, PagePool
from specdec.target import Target
from specdec.testing import tiny_model

SIZE, LENGTH, HEADS, DIM = 4, 4 * 9 + 3, 4, 8
SHAPE = LayerShape(2, DIM, DIM, torch.float64, torch.device("cpu"))


def filled() -> tuple[TreeKVCache, int, torch.Tensor, torch.Tensor]:
    """A sequence of ten pages, the last one partly filled, and its keys and values."""
    cache = TreeKVCache(PagePool([SHAPE], SIZE))
    sequence = cache.admit()
    keys, values = (torch.randn(LENGTH, 2, DIM, dtype=torch.float64) for _ in range(2))
    with cache.speculate([sequence], [LENGTH]) as lease:
        write(cache, lease.plan_chains().slots, keys, values)
        lease.commit()
    return cache, sequence, keys, values


def write(cache: TreeKVCache, slots: Any, keys: Any, values: Any) -> None:
    pages = cache.pool.layer(0)
    kernels.write_rows(pages.keys, slots, keys)
    kernels.write_rows(pages.values, slots, values)


CHOICES = {
    "window and sinks": views.sinks_and_window(10, sinks=1, window=2),
    "every third": views.every_nth(10, 3),
    "selected": [2, 3, 7, 9],
    "all": list(range(10)),
}


@pytest.mark.parametrize("pages", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_rows_see_the_chosen_pages_and_themselves(pages: list[int], backend: Any) -> None:
    cache, sequence, keys, values = filled()
    view = cache.view(sequence, pages)
    shown = [at for page in pages for at in range(SIZE * page, min(SIZE * page + SIZE, LENGTH))]
    assert cache.length_bound(view) == int(cache.lengths[view]) == len(shown)
    query, new_keys, new_values = (
        torch.randn(3, heads, DIM, dtype=torch.float64) for heads in (HEADS, 2, 2)
    )
    with cache.speculate([view], [3]) as lease:
        plan = lease.plan_chains()
        assert plan.positions.tolist() == [LENGTH, LENGTH + 1, LENGTH + 2]
        write(cache, plan.slots, new_keys, new_values)
        out = tree_attention(query, cache.pool.layer(0), plan, backend=backend)
        cache.check_integrity()
        lease.commit()
    for row in range(3):
        k = torch.cat([keys[shown], new_keys[: row + 1]]).repeat_interleave(2, 1)
        v = torch.cat([values[shown], new_values[: row + 1]]).repeat_interleave(2, 1)
        weights = torch.einsum("hd,khd->hk", query[row], k) / math.sqrt(DIM)
        expected = torch.einsum("hk,khd->hd", weights.softmax(-1), v)
        torch.testing.assert_close(out[row], expected)
    own = cache.slots(torch.full((LENGTH,), sequence), torch.arange(LENGTH))
    assert torch.equal(cache.pool.layer(0).keys.flatten(0, 1)[own], keys), "nothing was written"
    cache.release(sequence)
    cache.check_integrity()
    cache.release(view)
    assert cache.pool.num_free == cache.pool.num_pages


def test_a_view_of_everything_gives_the_models_logits() -> None:
    target = Target(tiny_model("Llama"), page_size=SIZE)
    text = torch.randint(1, 97, (30,))
    sequence = target.cache.admit()
    target.prefill([sequence], [text[:-1]])
    logits = []
    for number in (
        sequence,
        target.cache.view(sequence, list(range(8))),
        target.cache.view(sequence, views.sinks_and_window(8, sinks=1, window=2)),
    ):
        with target.cache.speculate([number], [1]) as lease:
            logits.append(target.forward(text[-1:], lease.plan_chains()))
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)
    target.cache.check_integrity()


def test_views_and_texts_run_in_one_pass() -> None:
    cache, sequence, _, _ = filled()
    view = cache.view(sequence, [0, 9])
    with cache.speculate([sequence, view], [2, 1]) as lease:
        assert lease.plan_chains().positions.tolist() == [LENGTH, LENGTH + 1, LENGTH]
        nodes = torch.tensor([0, 1, 0, 0])
        filled_up = lease.plan([2, 1], nodes, nodes, torch.ones(4, 1, dtype=torch.int32))
        assert filled_up.positions.tolist() == [LENGTH, LENGTH + 1, LENGTH, 0]


def test_choices_and_errors() -> None:
    assert views.sinks_and_window(10, sinks=2, window=3) == [0, 1, 7, 8, 9]
    assert views.sinks_and_window(3, sinks=2, window=9) == [0, 1, 2]
    assert views.every_nth(10, 4) == [1, 5, 9]
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        views.sinks_and_window(3, sinks=0, window=0)
    with pytest.raises(ValueError, match="sinks: expected 0 or more pages, got -1"):
        views.sinks_and_window(3, sinks=-1, window=1)
    cache, sequence, _, _ = filled()
    for pages in ([], [0, 1], [9, 0], [0, 0, 9], [-1, 9], [3, 10]):
        with pytest.raises(ValueError, match="pages: expected some of 0 to 9, rising"):
            cache.view(sequence, pages)
    view = cache.view(sequence, [0, 9])
    with pytest.raises(ValueError, match="is a view, which cannot be cut: it lacks 32 tokens"):
        cache.prune(view, 1)
    with pytest.raises(ValueError, match="is a view, which cannot be remembered"):
        cache.remember(view, [0] * LENGTH)
    assert cache.fork(view) != view
    cache.check_integrity()
