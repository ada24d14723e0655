"""Whole decoding steps as CUDA graphs, read one step late.

A graph holds a step of B requests with trees of N nodes: draft, plan, forward, acceptance, commit
and what the next step begins with. All of it lives in device tensors that stay where they are, so
the host only launches the next step while this one runs, and reads what the last one gave.

What the host learns late cannot do harm: a step that runs on behind the end of a text writes behind
that end, in pages that are still leased, and its tokens are thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.attention import AttentionPlan
from specdec.cache import Speculation
from specdec.drafting import DeviceDrafter, DraftBuffers, Drafter, RootsOnly
from specdec.rules import Greedy
from specdec.transfer import upload

if TYPE_CHECKING:
    from specdec.load import Lane
    from specdec.target import Target

ROOM = 256
"""Texts are given room for a multiple of so many tokens."""
SHORTEST = 1024
"""Of the prefixes that a graph is made for; later ones are for twice as many tokens."""
REPORT = 4
"""Numbers of a request's report before its tokens; see `kernels.steps`."""


@dataclass(frozen=True)
class Report:
    """What a step gave one request, as the device tells it."""

    tokens: tuple[int, ...]  # those that fit into its text
    drafted: int  # nodes, the root not counted
    accepted: int  # nodes, the root not counted, also those that did not fit
    continued: bool  # the last node of the path had children
    failed: bool  # a node of the path had no next token


