"""Texts that branch: fork, extend, score and prune, with every common beginning held once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from specdec.engine import Engine
from specdec.generation import Call
from specdec.pages import check_count
from specdec.request import check_key, token_ids
from specdec.target import Target
from specdec.transfer import upload

PASS_ROWS = 512
"""Rows of one pass when scoring, if one text alone has not more: each has logits of its own."""


class Branch:
    """A text whose K and V are shared with the texts it was forked from and forked to.

    Made by `SpeculativeModel.branch` and by `fork`. Leaving its `with` block prunes all branches of
    its tree; without one, prune each of them.
    """

    def __init__(
        self,
        target: Target,
        tokens: Sequence[int],
        sequence: int,
        key: tuple[Hashable, Hashable],
        family: list[Branch],
    ) -> None:
        self.tokens = list(tokens)
        """The whole text, the prompt included."""
        self.cache_key, self._weights = key
        self._target = target
        self._sequence = sequence
        self._family = family
        family.append(self)

    @classmethod
    def plant(cls, target: Target, tokens: Sequence[int], cache_key: Hashable) -> Branch:
        """The first branch of a tree; it begins with what is cached under the key."""
        check_key(cache_key)
        with turn(target):
            key = (cache_key, target.weights_state())
            return cls(target, tokens, target.cache.admit(tokens[:-1], key=key), key, [])

    @property
    def alive(self) -> bool:
        """Whether it has not been pruned."""
        return self._sequence >= 0

    @property
    def sequence(self) -> int:
        """Its number in the target's cache.

        Raises:
            RuntimeError: it was pruned.
        """
        if not self.alive:
            raise RuntimeError("this branch was pruned")
        return self._sequence

    @property
    def cached(self) -> int:
        """How many of its tokens have K and V in the cache."""
        return self._target.cache.length_bound(self.sequence)

    def fork(self, count: int = 1) -> list[Branch]:
        """More texts that begin like this one. What it lacks in the cache is computed first.

        Args:
            count: at least 1.
        """
        check_count("count", count)
        target, key = self._target, (self.cache_key, self._weights)
        with turn(target):
            check_weights([self])
            self._compute()
            numbers = [target.cache.fork(self.sequence) for _ in range(count)]
        return [Branch(target, self.tokens, number, key, self._family) for number in numbers]

    def append(self, tokens: Sequence[int] | Tensor) -> Branch:
        """Goes on with given tokens, which are computed when they are needed; returns itself.

        Args:
            tokens: their ids, [L].

        Raises:
            TypeError, ValueError: they are not integers, not in the vocabulary, or not [L].
        """
        _ = self.sequence
        ids = token_ids("tokens", tokens, self._target.vocab_size)
        if ids.ndim != 1:
            raise ValueError(f"tokens: expected [L], got {list(ids.shape)}")
        self.tokens += ids.tolist()
        return self

    def prune(self) -> None:
        """Gives its pages back, but for those that others use. Branches forked from it go on."""
        if self.alive:
            with turn(self._target):
                self._target.cache.release(self._sequence)
            self._sequence = -1
            self._family.remove(self)

    def text(self, tokenizer: Any, start: int = 0) -> str:
        """The text from the root down, joined over all forks, from token `start` on."""
        return str(tokenizer.decode(self.tokens[start:], skip_special_tokens=True))

    def inherit(self, tokens: Sequence[int], sequence: int) -> None:
        """Takes over a longer text and the sequence that holds it."""
        cache = self._target.cache
        if cache.length_bound(sequence) >= len(tokens):  # accepted beyond the end of the text
            cache.prune(sequence, len(tokens) - 1)
        cache.release(self.sequence)
        self.tokens, self._sequence = list(tokens), sequence

    def _compute(self) -> None:
        """Brings all tokens but the last into the cache."""
        if self.cached > len(self.tokens) - 1:
            self._target.cache.prune(self.sequence, len(self.tokens) - 1)
        missing = upload(self.tokens[self.cached : -1], self._target.device)
        self._target.prefill([self.sequence], [missing])

    def __enter__(self) -> Branch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for branch in list(self._family):
            branch.prune()

    def __repr__(self) -> str:
        state = f"{self.cached} cached" if self.alive else "pruned"
        return f"Branch({len(self.tokens)} tokens, {state})"


def grow(branches: Sequence[Branch], call: Call, engine: Engine, seed: int) -> None:
    """Extends branches by a prepared call, one row for each. All go on, or none if it raises."""
    requests = call.requests(seed)
    for branch, request in zip(branches, requests, strict=True):
        request.tokens = list(branch.tokens)
        request.origin, request.cache_key = branch.sequence, branch.cache_key
    ends: dict[int, int] = {}
    for request in requests:
        request.heir = lambda sequence, number=request.number: ends.setdefault(number, sequence)
    try:
        for _ in engine.run(requests):
            pass
    except BaseException:
        for sequence in ends.values():
            engine.target.cache.release(sequence)
        raise
    for branch, request in zip(branches, requests, strict=True):
        branch.inherit(request.tokens, ends[request.number])


def score(branches: Sequence[Branch], continuations: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """[B] float32, the log-probability of each continuation after its branch; nothing is kept.

    Args:
        branches: of one model, each at most once.
        continuations: the ids of one for each branch, [L] with at least one token.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    target = check_branches(branches)
    if len(continuations) != len(branches):
        raise ValueError(
            f"continuations: expected one for each of {len(branches)} branches, "
            f"got {len(continuations)}"
        )
    ids = [token_ids("continuations", c, target.vocab_size) for c in continuations]
    if any(one.ndim != 1 or not len(one) for one in ids):
        raise ValueError(
            "continuations: expected at least one token each, [L], "
            f"got {[list(one.shape) for one in ids]}"
        )
    scores = []
    with turn(target):
        check_weights(branches)
        for branch in branches:
            branch._compute()
        for group in _groups([len(one) for one in ids]):
            members = [branches[index] for index in group]
            answers = [ids[index].tolist() for index in group]
            rows = [[b.tokens[-1], *a[:-1]] for b, a in zip(members, answers, strict=True)]
            sizes = [len(row) for row in rows]
            with target.cache.speculate([b.sequence for b in members], sizes) as lease:
                tokens = upload([token for row in rows for token in row], target.device)
                logits = target.forward(tokens, lease.plan_chains())
            chosen = upload([token for answer in answers for token in answer], target.device)
            picked = logits.float().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
            scores += [part.sum() for part in picked.split(sizes)]
    return torch.stack(scores)


