"""One generation, step by step: what was drafted, what the target made of it, what was kept.

A `Trace` is plain data that goes to JSON and back; `report` draws it. Every probability in it is
one that the run itself decided by, so nothing is computed twice and nothing can disagree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

import specdec
from specdec.batch import TreeBatch
from specdec.generation import SpeculativeOutput
from specdec.request import Verified
from specdec.tree import ProposalLaw

FORMAT = "specdec-trace"
VERSION = 1

Origin = Literal["accepted", "bonus", "corrected", "plain"]


@dataclass(frozen=True)
class TracedToken:
    """A token of the answer and how it came about.

    `accepted` drafts have the depth that they had in their tree. A `bonus` follows a path that
    ended at a leaf, a `corrected` token one whose last node had children that were all rejected,
    and a `plain` token a step in which nothing was drafted.
    """

    token: int
    text: str
    origin: Origin
    depth: int
    """In its tree; the next token of a step counts as one below the end of the path."""
    step: int
    probability: float
    """Of the target, given the text before it."""


@dataclass(frozen=True)
class TracedStep:
    """The tree of one step, a list entry for each node, and what was kept of it."""

    tokens: list[int]
    texts: list[str]
    parents: list[int]
    """-1 for the root, which is the last token that was known."""
    target: list[float | None]
    """The target's probability of each node given its parent; None for the root."""
    draft: list[float | None]
    """The drafter's, where its children were drawn; None where they were chosen."""
    path: list[int]
    """Accepted nodes, the root first."""
    emitted: int
    """Tokens that the text took; fewer than path and next token give where it ended."""
    next_token: int
    next_text: str
    next_origin: Origin
    next_probability: float


@dataclass(frozen=True)
class Trace:
    """A generation of one text.

    Args:
        about: what ran: model, drafter, rule, options, versions.
        prompt: the text that went in, as the model saw it.
        prompt_tokens: how many tokens that was.
        text: the answer.
        tokens, steps: the answer token by token, and how the steps made it.
        stats: the counts of the run, `GenerationStats.to_dict`.
    """

    about: dict[str, Any]
    prompt: str
    prompt_tokens: int
    text: str
    tokens: list[TracedToken]
    steps: list[TracedStep]
    stats: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trace:
        """The trace that `to_dict` was made of.

        Raises:
            ValueError: it is not a trace, or one of another version.
        """
        found = (data.get("format"), data.get("version"))
        if found != (FORMAT, VERSION):
            raise ValueError(
                f"trace: expected format {FORMAT!r} of version {VERSION}, got {found[0]!r} of "
                f"version {found[1]!r}"
            )
        given = {key: value for key, value in data.items() if key not in ("format", "version")}
        try:
            tokens = [TracedToken(**token) for token in given.pop("tokens")]
            steps = [TracedStep(**step) for step in given.pop("steps")]
            if not steps:
                raise ValueError("trace: expected at least one step, got none")
            return cls(tokens=tokens, steps=steps, **given)
        except (KeyError, TypeError) as error:
            raise ValueError(f"trace: {error}") from None

    def save(self, file: Path) -> None:
        """Writes JSON, through a file beside it, so that no half of it is ever there."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(self.to_dict(), ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> Trace:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is not a trace; the message names it.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError("trace: expected a JSON object")
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


class Recorder:
    """An observer for `generate` that keeps every step of one text.

    Args:
        tokenizer: to show tokens with.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.tokens: list[TracedToken] = []
        self.steps: list[TracedStep] = []

    def __call__(self, verified: Verified) -> None:
        seen = verified.observation
        if len(seen.sequences) != 1:
            raise ValueError(f"trace: expected one text, got {len(seen.sequences)}")
        (emission,) = verified.emissions
        if emission.request.error is not None:
            return  # there was no next token: the call raises
        (path,), (new,) = seen.paths, seen.tokens
        tokens, parents = seen.trees.tokens.tolist(), list(seen.trees.known_parents)
        after = verified.scores.float().softmax(-1)
        self._add(
            TracedStep(
                tokens=tokens,
                texts=[
                    self._piece(tokens[parent] if parent >= 0 else None, token)
                    for token, parent in zip(tokens, parents, strict=True)
                ],
                parents=parents,
                target=[None, *_of_children(after, seen.trees)],
                draft=[None, *_drafted(seen.trees, after.shape[1])],
                path=list(path),
                emitted=len(emission.tokens),
                next_token=new[-1],
                next_text=self._piece(tokens[path[-1]], new[-1]),
                next_origin=_next_origin(parents, path[-1]),
                next_probability=_rounded(after[path[-1], new[-1]]),
            )
        )

    def _add(self, step: TracedStep) -> None:
        for place in range(step.emitted):
            origin: Origin = "accepted"
            if place + 1 < len(step.path):
                node = step.path[place + 1]
                probability = step.target[node]
                assert probability is not None, "only the root has none"
                token, text = step.tokens[node], step.texts[node]
            else:
                token, text = step.next_token, step.next_text
                origin, probability = step.next_origin, step.next_probability
            self.tokens.append(
                TracedToken(token, text, origin, place + 1, len(self.steps), probability)
            )
        self.steps.append(step)

    def _piece(self, before: int | None, token: int) -> str:
        """A token's text behind the one before it, which decides about spaces."""
        alone: str = self._tokenizer.decode([token])
        if before is None:
            return alone
        head: str = self._tokenizer.decode([before])
        both: str = self._tokenizer.decode([before, token])
        return both[len(head) :] if both.startswith(head) else alone


