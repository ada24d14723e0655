"""Prompt lookup: what followed the last tokens where they occurred before."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.drafting import DeviceDrafter, DraftBuffers, SequenceDrafter
from specdec.tree import TokenTree

Match = tuple[int, float]  # place behind an earlier occurrence of the last token, weight


Candidate = tuple[float, int, list[Match], int, int, int]
"""A node that may join the tree: minus the chance of its whole path, minus the latest place that it
continues, those places, its token, parent and depth. The least is the likeliest, among equals the
one that occurred later; no two continue the same place, so nothing behind is compared."""


@dataclass(frozen=True)
class NGram(SequenceDrafter):
    """All earlier occurrences of the last tokens, merged into the most promising tree.

    Prompt lookup (Saxena 2023) copies what followed one occurrence. Here every occurrence votes,
    twice as strongly for each further token that agrees before it. A token's share of the votes
    among its siblings estimates its chance, and nodes are taken by the chance of their path. No
    model is needed.

    Args:
        max_ngram: tokens to compare before an occurrence, at most.
        depth: tokens to copy behind an occurrence, at most.
        max_matches: the latest occurrences of the last token that vote.
    """

    max_ngram: int = 6
    depth: int = 24
    max_matches: int = 256

    DECAY: ClassVar[float] = 0.9
    """How much less sure each further token is, even where all votes agree."""

    def on_device(self, requests: int, nodes: int, device: torch.device) -> DeviceDrafter:
        return _DeviceNGram(self, requests, device)

    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        out, parents = [tokens[-1]], [-1]
        heap: list[Candidate] = []
        self._add_children(heap, tokens, self._matches(np.asarray(tokens)), 0, 0, 1.0)
        while heap and len(out) < nodes:
            chance, _, matches, token, parent, depth = heapq.heappop(heap)
            out.append(token)
            parents.append(parent)
            if depth < self.depth:
                self._add_children(heap, tokens, matches, len(out) - 1, depth, -chance)
        return TokenTree.from_lists(out, parents)

    def _add_children(
        self,
        heap: list[Candidate],
        tokens: Sequence[int],
        matches: list[Match],
        parent: int,
        depth: int,
        chance: float,
    ) -> None:
        """Adds what the matches say comes next, below node `parent` of the given depth."""
        voters: dict[int, list[Match]] = {}
        total, end = 0.0, len(tokens) - depth
        for match in matches:
            total += match[1]
            if match[0] < end:
                voters.setdefault(tokens[match[0] + depth], []).append(match)
        for token, group in voters.items():
            share = sum(weight for _, weight in group) / total
            latest = group[-1][0]
            heapq.heappush(
                heap, (-chance * share * self.DECAY, -latest, group, token, parent, depth + 1)
            )

    def _matches(self, text: NDArray[np.int64]) -> list[Match]:
        """The places behind earlier occurrences of the last token, weighted by what agrees."""
        ends = np.flatnonzero(text[:-1] == text[-1])[-self.max_matches :]
        length = np.ones(len(ends), dtype=np.int64)
        agreeing = np.arange(len(ends))
        for back in range(1, min(self.max_ngram, len(text) - 1)):
            # Before the text's beginning, where the index is negative, nothing agrees.
            before = ends[agreeing] - back
            agreeing = agreeing[(before >= 0) & (text[before] == text[-1 - back])]
            if not len(agreeing):
                break
            length[agreeing] += 1
        return list(zip((ends + 1).tolist(), np.ldexp(1.0, length).tolist(), strict=True))


class _DeviceNGram(DeviceDrafter):
    """The same trees, grown by one kernel; at most `VOTERS` occurrences vote."""

    VOTERS: ClassVar[int] = 64

    def __init__(self, drafter: NGram, requests: int, device: torch.device) -> None:
        self.drafter, self.max_depth = drafter, drafter.depth
        voters = 1 << (min(drafter.max_matches, self.VOTERS).bit_length() - 1)
        self._places = torch.empty(requests, voters, dtype=torch.int32, device=device)

    def draft(self, buffers: DraftBuffers) -> None:
        from specdec.kernels import ngram  # needs Triton

        ngram.draft(
            buffers.text,
            buffers.lengths,
            self._places,
            tokens=buffers.tokens,
            parents=buffers.parents,
            counts=buffers.counts,
            max_ngram=self.drafter.max_ngram,
            max_depth=self.drafter.depth,
            decay=self.drafter.DECAY,
        )
