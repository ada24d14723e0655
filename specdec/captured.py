"""Whole decoding steps as CUDA graphs, read one step late.

A graph holds a step of B requests with trees of N nodes: draft, plan, forward, acceptance, commit
and what the next step begins with. All of it lives in device tensors that stay where they are, so
the host only launches the next step while this one runs, and reads what the last one gave.

What the host learns late cannot do harm: a step that runs on behind the end of a text writes behind
that end, in pages that are still leased, and its tokens are thrown away.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.attention import AttentionPlan
from specdec.budget import NodeBudget
from specdec.cache import Speculation
from specdec.drafting import DeviceDrafter, DraftBuffers, Drafter, RootsOnly
from specdec.graphs import capture, reach, shared_memory
from specdec.transfer import upload
from specdec.tree import ProposalLaw
from specdec.verify import AcceptanceRule, DeviceChoice

if TYPE_CHECKING:
    from specdec.load import Lane
    from specdec.request import Policy, Request
    from specdec.target import Target

ROOM = 256
"""Texts are given room for a multiple of so many tokens."""
MOST = 64
"""Steps that are kept captured; drafters and options that are new with every request add more."""
TIME_MEMORY = 0.2
"""Weight of the newest time of a step among those before."""


@dataclass(frozen=True)
class Report:
    """What a step gave one request, as the device tells it."""

    tokens: tuple[int, ...]  # those that fit into its text
    drafted: int  # nodes, the root not counted
    accepted: int  # nodes, the root not counted, also those that did not fit
    continued: bool  # the last node of the path had children
    failed: bool  # a node of the path had no next token
    path: tuple[int, ...]  # accepted nodes, the root first, also those that did not fit


@dataclass(eq=False)
class Texts:
    """B texts on the device, and whose they are."""

    sequences: Tensor  # [B] int64, 0 for those that are over or fill up the batch
    limits: Tensor  # [B] int64
    tokens: Tensor  # [B, T] int32
    lengths: Tensor  # [B] int64
    seeds: Tensor  # [B] int64
    owner: weakref.ref[CapturedLane] | None = None

    @classmethod
    def empty(cls, requests: int, room: int, device: torch.device) -> Texts:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        tokens = torch.zeros(requests, room, dtype=torch.int32, device=device)
        return cls(zeros(requests), zeros(requests), tokens, zeros(requests), zeros(requests))

    def load(self, lane: Lane) -> None:
        """Takes over what the host knows of a lane's requests."""
        size, device = len(self.lengths), self.lengths.device
        fill = [0] * (size - len(lane.requests))
        facts = [
            [*lane.sequences, *fill],
            [*(request.max_length for request in lane.requests), *(1 for _ in fill)],
            [*(len(request.tokens) for request in lane.requests), *(1 for _ in fill)],
        ]
        self.sequences[:], self.limits[:], self.lengths[:] = upload(facts, device)
        self.seeds[: len(lane.seeds)] = lane.seeds
        longest = max(len(request.tokens) for request in lane.requests)
        rows = torch.zeros(size, longest, dtype=torch.int32)
        for row, request in zip(rows, lane.requests, strict=False):
            row[: len(request.tokens)] = torch.tensor(request.tokens, dtype=torch.int32)
        self.tokens[:, :longest] = upload(rows, device)


