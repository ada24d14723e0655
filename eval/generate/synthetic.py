"""A drafter and a rule of set acceptance, for models whose weights, and so whose texts, are random.

Every step costs what a real one of its size costs - the trees are scored, the best tokens looked
for, paths moved - but how many nodes are kept is set beforehand. What comes out is nobody's text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.batch import TreeBatch
from specdec.drafting import DeviceDrafter, DraftBuffers, DraftContext, Drafter
from specdec.rules import Greedy
from specdec.sampling import Sampler
from specdec.verify import ALL_LAWS, AcceptanceRule, DeviceChoice, Noise, Outcome

DEPTH = 8
"""Of the chain that every tree begins with."""
FACTOR, VOCABULARY = 7919, 30011
"""A chain's token at a position is `FACTOR * position` modulo `VOCABULARY`."""


class Synthetic(Drafter):
    """Trees of a chain and, for the rest of their nodes, further children of the root."""

    def on_device(self, requests: int, nodes: int, device: torch.device) -> DeviceDrafter:
        return _OnDevice()

    def propose(self, context: DraftContext, nodes: int) -> TreeBatch:
        raise RuntimeError("synthetic drafts exist in captured steps only")


class _OnDevice(DeviceDrafter):
    max_depth = DEPTH

    def draft(self, buffers: DraftBuffers) -> None:
        count, nodes = len(buffers.lengths), buffers.nodes
        node = torch.arange(nodes, device=buffers.tokens.device)
        tokens = buffers.tokens.view(count, nodes)
        position = buffers.lengths[:, None] - 1 + node
        tokens.copy_(position * FACTOR % VOCABULARY)
        tokens[:, :1] = buffers.text.gather(1, buffers.lengths[:, None] - 1)
        parents = torch.where((node > 0) & (node <= DEPTH), node - 1, 0)
        parents = torch.where(node == 0, -1, parents).int()
        buffers.parents.view(count, nodes).copy_(parents.expand(count, -1))
        buffers.counts.fill_(nodes)


@dataclass
class Accepts(AcceptanceRule):
    """Keeps the first `kept` nodes below the root, whatever the target says."""

    kept: int

    name = "synthetic"
    legal_laws = ALL_LAWS
    lossless = False

    def on_device(self, sampler: Sampler) -> DeviceChoice:
        return _Forced(self.kept)

    def verify(self, trees: TreeBatch, target: Tensor, noise: Noise) -> Outcome:
        if trees.max_depth:
            raise RuntimeError("synthetic acceptance exists in captured steps only")
        return Greedy().verify(trees, target, noise)  # the token that comes with the prompt


@dataclass(frozen=True)
class _Forced(DeviceChoice):
    kept: int

    def choose(
        self, logits: Tensor, seeds: Tensor, lengths: Tensor, depths: Tensor
    ) -> tuple[Tensor, Tensor]:
        from specdec.kernels.scan import greatest  # needs Triton

        best, tokens = greatest(logits)
        node = torch.arange(depths.shape[1], device=depths.device)
        ahead = (lengths[:, None] + depths) * FACTOR % VOCABULARY
        forced = (depths < self.kept) & (node <= DEPTH)
        return torch.where(forced.flatten(), ahead.flatten(), tokens), best
