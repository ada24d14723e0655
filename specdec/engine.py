"""Continuous batching: requests come and go while draft, verify, accept, commit goes on.

One pass of the model carries the trees of all requests that decode and, in what room is left,
pieces of the prompts of those that do not yet (chunked prefill, SARATHI, arXiv 2308.16369), all
packed without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from specdec.attention import AttentionPlan
from specdec.batch import TreeBatch
from specdec.bits import chain_words
from specdec.drafting import DraftContext, Observation
from specdec.pages import OutOfPages, check_count
from specdec.request import Emission, Policy, Request
from specdec.scheduler import Scheduler
from specdec.speculation import Speculation
from specdec.stats import GenerationStats, Stopwatch
from specdec.target import Target
from specdec.transfer import upload
from specdec.verify import Noise, Outcome


@dataclass(frozen=True)
class _Lane:
    """The decoding requests of one policy, as arrays; rebuilt when they change."""

    policy: Policy
    requests: tuple[Request, ...]
    numbers: tuple[int, ...]
    sequences: tuple[int, ...]
    seeds: Tensor  # [B] int64
    last_positions: Tensor  # [B] int64


class Engine:
    """Runs requests through one target.

    Invariant between steps: a request that decodes has exactly the tokens before the root, which is
    the last known token, in its cache. So the first step speculates like any other.

    Args:
        target: the model and its cache.
        policy: of requests that bring none.
        step_tokens: rows of one pass, at most, if the trees alone are not more; prompts get what
            trees leave, and never less than a page.
        prefix_cache: use what was computed for one request for others that begin like it.
        max_running: requests that run at once; None for as many as there is room for.
    """

    def __init__(
        self,
        target: Target,
        policy: Policy,
        *,
        step_tokens: int = 512,
        prefix_cache: bool = True,
        max_running: int | None = None,
    ) -> None:
        check_count("step_tokens", step_tokens)
        if max_running is not None:
            check_count("max_running", max_running)
        self.target = target
        self.step_tokens = step_tokens
        self.stats = GenerationStats(rule=policy.rule.name)
        self.scheduler = Scheduler(
            target,
            policy,
            self.stats,
            prefix_cache=prefix_cache,
            max_running=max_running,
        )
        self._watch = Stopwatch(target.device, self.stats.seconds)
        self._lanes: list[_Lane] = []
        self._lanes_of = -1  # the scheduler's changes that they were made after

    def add(self, request: Request) -> None:
        """Lets a request wait for its turn."""
        self.scheduler.waiting.append(request)
        self.stats.prompt_tokens += request.prompt_length

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not (self.scheduler.waiting or self.scheduler.running)

    def step(self) -> list[Emission]:
        """One pass of the model, and what it gave to the requests that decode.

        A request that does not fit into the cache alone ends with `error` set. If anything is
        raised, all requests have been stopped and no page stays behind.
        """
        scheduler, evicted = self.scheduler, self.target.cache.prefixes.evicted
        try:
            with self._turn(), self._watch.host("total"):
                scheduler.admit()
                emissions = self._pass()
                done = [emission.request for emission in emissions if emission.request.finished]
                if done:
                    self._account()
                for request in done:
                    scheduler.finish(request)
        except BaseException as error:
            self.cancel([*scheduler.running, *scheduler.waiting], error)
            raise
        self.stats.evicted_pages += self.target.cache.prefixes.evicted - evicted
        return emissions

    def cancel(self, requests: Sequence[Request], error: BaseException | None = None) -> None:
        """Stops requests, finished or not, wherever they are; nothing of them stays behind."""
        scheduler = self.scheduler
        with self._turn(), ExitStack() as stops:  # all of them, also when a drafter raises
            for request in requests:
                if request.sequence >= 0:
                    stops.callback(scheduler.finish, request)
                if request in scheduler.waiting:
                    scheduler.waiting.remove(request)
                if isinstance(error, Exception) and not request.finished:
                    request.error = error

    def run(self, requests: Sequence[Request]) -> Iterator[list[Emission]]:
        """Runs requests to their ends; yields after every step that gave any of them tokens.

        However it is left - end, exception, closed iterator - no page stays behind.

        Raises:
            OutOfPages: one of them does not fit into the cache alone.
        """
        try:
            for request in requests:
                self.add(request)
            while any(not request.finished for request in requests):
                emissions = self.step()
                for request in requests:
                    if request.error is not None:
                        raise request.error
                if emissions:
                    yield emissions
        finally:
            self.cancel(requests)
            self._watch.read()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, and ordinary tensors: the cache outlives an inference mode."""
        with self.target.lock, torch.inference_mode(False), torch.no_grad():
            yield

    def _account(self) -> None:
        for owner, count in asdict(self.target.cache.usage()).items():
            self.stats.bytes[owner] = max(self.stats.bytes.get(owner, 0), count)

    def _pass(self) -> list[Emission]:
        pieces = self._make_room()
        lanes = self._current_lanes()
        proposals = []
        for lane in lanes:
            with self._watch.phase("draft"):
                try:
                    proposals.append(self._propose(lane))
                except OutOfPages as error:  # of the drafter's own cache
                    self._begin_again(lane, error)
                    return []
        if not lanes and not pieces:
            return []
        sequences = [number for lane in lanes for number in lane.sequences]
        sequences += [request.sequence for request, _ in pieces]
        rows = [size for trees in proposals for size in trees.sizes]
        rows += [count for _, count in pieces]
        with self.target.cache.speculate(sequences, rows) as lease:
            starts = lease.lengths
            plan = self._plan(lease, lanes, proposals, pieces)
            trees_rows = sum(len(trees.tokens) for trees in proposals)
            tokens = [trees.tokens for trees in proposals]
            texts = [r.tokens[r.cached : r.cached + count] for r, count in pieces]
            if texts:
                tokens.append(upload([t for text in texts for t in text], self.target.device))
            keep: int | Tensor = 0 if not texts else 1
            if texts and lanes:
                keep = torch.arange(trees_rows, device=self.target.device)
            with self._watch.phase("forward" if lanes else "prefill"):
                logits = self.target.forward(torch.cat(tokens), plan, keep=keep)
            outcomes, first, line = [], 0, 0
            with self._watch.phase("accept"):
                for lane, trees in zip(lanes, proposals, strict=True):
                    here = logits[first : first + len(trees.tokens)]
                    roots = starts[line : line + len(lane.requests)]
                    policy = lane.policy
                    scores = policy.sampler.probs(here) if policy.rule.samples else here
                    noise = Noise(lane.seeds, roots + 1)
                    outcomes.append(policy.rule.verify(trees, scores, noise))
                    first, line = first + len(trees.tokens), line + len(lane.requests)
            with self._watch.phase("commit"):
                lease.commit(_stacked([outcome.paths for outcome in outcomes]))
        kept, emissions = [], []
        for lane, trees, outcome in zip(lanes, proposals, outcomes, strict=True):
            paths, tokens_, continued = _read(trees, outcome)
            self._check_outcome(lane, paths, tokens_)
            kept += [len(path) for path in paths]
            emissions.append((lane, trees, paths, tokens_, continued))
        lease.settle([*kept, *(count for _, count in pieces)])
        self.scheduler.prefilled(pieces)
        return [emission for parts in emissions for emission in self._emit(*parts)]

    def _make_room(self) -> list[tuple[Request, int]]:
        """Pages for the largest trees and the next pieces of prompts, by preempting if need be."""
        scheduler, cache = self.scheduler, self.target.cache
        while True:
            lanes = self._current_lanes()
            trees = sum(lane.policy.nodes * len(lane.requests) for lane in lanes)
            pieces = scheduler.pieces(max(self.step_tokens - trees, cache.pool.page_size))
            sequences = [number for lane in lanes for number in lane.sequences]
            rows = [lane.policy.nodes for lane in lanes for _ in lane.sequences]
            try:
                cache.reserve(
                    [*sequences, *(request.sequence for request, _ in pieces)],
                    [*rows, *(count for _, count in pieces)],
                )
            except OutOfPages as error:
                self._preempt(error)
            else:
                return pieces

    def _preempt(self, error: OutOfPages) -> None:
        """Stops the youngest request so that others can go on; one that is alone cannot."""
        request = self.scheduler.preempt()
        if not self.scheduler.running:
            self.scheduler.waiting.remove(request)
            self.stats.preemptions -= 1
            request.error = error

    def _begin_again(self, lane: _Lane, error: OutOfPages) -> None:
        """Preempts after the drafter ran out of pages, half-way through a proposal."""
        for request in lane.requests:
            lane.policy.drafter.end([request.number])
        for request in lane.requests:
            lane.policy.drafter.begin([request.number])
        self._preempt(error)

    def _current_lanes(self) -> list[_Lane]:
        scheduler = self.scheduler
        if self._lanes_of != scheduler.changes:
            members: dict[int, list[Request]] = {}
            for request in scheduler.running:
                if not request.missing:
                    members.setdefault(id(scheduler.policy_of(request)), []).append(request)
            self._lanes = [self._lane(requests) for requests in members.values()]
            self._lanes_of = scheduler.changes
        return self._lanes

    def _lane(self, requests: list[Request]) -> _Lane:
        device = self.target.device
        return _Lane(
            self.scheduler.policy_of(requests[0]),
            tuple(requests),
            tuple(request.number for request in requests),
            tuple(request.sequence for request in requests),
            upload([request.seed for request in requests], device),
            upload([request.max_length - 1 for request in requests], device),
        )

    def _propose(self, lane: _Lane) -> TreeBatch:
        keys = tuple(request.cache_key for request in lane.requests)
        context = DraftContext(
            sequences=lane.numbers,
            tokens=tuple(request.tokens for request in lane.requests),
            max_depths=tuple(max(0, r.max_length - len(r.tokens) - 1) for r in lane.requests),
            seeds=lane.seeds,
            sampler=lane.policy.sampler,
            vocab_size=self.target.vocab_size,
            device=self.target.device,
            cache_keys=keys if self.scheduler.prefix_cache else None,
        )
        trees = lane.policy.drafter.propose(context, lane.policy.nodes)
        self._check(lane.policy, trees, len(lane.requests))
        return trees

    def _plan(
        self,
        lease: Speculation,
        lanes: Sequence[_Lane],
        proposals: Sequence[TreeBatch],
        pieces: Sequence[tuple[Request, int]],
    ) -> AttentionPlan:
        """Trees first, then pieces of prompts, which are chains."""
        if not lanes:
            return lease.plan_chains()
        device = self.target.device
        chains = [torch.arange(count) for _, count in pieces]
        nodes = [trees.nodes for trees in proposals]
        depths = [trees.depths for trees in proposals]
        words = [trees.ancestors for trees in proposals]
        lasts = [lane.last_positions[t.tree] for lane, t in zip(lanes, proposals, strict=True)]
        if pieces:
            places = upload(torch.cat(chains), device)
            nodes.append(places)
            depths.append(places)
            words.append(chain_words(places, max(count for _, count in pieces)))
            ends = [request.max_length for request, count in pieces for _ in range(count)]
            lasts.append(upload(ends, device))
        width = max(word.shape[1] for word in words)
        if len(words) > 1:
            width = 1 << (width - 1).bit_length()  # few widths: kernels are compiled for each
        padded = [torch.nn.functional.pad(word, (0, width - word.shape[1])) for word in words]
        plan = lease.plan(lease.rows, torch.cat(nodes), torch.cat(depths), torch.cat(padded))
        # Nodes behind the last position a request may fill cannot matter.
        return plan.held(torch.cat(lasts))

    def _emit(
        self,
        lane: _Lane,
        trees: TreeBatch,
        paths: Sequence[tuple[int, ...]],
        tokens: Sequence[tuple[int, ...]],
        continued: Sequence[bool],
    ) -> list[Emission]:
        """Tells the drafter and the requests what became of their trees."""
        new = tuple(line[1:] for line in tokens)
        lane.policy.drafter.observe(Observation(lane.numbers, trees, tuple(paths), new))
        emissions = []
        for index, request in enumerate(lane.requests):
            request.cached += len(paths[index])
            taken = request.emit(new[index])
            accepted = min(len(paths[index]) - 1, len(taken))
            emission = Emission(request, taken, trees.sizes[index] - 1, accepted)
            self.stats.add_step(
                drafted=emission.drafted,
                accepted=emission.accepted,
                continued=continued[index] and len(taken) == len(new[index]),
                tokens=len(taken),
            )
            emissions.append(emission)
        return emissions

    def _check(self, policy: Policy, trees: TreeBatch, count: int) -> None:
        name = type(policy.drafter).__name__
        if not isinstance(trees, TreeBatch):
            raise TypeError(f"{name}.propose: expected a TreeBatch, got {type(trees).__name__}")
        if len(trees.sizes) != count or max(trees.sizes) > policy.nodes:
            raise ValueError(
                f"{name}.propose: expected {count} trees of at most {policy.nodes} nodes, "
                f"got sizes {trees.sizes}"
            )
        illegal = trees.laws_used - policy.rule.legal_laws
        if illegal:
            raise ValueError(
                f"{name}.propose: the rule {policy.rule.name!r} is not lossless for "
                f"{', '.join(law.name.lower() for law in illegal)} proposals; set the drafter's "
                "law, so that a legal rule is chosen"
            )
        if trees.device != self.target.device:
            raise ValueError(
                f"{name}.propose: expected trees on {self.target.device}, got {trees.device}"
            )

    def _check_outcome(
        self,
        lane: _Lane,
        paths: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
    ) -> None:
        """Checks on the host what could not be checked before without waiting for the device."""
        name = type(lane.policy.drafter).__name__
        for index, request in enumerate(lane.requests):
            root, token = tokens[index][0], tokens[index][-1]
            if root != request.tokens[-1]:
                raise ValueError(
                    f"{name}.propose: expected the root of tree {index} to be the last known "
                    f"token {request.tokens[-1]}, got {root}"
                )
            if not 0 <= token < self.target.vocab_size:
                raise ValueError(
                    f"request {index}: no token could be drawn after {len(paths[index]) - 1} "
                    "accepted nodes; its logits hold NaN or infinity, or the sampling options "
                    "leave no token"
                )


