"""Output held to a grammar: one mask for every node of every tree, through xgrammar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.sampling import Histories, TreeProcessor
from specdec.transfer import upload


class Grammar(TreeProcessor):
    """A logits processor that allows what a grammar allows after each node's own path.

    Needs xgrammar (`pip install specdec-toolkit[grammar]`). Use as
    `model.generate(..., logits_processor=[Grammar(compiled)])`; one object serves one call.

    Args:
        compiled: an `xgrammar.CompiledGrammar` for all rows, or one for each row of the batch.
        prompt: tokens before the constrained text, the padding included: the width of `input_ids`.

    Raises:
        ImportError: xgrammar is not installed.
        ValueError: the text so far does not follow the grammar.
    """

    def __init__(self, compiled: Any, *, prompt: int) -> None:
        import xgrammar

        self._xgrammar = xgrammar
        self._compiled = compiled
        self._prompt = prompt
        self._matchers: dict[int, tuple[Any, list[int]]] = {}

    def _matcher(self, row: int, emitted: list[int]) -> Any:
        """The row's matcher, brought up to the tokens it has emitted so far."""
        matcher, known = self._matchers.get(row, (None, []))
        if matcher is None or emitted[: len(known)] != known:
            several = isinstance(self._compiled, (list, tuple))
            grammar = self._compiled[row] if several else self._compiled
            matcher, known = self._xgrammar.GrammarMatcher(grammar), []
        for token in emitted[len(known) :]:
            # Behind the end of a row transformers has padding.
            if not matcher.is_terminated() and not matcher.accept_token(token):
                raise ValueError(
                    f"row {row}: token {token} does not follow the grammar after "
                    f"{len(known)} tokens"
                )
            known = [*known, token]
        self._matchers[row] = (matcher, known)
        return matcher

    def process_trees(self, scores: Tensor, histories: Histories) -> Tensor:
        """Masks [R, V] scores. A node that the grammar forbids is left as it is: it is never
        reached, since its parent gives it no probability."""
        rows, vocab = scores.shape
        mask = self._xgrammar.allocate_token_bitmask(rows, vocab)
        mask.fill_(-1)
        tokens = histories.tokens.tolist()
        start = 0
        for text, size in zip(histories.texts, histories.sizes, strict=True):
            matcher = self._matcher(text.row, list(text.tokens[self._prompt :]))
            self._fill(matcher, mask, histories.parents[start : start + size], tokens, start)
            start += size
        return _masked(scores, mask)

    def _fill(
        self, matcher: Any, mask: Tensor, parents: tuple[int, ...], tokens: list[int], start: int
    ) -> None:
        """Walks down one tree, depth first, and takes every step back."""
        children: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(parents[1:], start=1):
            children[parent].append(node)

        def visit(node: int) -> None:
            if matcher.is_terminated():  # nothing may follow: the request is over
                return
            matcher.fill_next_token_bitmask(mask, start + node)
            for child in children[node]:
                if matcher.accept_token(tokens[start + child]):
                    visit(child)
                    matcher.rollback(1)

        visit(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """transformers' own loop: one text a row."""
        mask = self._xgrammar.allocate_token_bitmask(*scores.shape)
        mask.fill_(-1)
        for row, text in enumerate(input_ids.tolist()):
            matcher = self._matcher(row, text[self._prompt :])
            if not matcher.is_terminated():
                matcher.fill_next_token_bitmask(mask, row)
        return _masked(scores, mask)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """[R, V] scores under [R, V / 32] int32 words of allowed tokens."""
    bits = torch.arange(32, dtype=torch.int32)
    allowed = ((mask[:, :, None] >> bits) & 1).bool().flatten(1)[:, : scores.shape[1]]
    return scores.masked_fill(~upload(allowed, scores.device), -torch.inf)
