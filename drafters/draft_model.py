"""A smaller model drafts: chains and trees, of a fixed shape or along the likeliest paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.batch import TreeBatch
from specdec.bits import ancestor_words, tree_words
from specdec.cache import Speculation
from specdec.drafters.device_draft import DeviceDraftModel
from specdec.drafters.draft_cache import DraftCache, fit
from specdec.drafters.growth import Beam, BeamGrowth, DrawnGrowth, Grown, Growth, Level, ShapeGrowth
from specdec.drafting import DeviceDrafter, DraftContext, Drafter
from specdec.pages import check_count
from specdec.target import Target
from specdec.topology import Topology
from specdec.transfer import upload
from specdec.tree import MAX_NODES, ProposalLaw


@dataclass
class DraftModel(Drafter):
    """Any smaller causal model with the target's tokenizer, on a paged cache of its own.

    A pass of the draft model runs one depth of all trees of the batch. Leaves are never run. Where
    its layers are computed by our kernels, it drafts inside captured steps, but for the laws that
    draw.

    Args:
        model: a Hugging Face model whose token ids mean what the target's mean.
        topology: the shape to draft, or a `Beam` for trees that follow the likeliest paths; by
            default the best shape for the node budget when acceptance falls from 0.6 by a factor
            of 4 from one sibling to the next.
        law: how children come about in a sampled run under `rule="auto"`: the most likely ones, or
            drawn with the run's sampling options, independently or without replacement. A rule
            asked for by name may ask for the law it draws best with. Greedy decoding always takes
            the most likely ones.
        candidates: draw from that many of the most likely tokens at most, so that no probabilities
            as wide as the vocabulary are kept.
        max_pages: upper bound for the draft model's cache.

    Raises:
        TypeError: `topology` is neither.
        ValueError: a `Beam` under a law that draws: it chooses children by what they are.
    """

    model: Any
    topology: Topology | Beam | None = None
    law: ProposalLaw = ProposalLaw.DETERMINISTIC
    candidates: int = 64
    max_pages: int | None = None

    def __post_init__(self) -> None:
        check_count("candidates", self.candidates)
        if not isinstance(self.topology, Topology | Beam | None):
            raise TypeError(f"topology: expected a Topology or a Beam, got {self.topology!r:.60}")
        if isinstance(self.topology, Beam) and self.law != ProposalLaw.DETERMINISTIC:
            raise ValueError(
                f"law: {self.topology} chooses the likeliest paths, which is deterministic, got "
                f"{self.law.name.lower()}; draw on a Topology"
            )
        self._cache = DraftCache(self.model, self.max_pages)

    @property
    def _target(self) -> Target:
        return self._cache.target

    @property
    def can_draft(self) -> frozenset[ProposalLaw]:
        return frozenset({self.law} if isinstance(self.topology, Beam) else ProposalLaw)

    @property
    def on_host(self) -> str:
        if self._target.uncaptured is not None:
            return f"drafts on the host, {self._target.uncaptured}"
        return f"drafts on {self._target.device}"

    def on_device(self, requests: int, nodes: int, device: torch.device) -> DeviceDrafter | None:
        self._target.weights_state()  # looks whether the layers can be computed as before
        if self._target.uncaptured is not None or self._target.device != device:
            return None
        return DeviceDraftModel(self._cache, self._growth, requests, nodes, device)

    def _growth(self, nodes: int, vocab_size: int, depth: int = MAX_NODES) -> Growth:
        """Trees of so many nodes whose children are chosen."""
        if isinstance(self.topology, Beam):
            vocab_size = min(vocab_size, self._target.vocab_size)
            return BeamGrowth(self.topology, nodes, depth, vocab_size)
        shape = self.topology or Topology.fading(nodes)
        return ShapeGrowth(shape.cut(depth=depth, nodes=nodes), self._target.device)

    def _growth_for(self, context: DraftContext, nodes: int) -> Growth:
        """Trees under the law, and in the shape, that a step asks for."""
        depth, law = max(0, *context.max_depths), context.law
        if isinstance(self.topology, Beam):
            if law != ProposalLaw.DETERMINISTIC:
                raise ValueError(f"law: {self.topology} cannot draw, got {law.name.lower()}")
            beam = Beam(1, self.topology.depth) if context.chains else self.topology
            vocab_size = min(context.vocab_size, self._target.vocab_size)
            return BeamGrowth(beam, nodes, depth, vocab_size)
        if law == ProposalLaw.DETERMINISTIC and not context.chains:
            return self._growth(nodes, context.vocab_size, depth)
        shape = self.topology or (Topology.chain if context.chains else Topology.fading)(nodes)
        shape = shape.cut(depth=depth, nodes=nodes)
        if law == ProposalLaw.DETERMINISTIC:
            return ShapeGrowth(shape, context.device)
        return DrawnGrowth(shape, context, self.candidates)

    def begin(self, sequences: Sequence[int]) -> None:
        self._cache.begin(sequences)

    def end(self, sequences: Sequence[int]) -> None:
        self._cache.end(sequences)

    def propose(self, context: DraftContext, nodes: int) -> TreeBatch:
        self._cache.check(context)
        growth = self._growth_for(context, nodes)
        roots = upload([tokens[-1] for tokens in context.tokens], context.device)
        behind = self._cache.catch_up(context, growth.depth + 1)
        logits = fit(behind.to(context.device), context.vocab_size)
        if not growth.rows:
            return _packed(growth, growth.grow(roots, logits, _nothing_to_run), context.law)
        numbers = [text.number for text in self._cache.texts(context)]
        with self._target.cache.speculate(numbers, [growth.rows] * len(numbers)) as lease:
            grown = growth.grow(roots, logits, lambda level: self._run(level, lease, context))
        return _packed(growth, grown, context.law)

    def _run(self, level: Level, lease: Speculation, context: DraftContext) -> Tensor:
        """Runs nodes of one depth of every tree: [B, w, V] logits behind them."""
        batch, width = level.tokens.shape
        device = self._target.device
        nodes = torch.arange(level.first, level.first + width, device=device).repeat(batch)
        # The root is committed, so what is run is a forest.
        depths = torch.full_like(nodes, level.depth - 1)
        words = level.ancestors.flatten(0, 1).to(device)
        plan = lease.plan([width] * batch, nodes, depths, words)
        tokens = self._cache.known(level.tokens.flatten().to(device))
        logits = self._target.forward(tokens, plan).to(context.device)
        return fit(logits, context.vocab_size).view(batch, width, -1)


def _nothing_to_run(level: Level) -> Tensor:
    raise AssertionError(f"nothing was leased for {level}")


def _packed(growth: Growth, grown: Grown, law: ProposalLaw) -> TreeBatch:
    batch, shape, device = len(grown.tokens), growth.shape, grown.tokens.device
    law = ProposalLaw.DETERMINISTIC if grown.draft_probs is None else law
    if shape is None:
        depths, words = tree_words(grown.parents, growth.depth)
    else:
        depths = upload(shape.depths, device).repeat(batch, 1)
        bits = ancestor_words(shape.ancestor_bits, len(shape))
        words = upload(bits, device).repeat(batch, 1, 1)
    tokens, names = grown.tokens.flatten(), grown.draft_tokens
    return TreeBatch(
        tokens=tokens,
        parents=grown.parents.flatten(),
        depths=depths.flatten(),
        ancestors=words.flatten(0, 1),
        laws=torch.full_like(tokens, law, dtype=torch.int8),
        draft_probs=None if grown.draft_probs is None else grown.draft_probs.flatten(0, 1),
        sizes=(growth.size,) * batch,
        laws_used=frozenset({law}),
        max_depth=growth.depth,
        max_children=growth.max_children,
        draft_tokens=None if names is None else names.flatten(0, 1),
        host_parents=None if shape is None else shape.parents * batch,
    )
