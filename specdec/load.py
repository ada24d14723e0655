"""What one pass of the model carries: trees of several lanes, then pieces of prompts.

A piece that ends with its request's last known token, the root, is an *arrival*: the logits behind
it are judged as those of a tree of one node, so that the pass also gives the next token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.attention import AttentionPlan
from specdec.batch import TreeBatch
from specdec.bits import chain_words
from specdec.drafting import DraftContext, OwnCache
from specdec.judge import Judgement
from specdec.request import Policy, Request
from specdec.speculation import Speculation
from specdec.transfer import upload

if TYPE_CHECKING:
    from specdec.target import Target


@dataclass(frozen=True)
class Lane:
    """The decoding requests of one policy, as arrays; rebuilt when they change."""

    policy: Policy
    requests: tuple[Request, ...]
    numbers: tuple[int, ...]
    sequences: tuple[int, ...]
    seeds: Tensor  # [B] int64
    last_positions: Tensor  # [B] int64
    cache_keys: tuple[Hashable, ...] | None  # who may share K and V; None: nobody

    def context(self, target: Target) -> DraftContext:
        """What its drafter may look at now."""
        layers = target.layers_of(self.policy.drafter)
        return DraftContext(
            sequences=self.numbers,
            tokens=tuple(request.tokens for request in self.requests),
            max_depths=tuple(max(0, r.max_length - len(r.tokens) - 1) for r in self.requests),
            seeds=self.seeds,
            sampler=self.policy.sampler,
            vocab_size=target.vocab_size,
            device=target.device,
            law=self.policy.law,
            chains=self.policy.rule.chains,
            cache_keys=self.cache_keys,
            own=None if layers is None else OwnCache(layers, target.cache, self.sequences),
        )


@dataclass(frozen=True)
class Load:
    """The rows of one pass: the trees of each lane, then (request, tokens to compute)."""

    lanes: Sequence[Lane]
    proposals: Sequence[TreeBatch]
    pieces: Sequence[tuple[Request, int]]
    arrivals: Sequence[Lane]  # the requests whose piece has their root
    device: torch.device

    @property
    def judged(self) -> list[Lane]:
        """The requests that the pass gives tokens."""
        return [*self.lanes, *self.arrivals]

    @cached_property
    def trees(self) -> list[TreeBatch]:
        """What is judged of each lane in `judged`; the logits of these rows come first."""
        lasts = [[request.tokens[-1] for request in lane.requests] for lane in self.arrivals]
        roots = [TreeBatch.roots(upload(tokens, self.device)) for tokens in lasts]
        return [*self.proposals, *roots]

    @property
    def sequences(self) -> list[int]:
        """Those that rows are leased for, in order."""
        decoding = [number for lane in self.lanes for number in lane.sequences]
        return decoding + [request.sequence for request, _ in self.pieces]

    @property
    def rows(self) -> list[int]:
        """How many rows each sequence gets."""
        sizes = [size for trees in self.proposals for size in trees.sizes]
        return sizes + [count for _, count in self.pieces]

    def tokens(self, device: torch.device) -> Tensor:
        """[R] int64."""
        parts = [trees.tokens for trees in self.proposals]
        texts = [r.tokens[r.cached : r.cached + count] for r, count in self.pieces]
        if texts:
            parts.append(upload([token for text in texts for token in text], device))
        return torch.cat(parts)

    @cached_property
    def keep(self) -> int | Tensor:
        """Whose logits are needed, as `Target.forward` takes it.

        Those of the trees, then of the arrivals' roots, then of prompts that are asked for.
        """
        if not self.pieces:
            return 0
        rows = sum(len(trees.tokens) for trees in self.proposals)
        ends, end = {}, rows - 1
        for request, count in self.pieces:
            end += count
            ends[request.number] = end
        roots = [ends[number] for lane in self.arrivals for number in lane.numbers]
        asked = [rows + row for _, first, n in self.asked for row in range(first, first + n)]
        if roots or asked:
            return upload([*range(rows), *roots, *asked], self.device)
        if not self.lanes:
            return 1  # none, but models want to compute some
        return torch.arange(rows, device=self.device)

    @cached_property
    def asked(self) -> list[tuple[Request, int, int]]:
        """Pieces of prompts whose log-probabilities are asked for: request, first row, rows.

        Rows are counted behind those of the trees.
        """
        found, row = [], 0
        for request, count in self.pieces:
            before_last = request.prompt_length - 1 - request.cached
            if request.prompt_scores is not None and before_last > 0:
                found.append((request, row, min(count, before_last)))
            row += count
        return found

    def score_prompts(self, logits: Tensor) -> None:
        """Hands the kept rows of prompts to who asked for them."""
        row = sum(len(trees.tokens) for trees in self.trees)
        for request, _, count in self.asked:
            assert request.prompt_scores is not None
            request.prompt_scores.add(request.cached, request.tokens, logits[row : row + count])
            row += count

    def plan(self, lease: Speculation) -> AttentionPlan:
        """Trees first, then pieces of prompts, which are chains."""
        lanes, proposals, pieces = self.lanes, self.proposals, self.pieces
        if not lanes:
            return lease.plan_chains()
        device = proposals[0].device
        chains = [torch.arange(count) for _, count in pieces]
        nodes = [trees.nodes for trees in proposals]
        depths = [trees.depths for trees in proposals]
        words = [trees.ancestors for trees in proposals]
        lasts = [lane.last_positions[t.tree] for lane, t in zip(lanes, proposals, strict=True)]
        if pieces:
            places = upload(torch.cat(chains), device)
            nodes.append(places)
            depths.append(places)
            words.append(chain_words(places, max(count for _, count in pieces)))
            ends = [request.max_length for request, count in pieces for _ in range(count)]
            lasts.append(upload(ends, device))
        width = max(word.shape[1] for word in words)
        if len(words) > 1:
            width = 1 << (width - 1).bit_length()  # few widths: kernels are compiled for each
        padded = [torch.nn.functional.pad(word, (0, width - word.shape[1])) for word in words]
        plan = lease.plan(lease.rows, torch.cat(nodes), torch.cat(depths), torch.cat(padded))
        # Nodes behind the last position a request may fill cannot matter.
        return plan.held(torch.cat(lasts))


@dataclass(frozen=True)
class Verdict:
    """An outcome on the host, by tree. Paths and tokens begin with the root."""

    paths: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    """Those of the path, then the next token."""
    continued: tuple[bool, ...]
    """Whether the last node had children."""
    healthy: tuple[bool, ...]
    """Whether every node of the path had a token to go on with."""


def read(trees: TreeBatch, judgement: Judgement) -> Verdict:
    """Brings an outcome to the host: one copy, the only time a step waits for the device."""
    outcome = judgement.outcome
    rows = trees.offsets[:, None] + outcome.paths.clamp_min(0)
    packed = torch.cat(
        [
            outcome.paths,
            trees.tokens[rows],
            outcome.next_tokens[:, None],
            outcome.continued[:, None].long(),
            judgement.healthy[:, None].long(),
        ],
        dim=1,
    )
    width = outcome.paths.shape[1]
    paths, tokens, continued, good = [], [], [], []
    for line in packed.tolist():
        path = tuple(node for node in line[:width] if node >= 0)
        paths.append(path)
        tokens.append((*line[width : width + len(path)], line[2 * width]))
        continued.append(bool(line[2 * width + 1]))
        good.append(bool(line[2 * width + 2]))
    return Verdict(tuple(paths), tuple(tokens), tuple(continued), tuple(good))


def stacked(paths: Sequence[Tensor]) -> Tensor | None:
    """[B, D] paths of several lanes under each other, -1 behind the last."""
    if not paths:
        return None
    width = max(path.shape[1] for path in paths)
    pad = torch.nn.functional.pad
    return torch.cat([pad(path, (0, width - path.shape[1]), value=-1) for path in paths])
