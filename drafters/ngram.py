"""Prompt lookup: what followed the last tokens when they occurred before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.drafting import SequenceDrafter
from specdec.tree import TokenTree


@dataclass(frozen=True)
class NGram(SequenceDrafter):
    """Several earlier occurrences of the last n-gram, merged into one tree; no model needed.

    Prompt lookup (Saxena 2023) copies what followed one occurrence. Here every occurrence of the
    last `max_ngram` tokens is a candidate, then of fewer tokens, until the tree is full.

    Args:
        max_ngram: longest suffix to look for.
        depth: tokens to copy from each occurrence.
    """

    max_ngram: int = 4
    depth: int = 10

    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        text = np.asarray(tokens)
        return TokenTree.from_paths(tokens[-1], self._candidates(text, nodes), nodes)

    def _candidates(self, text: np.ndarray, nodes: int) -> list[list[int]]:
        found: list[int] = []
        for size in range(min(self.max_ngram, len(text) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            starts = np.flatnonzero((windows == text[-size:]).all(1)) + size
            found += [start for start in starts[::-1].tolist() if start not in found]
            if len(found) >= nodes:
                break
        return [text[start : start + self.depth].tolist() for start in found]