def record(
    wrapped: specdec.SpeculativeModel,
    tokenizer: Any,
    about: Mapping[str, Any],
    **options: Any,
) -> Trace:
    """Generates one text and keeps every step of it.

    Args:
        wrapped: the model; its drafter, rule and node budget are used.
        tokenizer: to show tokens with.
        about: what to call the model and the drafter, and what else is worth knowing.
        options: those of `generate`, for one prompt.

    Raises:
        ValueError: there is more than one prompt, and what `generate` raises.
    """
    recorder = Recorder(tokenizer)
    options = {**options, "return_dict_in_generate": True}
    output = wrapped.generate(**options, observer=recorder)
    assert isinstance(output, SpeculativeOutput)
    assert output.stats is not None
    new = [token.token for token in recorder.tokens]
    prompt = output.sequences[0, : output.sequences.shape[1] - len(new)].tolist()
    plain = (bool, int, float, str)
    return Trace(
        about={
            **about,
            "rule": output.stats.rule,
            "nodes": wrapped.nodes,
            "options": {name: value for name, value in options.items() if isinstance(value, plain)},
            "device": str(wrapped.device),
            "dtype": str(wrapped.dtype).removeprefix("torch."),
            "specdec": specdec.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        prompt=tokenizer.decode(prompt),
        prompt_tokens=len(prompt),
        text=tokenizer.decode(new),
        tokens=recorder.tokens,
        steps=recorder.steps,
        stats=json.loads(json.dumps(output.stats.to_dict())),  # keys as JSON has them
    )


def _of_children(after: Tensor, trees: TreeBatch) -> list[float]:
    """What distributions [N, V] after each node give to the nodes below the root."""
    return [_rounded(p) for p in after[trees.parents[1:], trees.tokens[1:]]]


def _drafted(trees: TreeBatch, vocab_size: int) -> list[float | None]:
    """What the drafter drew the nodes below the root with, as far as they were drawn."""
    drawn = trees.laws[trees.parents[1:]] != ProposalLaw.DETERMINISTIC
    parents = trees.parents[1:]
    probs = trees.draft_rows(parents, vocab_size)
    if probs is None:
        return [None] * len(parents)
    chances = probs.gather(1, trees.tokens[1:, None])[:, 0]
    return [_rounded(p) if d else None for p, d in zip(chances, drawn.tolist(), strict=True)]


def _next_origin(parents: Sequence[int], last: int) -> Origin:
    """How the token behind an accepted path came about."""
    if len(parents) == 1:
        return "plain"
    return "corrected" if last in parents else "bonus"


def _rounded(probability: Tensor) -> float:
    return float(f"{float(probability):.4g}")
