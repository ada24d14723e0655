"""The paged cache against a plain dictionary, and speculation as a transaction."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specdec.batch import TreeBatch
from specdec.cache import NULL_SEQUENCE, Speculation, TreeKVCache
from specdec.kernels import cache as kernels
from specdec.pages import DraftLayers, LayerShape, OutOfPages, PagePool
from specdec.prefix_tree import Pin
from specdec.transfer import upload
from specdec.tree import TokenTree

CPU = torch.device("cpu")
LAYERS = [
    LayerShape(2, 4, 4, torch.float32, CPU),
    LayerShape(1, 4, 6, torch.float32, CPU),  # another group: fewer heads, wider values
    LayerShape(2, 4, 4, torch.float32, CPU),
]


OWN = [LayerShape(1, 2, 3, torch.float64, CPU), LayerShape(3, 1, 1, torch.float32, CPU)]
"""The layers of a drafter."""


def new_cache(page_size: int = 4, max_pages: int | None = None) -> TreeKVCache:
    return TreeKVCache(PagePool(LAYERS, page_size, max_pages))


def poison(cache: TreeKVCache) -> None:
    """What nobody has written reads as NaN."""
    for group in cache.pool.groups:
        group.keys.fill_(torch.nan)
        group.values.fill_(torch.nan)


def write(
    cache: TreeKVCache, slots: torch.Tensor, marks: torch.Tensor, own: DraftLayers | None = None
) -> None:
    """Writes a number that tells the rows apart into every layer of the model or of a drafter."""
    for index, shape in enumerate(OWN if own else LAYERS):
        pages = (own or cache.pool).layer(index)
        for tensor, dim in ((pages.keys, shape.key_dim), (pages.values, shape.value_dim)):
            rows = (marks + index)[:, None, None].expand(-1, shape.kv_heads, dim)
            kernels.write_rows(tensor, slots, rows)


def read(cache: TreeKVCache, sequence: int, own: DraftLayers | None = None) -> list[list[float]]:
    """The committed marks of a sequence, by layer; every head and dimension must agree."""
    length = int(cache.lengths[sequence])
    if own is not None:
        filled = cache.filled(sequence, own)
        length = length if filled is None else filled
    slots = cache.slots(torch.full((length,), sequence), torch.arange(length))
    out = []
    for index in range(len(OWN if own else LAYERS)):
        pages = (own or cache.pool).layer(index)
        keys, values = pages.keys.flatten(0, 1)[slots], pages.values.flatten(0, 1)[slots]
        for tensor in (keys, values):
            assert torch.equal(tensor, tensor[:, :1, :1].expand_as(tensor))
            out.append((tensor[:, 0, 0] - index).tolist())
    return out


def poison_free_pages(cache: TreeKVCache) -> None:
    """Whatever is read from pages that belong to nobody shows."""
    for group in cache.pool.groups:
        group.keys[:, cache.pool._free] = torch.nan
        group.values[:, cache.pool._free] = torch.nan


Text = tuple[str, tuple[int, ...]]


class CacheMachine(RuleBasedStateMachine):
    """Random operations on several sequences, compared with a dictionary of what they hold.

    What is written for a token depends on its key and on all tokens before it, as K and V do. Texts
    are made of two tokens, so that they often begin alike. A drafter has layers of its own, and
    fills them when it likes.
    """

    texts = st.lists(st.integers(0, 1), max_size=14)

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache(page_size=2, max_pages=40)
        self.own = self.cache.pool.register(OWN)
        self.model: dict[int, Text] = {}
        self.marks: dict[Text, float] = {}
        self.pins: list[tuple[Pin, Text]] = []

    def mark(self, key: str, tokens: Sequence[int]) -> float:
        return self.marks.setdefault((key, tuple(tokens)), float(len(self.marks) + 1))

    def sequence(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    def add(self, sequence: int, text: Text) -> None:
        assert sequence not in self.model
        assert sequence != NULL_SEQUENCE
        self.model[sequence] = text

    @precondition(lambda self: len(self.model) < 5)
    @rule(prompt=texts, key=st.sampled_from("ab"), later=st.booleans(), drafted=st.booleans())
    def admit(self, prompt: list[int], key: str, later: bool, drafted: bool) -> None:
        own = self.own if drafted else None
        sequence = self.cache.admit() if later else self.cache.admit(prompt, key=key, own=own)
        if later:
            self.cache.adopt(sequence, prompt, key=key, own=own)
        known = self.cache.length_bound(sequence)
        assert known % 2 == 0
        assert not drafted or self.cache.filled(sequence, self.own) is None
        self.add(sequence, (key, tuple(prompt[:known])))

    @precondition(lambda self: self.model and len(self.model) < 5)
    @rule(data=st.data(), cut=st.booleans())
    def fork(self, data: st.DataObject, cut: bool) -> None:
        parent = self.sequence(data)
        key, tokens = self.model[parent]
        length = data.draw(st.integers(0, len(tokens))) if cut else None
        state = self.cache._sequences[parent]
        settled = state.bound - state.unsettled
        if parent in self.unsettled() and (length is None or length > settled):
            with pytest.raises(RuntimeError, match="closed and settled"):
                self.cache.fork(parent, length)
        else:
            self.add(self.cache.fork(parent, length), (key, tokens[:length]))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        sequence = self.sequence(data)
        key, tokens = self.model[sequence]
        length = data.draw(st.integers(0, len(tokens)))
        if sequence not in self.unsettled():
            self.cache.prune(sequence, length)
            self.model[sequence] = (key, tokens[:length])

    def unsettled(self) -> set[int]:
        return {s for s in self.model if self.cache._sequences[s].unsettled}

    @precondition(lambda self: self.model)
    @rule(data=st.data(), remembered=st.booleans())
    def release(self, data: st.DataObject, remembered: bool) -> None:
        sequence = self.sequence(data)
        if remembered:
            self.cache.remember(sequence, self.model[sequence][1])
        self.cache.release(sequence)
        del self.model[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remember(self, data: st.DataObject) -> None:
        sequence = self.sequence(data)
        self.cache.remember(sequence, [*self.model[sequence][1], 0, 1])

    @rule(pages=st.integers(1, 9))
    def evict(self, pages: int) -> None:
        before = self.cache.pool.num_free
        assert self.cache.prefixes.evict(pages) == self.cache.pool.num_free - before <= pages

    @rule(prompt=texts, key=st.sampled_from("ab"))
    def pin(self, prompt: list[int], key: str) -> None:
        if self.pins:
            self.pins.pop()[0].release()
        else:
            pin = self.cache.prefixes.pin(prompt, key)
            self.pins.append((pin, (key, tuple(prompt[: 2 * len(pin.pages)]))))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), settle=st.sampled_from([True, True, False]), drafted=st.booleans())
    def speculate(self, data: st.DataObject, settle: bool, drafted: bool) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, unique=True))
        rows = [data.draw(st.integers(1, 7)) for _ in chosen]
        how = data.draw(st.sampled_from(["path", "path", "all", "nothing", "error"]))
        kept: list[list[int]] = [[] for _ in rows]
        if how == "all":
            kept = [list(range(count)) for count in rows]
        if how == "path":
            kept = [sorted(data.draw(st.sets(st.integers(0, count - 1)))) for count in rows]
        after, marks = dict(self.model), torch.full((sum(rows),), -1.0)
        for sequence, path, start in zip(chosen, kept, offsets(rows), strict=True):
            key, tokens = self.model[sequence]
            for row in path:
                tokens = (*tokens, data.draw(st.integers(0, 1)))
                marks[start + row] = self.mark(key, tokens)
            after[sequence] = (key, tokens)
        try:
            with self.cache.speculate(chosen, rows) as lease:
                self.cache.check_integrity()
                slots = lease.plan_chains().slots
                write(self.cache, slots, marks)
                if drafted:
                    write(self.cache, slots, marks, self.own)
                    lease.fill(self.own)
                if how == "error":
                    raise KeyboardInterrupt
                if how == "all":
                    lease.commit()
                if how == "path":
                    width = max(1, *(len(path) for path in kept))
                    lease.commit(torch.tensor([path + [-1] * (width - len(path)) for path in kept]))
        except KeyboardInterrupt:
            pass
        except OutOfPages as error:
            used = {page for m in self.cache._sequences.values() for page in m.pages}
            used.update(page for pin, _ in self.pins for page in pin.pages)
            if error.have != 40 - len(used):
                raise AssertionError("what was only cached was not evicted") from error
            return
        if settle and how in ("path", "all"):
            lease.settle([len(path) for path in kept])
        self.model = after

    @invariant()
    def same_contents(self) -> None:
        self.cache.check_integrity()
        poison_free_pages(self.cache)
        for sequence, (key, tokens) in self.model.items():
            expected = [self.mark(key, tokens[: at + 1]) for at in range(len(tokens))]
            assert all(layer == expected for layer in read(self.cache, sequence))
            for layer in read(self.cache, sequence, self.own):
                assert layer == expected[: len(layer)]
        for pin, (key, tokens) in self.pins:
            assert self.cache.prefixes.match(tokens, key) == pin.pages
        usage = self.cache.usage()
        total = usage.committed + usage.speculative + usage.cached + usage.free
        assert total == self.cache.pool.num_pages * self.cache.pool.page_bytes

    def teardown(self) -> None:
        for sequence in self.model:
            self.cache.release(sequence)
        for pin, _ in self.pins:
            pin.release()
        self.cache.prefixes.clear()
        self.cache.check_integrity()
        assert self.cache.pool.num_free == self.cache.pool.num_pages


def offsets(rows: list[int]) -> list[int]:
    return [sum(rows[:index]) for index in range(len(rows))]


CacheMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, derandomize=True
)
TestCacheMachine = CacheMachine.TestCase


def drafted(cache: TreeKVCache, sequence: int, rows: int, own: DraftLayers | None) -> None:
    """Commits rows 0, 1, ... of the target and, if it is there, of a drafter."""
    with cache.speculate([sequence], [rows]) as lease:
        marks = torch.arange(float(rows)) + int(cache.lengths[sequence])
        write(cache, lease.plan_chains().slots, marks)
        if own is not None:
            write(cache, lease.plan_chains().slots, marks, own)
            lease.fill(own)
        lease.commit()


def test_pages_that_a_drafter_has_not_filled_do_not_match_for_it_but_for_others() -> None:
    cache, text = new_cache(), range(12)
    first, second = cache.pool.register(OWN), cache.pool.register(OWN)
    plain = cache.admit(text, own=first)
    drafted(cache, plain, 4, first)
    drafted(cache, plain, 4, None)  # it misses these, so what it writes later is of no use to it
    drafted(cache, plain, 4, first)
    assert (cache.filled(plain, first), cache.filled(plain, second)) == (4, 0)
    child = cache.fork(plain, 3)
    assert cache.filled(child, first) is None
    cache.remember(plain, text)
    assert len(cache.prefixes.match(text)) == 3
    assert len(cache.prefixes.match(text, own=first)) == 1
    assert cache.prefixes.match(text, own=second) == []
    # Whoever computes the text again with a drafter completes the pages that are there.
    known = cache.prefixes.match(text)
    for own in (first, second):
        again = cache.admit(text, own=own)
        assert cache.length_bound(again) == (4 if own is first else 0)
        drafted(cache, again, 12 - cache.length_bound(again), own)
        cache.remember(again, text)
        cache.release(again)
        assert cache.prefixes.match(text, own=own) == known
    for own in (first, second):
        found = cache.admit(text, own=own)
        assert read(cache, found, own) == [list(map(float, text))] * 4
        cache.release(found)
    cache.check_integrity()
    cache.pool.unregister(first)
    assert len(cache.pool.groups) == 4
    cache.release(plain)
    cache.release(child)
    cache.prefixes.evict(3)
    assert not second.filled
    cache.check_integrity()


def test_a_page_that_was_cut_and_written_again_counts_as_not_filled() -> None:
    cache = new_cache()
    own = cache.pool.register(OWN)
    sequence = cache.admit()
    drafted(cache, sequence, 8, own)
    cache.remember(sequence, range(8))
    cache.prefixes.clear()
    cache.prune(sequence, 6)
    drafted(cache, sequence, 2, None)
    cache.remember(sequence, range(8))
    assert len(cache.prefixes.match(range(8), own=own)) == 1
    cache.prune(sequence, 6)
    drafted(cache, sequence, 2, own)
    assert cache.filled(sequence, own) is None


def test_a_view_shows_what_a_drafter_has_filled_of_its_pages() -> None:
    cache = new_cache()
    own = cache.pool.register(OWN)
    sequence = cache.admit()
    drafted(cache, sequence, 9, own)
    assert cache.filled(cache.view(sequence, [0, 2]), own) is None
    drafted(cache, sequence, 4, None)
    view = cache.view(sequence, [0, 2, 3])
    assert (cache.length_bound(view), cache.filled(view, own)) == (9, 4)
    with pytest.raises(ValueError, match="layers: expected at least one"):
        cache.pool.register([])


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


def test_a_failure_while_forking_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = new_cache()
    parent = cache.admit()
    with cache.speculate([parent], [6]) as lease:
        lease.commit()
    cache.remember(parent, range(6))

    def failing(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("specdec.cache.upload", failing)
        starts: list[Callable[[], int]] = [
            lambda: cache.fork(parent),
            lambda: cache.admit(range(6)),
            lambda: cache.view(parent, [1]),
        ]
        for start in starts:
            with pytest.raises(KeyboardInterrupt):
                start()
            assert cache.sequences == [parent]
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
