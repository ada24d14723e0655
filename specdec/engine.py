"""The decoding loop: draft, verify, accept, commit, for a batch of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor

from specdec.batch import TreeBatch
from specdec.drafting import DraftContext, Drafter, Observation
from specdec.sampling import Sampler, Text
from specdec.stats import GenerationStats, Stopwatch
from specdec.target import Target
from specdec.transfer import upload
from specdec.tree import ProposalLaw
from specdec.verify import AcceptanceRule, Noise, Outcome


@dataclass(eq=False)
class Request:
    """One text to continue.

    Args:
        tokens: the prompt; grows with every token emitted.
        max_new_tokens: at least 1.
        seed: of its position-keyed randomness.
        stops: asked after every token, with the request as it then is.
    """

    tokens: list[int]
    max_new_tokens: int
    seed: int
    stops: Callable[[Request], bool]
    prompt_length: int = field(init=False)
    number: int = field(init=False, default_factory=count().__next__)
    """Never given twice, so that a drafter can serve several runs at once."""
    finished: bool = False
    sequence: int = -1
    """In the target's cache while it runs, else -1."""
    row: int = 0
    """Of the batch passed to `generate`."""
    padding: Sequence[int] = ()
    """What stands before the prompt there: transformers' processors see it."""
    error: str | None = None
    """Why it ended early, if it did."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("tokens: expected a prompt of at least one token, got none")
        self.prompt_length = len(self.tokens)

    @property
    def emitted(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.tokens[self.prompt_length :]

    def emit(self, tokens: Sequence[int]) -> list[int]:
        """Takes tokens until one ends the text; returns those taken."""
        taken: list[int] = []
        for token in tokens:
            self.tokens.append(token)
            taken.append(token)
            full = len(self.tokens) - self.prompt_length >= self.max_new_tokens
            if self.stops(self) or full:
                self.finished = True
                break
        return taken


@dataclass(frozen=True)
class Emission:
    """What one step gave one request."""

    request: Request
    tokens: list[int]
    drafted: int
    """Nodes proposed, the root not counted."""
    accepted: int
    """Nodes accepted, the root not counted, nor what lay behind the end of the text."""
    scores: Tensor | None = None
    """[tokens, V] float32, what each token was chosen by, if the engine keeps them."""
    logits: Tensor | None = None
    """[tokens, V] float32, the same before processing."""


class RequestError(ValueError):
    """Some requests had no next token: the message names them and the nodes.

    The others of the batch ran to their ends; `sequences` has what all of them emitted.
    """

    sequences: Tensor | None = None


class Engine:
    """Runs requests through one target with one drafter and one rule.

    Invariant between steps: a sequence's cache holds exactly the tokens before the root, which is
    the last known token. So the first step speculates like any other.

    Args:
        target: the model and its cache.
        drafter: proposes trees.
        rule: keeps a path of each.
        sampler: the sampling options.
        nodes: largest tree to propose, the root included.
        law: to draft under; by default the drafter's own.
        keep: whether emissions carry `scores` and `logits`.
        prefill_chunk: prompt tokens in one pass.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rule: AcceptanceRule,
        sampler: Sampler,
        *,
        nodes: int,
        law: ProposalLaw | None = None,
        keep: bool = False,
        prefill_chunk: int = 512,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.rule = rule
        self.sampler = sampler
        self.nodes = nodes
        self.keep = keep
        self.law = drafter.law if law is None else law
        self.prefill_chunk = prefill_chunk
        self.stats = GenerationStats(rule=rule.label)

    def run(self, requests: Sequence[Request]) -> Iterator[list[Emission]]:
        """Runs requests to their ends; yields after every step of those still running.

        However it is left - end, exception, closed iterator - no page stays behind.

        Raises:
            RequestError: at the end, when a request had no next token.
        """
        watch = Stopwatch(self.target.device, self.stats.seconds)
        try:
            with self._turn(), watch.host("total"), watch.phase("prefill"):
                self._begin(requests)
            while running := [request for request in requests if not request.finished]:
                with self._turn(), watch.host("total"):
                    emissions = self._step(running, watch)
                yield emissions
                self._end([request for request in running if request.finished])
            failed = [request.error for request in requests if request.error is not None]
            if failed:
                raise RequestError("; ".join(failed))
        finally:
            self._end(requests)
            watch.read()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, and ordinary tensors: the cache outlives an inference mode."""
        with self.target.lock, torch.inference_mode(False), torch.no_grad():
            yield

    def _begin(self, requests: Sequence[Request]) -> None:
        cache, device = self.target.cache, self.target.device
        for request in requests:
            request.sequence = cache.admit()
        self.drafter.begin([request.number for request in requests])
        self.target.prefill(
            [request.sequence for request in requests],
            [upload(request.tokens[:-1], device) for request in requests],
            chunk=self.prefill_chunk,
        )
        self.stats.prompt_tokens += sum(len(request.tokens) for request in requests)

    def _end(self, requests: Sequence[Request]) -> None:
        running = [request for request in requests if request.sequence >= 0]
        with self._turn():
            try:
                self.drafter.end([request.number for request in running])
            finally:
                for request in running:
                    self.target.cache.release(request.sequence)
                    request.sequence = -1

    def _step(self, requests: Sequence[Request], watch: Stopwatch) -> list[Emission]:
        device = self.target.device
        sequences = tuple(request.sequence for request in requests)
        seeds = upload([request.seed for request in requests], device)
        numbers = tuple(request.number for request in requests)
        context = DraftContext(
            sequences=numbers,
            tokens=tuple(tuple(request.tokens) for request in requests),
            max_depths=tuple(
                max(0, request.prompt_length + request.max_new_tokens - len(request.tokens) - 1)
                for request in requests
            ),
            seeds=seeds,
            sampler=self.sampler,
            vocab_size=self.target.vocab_size,
            device=device,
            law=self.law,
            chains=self.rule.chains,
        )
        with watch.phase("draft"):
            trees = self.drafter.propose(context, self.nodes)
            self._check(trees, len(requests))
        last_positions = upload(
            [request.prompt_length + request.max_new_tokens - 1 for request in requests], device
        )
        with self.target.speculate(sequences, trees, last_positions=last_positions) as scored:
            with watch.phase("forward"):
                logits = scored.logits
            with watch.phase("accept"):
                texts = [Text((*r.padding, *r.tokens), r.row) for r in requests]
                scores = self.sampler.scores(logits, trees, texts)
                target = self.sampler.probs(scores) if self.rule.samples else scores
                outcome = self.rule.verify(trees, target, Noise(seeds, scored.lengths + 1))
            with watch.phase("commit"):
                scored.commit(outcome.paths)
        paths, tokens, continued, healthy = _read(trees, outcome, scores)
        self._check_roots(requests, tokens)
        scored.settle([len(path) for path in paths])
        for index, request in enumerate(requests):
            token = tokens[index][-1]
            if not healthy[index] or not 0 <= token < self.target.vocab_size:
                request.finished, request.error = True, _no_token(request, len(paths[index]) - 1)
        new = tuple(
            line[1:] if request.error is None else line[1:-1]
            for request, line in zip(requests, tokens, strict=True)
        )
        self.drafter.observe(Observation(numbers, trees, paths, new))
        emissions = []
        for index, request in enumerate(requests):
            taken = [] if request.error is not None else request.emit(new[index])
            accepted = min(len(paths[index]) - 1, len(taken))
            emission = Emission(request, taken, trees.sizes[index] - 1, accepted)
            if self.keep:
                start = sum(trees.sizes[:index])
                rows = upload([start + node for node in paths[index][: len(taken)]], device)
                emission = replace(
                    emission, scores=scores[rows].float(), logits=logits[rows].float()
                )
            self.stats.add_step(
                drafted=emission.drafted,
                accepted=emission.accepted,
                continued=continued[index] and len(taken) == len(new[index]),
                tokens=len(taken),
            )
            emissions.append(emission)
        return emissions

    def _check(self, trees: TreeBatch, count: int) -> None:
        name = type(self.drafter).__name__
        if not isinstance(trees, TreeBatch):
            raise TypeError(f"{name}.propose: expected a TreeBatch, got {type(trees).__name__}")
        if len(trees.sizes) != count or max(trees.sizes) > self.nodes:
            raise ValueError(
                f"{name}.propose: expected {count} trees of at most {self.nodes} nodes, "
                f"got sizes {trees.sizes}"
            )
        illegal = trees.laws_used - self.rule.legal_laws
        if illegal:
            raise ValueError(
                f"{name}.propose: the rule {self.rule.name!r} is not lossless for "
                f"{', '.join(law.name.lower() for law in illegal)} proposals; set the drafter's "
                "law, so that a legal rule is chosen"
            )
        if self.rule.chains and trees.max_children > 1:
            raise ValueError(
                f"{name}.propose: the rule {self.rule.name!r} verifies chains, got a node with "
                f"{trees.max_children} children; use rule='traversal', or draft chains where "
                "`context.chains` is set"
            )
        if trees.device != self.target.device:
            raise ValueError(
                f"{name}.propose: expected trees on {self.target.device}, got {trees.device}"
            )

    def _check_roots(self, requests: Sequence[Request], tokens: Sequence[Sequence[int]]) -> None:
        """Checks on the host what could not be checked before without waiting for the device."""
        name = type(self.drafter).__name__
        for index, request in enumerate(requests):
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


def _read(
    trees: TreeBatch, outcome: Outcome, scores: Tensor
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...], list[bool], list[bool]]:
    """Brings an outcome to the host: one copy, the only time a step waits for the device.

    Returns for each tree the nodes of its path, their tokens and the next token, whether the last
    node had children, and whether every node of the path had a token to go on with. Paths and
    tokens begin with the root.
    """
    rows = trees.offsets[:, None] + outcome.paths.clamp_min(0)
    healthy = scores[rows].amax(-1).isfinite().all(1)
    packed = torch.cat(
        [
            outcome.paths,
            trees.tokens[rows],
            outcome.next_tokens[:, None],
            outcome.continued[:, None].long(),
            healthy[:, None].long(),
        ],
        dim=1,
    )
    width = outcome.paths.shape[1]
    paths, tokens, continued, good = [], [], [], []
    for line in packed.tolist():
        path = tuple(node for node in line[:width] if node >= 0)
        paths.append(path)
        tokens.append((*line[width : width + len(path)], line[2 * width]))
        continued.append(bool(line[2 * width + 1]))
        good.append(bool(line[2 * width + 2]))
    return tuple(paths), tuple(tokens), continued, good
