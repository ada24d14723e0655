"""The paged cache against a plain dictionary, and speculation as a transaction."""

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specdec.batch import TreeBatch
from specdec.cache import NULL_SEQUENCE, Speculation, TreeKVCache
from specdec.kernels import cache as kernels
from specdec.pages import LayerShape, OutOfPages, PagePool
from specdec.transfer import upload
from specdec.tree import TokenTree

CPU = torch.device("cpu")
LAYERS = [
    LayerShape(2, 4, 4, torch.float32, CPU),
    LayerShape(1, 4, 6, torch.float32, CPU),  # another group: fewer heads, wider values
    LayerShape(2, 4, 4, torch.float32, CPU),
]


def new_cache(page_size: int = 4, max_pages: int | None = None) -> TreeKVCache:
    return TreeKVCache(PagePool(LAYERS, page_size, max_pages))


def poison(cache: TreeKVCache) -> None:
    """What nobody has written reads as NaN."""
    for group in cache.pool.groups:
        group.keys.fill_(torch.nan)
        group.values.fill_(torch.nan)


def write(cache: TreeKVCache, slots: torch.Tensor, marks: torch.Tensor) -> None:
    """Writes a number that tells the rows apart into every layer."""
    for index, shape in enumerate(LAYERS):
        pages = cache.pool.layer(index)
        for tensor, dim in ((pages.keys, shape.key_dim), (pages.values, shape.value_dim)):
            rows = (marks + index)[:, None, None].expand(-1, shape.kv_heads, dim)
            kernels.write_rows(tensor, slots, rows)


def read(cache: TreeKVCache, sequence: int) -> list[list[float]]:
    """The committed marks of a sequence, by layer; every head and dimension must agree."""
    length = int(cache.lengths[sequence])
    slots = cache.slots(torch.full((length,), sequence), torch.arange(length))
    out = []
    for index in range(len(LAYERS)):
        pages = cache.pool.layer(index)
        keys, values = pages.keys.flatten(0, 1)[slots], pages.values.flatten(0, 1)[slots]
        for tensor in (keys, values):
            assert torch.equal(tensor, tensor[:, :1, :1].expand_as(tensor))
            out.append((tensor[:, 0, 0] - index).tolist())
    return out


