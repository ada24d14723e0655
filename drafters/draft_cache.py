"""The draft model behind a paged cache of its own, which follows the texts it drafts for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.drafting import DraftContext
from specdec.support import causal_model, check_length
from specdec.target import Target
from specdec.transfer import upload

VOCABULARY_PADDING = 1024
"""Models of one tokenizer pad their heads differently; more than this is another tokenizer."""


@dataclass
class DraftText:
    """The draft model's side of one sequence."""

    number: int  # in the draft model's own cache
    cached: int = 0  # known tokens that are committed there
    tokens: Sequence[int] = ()  # what it holds, if others may begin with it


class DraftCache:
    """A draft model and the texts that it has computed.

    Only texts are kept: a step begins with one pass over the tokens that are new since the last
    one, root included, and what it writes for its tree is forgotten when the tree is drafted.

    Args:
        model: a Hugging Face model.
        max_pages: upper bound for the cache.
    """

    def __init__(self, model: Any, max_pages: int | None) -> None:
        config = causal_model(model).config.get_text_config(decoder=True)
        length = getattr(config, "max_position_embeddings", None)
        last = None if length is None else length - 1
        self.target = Target(model, max_pages=max_pages, last_position=last)
        self._texts: dict[int, DraftText] = {}

    def begin(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            self._texts[sequence] = DraftText(self.target.cache.admit())

    def end(self, sequences: Sequence[int]) -> None:
        """Keeps the pages of texts for others, and forgets the rest."""
        for sequence in sequences:
            if sequence in self._texts:
                text = self._texts.pop(sequence)
                self.target.cache.remember(text.number, text.tokens)
                self.target.cache.release(text.number)

    def check(self, context: DraftContext) -> None:
        """Refuses what the model cannot draft for.

        Raises:
            ValueError: the target has another vocabulary.
            UnsupportedModel: the texts may become too long for the model.
        """
        own = self.target.vocab_size
        if abs(own - context.vocab_size) > VOCABULARY_PADDING:
            raise ValueError(
                f"draft model: its vocabulary of {own} tokens is not the target's "
                f"{context.vocab_size}; use a model with the same tokenizer"
            )
        ends = [len(t) + d for t, d in zip(context.tokens, context.max_depths, strict=True)]
        check_length(self.target.model, max(ends))

    def texts(self, context: DraftContext) -> list[DraftText]:
        """The model's side of a step's sequences.

        New ones begin with what earlier ones computed, where the run allows it.
        """
        texts = [self._texts[sequence] for sequence in context.sequences]
        if context.cache_keys is None:
            return texts
        weights = None if all(text.cached for text in texts) else self.target.weights_state()
        for text, tokens, key in zip(texts, context.tokens, context.cache_keys, strict=True):
            if not text.cached:
                cache = self.target.cache
                text.cached = cache.adopt(text.number, tokens[:-1], key=(key, weights))
            text.tokens = tokens
        return texts

    def catch_up(self, context: DraftContext, most: int) -> Tensor:
        """Commits every known token, the root included; [B, V] logits behind the roots.

        Args:
            context: of the step.
            most: tokens that are new in an ordinary step; one pass takes them. What a text has
                beyond them is prefilled.
        """
        texts, device = self.texts(context), self.target.device
        missing = [
            self.known(upload(tokens[text.cached :], device))
            for text, tokens in zip(texts, context.tokens, strict=True)
        ]
        numbers = [text.number for text in texts]
        self.target.prefill(numbers, [tokens[:-most] for tokens in missing])
        last = [tokens[-most:] for tokens in missing]
        rows = [len(tokens) for tokens in last]
        ends = upload(rows, device).cumsum(0) - 1
        with self.target.cache.speculate(numbers, rows) as lease:
            logits = self.target.forward(torch.cat(last), lease.plan_chains(), keep=ends)
            lease.commit()
        for text, tokens in zip(texts, context.tokens, strict=True):
            text.cached = len(tokens)
        return logits

    def known(self, tokens: Tensor) -> Tensor:
        """Tokens as the model can read them.

        One that only the target's padded head knows stands for the last one here.
        """
        return tokens.clamp_max(self.target.vocab_size - 1)


def fit(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits over the target's vocabulary: padded heads are cut, missing ones impossible."""
    logits = logits.float()
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
    return logits[..., :vocab_size]
