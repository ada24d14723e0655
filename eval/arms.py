"""How a configuration generates: our own loop, or transformers' `generate` for comparison."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import specdec
from specdec.drafting import Drafter
from specdec.eval.grid import Settings
from specdec.eval.loading import load_model, make_drafter
from specdec.eval.observe import Counts, Observed, count
from specdec.eval.records import Configuration
from specdec.generation import SpeculativeOutput
from specdec.stats import GenerationStats

WARM_UP_TOKENS = 8
LOOKUP_TOKENS = 10
"""Of transformers' prompt lookup, as in its documentation."""


@dataclass(frozen=True)
class Generation:
    """One prompt, generated."""

    tokens: list[int]
    steps: int
    """Passes of the target behind the prefill."""
    seconds: dict[str, float]
    prefill: float
    """Seconds of it."""
    first: int = 0
    """Tokens that came with the prefill."""
    stats: GenerationStats | None = None
    counts: Counts | None = None
    observed: str | None = None


class Arm(ABC):
    """A configuration, ready to run."""

    @abstractmethod
    def generate(self, ids: Tensor, new: int, seed: int) -> Generation:
        """Continues a prompt.

        Args:
            ids: [1, L] token ids.
            new: tokens, at most.
            seed: of a sampled run.
        """

    def warm_up(self, longest: Tensor) -> None:
        """Does what only the first runs do, on the longest prompt there will be."""
        self.generate(longest, WARM_UP_TOKENS, 0)


@dataclass
class Lab:
    """A target with everything that its arms share."""

    model: Any
    tokenizer: Any
    settings: Settings
    wrapped: specdec.SpeculativeModel = field(init=False)

    def __post_init__(self) -> None:
        self.wrapped = specdec.wrap(
            self.model, "none", prefix_cache=False, capture=self.settings.capture
        )

    def arm(self, configuration: Configuration) -> Arm:
        """A configuration, ready to run; its node budget must be known if it is our own loop."""
        if configuration.is_transformers:
            return TransformersArm(self, configuration)
        drafter, _ = make_drafter(
            configuration.drafter, configuration.tree, self.model.device, self.model.dtype
        )
        assert configuration.nodes is not None
        return OwnArm(self, configuration, drafter, configuration.nodes)

    def options(self, configuration: Configuration, ids: Tensor, new: int) -> dict[str, Any]:
        """Those of `generate`: nothing but the temperature bends the target's distribution."""
        sampling = {
            "do_sample": True,
            "temperature": configuration.temperature,
            "top_k": 0,
            "top_p": 1.0,
        }
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": new,
            **(sampling if configuration.temperature > 0 else {"do_sample": False}),
        }

    def now(self) -> float:
        """Seconds, when the device has done all it was told."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


@dataclass
class OwnArm(Arm):
    """The loop of this project."""

    lab: Lab
    configuration: Configuration
    drafter: Drafter
    nodes: int

    def generate(self, ids: Tensor, new: int, seed: int) -> Generation:
        # On a GPU steps are captured for a drafter, so the drafter itself must run, unwatched.
        timed = Observed(self.drafter) if self.lab.model.device.type == "cpu" else None
        start = self.lab.now()
        output = self._run(timed or self.drafter, ids, new, seed)
        total = self.lab.now() - start
        tokens = output.sequences[0, ids.shape[1] :].tolist()
        stats = output.stats
        assert stats is not None
        observed, watched = "timed", timed
        if watched is None:
            observed, watched = "again", Observed(self.drafter)
            self._run(watched, ids, new, seed)
        return Generation(
            tokens,
            stats.steps,
            {**stats.seconds, "total": total},
            stats.seconds.get("prefill", 0.0),
            first=stats.first_tokens,
            stats=stats,
            counts=count(watched.notes, stats.first_tokens, len(tokens)),
            observed=observed,
        )

    def _run(self, drafter: Drafter, ids: Tensor, new: int, seed: int) -> SpeculativeOutput:
        wrapped, configuration = self.lab.wrapped, self.configuration
        wrapped.drafter, wrapped.rule, wrapped.nodes = drafter, configuration.rule, self.nodes
        wrapped.adaptive = configuration.tree is None  # who names a size means it
        output = wrapped.generate(
            **self.lab.options(configuration, ids, new), seed=seed, return_dict_in_generate=True
        )
        assert isinstance(output, SpeculativeOutput)
        return output


class TransformersArm(Arm):
    """transformers' own `generate` on the same weights.

    Raises:
        ValueError: `hf-compile` without a CUDA device; transformers compiles nothing elsewhere.
    """

    def __init__(self, lab: Lab, configuration: Configuration) -> None:
        self.lab, self.configuration = lab, configuration
        self.extra: dict[str, Any] = {}
        name, _, assistant = configuration.drafter.partition(":")
        if name == "hf-prompt-lookup":
            self.extra = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        elif name == "hf-assisted":
            dtype = str(lab.model.dtype).removeprefix("torch.")
            self.extra = {"assistant_model": load_model(assistant, dtype, str(lab.model.device))[0]}
        elif name == "hf-compile":
            if lab.model.device.type != "cuda":
                raise ValueError(
                    "--baseline: hf-compile needs a CUDA device, where transformers compiles a "
                    f"model with a static cache; got {lab.model.device}"
                )
            self.extra = {"cache_implementation": "static"}

    def warm_up(self, longest: Tensor) -> None:
        # transformers keeps the largest static cache it has needed, so that nothing is compiled
        # again for shorter texts.
        whole = self.lab.settings.max_new_tokens
        compiles = "cache_implementation" in self.extra
        self.generate(longest, whole if compiles else WARM_UP_TOKENS, 0)

    def generate(self, ids: Tensor, new: int, seed: int) -> Generation:
        torch.manual_seed(seed % 2**63)
        clock = Clock(self.lab)
        options = self.lab.options(self.configuration, ids, new)
        start = self.lab.now()
        out = self.lab.model.generate(
            **options, **self.extra, stopping_criteria=StoppingCriteriaList([clock])
        )
        total = self.lab.now() - start
        prefill = clock.first_at - start
        return Generation(
            out[0, ids.shape[1] :].tolist(),
            clock.passes - 1,
            {"prefill": prefill, "total": total},
            prefill,
            first=min(clock.first_length - ids.shape[1], out.shape[1] - ids.shape[1]),
        )


class Clock(StoppingCriteria):
    """Never stops anything; notes when the first pass was over, and counts passes."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.passes, self.first_at, self.first_length = 0, 0.0, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.passes += 1
        if self.passes == 1:
            self.first_at, self.first_length = self.lab.now(), input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def seed_of(base: int, suite: str, prompt: str, repetition: int) -> int:
    """The seed of one row, the same for all configurations; below 2**62."""
    text = f"{base} {suite} {prompt} {repetition}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
