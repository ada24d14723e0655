"""Requests that come when they like: submit, read tokens as they are verified, cancel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.engine import Engine
from specdec.request import Policy, Request
from specdec.sampling import Sampler

if TYPE_CHECKING:
    from specdec.wrap import SpeculativeModel


class Handle:
    """A submitted request. Iterating it, synchronously or not, yields its new tokens.

    Whoever waits for a token runs the engine, for all requests, until there is one.
    """

    def __init__(self, engine: ServingEngine, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._read = 0
        self.cancelled = False

    @property
    def tokens(self) -> list[int]:
        """All new tokens so far."""
        return self._request.emitted

    @property
    def finished(self) -> bool:
        """Whether its text has come to its end."""
        return self._request.finished

    @property
    def done(self) -> bool:
        """Whether no more tokens come: it is finished, was cancelled, or failed."""
        return self.finished or self.cancelled or self._request.error is not None

    def cancel(self) -> None:
        """Stops it; the tokens it has remain. Nothing happens if it is done."""
        if not self.done:
            self.cancelled = True
            self._engine.cancel([self._request])

    def result(self) -> list[int]:
        """Runs the engine until it is done; all its new tokens.

        Raises:
            Exception: what stopped it, such as `OutOfPages` if it does not fit alone.
        """
        for _ in self:
            pass
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        while not self._has_next():
            self._engine.step()
        return self._next(StopIteration)

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        while not self._has_next():
            self._engine.step()
            await asyncio.sleep(0)  # others may read what this step gave them
        return self._next(StopAsyncIteration)

    def _has_next(self) -> bool:
        return self.done or self._read < len(self._request.tokens) - self._request.prompt_length

    def _next(self, end: type[Exception]) -> int:
        place = self._request.prompt_length + self._read
        if place < len(self._request.tokens):
            self._read += 1
            return self._request.tokens[place]
        if self._request.error is not None:
            raise self._request.error
        raise end

    def __repr__(self) -> str:
        state = "done" if self.done else "running" if self._request.sequence >= 0 else "waiting"
        return f"Handle({state}, {len(self.tokens)} tokens)"


class ServingEngine(Engine):
    """Continuous batching for a wrapped model. Made by `SpeculativeModel.engine`.

    Every request has options, a drafter and a budget of its own; those that agree in them are
    drafted and verified together, and all share each pass of the model. The same requests in the
    same order give the same tokens, and each gives those it would give alone.
    """

    def __init__(self, model: SpeculativeModel, **options: Any) -> None:
        super().__init__(model._driven(), model._greedy_policy(), **options)
        self._model = model
        self._policies: dict[Hashable, Policy] = {}

    def submit(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        drafter: Any = None,
        rule: str | None = None,
        nodes: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        cache_key: Hashable = None,
        **options: Any,
    ) -> Handle:
        """Lets a request wait for its turn.

        Args:
            tokens: the ids of the prompt, [L] or [1, L].
            drafter, rule, nodes: the model's by default; see `specdec.wrap`. Give one drafter
                object to all requests that are to be drafted together.
            seed, generator, tokenizer, cache_key, options: as in `generate`.

        Raises:
            NotImplementedError, TypeError, ValueError: an option is wrong or not supported; nothing
                was submitted.
        """
        request, policy = self._model._request(
            tokens,
            drafter=drafter,
            rule=rule,
            nodes=nodes,
            seed=seed,
            generator=generator,
            tokenizer=tokenizer,
            cache_key=cache_key,
            options=options,
        )
        key = (id(policy.drafter), policy.rule.name, policy.nodes, _settings(policy.sampler))
        request.policy = self._policies.setdefault(key, policy)
        if policy.rule.name != self.stats.rule:
            fresh = not self.stats.steps and len(self._policies) == 1
            self.stats.rule = policy.rule.name if fresh else "mixed"
        self.add(request)
        return Handle(self, request)

    def run_all(self) -> None:
        """Steps until no request waits or runs."""
        while not self.idle:
            self.step()

    def close(self) -> None:
        """Stops all requests."""
        self.cancel([*self.scheduler.running, *self.scheduler.waiting])
        self._watch.read()

    def __enter__(self) -> ServingEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _settings(sampler: Sampler) -> Hashable:
    """Equal for samplers that do the same; its own for one whose settings cannot be compared."""
    settings: list[Hashable] = [sampler.do_sample]
    for processor in sampler.processors:
        values = sorted(vars(processor).items())
        if not all(isinstance(value, bool | int | float | str | None) for _, value in values):
            return id(sampler)
        settings.append((type(processor), tuple(values)))
    return tuple(settings)
