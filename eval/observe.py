"""What statistics do not tell: which child was accepted, how large trees were, what the text is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.batch import TreeBatch
from specdec.drafting import DraftContext, Drafter, Observation
from specdec.tree import ProposalLaw

FENCE = "```"


class Observed(Drafter):
    """Another drafter, and notes of what became of its trees.

    Notes are references to what the engine hands out anyway, so taking them costs nothing. Captured
    steps tell a drafter nothing, so its steps are never captured.
    """

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.law = inner.law
        self.notes: list[Observation] = []

    @property
    def can_draft(self) -> frozenset[ProposalLaw]:
        return self.inner.can_draft

    def begin(self, sequences: Sequence[int]) -> None:
        self.inner.begin(sequences)

    def propose(self, context: DraftContext, nodes: int) -> TreeBatch:
        return self.inner.propose(context, nodes)

    def observe(self, observation: Observation) -> None:
        self.inner.observe(observation)
        self.notes.append(observation)

    def end(self, sequences: Sequence[int]) -> None:
        self.inner.end(sequences)

    def __repr__(self) -> str:
        return repr(self.inner)


@dataclass
class Counts:
    """What the steps of one sequence did."""

    offered: Counter[int] = field(default_factory=Counter)
    """By rank: children below a node that a step came to."""
    accepted: Counter[int] = field(default_factory=Counter)
    """By rank: those accepted."""
    tree_sizes: Counter[int] = field(default_factory=Counter)
    """By number of nodes, the root included: steps."""
    drafted_places: set[int] = field(default_factory=set)
    """Places of new tokens that had been drafted."""


def count(notes: Sequence[Observation], first_tokens: int, new_tokens: int) -> Counts:
    """Counts the steps of one sequence, which ended after `new_tokens`.

    A drafter is not told of the `first_tokens`, which came with the prefill before all steps. What
    the last step accepted behind the end of the text does not count, nor does the node where the
    text ended: it was not asked for a child.
    """
    counts, known = Counts(), first_tokens
    for note in notes:
        (path,) = note.paths
        kept = min(len(note.tokens[0]), new_tokens - known)
        ended = kept < len(note.tokens[0])
        counts.tree_sizes[note.trees.sizes[0]] += 1
        counts.drafted_places |= set(range(known, known + min(len(path) - 1, kept)))
        known += kept
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(note.trees.parents.tolist()):
            children.setdefault(parent, []).append(node)
        for place, node in enumerate(path):
            if place == kept and ended:
                break
            siblings = children.get(node, [])
            counts.offered.update(range(len(siblings)))
            if place < min(len(path) - 1, kept):
                counts.accepted[siblings.index(path[place + 1])] += 1
    return counts


def token_classes(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The class of each token, one of `records.TOKEN_CLASSES`.

    Between fences of three backticks all is `code`. Otherwise a token is what its characters are:
    `words` if one is a letter, or part of a character of several tokens; else `numbers` if one is a
    digit; `whitespace` if there is nothing else; else `punctuation`.
    """
    special, classes, text = set(tokenizer.all_special_ids), [], ""
    for token in tokens:
        if token in special:
            classes.append("special")
            continue
        piece = tokenizer.decode([token])
        inside = text.count(FENCE) % 2 == 1
        text += piece
        classes.append("code" if inside else _class(piece))
    return classes


def _class(piece: str) -> str:
    if any(char.isalpha() or char == "\N{REPLACEMENT CHARACTER}" for char in piece):
        return "words"
    if any(char.isdigit() for char in piece):
        return "numbers"
    return "punctuation" if piece.strip() else "whitespace"
