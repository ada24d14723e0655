"""What is compared: transformers' ways to generate, and ours.

Every arm takes a prompt and a number of new tokens, and gives the tokens of the whole text and how
many passes of the model they took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import specdec
from specdec.eval.generate.shapes import Subject
from specdec.eval.generate.synthetic import Accepts, Synthetic
from specdec.stats import GenerationStats


@dataclass(frozen=True)
class Answer:
    """What one call gave."""

    tokens: Tensor  # [1, L + new]
    steps: int | None  # passes of the model behind the prompt, where they are counted
    stats: GenerationStats | None = None


Run = Callable[[Tensor, int], Answer]


@dataclass(frozen=True)
class Arm:
    """A way to generate."""

    name: str
    what: str
    run: Run
    wrapped: Any = None  # our wrapper, for what only it can tell
    stream: Callable[[Tensor, int], Iterator[Any]] | None = None  # its steps one by one
    synthetic: bool = False


def _of_transformers(name: str, what: str, subject: Subject, **options: Any) -> Arm:
    def run(prompt: Tensor, new: int) -> Answer:
        steps = 0

        def count(*_: object) -> None:
            nonlocal steps
            steps += 1

        hook = subject.model.register_forward_pre_hook(count)
        try:
            tokens = subject.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        finally:
            hook.remove()
        return Answer(tokens, max(0, steps - 1))

    return Arm(name, what, run)


def _compiled(subject: Subject) -> Arm:
    # A hook to count passes would be compiled, too.
    def run(prompt: Tensor, new: int) -> Answer:
        tokens = subject.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
        )
        return Answer(tokens, tokens.shape[1] - prompt.shape[1] - 1)

    return Arm("hf-compile", "transformers, static cache, compiled", run)


def _ours(name: str, what: str, subject: Subject, drafter: Any, **options: Any) -> Arm:
    sampling: dict[str, Any] = {"do_sample": False}
    if "rule" in options:  # rules are asked in sampled runs only; this one does not sample
        sampling = {"do_sample": True, "top_k": 0, "temperature": 1.0}
    wrapped: Any = specdec.wrap(subject.model, drafter, **options)

    def arguments(prompt: Tensor, new: int) -> dict[str, Any]:
        mask = torch.ones_like(prompt)
        return {"attention_mask": mask, "max_new_tokens": new, "pad_token_id": 0, **sampling}

    def run(prompt: Tensor, new: int) -> Answer:
        given = arguments(prompt, new)
        out = wrapped.generate(prompt, return_dict_in_generate=True, **given)
        return Answer(out.sequences, out.stats.steps, out.stats)

    def stream(prompt: Tensor, new: int) -> Iterator[Any]:
        # It must not end before it has been looked at.
        steps: Iterator[Any] = wrapped.stream(prompt, eos_token_id=None, **arguments(prompt, new))
        return steps

    return Arm(name, what, run, wrapped, stream, synthetic="rule" in options)


def arms(subject: Subject, nodes: int, kept: int) -> dict[str, Callable[[], Arm]]:
    """The arms by name, made when they are asked for.

    Args:
        subject: the model.
        nodes: of the largest trees.
        kept: nodes that the synthetic drafter gets accepted in each step.
    """

    def eager() -> Arm:
        return _of_transformers("hf-eager", "transformers", subject, disable_compile=True)

    def lookup() -> Arm:
        options: dict[str, Any] = {"prompt_lookup_num_tokens": 10, "disable_compile": True}
        return _of_transformers("hf-lookup", "transformers, prompt lookup", subject, **options)

    def assisted() -> Arm:
        return _of_transformers(
            "hf-assisted",
            "transformers, assisted by the model itself (cost of the loop, not a speed-up)",
            subject,
            assistant_model=subject.model,
            disable_compile=True,
        )

    return {
        "hf-eager": eager,
        "hf-compile": lambda: _compiled(subject),
        "hf-lookup": lookup,
        "hf-assisted": assisted,
        "uncaptured": lambda: _ours(
            "uncaptured", "no drafts, no graphs", subject, "none", nodes=1, capture=False
        ),
        "plain": lambda: _ours("plain", "no drafts", subject, "none", nodes=1),
        "ngram": lambda: _ours(
            "ngram", f"n-gram trees, {nodes} nodes", subject, "ngram", nodes=nodes
        ),
        "synthetic": lambda: _ours(
            "synthetic",
            f"synthetic: {kept} of {nodes - 1} drafts accepted in every step",
            subject,
            Synthetic(),
            nodes=nodes,
            rule=Accepts(kept),
            adaptive=False,
        ),
    }
