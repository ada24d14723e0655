"""Requests that come when they like: submit, read tokens as they are verified, cancel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from specdec.engine import Engine
from specdec.request import Policy, Request
from specdec.stats import mixed
from specdec.verify import AcceptanceRule

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
        """Whether no more tokens come: it is finished, was cancelled or stopped, or failed."""
        return self.cancelled or self._request.over

    def cancel(self) -> None:
        """Stops it; the tokens it has remain. Nothing happens if it is done."""
        if not self.done:
            self.cancelled = True
            self._engine.cancel([self._request])

    def result(self) -> list[int]:
        """Runs the engine until it is done; all its new tokens.

        Raises:
            Exception: what stopped it, such as `OutOfPages` if it does not fit alone.
            RuntimeError: the engine was closed, or interrupted, before it was finished.
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
        if self._request.stopped and not self.cancelled:
            raise RuntimeError(
                f"stopped: the engine was closed or interrupted after {self._read} new tokens"
            )
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
        # Those that requests use: equal ones share one.
        self._policies: WeakValueDictionary[Hashable, Policy] = WeakValueDictionary()

    def submit(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        drafter: Any = None,
        rule: str | AcceptanceRule | None = None,
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
        request.policy = self._policies.setdefault(_key(policy), policy)
        label = policy.rule.label
        self.stats.rule = mixed(self.stats.rule, label) if self.stats.prompt_tokens else label
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


def _key(policy: Policy) -> Hashable:
    """Equal for policies that do the same. Identities in it are of what the policy keeps alive."""
    sampler = policy.sampler
    return (
        id(policy.drafter),
        _rule_settings(policy.rule),
        policy.nodes,
        policy.law,
        policy.keep,
        sampler.do_sample,
        tuple(_settings(processor, vars(processor)) for processor in sampler.processors),
    )


def _rule_settings(rule: AcceptanceRule) -> Hashable:
    """A rule that could change, since it has settings and is not frozen, equals only itself."""
    if is_dataclass(rule) and rule.__dataclass_params__.frozen:
        return _settings(rule, {one.name: getattr(rule, one.name) for one in fields(rule)})
    return id(rule) if vars(rule) else type(rule)


def _settings(part: object, values: dict[str, object]) -> Hashable:
    """Equal for parts of one type with equal values; its own if they cannot be compared."""
    try:
        return type(part), _value(values)
    except TypeError:
        return id(part)


def _value(value: object) -> Hashable:
    """Equal for equal settings.

    Raises:
        TypeError: it is of a kind that is not compared by value.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.device, tuple(value.flatten().tolist())
    if isinstance(value, list | tuple):
        return type(value), tuple(_value(entry) for entry in value)
    if isinstance(value, dict):
        return tuple((_value(name), _value(entry)) for name, entry in value.items())
    raise TypeError(f"{type(value).__name__} is not compared by value")
