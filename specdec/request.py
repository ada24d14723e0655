"""What runs through the engine: a text to continue, and how."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from specdec.drafting import Drafter, Observation
from specdec.prompt_logprobs import PromptScores
from specdec.sampling import Sampler
from specdec.tree import ProposalLaw
from specdec.verify import AcceptanceRule


@dataclass(frozen=True, eq=False)
class Policy:
    """How requests are decoded. Those of one policy are drafted and verified together.

    Args:
        drafter: proposes trees.
        rule: keeps a path of each.
        sampler: the sampling options.
        nodes: largest tree to propose, the root included.
        law: to draft under, one for which the rule is legal.
        keep: whether emissions carry `scores` and `logits`.
        adaptive: whether captured steps may take smaller trees where these pay better.
        observer: is told what became of every step, before the step is over; of the pass that ends
            a prompt, too.
    """

    drafter: Drafter
    rule: AcceptanceRule
    sampler: Sampler
    nodes: int
    law: ProposalLaw
    keep: bool = False
    adaptive: bool = True
    observer: Callable[[Verified], object] | None = None


@dataclass(eq=False)
class Request:
    """One text to continue.

    Args:
        tokens: the prompt; grows with every token emitted.
        max_new_tokens: at least 1.
        seed: of its position-keyed randomness.
        stops: asked after every token, with the request as it then is.
        policy: how it is decoded; the engine's by default.
        cache_key: only requests of equal keys share what was computed before.
    """

    tokens: list[int]
    max_new_tokens: int
    seed: int
    stops: Callable[[Request], bool]
    policy: Policy | None = None
    cache_key: Hashable = None
    origin: int | None = None
    """A sequence of the cache that holds a beginning of it, if it does not have to be found."""
    heir: Callable[[int], object] | None = None
    """Is given its sequence when it is finished, which is released otherwise."""
    prompt_scores: PromptScores | None = None
    """Collects what the model thinks of the prompt; then nothing of it comes from the cache."""
    prompt_length: int = field(init=False)
    number: int = field(init=False, default_factory=count().__next__)
    """Never given twice, so that a drafter can serve several runs at once; rises with arrival."""
    finished: bool = False
    error: Exception | None = None
    """Why it ended early, if it did."""
    stopped: bool = False
    """Whether it was given up before its end, without an error of its own."""
    sequence: int = -1
    """In the target's cache while it runs, else -1."""
    cached: int = 0
    """Tokens committed there."""
    row: int = 0
    """Of the batch passed to `generate`."""
    padding: Sequence[int] = ()
    """What stands before the prompt there: transformers' processors see it."""
    key: Hashable = None
    """Under which its tokens are cached while it runs: `cache_key` and the weights' state."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("tokens: expected a prompt of at least one token, got none")
        check_key(self.cache_key)
        self.prompt_length = len(self.tokens)

    @property
    def emitted(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def over(self) -> bool:
        """Whether no more tokens come: it is finished, failed or was stopped."""
        return self.finished or self.stopped or self.error is not None

    @property
    def max_length(self) -> int:
        """Prompt and new tokens, at most."""
        return self.prompt_length + self.max_new_tokens

    @property
    def missing(self) -> int:
        """Tokens before the root that are still to be prefilled; 0 for one that can decode."""
        return len(self.tokens) - 1 - self.cached

    def emit(self, tokens: Sequence[int]) -> list[int]:
        """Takes tokens until one ends the text; returns those taken."""
        taken: list[int] = []
        for token in tokens:
            self.tokens.append(token)
            taken.append(token)
            if self.stops(self) or len(self.tokens) >= self.max_length:
                self.finished = True
                break
        return taken


@dataclass(frozen=True)
class Emission:
    """What one step, or the pass that ended its prompt, gave one request."""

    request: Request
    tokens: list[int]
    drafted: int
    """Nodes proposed, the root not counted."""
    accepted: int
    """Nodes accepted, the root not counted, nor what lay behind the end of the text."""
    scores: Tensor | None = None
    """[tokens, V] float32, what each token was chosen by, if the policy keeps them."""
    logits: Tensor | None = None
    """[tokens, V] float32, the same before processing."""


@dataclass(frozen=True)
class Verified:
    """One step of the requests of one policy: what was proposed, and what became of it.

    The pass that ends prompts is told as a step in which nothing was proposed: trees of one node.
    """

    observation: Observation
    """The trees, their accepted paths, and the tokens that these give."""
    scores: Tensor
    """[R, V], what the token after each node is chosen by: logits under the sampling options. Good
    until the step is over."""
    emissions: Sequence[Emission]
    """What each request took of its tokens: not all of them where the text ended."""


class RequestError(ValueError):
    """Some requests had no next token: the message names them and the nodes.

    The others of the batch ran to their ends; `sequences` has what all of them emitted.
    """

    sequences: Tensor | None = None


def token_ids(name: str, tokens: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """Token ids as an int64 tensor of the shape they have, checked.

    Raises:
        TypeError: they are not integers.
        ValueError: one lies outside the vocabulary.
    """
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected token ids, got {tokens!r:.60} ({error})") from None
    if not ids.numel():
        return ids.long()  # torch takes an empty list for floats
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer token ids, got {ids.dtype}")
    ids = ids.long()
    for extreme in (int(ids.min()), int(ids.max())):
        if not 0 <= extreme < vocab_size:
            raise ValueError(
                f"{name}: expected ids from 0 to {vocab_size - 1}, the vocabulary, got {extreme}"
            )
    return ids


def check_key(cache_key: object) -> None:
    """Raises TypeError unless the key can be looked up."""
    try:
        hash(cache_key)
    except TypeError:
        raise TypeError(f"cache_key: expected something hashable, got {cache_key!r:.60}") from None
