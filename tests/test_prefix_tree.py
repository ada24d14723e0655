"""The prefix tree: what is found, what is shared, what is evicted first, and what it saves."""

from __future__ import annotations

import pytest
import torch

from specdec.cache import TreeKVCache
from specdec.pages import LayerShape, PagePool
from specdec.prefix_tree import PrefixTree

SIZE = 4
SHAPE = LayerShape(1, 2, 2, torch.float32, torch.device("cpu"))


def new_tree(max_bytes: int | None = None) -> PrefixTree:
    return PrefixTree(PagePool([SHAPE], SIZE), max_bytes)


def text(*pages: int) -> list[int]:
    """Tokens of pages that are told apart by their last token."""
    return [token for page in pages for token in (0, 0, 0, page)]


def add(tree: PrefixTree, *pages: int, key: object = None) -> list[int]:
    """A text of such pages that only the tree holds."""
    owned = tree.pool.allocate(len(pages))
    tree.insert(text(*pages), owned, key)
    tree.pool.free(owned)
    tree.check_integrity()
    tree.pool.check_integrity(tree.owned())
    return owned


def test_the_longest_run_of_full_pages_is_found() -> None:
    tree = new_tree()
    pages = add(tree, 1, 2, 3)
    assert tree.match(text(1, 2, 3)) == pages
    assert tree.match([*text(1, 2, 3), 7]) == pages
    assert tree.match(text(1, 2, 3)[:-1]) == pages[:2]
    assert tree.match(text(1, 2, 4)) == pages[:2], "the first tokens of page 3 agree, not all"
    assert tree.match(text(2)) == tree.match([]) == []
    assert tree.match(text(1), "another key") == []


def test_texts_that_part_share_what_they_have_in_common() -> None:
    tree = new_tree()
    first = add(tree, 1, 2, 3, 4)
    second = add(tree, 1, 2, 5)
    assert tree.num_pages == 5
    assert tree.match(text(1, 2, 5)) == [*first[:2], second[2]]
    assert [len(node.pages) for node in tree.nodes()] == [2, 2, 1]
    add(tree, 1, 2, 3, 4, 6)
    assert [len(node.pages) for node in tree.nodes()] == [2, 3, 1], "a leaf grows in place"
    assert tree.insert(text(1, 2), tree.match(text(1, 2))) == 0
    tree.clear()
    assert tree.pool.num_free == tree.pool.num_pages
    assert tree.num_pages == 0


def test_equal_hashes_do_not_mix_prompts() -> None:
    tree = new_tree()
    pages = add(tree, 1)
    clash = [0, 0, 0, 1 + (2**61 - 1)]  # Python hashes integers modulo that prime
    assert hash(tuple(clash)) == hash(tuple(text(1)))
    assert tree.match(clash) == []
    assert tree.match(text(1)) == pages


def test_the_ends_of_the_least_recently_used_leaves_go_first() -> None:
    tree = new_tree()
    add(tree, 1, 2, 3)
    add(tree, 1, 4)
    tree.match(text(1, 2))
    assert tree.evict(1) == 1
    assert len(tree.match(text(1, 4))) == 1
    assert tree.evict(1) == 1
    assert len(tree.match(text(1, 2, 3))) == 2, "a leaf loses its end, not all of it"
    assert tree.evict(9) == 2
    assert tree.evicted == 4
    assert not list(tree.nodes())
    assert not tree.roots


def test_pages_in_use_and_pinned_ones_are_not_evicted() -> None:
    tree = new_tree()
    add(tree, 1, 2)
    with tree.pin(text(1, 9)) as pin:
        assert len(pin.pages) == 1
        assert tree.evict(9) == 1
        assert tree.match(text(1, 2)) == pin.pages
        tree.clear()
        tree.pool.check_integrity(tree.owned())
    pin.release()
    assert tree.pool.num_free == tree.pool.num_pages


def test_the_budget_is_kept_by_evicting() -> None:
    page_bytes = new_tree().pool.page_bytes
    assert page_bytes == SIZE * 2 * 2 * 4
    tree = new_tree(max_bytes=3 * page_bytes + 1)
    add(tree, 1, 2)
    add(tree, 3, 4)
    assert tree.num_pages == 3
    assert len(tree.match(text(3, 4))) == 2
    assert new_tree(0).insert([], []) == 0
    with pytest.raises(ValueError, match="max_bytes: expected 0 or more, got -1"):
        new_tree(-1)
    with pytest.raises(ValueError, match="tokens: expected 8 for 2 pages, got 7"):
        tree.insert([0] * 7, [1, 2])


def extend(cache: TreeKVCache, sequences: list[int], tokens: list[int]) -> None:
    with cache.speculate(sequences, tokens) as lease:
        lease.commit()


def committed_tokens(cache: TreeKVCache) -> float:
    """Committed bytes in units of one token's."""
    return cache.usage().committed * cache.pool.page_size / cache.pool.page_bytes


@pytest.mark.parametrize("page_size", [4, 16])
def test_a_common_prefix_is_stored_once(page_size: int) -> None:
    """32 requests, 2,048 tokens in common and 256 of their own: within 5 % of the unique bytes."""
    cache = TreeKVCache(PagePool([SHAPE], page_size))
    trunk = cache.admit()
    extend(cache, [trunk], [2046])  # in the middle of a page
    sequences = [trunk, *(cache.fork(trunk) for _ in range(31))]
    extend(cache, sequences, [258] * 32)
    assert committed_tokens(cache) <= 1.05 * (2048 + 32 * 256)
    nodes = 25
    with cache.speculate(sequences, [nodes] * 32) as lease:
        assert lease.plan_chains().shared
        speculative = cache.usage().speculative // cache.pool.page_bytes
        assert speculative <= 32 * (nodes // page_size + 2)
    cache.check_integrity()


@pytest.mark.parametrize(("shared", "batch"), [(1024, 23), (2048, 19), (4096, 16)])
def test_sharing_saves_what_chunk_attention_reports(shared: int, batch: int) -> None:
    """Its table 4: prompts that are all shared, answers of up to 512 tokens in all stages."""
    cache = TreeKVCache(PagePool([SHAPE], 16))
    trunk = cache.admit()
    extend(cache, [trunk], [shared])
    sequences = [trunk, *(cache.fork(trunk) for _ in range(batch - 1))]
    answers = [1 + 511 * index // (batch - 1) for index in range(batch)]
    extend(cache, sequences, answers)
    saved = 1 - committed_tokens(cache) / (batch * shared + sum(answers))
    assert 0.7 <= saved <= 0.9
