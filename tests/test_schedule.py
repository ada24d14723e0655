"""The device planner against its statement in plain Python, and both against what must hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.bits import ancestor_bits, ancestor_words

pytest.importorskip("triton")

import triton
import triton.language as tl

from specdec.kernels import partition, schedule, worklist
from specdec.kernels.flash import next_worker
from specdec.kernels.partition import MODES, Mode
from specdec.kernels.worklist import Schedule, Tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 60 if DEVICE == "cpu" else 20  # a GPU compiles for every window
PAGE, BLOCK_M, BLOCK_N = 4, 4, 8
FIELDS = ["START", "STEPS", "BLOCKS", "FIRST_ROW", "TOKENS", "OWNER", "TILE0", "TILES"]
FIELDS += ["KEY0", "LOOSE", "STEP", "STOP"]


@dataclass
class Batch:
    """Requests over a made-up page table, each with a random tree."""

    requests: list[partition.Request]
    parents: list[list[int]]
    groups: int = 2
    kv_heads: int = 2
    programs: int = 5

    def shape(self, window: int | None) -> partition.Shape:
        return partition.Shape(
            PAGE, BLOCK_M, BLOCK_N, self.groups, self.kv_heads, self.programs, window=window
        )

    def build(self, mode: Mode, window: int | None = None) -> Schedule:
        width = max(len(request.pages) for request in self.requests)
        table = [[*request.pages, *[0] * (width - len(request.pages))] for request in self.requests]
        rows = [request.rows for request in self.requests]
        starts = [sum(rows[:n]) for n in range(len(rows) + 1)]
        words = max(1, *(-(-len(p) // 32) for p in self.parents))
        bits = [b for parents in self.parents for b in ancestor_bits(parents)]
        return schedule.build(
            torch.tensor(table, device=DEVICE),
            torch.tensor([request.prefix for request in self.requests], device=DEVICE),
            PAGE,
            torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)).to(DEVICE),
            torch.cat([torch.arange(n) for n in rows]).to(DEVICE),
            ancestor_words(bits, words * 32).to(DEVICE),
            max_places=sum(rows),
            max_prefix=max(request.prefix for request in self.requests),
            shared=True,
            groups=self.groups,
            kv_heads=self.kv_heads,
            window=window,
            mode=mode,
            tiling=Tiling(BLOCK_M, BLOCK_N, 4, 1, 1, loose_n=BLOCK_N),
            programs=self.programs,
        )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Requests whose page tables agree with their neighbours' up to random depths."""
    requests: list[partition.Request] = []
    parents = []
    fresh = 1
    for _ in range(draw(st.integers(1, 6))):
        rows = draw(st.integers(1, 5))
        prefix = draw(st.integers(0, 45))
        count = -(-(prefix + rows) // PAGE)
        before = requests[-1].pages if requests else []
        common = draw(st.integers(0, min(prefix // PAGE, len(before))))
        pages = [*before[:common], *range(fresh, fresh + count - common)]
        fresh += count
        requests.append(partition.Request(pages, prefix, rows, rows))
        parents.append([-1, *(draw(st.integers(0, n - 1)) for n in range(1, rows))])
    for _ in range(draw(st.integers(0, 2))):  # what fills up a pass that is captured
        requests.append(partition.Request([], 0, 0, 0))
        parents.append([])
    return Batch(requests, parents)


windows = st.none() | st.integers(1, 50)


@settings(max_examples=EXAMPLES, deadline=None)
@given(batches(), st.sampled_from(MODES), windows)
def test_items_and_workers_are_those_of_the_reference(
    batch: Batch, mode: Mode, window: int | None
) -> None:
    built = batch.build(mode, window)
    shape = batch.shape(window)
    expected = partition.items(batch.requests, mode, shape)
    starts = [0, *torch.tensor([r.rows for r in batch.requests]).cumsum(0).tolist()]
    wanted: Counter[tuple[int, ...]] = Counter()
    for item in expected:
        if item.steps(batch.requests, shape):
            loose = sum(shape.loose(batch.requests[r]) for r in item.loose)
            rows = starts[item.last] - starts[item.first]
            wanted[item.first, starts[item.first], rows, item.tile0, item.tiles, loose] += 1
    found: Counter[tuple[int, ...]] = Counter()
    for row in built.items.tolist():
        if row[worklist.STEPS.value]:
            block_by_block = row[worklist.BLOCKS.value] < 0
            assert block_by_block == (row[worklist.TAKES.value] > 1), "or keys are read twice"
            fields = ("OWNER", "FIRST_ROW", "TOKENS", "TILE0", "TILES", "LOOSE")
            values = tuple(row[getattr(worklist, field).value] for field in fields)
            found[values if values[4] else (*values[:3], -1, *values[4:])] += 1
    wanted = Counter(
        {(k if k[4] else (*k[:3], -1, *k[4:])): n for k, n in wanted.items()}
    )  # where no tile is left, the first does not matter
    assert found == wanted

    lengths = sorted(b - a for a, b in partition.workers(expected, batch.requests, mode, shape))
    count = int(built.header[worklist.WORKERS.value])
    for worker in built.workers[:count].tolist():
        committed = batch.requests[worker[worklist.OWNER.value]].prefix
        assert worker[worklist.SETTLED.value] == committed // BLOCK_N
    found_workers = built.workers[:count, [worklist.STEP.value, worklist.STOP.value]].tolist()
    steps = sorted(found_workers)
    assert sorted(b - a for a, b in steps) == lengths
    assert [a for a, _ in steps[1:]] == [b for _, b in steps[:-1]], "no gap, no overlap"
    if mode == "sequence":  # the others may number their items in another order
        assert [b - a for a, b in found_workers] == [
            b - a for a, b in partition.workers(expected, batch.requests, mode, shape)
        ]


@settings(max_examples=EXAMPLES, deadline=None)
@given(batches(), st.sampled_from(MODES), windows)
def test_every_pair_of_query_and_key_is_covered_once(
    batch: Batch, mode: Mode, window: int | None
) -> None:
    built = batch.build(mode, window)
    covered = pairs(built, batch.groups, batch.kv_heads)
    expected: Counter[tuple[int, int, int]] = Counter()
    first = 0
    for request, parents in zip(batch.requests, batch.parents, strict=True):
        for node in range(request.rows):
            path: list[int] = []
            at = node
            while at >= 0:
                path.insert(0, request.prefix + at)
                at = parents[at]
            places = [*range(request.prefix), *path][-(window or 10**6) :]
            for place in places:
                slot = request.pages[place // PAGE] * PAGE + place % PAGE
                for head in range(batch.kv_heads * batch.groups):
                    expected[first + node, head, slot] += 1
        first += request.rows
    assert covered == expected


def pairs(built: Schedule, groups: int, kv_heads: int) -> Counter[tuple[int, int, int]]:
    """The (row, head, slot) that the kernel computes, read off the device's tables."""
    field = {name: getattr(worklist, name).value for name in FIELDS}
    slots, positions = built.key_slots.tolist(), built.row_positions.tolist()
    roots, tails = built.row_roots.tolist(), built.row_tails.tolist()
    assert built.words is not None
    bits = [
        sum((word & 0xFFFFFFFF) << 32 * n for n, word in enumerate(row))
        for row in built.words.tolist()
    ]
    weight, found = built.tiling.loose_steps, Counter[tuple[int, int, int]]()
    for worker in built.workers[: int(built.header[worklist.WORKERS.value])].tolist():
        get = {name: worker[at] for name, at in field.items()}
        step = get["STEP"]
        while step < get["STOP"]:
            column, begin = divmod(step - get["START"], get["STEPS"])
            end = min(get["STEPS"], begin + get["STOP"] - step)
            if get["BLOCKS"] > 0:
                head, block = divmod(column, get["BLOCKS"])
            else:
                block, head = divmod(column, kv_heads)
            for m in range(block * BLOCK_M, (block + 1) * BLOCK_M):
                if m >= get["TOKENS"] * groups:
                    continue
                row, query_head = get["FIRST_ROW"] + m // groups, head * groups + m % groups
                for unit in range(begin, end):
                    if unit < get["TILES"]:
                        for n in range(BLOCK_N):
                            place = (get["TILE0"] + unit) * BLOCK_N + n
                            page = int(built.page_table[get["OWNER"], place // PAGE])
                            if built.window is None or positions[row] - place < built.window:
                                found[row, query_head, page * PAGE + place % PAGE] += 1
                    elif (unit - get["TILES"]) % weight == 0:
                        tile = (unit - get["TILES"]) // weight * BLOCK_N
                        for key in range(tile, min(tile + BLOCK_N, get["LOOSE"])):
                            place = get["KEY0"] + key - roots[row]
                            if place >= -tails[row] if place < 0 else bits[row] >> place & 1:
                                found[row, query_head, slots[get["KEY0"] + key]] += 1
            step += end - begin
    return found


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 9)), min_size=1), st.integers(1, 12))
def test_the_busiest_program_is_known(each: list[tuple[int, int]], programs: int) -> None:
    while sum(count for _, count in each) > 2 * programs:
        each.pop()
    costs = [cost for cost, count in sorted(each, reverse=True) for _ in range(count)]
    hands = partition.dealt(len(costs), programs)
    assert sorted(worker for hand in hands for worker in hand) == [*range(len(costs))]
    most = max(sum(costs[worker] for worker in hand) for hand in hands)
    assert partition._busiest(each, programs) == most


@triton.jit  # type: ignore[untyped-decorator]
def _hands(OUT, workers, TURNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which workers a program has, one after the other, as the kernel finds them."""
    worker = tl.program_id(0)
    for turn in range(TURNS):
        if worker >= 0:
            tl.store(OUT + tl.program_id(0) * TURNS + turn, worker)
            worker = next_worker(worker, workers, tl.num_programs(0))


@pytest.mark.parametrize("workers", [3, 5, 8, 10, 14, 21])
def test_the_kernel_deals_as_the_reference_does(workers: int) -> None:
    programs, turns = 5, 6
    found = torch.full((programs, turns), -1, dtype=torch.int32, device=DEVICE)
    _hands[(programs,)](found, workers, TURNS=turns)
    hands = [[w for w in row if 0 <= w < workers] for row in found.tolist()]
    assert hands == partition.dealt(workers, programs)


@pytest.mark.parametrize("mode", ["sequence", "auto"])
def test_uneven_work_is_dealt_out_in_two_rounds(mode: Mode) -> None:
    """One worker for each program would leave some idle: columns are too unlike, and too few."""
    lengths = [380, 20, 200, 90, 60, 150, 35]
    ends = [sum(-(-n // PAGE) + 1 for n in lengths[: k + 1]) for k in range(len(lengths))]
    requests = [
        partition.Request(range(end - -(-n // PAGE) - 1, end), n, 4, 4)
        for n, end in zip(lengths, ends, strict=True)
    ]
    batch = Batch(requests, [[-1, 0, 0, 1]] * len(requests), programs=20)
    shape = batch.shape(None)
    items = partition.items(requests, mode, shape)
    built = batch.build(mode)
    count = int(built.header[worklist.WORKERS.value])
    found = built.workers[:count, [worklist.STEP.value, worklist.STOP.value]].tolist()
    assert [(a, b) for a, b in found] == partition.workers(items, requests, mode, shape)

    assert batch.programs < count <= 2 * batch.programs
    costs = [b - a + shape.start_steps for a, b in found]
    busiest = max(
        sum(costs[worker] for worker in hand) for hand in partition.dealt(count, batch.programs)
    )
    assert busiest < 1.2 * sum(costs) / batch.programs


def test_keys_that_are_still_to_be_written_are_told_from_committed_ones() -> None:
    """To a part of a chain the parts before it are prefix, which its own forward computes."""
    prefix, parts, rows = 21, 3, 10
    built = schedule.build(
        torch.arange(1, 16, device=DEVICE)[None],
        torch.tensor([prefix], device=DEVICE),
        PAGE,
        torch.arange(0, parts * rows + 1, rows, dtype=torch.int32, device=DEVICE),
        torch.zeros(parts * rows, dtype=torch.int64, device=DEVICE),
        torch.arange(parts * rows, device=DEVICE),
        None,
        max_places=parts * rows,
        max_prefix=prefix,
        shared=False,
        groups=1,
        kv_heads=1,
        window=None,
        mode="auto",
        tiling=Tiling(BLOCK_M, BLOCK_N, 4, 1, 1, loose_n=BLOCK_N),
        programs=5,
    )
    workers = built.workers[: int(built.header[worklist.WORKERS.value])]
    assert (workers[:, worklist.SETTLED.value] == prefix // BLOCK_N).all()
    ends = workers[:, worklist.TILE0.value] + workers[:, worklist.TILES.value]
    assert int(ends.max()) == (prefix + 2 * rows) // BLOCK_N, "the last part's prefix"


def test_hundreds_of_requests_share_a_prefix() -> None:
    requests = [partition.Request([1, 2, 3 + r], 9, 1, 1) for r in range(300)]
    batch = Batch(requests, [[-1]] * 300, groups=1, kv_heads=1)
    built = batch.build("auto")
    used = built.items[built.items[:, worklist.STEPS.value] > 0].tolist()
    assert [row[worklist.TOKENS.value] for row in used] == [300, *[1] * 300]
    covered = pairs(built, 1, 1)
    assert set(covered.values()) == {1}
    assert len(covered) == 300 * 10