def _read(
    trees: TreeBatch, outcome: Outcome
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...], list[bool]]:
    """Brings an outcome to the host: one copy, the only time a step waits for the device.

    Returns for each tree the nodes of its path, their tokens and the next token, and whether the
    last node had children. Paths and tokens begin with the root.
    """
    rows = trees.offsets[:, None] + outcome.paths.clamp_min(0)
    packed = torch.cat(
        [
            outcome.paths,
            trees.tokens[rows],
            outcome.next_tokens[:, None],
            outcome.continued[:, None].long(),
        ],
        dim=1,
    )
    width = outcome.paths.shape[1]
    paths, tokens, continued = [], [], []
    for line in packed.tolist():
        path = tuple(node for node in line[:width] if node >= 0)
        paths.append(path)
        tokens.append((*line[width : width + len(path)], line[2 * width]))
        continued.append(bool(line[2 * width + 1]))
    return tuple(paths), tuple(tokens), continued


def _stacked(paths: Sequence[Tensor]) -> Tensor | None:
    """[B, D] paths of several lanes under each other, -1 behind the last."""
    if not paths:
        return None
    width = max(path.shape[1] for path in paths)
    pad = torch.nn.functional.pad
    return torch.cat([pad(path, (0, width - path.shape[1]), value=-1) for path in paths])