class Step:
    """One step over some texts with trees of N nodes: the buffers, and how they are worked through.

    Args:
        target: the model and its cache.
        texts: what is decoded.
        drafter: grows the trees.
        choice: what the target says after each node.
        nodes: N.
        words: of ancestor bits, a power of two; the same for trees of all sizes, so that kernels
            are compiled once.
        longest: committed tokens of a sequence, at most.
        shared: whether sequences may share pages.
    """

    def __init__(
        self,
        target: Target,
        texts: Texts,
        drafter: DeviceDrafter,
        choice: DeviceChoice,
        nodes: int,
        words: int,
        longest: int,
        shared: bool,
    ) -> None:
        self.target, self.texts, self.drafter, self.choice = target, texts, drafter, choice
        self.longest, self.shared = longest, shared
        count, device = len(texts.lengths), target.device
        rows = count * nodes
        self.path = min(nodes, drafter.max_depth + 1)  # nodes of a path, at most

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.trees = DraftBuffers(
            sequences=texts.sequences,
            text=texts.tokens,
            lengths=texts.lengths,
            tokens=zeros(rows),
            parents=zeros(rows, dtype=torch.int32),
            counts=zeros(count, dtype=torch.int32) + 1,
            longest=longest,
            shared=shared,
        )
        self.trees.parents.view(count, nodes)[:, 0] = -1
        self.nodes = torch.arange(nodes, device=device).repeat(count)
        self.row_starts = torch.arange(count + 1, dtype=torch.int32, device=device) * nodes
        self.row_sequences, self.depths = zeros(rows), zeros(rows)
        self.ancestors = zeros(rows, words, dtype=torch.int32)
        self.slots, self.positions = zeros(rows), zeros(rows)
        self.sources, self.targets = zeros(count, self.path), zeros(count, self.path)
        self.report = zeros(count, 5 + 2 * self.path, dtype=torch.int32)

    def run(self) -> None:
        """Launches all of the step; the host waits for nothing."""
        from specdec.kernels import steps  # needs Triton

        target, texts, trees = self.target, self.texts, self.trees
        cache = target.cache
        size = cache.pool.page_size
        self.drafter.draft(trees)
        steps.place(
            texts.sequences,
            cache.lengths,
            texts.limits,
            trees.parents,
            cache.page_table,
            size,
            row_sequences=self.row_sequences,
            depths=self.depths,
            ancestors=self.ancestors,
            slots=self.slots,
            positions=self.positions,
        )
        logits = target.compute(trees.tokens, self._plan())
        choices, best = self.choice.choose(
            logits, texts.seeds, texts.lengths, self.depths.view(len(texts.lengths), -1)
        )
        steps.accept(
            texts.sequences,
            cache.lengths,
            texts.limits,
            texts.tokens,
            texts.lengths,
            cache.page_table,
            size,
            tokens=trees.tokens,
            parents=trees.parents,
            depths=self.depths,
            ancestors=self.ancestors,
            counts=trees.counts,
            choices=choices,
            best=best,
            sources=self.sources,
            targets=self.targets,
            report=self.report,
        )
        cache.pool.move(self.sources, self.targets)

    def _plan(self) -> AttentionPlan:
        cache = self.target.cache
        return AttentionPlan(
            page_table=cache.page_table,
            prefix_lens=cache.lengths,
            page_size=cache.pool.page_size,
            row_starts=self.row_starts,
            sequence=self.row_sequences,
            nodes=self.nodes,
            ancestors=self.ancestors,
            slots=self.slots,
            positions=self.positions,
            max_rows=self.trees.nodes,
            max_places=len(self.nodes),
            max_prefix=self.longest,
            shared=self.shared,
        )

    def read(self, numbers: list[list[int]]) -> list[Report]:
        """The reports of a step, from what was copied to the host."""
        reports = []
        for emitted, drafted, accepted, flags, *rest in numbers:
            tokens, path = rest[: self.path + 1], rest[self.path + 1 :]
            reports.append(
                Report(
                    tuple(tokens[:emitted]),
                    drafted,
                    accepted,
                    bool(flags & 1),
                    bool(flags & 2),
                    tuple(path[: accepted + 1]),
                )
            )
        return reports


@dataclass
class Graph:
    """A step, and after its first run the graph that replays it."""

    step: Step
    policy: Policy  # kept alive: graphs are found by what it is made of
    state: Hashable  # of the drafter, when the step was made
    graph: torch.cuda.CUDAGraph | None = None
    warm: bool = False
    seconds: float | None = None  # of a replay

    def timed(self, seconds: float) -> None:
        """Takes in how long a replay took."""
        if self.seconds is None:
            self.seconds = seconds
        else:
            self.seconds += TIME_MEMORY * (seconds - self.seconds)