@dataclass(eq=False)
class Texts:
    """B texts on the device, and whose they are."""

    sequences: Tensor  # [B] int64, 0 for those that are over or fill up the batch
    limits: Tensor  # [B] int64
    tokens: Tensor  # [B, T] int32
    lengths: Tensor  # [B] int64
    owner: CapturedLane | None = None

    @classmethod
    def empty(cls, requests: int, room: int, device: torch.device) -> Texts:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        tokens = torch.zeros(requests, room, dtype=torch.int32, device=device)
        return cls(zeros(requests), zeros(requests), tokens, zeros(requests))

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
        nodes: N.
        longest: committed tokens of a sequence, at most.
        shared: whether sequences may share pages.
    """

    def __init__(
        self,
        target: Target,
        texts: Texts,
        drafter: DeviceDrafter,
        nodes: int,
        longest: int,
        shared: bool,
    ) -> None:
        self.target, self.texts, self.drafter = target, texts, drafter
        self.longest, self.shared = longest, shared
        count, device = len(texts.lengths), target.device
        rows = count * nodes
        self.path = min(nodes, drafter.max_depth + 1)  # nodes of a path, at most

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.trees = DraftBuffers(
            text=texts.tokens,
            lengths=texts.lengths,
            tokens=zeros(rows),
            parents=zeros(rows, dtype=torch.int32),
            counts=zeros(count, dtype=torch.int32),
        )
        self.nodes = torch.arange(nodes, device=device).repeat(count)
        self.row_starts = torch.arange(count + 1, dtype=torch.int32, device=device) * nodes
        self.row_sequences, self.depths = zeros(rows), zeros(rows)
        self.ancestors = zeros(rows, (nodes + 31) // 32, dtype=torch.int32)
        self.slots, self.positions = zeros(rows), zeros(rows)
        self.sources, self.targets = zeros(count, self.path), zeros(count, self.path)
        self.report = zeros(count, REPORT + self.path + 1, dtype=torch.int32)

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
        logits = target.forward(trees.tokens, self._plan())
        best, choices = logits.max(-1)
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
        for emitted, drafted, accepted, flags, *tokens in numbers:
            path = tuple(tokens[:emitted])
            reports.append(Report(path, drafted, accepted, bool(flags & 1), bool(flags & 2)))
        return reports


@dataclass
class Graph:
    """A step, and after its first run the graph that replays it."""

    step: Step
    drafter: Drafter  # kept alive: graphs are found by it
    graph: torch.cuda.CUDAGraph | None = None
    warm: bool = False


@dataclass(eq=False)
class StepGraphs:
    """All steps that were captured for a target; they share their memory."""

    target: Target
    _texts: dict[int, Texts] = field(default_factory=dict)
    _graphs: dict[Hashable, Graph] = field(default_factory=dict)
    _places: Hashable = None  # where the tensors that the graphs refer to lie

    def texts(self, requests: int, longest: int) -> Texts:
        """Room for so many texts of a length; whoever had it last has finished with it."""
        size = 1 << (requests - 1).bit_length()
        room = -(-(longest + 1) // ROOM) * ROOM
        found = self._texts.get(size)
        if found is not None and found.owner is not None:
            found.owner.land()
        if found is None or found.tokens.shape[1] < room:
            self._graphs = {k: g for k, g in self._graphs.items() if g.step.texts is not found}
            room = max(room, 2 * found.tokens.shape[1] if found else 0)
            found = self._texts[size] = Texts.empty(size, room, self.target.device)
        found.owner = None
        return found

    def graph(
        self, texts: Texts, drafter: Drafter, nodes: int, longest: int, shared: bool
    ) -> Graph:
        """The graph for such a step, which may still be empty."""
        places = self._where()
        if places != self._places:  # the old graphs would write to memory that is others' now
            self._graphs.clear()
            self._places = places
        longest = max(SHORTEST, 1 << (longest - 1).bit_length())
        key = (len(texts.lengths), id(drafter), nodes, longest, shared)
        if key not in self._graphs:
            own = drafter.on_device(len(texts.lengths), self.target.device) if nodes > 1 else None
            own = own or RootsOnly()
            step = Step(self.target, texts, own, nodes, longest, shared)
            self._graphs[key] = Graph(step, drafter)
        return self._graphs[key]

    def launch(self, graph: Graph) -> None:
        """Runs a step: the first time as it is, which compiles what it needs; then captured.

        A CPU has no graphs; there the steps of Triton's interpreter run as they are.
        """
        if graph.graph is not None:
            graph.graph.replay()
        elif not graph.warm or self.target.device.type != "cuda":
            graph.step.run()
            graph.warm = True
        else:
            self._capture(graph)
            self.launch(graph)

    def _capture(self, graph: Graph) -> None:
        found, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            found.capture_begin(self._memory(), capture_error_mode="thread_local")
            try:
                graph.step.run()
            finally:
                found.capture_end()
        now.wait_stream(stream)
        graph.graph = found

    def _memory(self) -> Any:
        """What the graphs that there are allocate from; None if there are none."""
        return next((g.graph.pool() for g in self._graphs.values() if g.graph is not None), None)

    def _where(self) -> Hashable:
        cache = self.target.cache
        pages = [(g.keys.data_ptr(), g.values.data_ptr()) for g in cache.pool.groups]
        table = (cache.page_table.data_ptr(), tuple(cache.page_table.shape))
        return id(self.target.fused), cache.lengths.data_ptr(), table, tuple(pages)


@dataclass(frozen=True)
class Flight:
    """A step that was launched and not yet read."""

    step: Step
    lease: Speculation
    numbers: Tensor  # [B, 4 + path + 1] int32 on the host, once `done`
    done: torch.cuda.Event | None


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
        pages = [graphs.target.cache.pages_of(sequence)[:1] for sequence in lane.sequences]
        first = [page for (page,) in filter(None, pages)]
        self._shared = len(set(first)) < len(first)

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
            self._texts.owner = self
            self._launch()
        self._launch()
        return self._read()

    def land(self) -> None:
        """Reads what is in flight, and leaves the device to others."""
        while self._flights:
            self._landed.append(self._read())
        if self._texts is not None:
            self._texts.owner = None
            self._texts = None

    @property
    def landed(self) -> list[list[Report]]:
        """What was read and not yet handed out, which is handed out by this."""
        out = list(self._landed)
        self._landed.clear()
        return out

    def _launch(self) -> None:
        assert self._texts is not None
        cache, nodes = self.graphs.target.cache, self.lane.policy.nodes
        count = len(self.lane.sequences)
        lease = cache.speculate(self.lane.sequences, [nodes] * count)
        with lease:
            longest = max(map(cache.length_bound, self.lane.sequences)) + nodes
            graph = self.graphs.graph(
                self._texts, self.lane.policy.drafter, nodes, longest, self._shared
            )
            self.graphs.launch(graph)
            self._flights.append(Flight(graph.step, lease, *_to_host(graph.step.report)))
            lease.committed(graph.step.path)

    def _read(self) -> list[Report]:
        flight = self._flights.popleft()
        if flight.done is not None:
            flight.done.synchronize()
        reports = flight.step.read(flight.numbers.tolist())[: len(self.lane.requests)]
        flight.lease.settle([len(report.tokens) for report in reports])
        return reports


def _to_host(report: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy of a report, which is there when the event has happened."""
    if not report.is_cuda:
        return report.clone(), None
    numbers = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
    numbers.copy_(report, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return numbers, done


def grounded(target: Target, lane: Lane) -> str | None:
    """Why the steps of a lane cannot be captured; None if they can."""
    policy = lane.policy
    if not target.capture:
        return "capture is off"
    if target.fused is None:
        return f"layers by transformers: {target.unfit}"
    if not isinstance(policy.rule, Greedy):
        return f"the rule {policy.rule.name!r} is not captured"
    if policy.sampler.processors:
        return "processors change the logits"
    if policy.keep:
        return "scores or logits are kept"
    if policy.drafter.on_device(1, target.device) is None:
        return f"{type(policy.drafter).__name__} drafts on the host"
    return None
