"""Which requests run: admission by common prefix, prefill in pieces, preemption when pages run out.

The order of service is the order of arrival, but requests that share pages with those that run go
first, so that prefixes are used while they are there (BatchLLM, arXiv 2412.03594). That may happen
to the oldest request `PATIENCE` times, and it is the last to be preempted, so every request ends.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from specdec.cache import TreeKVCache
from specdec.pages import DraftLayers
from specdec.request import Policy, Request
from specdec.stats import GenerationStats
from specdec.target import Target

PATIENCE = 16
"""Requests that may overtake the oldest one that waits."""


class Scheduler:
    """The requests that wait and those that run, and the cache's pages between them.

    Args:
        target: the model and its cache.
        policy: of requests that bring none.
        stats: where prompts, reuse and preemptions are counted.
        prefix_cache: whether what was computed for one request is used for others.
        max_running: requests that run at once; None for as many as there is room for.
    """

    def __init__(
        self,
        target: Target,
        policy: Policy,
        stats: GenerationStats,
        *,
        prefix_cache: bool,
        max_running: int | None,
    ) -> None:
        self.target = target
        self.policy = policy
        self.stats = stats
        self.prefix_cache = prefix_cache
        self.max_running = max_running
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        """In the depth-first order of their prefix tree, in which neighbours share most."""
        self.crowded = False
        """Pages ran out since the last request ended: letting others in would not last."""
        self._prefilling: list[Request] = []
        self._prefilling_of = -1  # the changes after which they were found
        self._overtaken = (-1, 0)  # the oldest that waits, and by how many
        self.changes = 0
        """Grows whenever a request begins or ends to decode."""

    @property
    def cache(self) -> TreeKVCache:
        return self.target.cache

    def policy_of(self, request: Request) -> Policy:
        return request.policy or self.policy

    def admit(self) -> None:
        """Lets waiting requests run: those first that have most in common with the oldest running.

        A request that begins like one whose prompt is still being computed waits for that, so that
        nothing is computed twice.
        """
        if not self.waiting or (self.running and (self.crowded or self._full(0))):
            return
        weights = self._weights()
        size = self.cache.pool.page_size
        head = min(self.waiting, key=lambda request: request.number)
        like = min(self.running, key=lambda request: request.number, default=head).tokens
        patient = self._overtaken[1] if self._overtaken[0] == head.number else 0
        order = sorted(
            self.waiting,
            key=lambda r: (
                r is not head or patient < PATIENCE,
                -(_common(like, r.tokens) // size),
                r.number,
            ),
        )
        before, about = len(self.running), 0
        for request in order:
            if self._full(about):
                break
            if self.running and not self._fits(request):
                self.crowded = True
                break
            if not self._start(request, (request.cache_key, weights)):
                about += 1  # its place is kept
        started = len(self.running) - before
        if started:
            self.running.sort(key=lambda request: (request.tokens, request.number))
            self._overtaken = (head.number, patient + started)

    def _weights(self) -> Hashable:
        """What K and V now depend on besides the tokens.

        A request that has run under other weights as well is nobody's to reuse from then on.
        """
        weights = self.target.weights_state()
        if not self.prefix_cache:
            return None
        for request in self.running:
            if request.key != (request.cache_key, weights):
                request.key = object()
        return weights

    def _may_share(self, request: Request) -> bool:
        """Whether what was computed for a request may serve others."""
        pure = (request.cache_key, self._weights())
        return self.prefix_cache and request.error is None and request.key == pure

    def _full(self, about: int) -> bool:
        """Whether no more may run, if so many are about to."""
        return self.max_running is not None and len(self.running) + about >= self.max_running

    def _fits(self, request: Request) -> bool:
        """Whether there are pages for its text so far and one tree, if all that is cached goes."""
        pool = self.cache.pool
        if pool.max_pages is None:
            return True
        spare = pool.max_pages - pool.num_pages + pool.num_free
        spare += self.cache.usage().cached // pool.page_bytes
        ahead = sum(r.missing + self.policy_of(r).nodes for r in self.running)
        need = len(request.tokens) + self.policy_of(request).nodes + ahead
        return need <= spare * pool.page_size

    def _start(self, request: Request, key: object) -> bool:
        """Starts a request, unless another one is about to compute what it begins with."""
        cache, text = self.cache, request.tokens[:-1]
        request.key = key
        # What a model thinks of a prompt is only known to the pass that computes it.
        reuse = self.prefix_cache and request.prompt_scores is None
        own = self.target.layers_of(self.policy_of(request).drafter)
        leader, common = self._leader(request, own) if reuse else (None, 0)
        known = len(cache.prefixes.match(text, key, own=own)) if reuse else 0
        known *= cache.pool.page_size
        given = 0
        if request.origin is not None:
            given = min(len(text), cache.length_bound(request.origin))
            given = self._filled(request.origin, own, given)
        if leader is not None and common > max(known, given):
            if leader.cached < common:
                return False
            request.sequence = cache.fork(leader.sequence, common)
        elif request.origin is not None and given >= known:
            request.sequence = cache.fork(request.origin, given)
        elif reuse:
            request.sequence = cache.admit(text, key=key, own=own)
        else:
            request.sequence = cache.admit()
        request.cached = cache.length_bound(request.sequence)
        self.waiting.remove(request)
        self.running.append(request)
        self.stats.reused_tokens += request.cached
        self.changes += 1
        self.policy_of(request).drafter.begin([request.number])
        return True

    def _filled(self, sequence: int, own: DraftLayers | None, tokens: int) -> int:
        """How many of a sequence's first tokens a drafter can begin with."""
        filled = None if own is None else self.cache.filled(sequence, own)
        return tokens if filled is None else min(tokens, filled)

    def _leader(self, request: Request, own: DraftLayers | None) -> tuple[Request | None, int]:
        """The running request with the most tokens in common, and how many before the root.

        Of requests whose drafter does not fill the layers `own`, only what is filled counts.
        """
        size = self.cache.pool.page_size
        best, most = None, 0
        for other in self.running:
            # Less than a page is computed as fast as it is copied, but for equal prompts.
            begins = other.tokens[:size], other.tokens[: min(size, other.prompt_length)]
            if other.key != request.key or request.tokens[:size] not in begins:
                continue
            common = _common(other.tokens, request.tokens)
            common = min(common, len(other.tokens) - 1, len(request.tokens) - 1)
            common = self._filled(other.sequence, own, common)
            if common > most:
                best, most = other, common
        return best, most

    @property
    def prefilling(self) -> bool:
        """Whether a running request cannot decode yet."""
        return bool(self.pieces(1))

    def pieces(self, room: int) -> list[tuple[Request, int]]:
        """What to prefill in the next pass: the oldest requests, and how many tokens of each.

        The last piece of a text has its root, too, if there is room: one token more than is
        missing. A request of which only the root is left over begins to decode with it.
        """
        if self._prefilling_of != self.changes:
            prefilling = [request for request in self.running if request.missing]
            self._prefilling = sorted(prefilling, key=lambda request: request.number)
            self._prefilling_of = self.changes
        pieces = []
        for request in self._prefilling:
            count = min(request.missing + 1, room)
            if count:
                pieces.append((request, count))
                room -= count
        return pieces

    def prefilled(self, pieces: Sequence[tuple[Request, int]]) -> None:
        """Notes what was prefilled; whole prompts are there for others from now on.

        Roots do not count: like those of trees they are noted when what follows them is emitted.
        """
        for request, rows in pieces:
            count = min(rows, request.missing)
            request.cached += count
            self.stats.prefilled_tokens += count
            if not request.missing:
                self.changes += 1
                if self._may_share(request):
                    self.cache.remember(request.sequence, request.tokens)

    def preempt(self) -> Request:
        """Stops the youngest running request; it waits, and what it loses is computed again."""
        victim = max(self.running, key=lambda request: request.number)
        self.stop(victim)
        self.waiting.append(victim)
        self.crowded = True
        self.stats.preemptions += 1
        return victim

    def finish(self, request: Request) -> None:
        """Stops a request that is over, which makes room for others."""
        self.stop(request)
        self.crowded = False

    def stop(self, request: Request) -> None:
        """Gives a running request's pages back; full ones stay in the prefix tree."""
        try:
            self.policy_of(request).sampler.end(request.row)
            self.policy_of(request).drafter.end([request.number])
        finally:
            if self._may_share(request):
                self.cache.remember(request.sequence, request.tokens)
            if request.finished and request.error is None and request.heir is not None:
                request.heir(request.sequence)
            else:
                self.cache.release(request.sequence)
            self.running.remove(request)
            request.sequence, request.cached = -1, 0
            self.changes += 1


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # comparing slices is fast
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