class CacheMachine(RuleBasedStateMachine):
    """Random operations on several sequences, compared with lists of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache()
        self.model: dict[int, list[float]] = {}
        self.mark = 1.0

    def fresh(self, count: int) -> torch.Tensor:
        marks = torch.arange(count) + self.mark
        self.mark += count
        return marks

    @rule()
    def admit(self) -> None:
        if len(self.model) < 5:
            sequence = self.cache.admit()
            assert sequence not in self.model
            assert sequence != NULL_SEQUENCE
            self.model[sequence] = []

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        pages = list(self.cache._sequences[sequence].pages)
        self.cache.release(sequence)
        for group in self.cache.pool.groups:  # whatever is read from freed pages shows
            group.keys[:, pages] = torch.nan
            group.values[:, pages] = torch.nan
        del self.model[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), settle=st.booleans())
    def speculate(self, data: st.DataObject, settle: bool) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, unique=True))
        rows = [data.draw(st.integers(1, 9)) for _ in chosen]
        how = data.draw(st.sampled_from(["path", "all", "nothing", "error"]))
        try:
            with self.cache.speculate(chosen, rows) as lease:
                plan = lease.plan_chains()
                marks = self.fresh(sum(rows))
                write(self.cache, plan.slots, marks)
                if how == "error":
                    raise KeyboardInterrupt
                if how == "all":
                    lease.commit()
                    kept = [list(range(count)) for count in rows]
                elif how == "path":
                    kept = [sorted(data.draw(st.sets(st.integers(0, count - 1)))) for count in rows]
                    width = max(1, *(len(path) for path in kept))
                    lease.commit(torch.tensor([path + [-1] * (width - len(path)) for path in kept]))
                else:
                    kept = [[] for _ in rows]
        except KeyboardInterrupt:
            kept = [[] for _ in rows]
        if settle and how in ("path", "all"):
            lease.settle([len(path) for path in kept])
        for sequence, path, start in zip(chosen, kept, offsets(rows), strict=True):
            self.model[sequence] += [float(marks[start + row]) for row in path]

    @invariant()
    def same_contents(self) -> None:
        self.cache.check_integrity()
        for sequence, marks in self.model.items():
            assert all(layer == marks for layer in read(self.cache, sequence))


def offsets(rows: list[int]) -> list[int]:
    return [sum(rows[:index]) for index in range(len(rows))]


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestCacheMachine = CacheMachine.TestCase


def test_a_committed_path_is_compacted_over_its_own_rows() -> None:
    """Sources and destinations overlap: rows 1, 2, 4 move to 0, 1, 2."""
    cache = new_cache()
    poison(cache)
    sequence = cache.admit()
    tree = TokenTree.from_lists([0] * 6, [-1, 0, 1, 0, 2, 4])
    with cache.speculate([sequence], [len(tree)]) as lease:
        plan = lease.plan_trees(TreeBatch.pack([tree], vocab_size=1))
        write(cache, plan.slots, torch.arange(6.0))
        lease.commit(torch.tensor([[1, 2, 4, -1]]))
    assert read(cache, sequence) == [[1.0, 2.0, 4.0]] * 6
    cache.check_integrity()


def test_leaving_without_commit_rolls_back_and_a_second_commit_is_refused() -> None:
    cache = new_cache()
    sequence = cache.admit()
    with pytest.raises(ZeroDivisionError), cache.speculate([sequence], [3]):
        raise ZeroDivisionError
    assert int(cache.lengths[sequence]) == 0
    with cache.speculate([sequence], [3]) as lease:
        lease.commit()
        with pytest.raises(RuntimeError, match="already committed"):
            lease.commit()
        with pytest.raises(RuntimeError, match="already committed"):
            lease.plan_chains()
    assert int(cache.lengths[sequence]) == 3
    cache.check_integrity()


def test_a_sequence_has_one_speculation_at_a_time() -> None:
    cache = new_cache()
    sequence = cache.admit()
    with cache.speculate([sequence], [1]), pytest.raises(RuntimeError, match="already has an open"):
        cache.speculate([sequence], [1])
    with pytest.raises(ValueError, match="expected admitted ones, got 9"):
        cache.speculate([9], [1])
    with pytest.raises(ValueError, match="at least 1"):
        cache.speculate([sequence], [0])


def test_a_full_pool_says_need_and_have_and_changes_nothing() -> None:
    cache = new_cache(page_size=4, max_pages=3)
    first, second = cache.admit(), cache.admit()
    with cache.speculate([first], [8]) as lease:
        lease.commit()
    with pytest.raises(OutOfPages, match="need 2 pages of 4 tokens, have 1 free of 3") as caught:
        cache.speculate([first, second], [1, 1])
    assert (caught.value.need, caught.value.have, caught.value.limit) == (2, 1, 3)
    cache.check_integrity()
    with cache.speculate([second], [4]) as lease:
        lease.commit()
    cache.release(first)
    with cache.speculate([second], [8]) as lease:
        lease.commit()
    cache.check_integrity()


def test_growing_keeps_what_was_written() -> None:
    cache = new_cache(page_size=2)
    sequences = [cache.admit() for _ in range(3)]
    for turn in range(6):
        with cache.speculate(sequences, [3, 3, 3]) as lease:
            write(cache, lease.plan_chains().slots, torch.arange(9.0) + 10 * turn)
            lease.commit()
        cache.check_integrity()
    expected = [float(10 * turn + row) for turn in range(6) for row in range(3)]
    assert read(cache, sequences[0]) == [expected] * 6


def test_the_bound_of_a_length_may_be_settled_late() -> None:
    """Two steps run before the host learns what the first one kept."""
    cache = new_cache()
    sequence = cache.admit()
    leases: list[Speculation] = []
    for _ in range(2):
        with cache.speculate([sequence], [5]) as lease:
            lease.commit(torch.tensor([[0, 2, -1]]))
            leases.append(lease)
        cache.check_integrity()
    assert cache.length_bound(sequence) == 6
    for lease in leases:
        lease.settle([2])
    assert cache.length_bound(sequence) == int(cache.lengths[sequence]) == 4


def test_a_lease_never_acts_on_a_sequence_that_took_its_number() -> None:
    cache = new_cache()
    old = cache.admit()
    lease = cache.speculate([old], [5])
    late = cache.speculate([cache.admit()], [5])
    late.commit(torch.tensor([[0, 1, 2, 3]]))
    cache.release(old)
    cache.release(2)
    first, second = cache.admit(), cache.admit()
    assert (first, second) == (1, 2)
    with cache.speculate([first, second], [8, 8]) as new:
        new.commit()
    assert not lease.open
    with pytest.raises(RuntimeError, match="already committed or rolled back"):
        lease.commit()
    late.settle([1])
    assert cache.length_bound(second) == 8
    cache.check_integrity()
    with pytest.raises(RuntimeError, match="settle: expected once"):
        late.settle([1])
    with pytest.raises(ValueError, match="kept: expected 0 to 8 rows, got 9"):
        new.settle([9, 9])


@pytest.mark.parametrize("fail_at", range(4))
def test_a_failure_while_reserving_reserves_nothing(
    monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    cache = new_cache()
    sequences = [cache.admit(), cache.admit()]
    calls = 0

    def failing(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > fail_at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", failing(torch.cat))
        patch.setattr("specdec.cache.upload", failing(upload))
        with pytest.raises(KeyboardInterrupt):
            cache.speculate(sequences, [30, 30])
    cache.check_integrity()
    with cache.speculate(sequences, [30, 30]) as lease:
        lease.commit()
    cache.check_integrity()


def test_pages_are_not_freed_twice() -> None:
    pool = new_cache().pool
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(RuntimeError, match="page 1 is freed but not owned"):
        pool.free(pages)


def test_padding_rows_live_in_the_trash_page() -> None:
    cache = new_cache(page_size=4)
    slots = cache.slots(torch.tensor([NULL_SEQUENCE] * 6), torch.arange(6))
    assert slots.tolist() == [0, 1, 2, 3, 0, 1]


def test_a_shared_page_stays_until_its_last_owner_lets_go() -> None:
    pool = new_cache().pool
    pages = pool.allocate(2)
    pool.share(pages[:1])
    pool.check_integrity([pages, pages[:1]])
    pool.free(pages)
    pool.check_integrity([pages[:1]])
    assert pool.allocate(1) == pages[1:]
    pool.free(pages)
    pool.check_integrity([])


def test_integrity_finds_a_leaked_page() -> None:
    cache = new_cache()
    sequence = cache.admit()
    with cache.speculate([sequence], [4]) as lease:
        lease.commit()
    cache._sequences[sequence].pages.pop()
    with pytest.raises(RuntimeError, match="owned 0 times but has 1 references"):
        cache.check_integrity()


@pytest.mark.parametrize("page_size", [0, 3, -4])
def test_page_size_is_a_power_of_two(page_size: int) -> None:
    with pytest.raises(ValueError, match="page_size: expected"):
        PagePool(LAYERS, page_size)