@dataclass(eq=False)
class StepGraphs:
    """All steps that were captured for a target; they share their memory."""

    target: Target
    _texts: dict[int, Texts] = field(default_factory=dict)
    _graphs: dict[Hashable, Graph] = field(default_factory=dict)
    _drafters: dict[Hashable, tuple[Policy, DeviceDrafter]] = field(default_factory=dict)
    _plain: DeviceDrafter = field(default_factory=RootsOnly)
    _budgets: dict[Hashable, tuple[Drafter, NodeBudget]] = field(default_factory=dict)
    _places: Hashable = None  # where the tensors that the graphs refer to lie

    def texts(self, requests: int, longest: int) -> Texts:
        """Room for so many texts of a length; whoever had it last has finished with it."""
        size = 1 << (requests - 1).bit_length()
        room = -(-(longest + 1) // ROOM) * ROOM
        found = self._texts.get(size)
        owner = found.owner() if found is not None and found.owner is not None else None
        if owner is not None:
            owner.land()
        if found is None or found.tokens.shape[1] < room:
            self._graphs = {k: g for k, g in self._graphs.items() if g.step.texts is not found}
            room = max(room, 2 * found.tokens.shape[1] if found else 0)
            found = self._texts[size] = Texts.empty(size, room, self.target.device)
        found.owner = None
        return found

    def drafter(self, texts: Texts, policy: Policy) -> DeviceDrafter:
        """What drafts for some texts, in steps of all sizes."""
        count = len(texts.lengths)
        if policy.nodes == 1:
            return self._plain
        key = count, _same(policy.drafter), policy.nodes
        if key not in self._drafters:
            made = policy.drafter.on_device(count, policy.nodes, self.target.device)
            assert made is not None
            self._drafters[key] = policy, made
            while len(self._drafters) > MOST:
                del self._drafters[next(iter(self._drafters))]
        return self._drafters[key][1]

    def graph(
        self,
        texts: Texts,
        policy: Policy,
        drafter: DeviceDrafter,
        nodes: int,
        longest: int,
        shared: bool,
    ) -> Graph:
        """The graph for such a step, which may still be empty."""
        drafter = drafter if nodes > 1 else self._plain
        places = self.target.places
        if places != self._places:  # the old graphs would write to memory that is others' now
            self._graphs.clear()
            self._places = places
        longest = reach(longest)
        # What all requests with such options have in common, not the policy of one call.
        how = _same(policy.drafter) if nodes > 1 else None, _settings(policy.rule)
        count = len(texts.lengths)
        key = (count, how, policy.sampler.settings, nodes, policy.nodes, longest, shared)
        found, state = self._graphs.get(key), drafter.state
        if found is None or found.step.drafter is not drafter or found.state != state:
            choice = policy.rule.on_device(policy.sampler)
            assert choice is not None
            words = 1 << ((policy.nodes + 31) // 32 - 1).bit_length()
            step = Step(self.target, texts, drafter, choice, nodes, words, longest, shared)
            self._graphs[key] = Graph(step, policy, state)
            while len(self._graphs) > MOST:
                del self._graphs[next(iter(self._graphs))]
        return self._graphs[key]

    @property
    def captured(self) -> list[Graph]:
        """The steps that are captured now."""
        return [graph for graph in self._graphs.values() if graph.graph is not None]

    def budget(self, policy: Policy) -> NodeBudget:
        """How large trees have paid so far with a drafter."""
        key = (_same(policy.drafter), policy.nodes, policy.adaptive)
        if key not in self._budgets:
            budget = NodeBudget(policy.nodes, fixed=not policy.adaptive)
            self._budgets[key] = (policy.drafter, budget)
            while len(self._budgets) > MOST:
                del self._budgets[next(iter(self._budgets))]
        return self._budgets[key][1]

    def forget_budgets(self) -> None:
        """Forgets what trees gave, when it was no real text that they were drafted for."""
        self._budgets.clear()

    def launch(self, graph: Graph) -> bool:
        """Runs a step, and says whether how long it takes means anything.

        The first time it runs as it is, which compiles what it needs; then it is captured. A CPU
        has no graphs; there the steps of Triton's interpreter run as they are.
        """
        if graph.graph is not None:
            graph.graph.replay()
            return True
        if graph.warm and self.target.device.type == "cuda":
            memory = shared_memory(found.graph for found in self._graphs.values())
            graph.graph, _ = capture(graph.step.run, memory)
            graph.graph.replay()  # the first time takes longer
        else:
            graph.step.run()
            graph.warm = True
        return False


@dataclass(frozen=True)
class Flight:
    """A step that was launched and not yet read."""

    graph: Graph
    lease: Speculation
    numbers: Tensor  # the step's report on the host, once `done`
    begun: torch.cuda.Event | None  # None if the time it takes means nothing
    done: torch.cuda.Event | None
    caught_up: bool  # the drafter did, before


class CapturedLane:
    """The decoding requests of one policy, while their steps are captured.

    Args:
        graphs: those of the target.
        lane: requests that all decode.
    """

    def __init__(self, graphs: StepGraphs, lane: Lane) -> None:
        self.graphs, self.lane = graphs, lane
        self._flights: deque[Flight] = deque()
        self._landed: deque[list[Report]] = deque()
        self._texts: Texts | None = None
        self._drafter: DeviceDrafter | None = None
        self._last: torch.cuda.Event | None = None  # when the step that was read last was over
        self._catching_up = 0.0  # seconds that it took the drafter when it last did
        self.gap = 0.0
        """Seconds before the step read last in which the device had nothing to do."""
        pages = [graphs.target.cache.pages_of(sequence)[:1] for sequence in lane.sequences]
        first = [page for (page,) in filter(None, pages)]
        self._shared = len(set(first)) < len(first)
        self.budget = graphs.budget(lane.policy)

    def advance(self) -> list[Report]:
        """Launches a step, and reads the one before it.

        Raises:
            OutOfPages: there is no room for a step; nothing is in flight then.
        """
        if self._landed:
            return self._landed.popleft()
        if self._texts is None:
            lane = self.lane
            longest = max(request.max_length for request in lane.requests)
            self.graphs.target.cache.expect(
                lane.sequences,
                [request.max_length + 2 * lane.policy.nodes for request in lane.requests],
            )
            self._texts = self.graphs.texts(len(lane.requests), longest)
            self._texts.load(lane)
            self._texts.owner = weakref.ref(self)
            self._drafter = self.graphs.drafter(self._texts, lane.policy)
            self._drafter.load(lane.context(self.graphs.target))
            self._launch()
        if any(self._left(request) > len(self._flights) for request in self.lane.requests):
            self._launch()
        return self._landed.popleft() if self._landed else self._read()

    @staticmethod
    def _left(request: Request) -> int:
        """Steps that a request needs at least one token from, as far as is known."""
        return 0 if request.over else request.max_length - len(request.tokens)

    def land(self) -> None:
        """Reads what is in flight, and leaves the device to others."""
        self._read_all()
        if self._texts is not None:
            self._texts.owner = None
            self._texts = None

    def _read_all(self) -> None:
        while self._flights:
            self._landed.append(self._read())

    @property
    def landed(self) -> list[list[Report]]:
        """What was read and not yet handed out, which is handed out by this."""
        out = list(self._landed)
        self._landed.clear()
        return out

    def _launch(self) -> None:
        assert self._texts is not None
        assert self._drafter is not None
        drafter, cache, policy = self._drafter, self.graphs.target.cache, self.lane.policy
        longest = max(map(cache.length_bound, self.lane.sequences)) + policy.nodes

        def graph(nodes: int) -> Graph:
            assert self._texts is not None
            return self.graphs.graph(self._texts, policy, drafter, nodes, longest, self._shared)

        lagging = drafter.lagging
        before = self._catching_up if lagging else 0.0
        nodes = self.budget.choose(lambda size: graph(size).seconds, before)
        lagging = lagging and nodes > 1
        if lagging:
            self._read_all()
            drafter.catch_up(self._texts.tokens)
        path = graph(nodes).step.path
        with (
            cache.speculate(self.lane.sequences, [nodes] * len(self.lane.sequences)) as lease,
            drafter.launching(nodes, path),
        ):
            chosen = graph(nodes)  # not before: making room may move what graphs refer to
            begun = _event(cache.device)
            tells = self.graphs.launch(chosen)
            numbers, done = _to_host(chosen.step.report)
            lease.committed(path)
        begun = begun if tells else None
        self._flights.append(Flight(chosen, lease, numbers, begun, done, lagging))

    def _read(self) -> list[Report]:
        flight = self._flights.popleft()
        self.gap = 0.0
        if flight.done is not None:
            flight.done.synchronize()
            if flight.begun is not None:
                flight.graph.timed(flight.begun.elapsed_time(flight.done) / 1000)
                if self._last is not None:
                    self.gap = self._last.elapsed_time(flight.begun) / 1000
                if flight.caught_up:
                    self._catching_up = self.gap
            self._last = flight.done
        step = flight.graph.step
        reports = step.read(flight.numbers.tolist())[: len(self.lane.requests)]
        emitted = [len(report.tokens) for report in reports]
        flight.lease.settle(emitted)
        assert self._drafter is not None
        self._drafter.settle(emitted)
        self.budget.learn(step.trees.nodes, [r.path for r in reports if r.tokens])
        return reports


def _same(drafter: Drafter) -> Hashable:
    """Equal for drafters that draft alike, as far as they can tell by themselves."""
    return drafter if isinstance(drafter, Hashable) else id(drafter)


def _settings(rule: AcceptanceRule) -> Hashable:
    return type(rule), repr(sorted(vars(rule).items()))


def _event(device: torch.device) -> torch.cuda.Event | None:
    """The present moment on a GPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _to_host(report: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy of a report, which is there when the event has happened."""
    if not report.is_cuda:
        return report.clone(), None
    numbers = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
    numbers.copy_(report, non_blocking=True)
    return numbers, _event(report.device)


def grounded(target: Target, lane: Lane) -> str | None:
    """Why the steps of a lane cannot be captured; None if they can."""
    policy = lane.policy
    if target.uncaptured is not None:
        return target.uncaptured
    if policy.rule.on_device(policy.sampler) is None:
        return f"the rule {policy.rule.name!r} with these options is not captured"
    if policy.keep:
        return "scores or logits are kept"
    if policy.observer is not None:
        return "an observer looks at every step"
    if target.layers_of(policy.drafter) is not None:
        return f"{type(policy.drafter).__name__} has layers of its own"
    if policy.law != ProposalLaw.DETERMINISTIC:
        return f"{type(policy.drafter).__name__} draws its drafts"
    if policy.drafter.on_device(1, policy.nodes, target.device) is None:
        return f"{type(policy.drafter).__name__} {policy.drafter.on_host}"
    return None
