"""What only a look at every step tells: acceptance by rank and by token class, sizes of trees."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from specdec.request import Verified

FENCE = "```"


class Classifier:
    """Sorts the tokens of one answer into the classes of `TOKEN_CLASSES`, in the order they come.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._text = ""

    def __call__(self, token: int) -> str:
        if token in self._special:
            return "special"
        piece: str = self._tokenizer.decode([token])
        inside = self._text.count(FENCE) % 2 == 1
        self._text += piece
        bare = piece.strip()
        if inside and self._text.count(FENCE) % 2 == 1:
            return "code"
        if not bare:
            return "whitespace"
        if all(letter in string.punctuation or not letter.isalnum() for letter in bare):
            return "punctuation"
        return "numbers" if bare.isdecimal() else "words"


class Watch:
    """An observer for `generate` that counts over the steps of one text.

    Args:
        tokenizer: of the model, to sort tokens into classes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._classify = Classifier(tokenizer)
        self.offered: Counter[int] = Counter()
        self.accepted: Counter[int] = Counter()
        self.emitted_classes: Counter[str] = Counter()
        self.accepted_classes: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()

    def __call__(self, verified: Verified) -> None:
        seen = verified.observation
        (path,), (emission,) = seen.paths, verified.emissions
        self.sizes[emission.drafted + 1] += 1
        whole = len(emission.tokens) == len(seen.tokens[0])
        self._count_ranks(seen.trees.known_parents, path, emission.accepted, whole)
        for place, token in enumerate(emission.tokens):
            kind = self._classify(token)
            self.emitted_classes[kind] += 1
            self.accepted_classes[kind] += place < emission.accepted

    def _count_ranks(
        self, parents: Sequence[int], path: Sequence[int], accepted: int, whole: bool
    ) -> None:
        """As `GenerationStats.reached` does, by place among siblings instead of depth."""
        for place, node in enumerate(path[: accepted + whole]):
            children = [child for child, parent in enumerate(parents) if parent == node]
            self.offered.update(range(len(children)))
            if place < accepted:
                self.accepted[children.index(path[place + 1])] += 1

    def counts(self) -> dict[str, Any]:
        """The fields of a `Row` that these are."""
        return {
            "offered_by_rank": dict(self.offered),
            "accepted_by_rank": dict(self.accepted),
            "emitted_by_class": dict(self.emitted_classes),
            "accepted_by_class": {kind: n for kind, n in self.accepted_classes.items() if n},
            "tree_sizes": dict(self.sizes),
        }
