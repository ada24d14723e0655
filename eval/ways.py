"""Ways to generate, ours and transformers', that take one prompt and tell what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import specdec
from specdec.eval.loading import load_model, make_drafter
from specdec.eval.records import Configuration
from specdec.eval.watching import Watch
from specdec.generation import SpeculativeOutput

PROMPT_LOOKUP_TOKENS = 10
"""Tokens that transformers' prompt lookup copies at most, as its documentation suggests."""

FOLLOWING = "sample-and-match"
"""The rule whose sampled tokens are those of the plain loop with the same seed."""


@dataclass(frozen=True)
class Generated:
    """What one call gave."""

    tokens: list[int]
    """The new ones."""
    steps: int
    decode_tokens: int
    seconds: dict[str, float]
    follows: bool
    """Whether the tokens should be those of the plain loop with the same seed."""
    counts: dict[str, Any] = field(default_factory=dict)
    """Further fields of a `Row`."""


class Way(Protocol):
    """One configuration, ready to run."""

    def __call__(self, inputs: dict[str, Any], seed: int, *, watch: bool) -> Generated:
        """Generates from `input_ids` [1, L] and `attention_mask`; `watch` asks for all counts."""


@dataclass(frozen=True)
class Subject:
    """A target, loaded once for all its configurations."""

    model: Any
    tokenizer: Any
    wrapped: specdec.SpeculativeModel
    max_new_tokens: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @classmethod
    def load(
        cls, target: str, *, dtype: str | None, device: str | None, capture: bool, max_new: int
    ) -> Subject:
        """A target by name, folder or hub id."""
        model, tokenizer = load_model(target, dtype, device)
        # No prompt is reused: every configuration and repetition pays for its own prefill.
        wrapped = specdec.wrap(model, "none", prefix_cache=False, capture=capture, adaptive=False)
        return cls(model, tokenizer, wrapped, max_new)

    def way(self, configuration: Configuration) -> Way:
        """A configuration, ready to run.

        Raises:
            ValueError: its drafter or tree cannot be made.
        """
        if configuration.is_transformers:
            return _Transformers(self, configuration)
        return _Ours(self, configuration)


def sampling(temperature: float) -> dict[str, Any]:
    """The options of `generate` for a temperature: the whole distribution, or greedy for 0."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


class _Ours:
    """Our loop, with a drafter of its own and the target's one cache."""

    def __init__(self, subject: Subject, configuration: Configuration) -> None:
        self._subject = subject
        self._configuration = configuration
        self._drafter, _ = make_drafter(
            configuration.drafter, configuration.tree, subject.device, subject.model.dtype
        )

    def __call__(self, inputs: dict[str, Any], seed: int, *, watch: bool) -> Generated:
        wrapped, own = self._subject.wrapped, self._configuration
        assert own.nodes is not None, "only transformers' own have none"
        wrapped.drafter, wrapped.rule, wrapped.nodes = self._drafter, own.rule, own.nodes
        # Steps that are watched are not captured: on a GPU they are run again to be counted.
        on_cpu = self._subject.device.type == "cpu"
        timed = Watch(self._subject.tokenizer) if watch and on_cpu else None
        output, total = self._run(inputs, seed, timed)
        counted = timed
        if watch and counted is None:
            counted = Watch(self._subject.tokenizer)
            self._run(inputs, seed, counted)
        stats = output.stats
        assert stats is not None
        counts: dict[str, Any] = {
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "reached_by_depth": dict(stats.reached),
            "accepted_by_depth": dict(stats.accepted_at),
            "paths": dict(stats.paths),
        }
        if counted is not None:
            counts |= {**counted.counts(), "observed": "again" if timed is None else "timed"}
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return Generated(
            tokens=tokens,
            steps=stats.steps,
            decode_tokens=len(tokens),
            seconds={**stats.seconds, "total": total},
            follows=own.temperature == 0 or stats.rule == FOLLOWING or own.is_plain,
            counts=counts,
        )

    def _run(
        self, inputs: dict[str, Any], seed: int, observer: Watch | None
    ) -> tuple[SpeculativeOutput, float]:
        def call() -> Any:
            return self._subject.wrapped.generate(
                **inputs,
                **sampling(self._configuration.temperature),
                max_new_tokens=self._subject.max_new_tokens,
                seed=seed,
                observer=observer,
                return_dict_in_generate=True,
            )

        return _timed(call, self._subject.device)


class _Clock(StoppingCriteria):
    """Never stops: counts passes, and notes when the first was over and what it gave."""

    def __init__(self) -> None:
        self.passes = 0
        self.first_at = 0.0
        self.first_length = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if not self.passes:
            _synchronize(input_ids.device)
            self.first_at, self.first_length = time.perf_counter(), input_ids.shape[1]
        self.passes += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Transformers:
    """transformers' own `generate`."""

    def __init__(self, subject: Subject, configuration: Configuration) -> None:
        self._subject = subject
        self._configuration = configuration
        name, _, assistant = configuration.drafter.partition(":")
        self._options: dict[str, Any] = {"disable_compile": True}
        if name == "hf-compile":
            if subject.device.type == "cpu":
                raise ValueError("hf-compile: transformers compiles on a GPU only, got a CPU")
            self._options = {"cache_implementation": "static"}
        elif name == "hf-prompt-lookup":
            self._options["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
        elif name == "hf-assisted":
            dtype = str(subject.model.dtype).removeprefix("torch.")
            self._options["assistant_model"], _ = load_model(assistant, dtype, str(subject.device))

    def __call__(self, inputs: dict[str, Any], seed: int, *, watch: bool) -> Generated:
        clock, temperature = _Clock(), self._configuration.temperature
        transformers.set_seed(seed)

        def call() -> Any:
            return time.perf_counter(), self._subject.model.generate(
                **inputs,
                **sampling(temperature),
                **self._options,
                max_new_tokens=self._subject.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([clock]),
            )

        (start, sequences), total = _timed(call, self._subject.device)
        tokens = sequences[0, inputs["input_ids"].shape[1] :].tolist()
        first = clock.first_length - inputs["input_ids"].shape[1]
        return Generated(
            tokens=tokens,
            steps=clock.passes,
            decode_tokens=len(tokens) - first,
            seconds={"prefill": clock.first_at - start, "total": total},
            follows=temperature == 0,
        )


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a call gives and how long it took, the device's work included."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