def logprobs(branches: Sequence[Branch]) -> Tensor:
    """[B, V] float32, the log-probabilities of the next token of each branch, in one pass.

    The branches' own tokens are in the cache afterwards, so that a search that appends one token at
    a time computes one row for each.

    Args:
        branches: of one model, each at most once.
    """
    target = check_branches(branches)
    with turn(target):
        check_weights(branches)
        for branch in branches:
            branch._compute()
        with target.cache.speculate([b.sequence for b in branches], [1] * len(branches)) as lease:
            tokens = upload([branch.tokens[-1] for branch in branches], target.device)
            logits = target.forward(tokens, lease.plan_chains())
            lease.commit()
    return logits.float().log_softmax(-1)


def check_branches(branches: Sequence[Branch], target: Target | None = None) -> Target:
    """The target that branches are of.

    Args:
        branches: at least one.
        target: the one it has to be, if it is known.

    Raises:
        ValueError: there is none, one is of another model, or one is there twice.
    """
    if not branches:
        raise ValueError("branches: expected at least one, got none")
    target = target or branches[0]._target
    if any(branch._target is not target for branch in branches):
        raise ValueError("branches: expected those of this model as it is now, got others")
    if len({branch.sequence for branch in branches}) < len(branches):
        raise ValueError(f"branches: expected each at most once, got {list(branches)}")
    return target


def check_weights(branches: Sequence[Branch]) -> None:
    """Refuses branches that were computed with other weights than the model has now.

    Raises:
        RuntimeError: some were.
    """
    now = branches[0]._target.weights_state()
    if any(branch._weights != now for branch in branches):
        raise RuntimeError(
            "the model's weights or its active adapters have changed since this branch was made; "
            "make a new one with model.branch(branch.tokens)"
        )


@contextmanager
def turn(target: Target) -> Iterator[None]:
    with target.lock, torch.inference_mode(False), torch.no_grad():
        yield


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Runs of texts of at most `PASS_ROWS` rows together."""
    group: list[int] = []
    for index, size in enumerate(sizes):
        if group and sum(sizes[i] for i in group) + size > PASS_ROWS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
