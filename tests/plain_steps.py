"""What the kernels around a captured forward do, in plain Python: slow, and easy to believe.

The kernels are compared with it, and stand aside for it where only the host's part is tested:
Triton's interpreter takes seconds for a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.drafters import NGram
from specdec.drafting import DeviceDrafter, DraftBuffers, SequenceDrafter
from specdec.fused import FusedModel
from specdec.hooks import ATTENTION, PagedAttention, PassThroughCache, attention_name, configs_of
from specdec.kernels import ngram, steps
from specdec.tree import TokenTree


def slot(page_table: Tensor, page_size: int, sequence: int, place: int) -> int:
    page = min(place // page_size, page_table.shape[1] - 1)
    return int(page_table[sequence, page]) * page_size + place % page_size


def place(
    sequences: Tensor,
    lengths: Tensor,
    limits: Tensor,
    parents: Tensor,
    page_table: Tensor,
    page_size: int,
    *,
    row_sequences: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> None:
    nodes = len(parents) // len(sequences)
    for request, sequence in enumerate(sequences.tolist()):
        prefix, last = int(lengths[sequence]), int(limits[request]) - 1
        sees: list[int] = []
        for node in range(nodes):
            row = request * nodes + node
            parent = int(parents[row])
            sees.append(1 << node | (sees[parent] if parent >= 0 else 0))
            depth = sees[node].bit_count() - 1
            row_sequences[row], depths[row] = sequence, depth
            for word in range(ancestors.shape[1]):
                bits = sees[node] >> 32 * word & 0xFFFFFFFF
                ancestors[row, word] = bits - (bits >> 31 << 32)
            slots[row] = slot(page_table, page_size, sequence, prefix + node)
            positions[row] = min(prefix + depth, last)


def accept(
    sequences: Tensor,
    lengths: Tensor,
    limits: Tensor,
    text: Tensor,
    text_lengths: Tensor,
    page_table: Tensor,
    page_size: int,
    *,
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    ancestors: Tensor,
    counts: Tensor,
    choices: Tensor,
    best: Tensor,
    sources: Tensor,
    targets: Tensor,
    report: Tensor,
) -> None:
    nodes = len(parents) // len(sequences)
    sources.zero_()
    targets.zero_()
    for request, sequence in enumerate(sequences.tolist()):
        rows = slice(request * nodes, request * nodes + int(counts[request]))
        token, parent, chosen = (x[rows].tolist() for x in (tokens, parents, choices))
        paths = {0: [0]}
        for node in range(1, len(token)):
            if parent[node] in paths and token[node] == chosen[parent[node]]:
                paths[node] = [*paths[parent[node]], node]
        path = max(paths.values(), key=lambda path: (len(path), -path[-1]))
        known, limit = int(text_lengths[request]), int(limits[request])
        new = [*(token[node] for node in path[1:]), chosen[path[-1]]][: max(limit - known, 0)]
        scores = best[rows].tolist()
        failed = not all(scores[node] > float("-inf") for node in path[: len(new)])
        columns = [len(new), len(token) - 1, len(path) - 1, (path[-1] in parent) + 2 * failed, *new]
        for column, number in enumerate(columns):
            report[request, column] = number
        for depth, node in enumerate(path):
            report[request, 4 + sources.shape[1] + 1 + depth] = node
        prefix = int(lengths[sequence])
        for depth, node in enumerate(path[: len(new)]):
            sources[request, depth] = slot(page_table, page_size, sequence, prefix + node)
            targets[request, depth] = slot(page_table, page_size, sequence, prefix + depth)
        for place, number in enumerate(new, known):
            text[request, place] = number
        if sequence > 0:
            lengths[sequence] += len(new)
            text_lengths[request] += len(new)
        if known + len(new) >= limit:
            sequences[request] = 0


def draft(
    text: Tensor,
    lengths: Tensor,
    places: Tensor,
    *,
    tokens: Tensor,
    parents: Tensor,
    counts: Tensor,
    max_ngram: int,
    max_depth: int,
    decay: float,
) -> None:
    fill(
        NGram(max_ngram, max_depth, places.shape[1]),
        DraftBuffers(
            torch.ones_like(lengths), text, lengths, tokens, parents, counts, text.shape[1], False
        ),
    )


def fill(drafter: SequenceDrafter, buffers: DraftBuffers) -> None:
    """What a drafter proposes on the host, where a captured step looks for it."""
    text, lengths, tokens = buffers.text, buffers.lengths, buffers.tokens
    parents, counts, nodes = buffers.parents, buffers.counts, buffers.nodes
    for request, length in enumerate(lengths.tolist()):
        tree = drafter.draft(text[request, :length].tolist(), nodes)
        missing = nodes - len(tree)
        rows = slice(request * nodes, (request + 1) * nodes)
        tokens[rows] = tokens.new_tensor([*tree.tokens.tolist(), *[int(tree.tokens[0])] * missing])
        parents[rows] = parents.new_tensor([*tree.parents.tolist(), *[0] * missing])
        counts[request] = len(tree)


class OnDevice(SequenceDrafter):
    """A drafter of the host that captured steps can have too, as long as the device is the host."""

    def __init__(self, drafter: SequenceDrafter) -> None:
        self._drafter = drafter

    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        return self._drafter.draft(tokens, nodes)

    def on_device(self, requests: int, nodes: int, device: torch.device) -> DeviceDrafter:
        return _Filled(self._drafter)


class _Filled(DeviceDrafter):
    max_depth = 63

    def __init__(self, drafter: SequenceDrafter) -> None:
        self._drafter = drafter

    def draft(self, buffers: DraftBuffers) -> None:
        fill(self._drafter, buffers)


def forward(
    model: FusedModel,
    tokens: Tensor,
    plan: Any,
    pool: Any,
    backend: Any,
    keep: int | Tensor,
    taps: None = None,
) -> Tensor:
    """transformers' forward in place of the fused one."""
    names = inspect.signature(type(model.model).forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    with attention_name(configs_of(model.model), ATTENTION):
        output = model.model(
            input_ids=tokens[None],
            position_ids=plan.positions[None],
            **{name: PassThroughCache()},
            use_cache=True,
            logits_to_keep=keep,
            specdec_handler=PagedAttention(pool, plan, "sdpa"),
        )
    logits: Tensor = output.logits[0]
    return logits


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the place of everything that Triton's interpreter would run in a captured step."""
    for module, name, function in (
        (steps, "place", place),
        (steps, "accept", accept),
        (ngram, "draft", draft),
        (FusedModel, "forward", forward),
    ):
        monkeypatch.setattr(module, name, function)
