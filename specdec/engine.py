"""Continuous batching: requests come and go while draft, verify, accept, commit goes on.

One pass of the model carries the trees of all requests that decode and, in what room is left,
pieces of the prompts of those that do not yet (chunked prefill, SARATHI, arXiv 2308.16369), all
packed without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor

from specdec.batch import TreeBatch
from specdec.captured import CapturedLane, Report, grounded
from specdec.drafting import Filling, Observation
from specdec.fused import FusedModel
from specdec.judge import Judgement, judge
from specdec.load import Lane, Load, Verdict, read, stacked
from specdec.pages import OutOfPages, check_count
from specdec.request import Emission, Policy, Request, RequestError, Verified
from specdec.sampling import Text
from specdec.scheduler import Scheduler
from specdec.stats import GenerationStats, Stopwatch
from specdec.target import Target
from specdec.transfer import upload
from specdec.verify import Noise

STEP_TOKENS = 512
"""Rows of a pass beside trees: enough to keep a GPU busy, and nobody waits long for the next."""
ALONE_TOKENS = 2048
"""Rows of a pass without trees."""


class Engine:
    """Runs requests through one target.

    Invariant between steps: a request that decodes has exactly the tokens before the root, which is
    the last known token, in its cache. The pass that computes the end of a prompt has the root as
    well, and emits what follows it; the token emitted is the root of the first step.

    Args:
        target: the model and its cache.
        policy: of requests that bring none.
        step_tokens: rows of one pass, at most, if the trees alone are not more; prompts get what
            trees leave, and never less than a page. By default 512, and 2,048 without trees.
        prefix_cache: use what was computed for one request for others that begin like it.
        max_running: requests that run at once; None for as many as there is room for.
    """

    def __init__(
        self,
        target: Target,
        policy: Policy,
        *,
        step_tokens: int | None = None,
        prefix_cache: bool = True,
        max_running: int | None = None,
    ) -> None:
        if step_tokens is not None:
            check_count("step_tokens", step_tokens)
        if max_running is not None:
            check_count("max_running", max_running)
        self.target = target
        self.step_tokens = step_tokens
        self.stats = GenerationStats(rule=policy.rule.label)
        self.scheduler = Scheduler(
            target,
            policy,
            self.stats,
            prefix_cache=prefix_cache,
            max_running=max_running,
        )
        self._watch = Stopwatch(target.device, self.stats.seconds)
        self._stepping = False
        self._noted: list[Request] = []  # to be stopped when the step that runs is over
        self._lanes: list[Lane] = []
        self._lanes_of = -1  # the scheduler's changes that they were made after
        self._captured: CapturedLane | None = None
        self._judged: tuple[Lane, FusedModel | None] | None = None  # what `_why` is about
        self._why: str | None = None

    def add(self, request: Request) -> None:
        """Lets a request wait for its turn.

        Raises:
            ValueError: its text has an id outside the vocabulary, or the drafter cannot be used.
        """
        # On the host, where it costs next to nothing: on a GPU such an id ends the process.
        for extreme in (min(request.tokens), max(request.tokens)):
            if not 0 <= extreme < self.target.vocab_size:
                raise ValueError(
                    f"input_ids: expected ids from 0 to {self.target.vocab_size - 1}, the "
                    f"vocabulary, got {extreme}"
                )
        self.target.layers_of(self.scheduler.policy_of(request).drafter)  # says now what is wrong
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

        Raises:
            RuntimeError: it was called from inside a step, by a drafter, a processor or a stopping
                criterion.
        """
        scheduler, evicted = self.scheduler, self.target.cache.prefixes.evicted
        with self._turn():
            if self._stepping:
                raise RuntimeError(
                    "step: called from inside a step; a drafter, a processor or a stopping "
                    "criterion cannot wait for tokens of the engine that asks it"
                )
            try:
                with self._noting(), self._watch.host("total"):
                    scheduler.admit()
                    emissions = self._pass()
                    done = [e.request for e in emissions if e.request.finished]
                    if done:
                        self._account()
                        scheduler.admit()  # who waits for the prompt of one of them has it now
                    for request in done:
                        scheduler.finish(request)
            except BaseException as error:
                self.cancel([*scheduler.running, *scheduler.waiting], error)
                raise
        self.stats.evicted_pages += self.target.cache.prefixes.evicted - evicted
        return emissions

    def cancel(self, requests: Sequence[Request], error: BaseException | None = None) -> None:
        """Stops requests, finished or not, wherever they are; nothing of them stays behind.

        Called from inside a step - by a drafter, a processor, a stopping criterion - it stops them
        at the end of that step, which the other requests need whole.
        """
        scheduler = self.scheduler
        with self._turn(), ExitStack() as stops:  # all of them, also when a drafter raises
            if self._stepping:  # in this thread: it has the lock
                self._noted += requests
                return
            for request in requests:
                if request.sequence >= 0:
                    stops.callback(scheduler.finish, request)
                if request in scheduler.waiting:
                    scheduler.waiting.remove(request)
                if isinstance(error, Exception) and not request.finished:
                    request.error = error
                elif not request.over:
                    request.stopped = True

    def run(self, requests: Sequence[Request]) -> Iterator[list[Emission]]:
        """Runs requests to their ends; yields after every step that gave any of them tokens.

        However it is left - end, exception, closed iterator - no page stays behind.

        Raises:
            OutOfPages: one of them does not fit into the cache alone.
            RequestError: at the end, when requests had no next token; the others ran on.
        """
        try:
            for request in requests:
                self.add(request)
            while not all(request.over for request in requests):
                emissions = self.step()
                for request in requests:
                    if request.error is not None and not isinstance(request.error, RequestError):
                        raise request.error
                if emissions:
                    yield emissions
            failed = [str(request.error) for request in requests if request.error is not None]
            if failed:
                raise RequestError("; ".join(failed))
        finally:
            self.cancel(requests)
            self._watch.read()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, and ordinary tensors: the cache outlives an inference mode."""
        with self.target.lock, torch.inference_mode(False), torch.no_grad():
            yield

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """While it lasts, `cancel` only takes note; what was noted is stopped afterwards."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
            noted, self._noted = self._noted, []
            self.cancel(noted)

    def _account(self) -> None:
        for owner, count in asdict(self.target.cache.usage()).items():
            self.stats.bytes[owner] = max(self.stats.bytes.get(owner, 0), count)

    def _pass(self) -> list[Emission]:
        lanes = self._current_lanes()
        lane = lanes[0] if len(lanes) == 1 and not self.scheduler.prefilling else None
        why = self._grounded(lanes, lane)
        if self._captured is not None and (self._captured.lane is not lane or why is not None):
            return self._land()
        if lane is not None and why is None:
            emissions = self._fly(lane)
            if emissions is not None:
                return emissions
            why = "pages run out"
        pieces, lanes = self._make_room(), self._current_lanes()
        if not lanes and not pieces:
            return []
        self.stats.paths[why or "pages run out"] += 1
        try:
            with self._watch.phase("draft"):
                proposals = [self._propose(lane) for lane in lanes]
            arrived = [request for request, count in pieces if count > request.missing]
            load = Load(lanes, proposals, pieces, self._grouped(arrived), self.target.device)
            leased = self.target.cache.speculate(load.sequences, load.rows)
        except OutOfPages as error:  # of a drafter's own cache, or trees deeper than was asked for
            self._begin_again(lanes, error)
            return []
        with leased as lease:
            plan = load.plan(lease)
            policies = [
                *(lane.policy for lane in lanes),
                *(self.scheduler.policy_of(request) for request, _ in pieces),
            ]
            filling = Filling(self.target, [policy.drafter for policy in policies])
            with self._watch.phase("forward" if lanes else "prefill"):
                tokens = load.tokens(plan.slots.device)
                logits = self.target.forward(tokens, plan, keep=load.keep, taps=filling.taps)
            load.score_prompts(logits)
            with self._watch.phase("draft"):
                filling.fill(tokens, plan, lease)
            with self._watch.phase("accept"):
                judged = self._verify(load, logits)
            with self._watch.phase("commit"):
                paths = [judgement.outcome.paths for judgement in judged[: len(lanes)]]
                lease.commit(stacked(paths))
        decided = [read(*pair) for pair in zip(load.trees, judged, strict=True)]
        for lane, verdict in zip(lanes, decided, strict=False):
            self._check_roots(lane, verdict.tokens)
        kept = [len(path) for verdict in decided[: len(lanes)] for path in verdict.paths]
        lease.settle([*kept, *(count for _, count in pieces)])
        self.scheduler.prefilled(pieces)
        given: list[Emission] = []
        for place, part in enumerate(zip(load.judged, load.trees, judged, decided, strict=True)):
            given += self._emit(*part, proposed=place < len(lanes))
        return given

    def _grounded(self, lanes: Sequence[Lane], lane: Lane | None) -> str | None:
        """Why the next pass cannot be captured; None if it can."""
        if lane is None:
            return "prompts are computed" if self.scheduler.prefilling else "several policies"
        if self._judged != (lane, self.target.fused):
            self._judged = lane, self.target.fused
            self._why = grounded(self.target, lane)
        return self._why

    def _fly(self, lane: Lane) -> list[Emission] | None:
        """Launches a captured step and tells what the last one gave; None if pages run out."""
        if self._captured is None:
            self._captured = CapturedLane(self.target.graphs, lane)
        try:
            with self._watch.phase("captured"):
                reports = self._captured.advance()
        except OutOfPages:
            return self._land() or None
        self.stats.paths["captured"] += 1
        self._watch.add("gap", self._captured.gap)
        emissions = self._report(lane, reports)
        if any(e.request.finished and e.request.heir is not None for e in emissions):
            self._captured.land()  # whoever inherits the sequence finds it settled
        return emissions

    def _land(self) -> list[Emission]:
        """Ends the captured steps of a lane, and tells what they still gave."""
        captured, self._captured = self._captured, None
        if captured is None:
            return []
        captured.land()
        return [e for reports in captured.landed for e in self._report(captured.lane, reports)]

    def _report(self, lane: Lane, reports: Sequence[Report]) -> list[Emission]:
        """Tells the requests what a captured step gave them, but for those that are over."""
        emissions = []
        for request, report in zip(lane.requests, reports, strict=True):
            if request.over or request.sequence < 0:
                continue
            request.cached += len(report.tokens)
            if report.failed:
                request.finished = True
                request.error = RequestError(_no_token(request, report.accepted))
            taken = [] if report.failed else request.emit(report.tokens)
            emission = Emission(request, taken, report.drafted, min(report.accepted, len(taken)))
            self.stats.add_step(
                drafted=emission.drafted,
                accepted=emission.accepted,
                continued=report.continued and len(taken) == report.accepted + 1,
                tokens=len(taken),
            )
            emissions.append(emission)
        return emissions

    def _verify(self, load: Load, logits: Tensor) -> list[Judgement]:
        """What the rule of each lane keeps of its trees, and says behind the arrivals' roots."""
        judged, row = [], 0
        for lane, trees in zip(load.judged, load.trees, strict=True):
            here, policy = logits[row:][: len(trees.tokens)], lane.policy
            texts = [Text((*r.padding, *r.tokens), r.row) for r in lane.requests]
            places = upload([len(r.tokens) for r in lane.requests], self.target.device)
            noise = Noise(lane.seeds, places)
            keep = policy.keep or policy.observer is not None
            judged.append(judge(policy.rule, policy.sampler, here, trees, texts, noise, keep=keep))
            row += len(here)
        return judged

    def _make_room(self) -> list[tuple[Request, int]]:
        """Pages for the largest trees and the next pieces of prompts, by preempting if need be."""
        scheduler, cache = self.scheduler, self.target.cache
        while True:
            lanes = self._current_lanes()
            trees = sum(lane.policy.nodes * len(lane.requests) for lane in lanes)
            most = self.step_tokens or (STEP_TOKENS if lanes else ALONE_TOKENS)
            pieces = scheduler.pieces(max(most - trees, cache.pool.page_size))
            sequences = [number for lane in lanes for number in lane.sequences]
            rows = [  # one that ends with its next token needs no drafts
                lane.policy.nodes if len(request.tokens) + 1 < request.max_length else 1
                for lane in lanes
                for request in lane.requests
            ]
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

    def _begin_again(self, lanes: Sequence[Lane], error: OutOfPages) -> None:
        """Preempts after a drafter ran out of pages, half-way through a proposal."""
        for lane in lanes:
            lane.policy.drafter.end(lane.numbers)
        for lane in lanes:
            lane.policy.drafter.begin(lane.numbers)
        self._preempt(error)

    def _current_lanes(self) -> list[Lane]:
        scheduler = self.scheduler
        if self._lanes_of != scheduler.changes:
            self._lanes = self._grouped([r for r in scheduler.running if not r.missing])
            self._lanes_of = scheduler.changes
        return self._lanes

    def _grouped(self, requests: Sequence[Request]) -> list[Lane]:
        members: dict[int, list[Request]] = {}
        for request in requests:
            members.setdefault(id(self.scheduler.policy_of(request)), []).append(request)
        return [self._lane(same) for same in members.values()]

    def _lane(self, requests: list[Request]) -> Lane:
        device = self.target.device
        return Lane(
            self.scheduler.policy_of(requests[0]),
            tuple(requests),
            tuple(request.number for request in requests),
            tuple(request.sequence for request in requests),
            upload([request.seed for request in requests], device),
            upload([request.max_length - 1 for request in requests], device),
            tuple(r.cache_key for r in requests) if self.scheduler.prefix_cache else None,
        )

    def _propose(self, lane: Lane) -> TreeBatch:
        context = lane.context(self.target)
        trees = lane.policy.drafter.propose(context, lane.policy.nodes)
        self._check(lane.policy, trees, len(lane.requests))
        return trees

    def _emit(
        self,
        lane: Lane,
        trees: TreeBatch,
        judgement: Judgement,
        verdict: Verdict,
        *,
        proposed: bool,
    ) -> list[Emission]:
        """Tells the requests, and the drafter if it proposed them, what became of their trees."""
        paths, continued = verdict.paths, verdict.continued
        for index, request in enumerate(lane.requests):
            token = verdict.tokens[index][-1]
            if not verdict.healthy[index] or not 0 <= token < self.target.vocab_size:
                request.finished = True
                request.error = RequestError(_no_token(request, len(paths[index]) - 1))
        new = tuple(
            line[1:] if request.error is None else line[1:-1]
            for request, line in zip(lane.requests, verdict.tokens, strict=True)
        )
        observation = Observation(lane.numbers, trees, paths, new)
        if proposed:
            lane.policy.drafter.observe(observation)
        emissions = []
        for index, request in enumerate(lane.requests):
            request.cached += len(paths[index])
            taken = [] if request.error is not None else request.emit(new[index])
            accepted = min(len(paths[index]) - 1, len(taken))
            emission = Emission(request, taken, trees.sizes[index] - 1, accepted)
            if lane.policy.keep:
                start = sum(trees.sizes[:index])
                rows = [start + node for node in paths[index][: len(taken)]]
                scores, logits = judgement.of(upload(rows, self.target.device))
                emission = replace(emission, scores=scores, logits=logits)
            if proposed:
                self.stats.add_step(
                    drafted=emission.drafted,
                    accepted=emission.accepted,
                    continued=continued[index] and len(taken) == len(new[index]),
                    tokens=len(taken),
                )
            else:
                self.stats.add_first(tokens=len(taken))
            emissions.append(emission)
        if lane.policy.observer is not None:
            lane.policy.observer(Verified(observation, judgement.scores, emissions))
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
        if policy.rule.chains and trees.max_children > 1:
            raise ValueError(
                f"{name}.propose: the rule {policy.rule.name!r} verifies chains, got a node with "
                f"{trees.max_children} children; use rule='traversal', or draft chains where "
                "`context.chains` is set"
            )
        if trees.device != self.target.device:
            raise ValueError(
                f"{name}.propose: expected trees on {self.target.device}, got {trees.device}"
            )

    def _check_roots(self, lane: Lane, tokens: Sequence[Sequence[int]]) -> None:
        """Checks on the host what could not be checked before without waiting for the device."""
        name = type(lane.policy.drafter).__name__
        for index, request in enumerate(lane.requests):
            root = tokens[index][0]
            if root != request.tokens[-1]:
                raise ValueError(
                    f"{name}.propose: expected the root of tree {index} to be the last known "
                    f"token {request.tokens[-1]}, got {root}"
                )


def _no_token(request: Request, accepted: int) -> str:
    place = len(request.tokens) - request.prompt_length + accepted
    return (
        f"request {request.row}: no token could be drawn after {accepted} accepted nodes, for new "
        f"token {place}; its logits hold NaN or infinity, or the sampling options and processors "
        "leave no token"
    )
