"""A smaller model drafts: chains and trees of a fixed shape, chosen or sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.batch import TreeBatch
from specdec.bits import ancestor_words
from specdec.cache import Speculation
from specdec.drafting import DraftContext, Drafter, Observation
from specdec.noise import Purpose, uniform
from specdec.pages import check_count
from specdec.sampling import draw
from specdec.support import causal_model, check_length
from specdec.target import Target
from specdec.topology import Topology
from specdec.transfer import upload
from specdec.tree import ProposalLaw

VOCABULARY_PADDING = 1024
"""Models of one tokenizer pad their heads differently; more than this is another tokenizer."""


@dataclass
class _Sequence:
    """The draft model's side of one sequence."""

    number: int  # in the draft model's own cache
    cached: int = 0  # known tokens that are committed there
    text: Sequence[int] = ()  # what it holds, if others may begin with it


@dataclass
class _OpenDraft:
    """The lease behind proposed trees, until `observe` settles it."""

    topology: Topology
    lease: Speculation | None


@dataclass
class DraftModel(Drafter):
    """Any smaller causal model with the target's tokenizer, on a paged cache of its own.

    A pass of the draft model runs one depth of all trees of the batch. Leaves are never run: an
    accepted one is caught up, with the token that followed it, in the first pass of the next step.

    Args:
        model: a Hugging Face model whose token ids mean what the target's mean.
        topology: the shape to draft; by default the best for the node budget when acceptance
            falls from 0.6 by a factor of 4 from one sibling to the next.
        law: how children come about in a sampled run under `rule="auto"`: the most likely ones, or
            drawn with the run's sampling options, independently or without replacement. A rule
            asked for by name may ask for the law it draws best with. Greedy decoding always takes
            the most likely ones.
        candidates: draw from that many of the most likely tokens at most, so that no probabilities
            as wide as the vocabulary are kept.
        max_pages: upper bound for the draft model's cache.
    """

    model: Any
    topology: Topology | None = None
    law: ProposalLaw = ProposalLaw.DETERMINISTIC
    candidates: int = 64
    max_pages: int | None = None
    _sequences: dict[int, _Sequence] = field(default_factory=dict, init=False, repr=False)
    _open: dict[tuple[int, ...], _OpenDraft] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("candidates", self.candidates)
        config = causal_model(self.model).config.get_text_config(decoder=True)
        length = getattr(config, "max_position_embeddings", None)
        last = None if length is None else length - 1
        self._target = Target(self.model, max_pages=self.max_pages, last_position=last)

    @property
    def can_draft(self) -> frozenset[ProposalLaw]:
        return frozenset(ProposalLaw)

    def begin(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            self._sequences[sequence] = _Sequence(self._target.cache.admit())

    def end(self, sequences: Sequence[int]) -> None:
        self._drop()
        for sequence in sequences:
            if sequence in self._sequences:
                member = self._sequences.pop(sequence)
                self._target.cache.remember(member.number, member.text)
                self._target.cache.release(member.number)

    def propose(self, context: DraftContext, nodes: int) -> TreeBatch:
        self._check(context)
        shape = self.topology or (Topology.chain if context.chains else Topology.fading)(nodes)
        shape = shape.cut(depth=max(0, *context.max_depths), nodes=nodes)
        grown = _GrowingTrees(shape, context, candidates=self.candidates)
        logits = self._catch_up(context)
        lease = None
        if len(shape) > 1:
            grown.add_children((0,), logits[:, None])
            inner = _inner_levels(shape)
            if inner:
                members = [self._sequences[s].number for s in context.sequences]
                lease = self._target.cache.speculate(members, [len(shape) - 1] * len(members))
            self._open[context.sequences] = _OpenDraft(shape, lease)
            for level in inner:
                grown.add_children(level, self._run_level(grown, level, lease))
        else:
            self._open[context.sequences] = _OpenDraft(shape, None)
        return grown.batch()

    def _check(self, context: DraftContext) -> None:
        own = self._target.vocab_size
        if abs(own - context.vocab_size) > VOCABULARY_PADDING:
            raise ValueError(
                f"draft model: its vocabulary of {own} tokens is not the target's "
                f"{context.vocab_size}; use a model with the same tokenizer"
            )
        ends = [len(t) + d for t, d in zip(context.tokens, context.max_depths, strict=True)]
        check_length(self._target.model, max(ends))

    def _catch_up(self, context: DraftContext) -> Tensor:
        """Commits every known token, the root included; [B, V] logits behind the roots."""
        members = [self._sequences[sequence] for sequence in context.sequences]
        self._reuse(context, members)
        top = self._target.vocab_size - 1
        missing = [
            # A token that only the target's padded head knows stands for the last one here.
            upload(tokens[member.cached :], self._target.device).clamp_max(top)
            for member, tokens in zip(members, context.tokens, strict=True)
        ]
        numbers = [member.number for member in members]
        self._target.prefill(numbers, [tokens[:-2] for tokens in missing])
        last = [tokens[-2:] for tokens in missing]
        rows = [len(tokens) for tokens in last]
        ends = upload(rows, self._target.device).cumsum(0) - 1
        with self._target.cache.speculate(numbers, rows) as lease:
            logits = self._target.forward(torch.cat(last), lease.plan_chains(), keep=ends)
            lease.commit()
        for member, tokens in zip(members, context.tokens, strict=True):
            member.cached = len(tokens)
        return self._fit(logits, context)

    def _reuse(self, context: DraftContext, members: Sequence[_Sequence]) -> None:
        """Lets new sequences begin with what earlier ones computed, where the run allows it."""
        if context.cache_keys is None:
            return
        weights = None if all(member.cached for member in members) else self._target.weights_state()
        for member, tokens, key in zip(members, context.tokens, context.cache_keys, strict=True):
            if not member.cached:
                cache, number = self._target.cache, member.number
                member.cached = cache.adopt(number, tokens[:-1], key=(key, weights))
            member.text = tokens

    def _run_level(
        self, grown: _GrowingTrees, level: tuple[int, ...], lease: Speculation | None
    ) -> Tensor:
        """Runs nodes of one depth of every tree: [B, nodes, V] logits behind them."""
        assert lease is not None, "a level is only run on leased rows"
        batch = len(lease.sequences)
        device = self._target.device
        # The root is committed here, so the tree is a forest: every index falls by one.
        bits = [grown.shape.ancestor_bits[node] >> 1 for node in level]
        words = upload(ancestor_words(bits, len(grown.shape) - 1), device)
        nodes = upload(level, device) - 1
        depth = grown.shape.depths[level[0]] - 1
        nodes = nodes.repeat(batch)
        plan = lease.plan(
            [len(level)] * batch,
            nodes,
            torch.full_like(nodes, depth),
            words.repeat(batch, 1),
        )
        tokens = grown.tokens[:, level].flatten().to(device)
        tokens = tokens.clamp_max(self._target.vocab_size - 1)
        logits = self._target.forward(tokens, plan)
        fitted = self._fit(logits, grown.context)
        return fitted.view(batch, len(level), -1)

    def _fit(self, logits: Tensor, context: DraftContext) -> Tensor:
        """Logits over the target's vocabulary: padded heads are cut, missing ones impossible."""
        logits = logits.to(context.device).float()
        missing = context.vocab_size - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[..., : context.vocab_size]

    def observe(self, observation: Observation) -> None:
        """Keeps the accepted nodes that were run; the others are caught up in the next step."""
        opened = self._open.pop(observation.sequences, None)
        if opened is None or opened.lease is None:
            return
        kept = [
            [node - 1 for node in path[1:] if node in opened.topology.inner]
            for path in observation.paths
        ]
        width = max(1, *(len(path) for path in kept))
        paths = [path + [-1] * (width - len(path)) for path in kept]
        opened.lease.commit(upload(paths, self._target.device))
        opened.lease.settle([len(path) for path in kept])
        for sequence, path in zip(observation.sequences, kept, strict=True):
            self._sequences[sequence].cached += len(path)

    def _drop(self) -> None:
        """Rolls back drafts that were never observed."""
        for opened in self._open.values():
            if opened.lease is not None and opened.lease.open:
                opened.lease.rollback()
        self._open.clear()


class _GrowingTrees:
    """Trees of one shape for a whole batch, filled in level by level."""

    def __init__(self, shape: Topology, context: DraftContext, *, candidates: int) -> None:
        self.shape = shape
        self.context = context
        batch, device = len(context.sequences), context.device
        roots = upload([tokens[-1] for tokens in context.tokens], device)
        self.tokens = torch.zeros(batch, len(shape), dtype=torch.int64, device=device)
        self.tokens[:, 0] = roots
        self._lengths = upload([len(tokens) for tokens in context.tokens], device)
        self._candidates = min(candidates, context.vocab_size)
        drawn = context.law != ProposalLaw.DETERMINISTIC
        size = (batch, len(shape), self._candidates)
        self._probs = torch.zeros(size, device=device) if drawn else None
        self._names = torch.zeros(size, dtype=torch.int64, device=device) if drawn else None

    def add_children(self, level: tuple[int, ...], logits: Tensor) -> None:
        """Chooses or draws the children of some nodes, given [B, nodes, V] logits behind them."""
        for index, node in enumerate(level):
            children = [c for c, parent in enumerate(self.shape.parents) if parent == node]
            if self._probs is None or self._names is None:
                self.tokens[:, children] = logits[:, index].topk(len(children)).indices
                continue
            probs = self.context.sampler.draft_probs(logits[:, index])
            probs, names = probs.topk(self._candidates)
            probs = probs / probs.sum(1, keepdim=True)
            self._probs[:, node], self._names[:, node] = probs, names
            tried = torch.zeros_like(probs, dtype=torch.bool)
            for child in children:
                # Another step may draw for the same position: the numbers belong to this one.
                noise = uniform(self.context.seeds, self._lengths, Purpose.DRAFT + child)
                pick = draw(probs, noise)
                if self.context.law == ProposalLaw.WITHOUT_REPLACEMENT:
                    # When nothing is left to draw, the likeliest untried candidate is chosen.
                    pick = torch.where(probs.sum(1) > 0, pick, (~tried).int().argmax(1))
                    probs = probs.scatter(1, pick[:, None], 0.0)
                    tried = tried.scatter(1, pick[:, None], True)
                self.tokens[:, child] = names.gather(1, pick[:, None])[:, 0]

    def batch(self) -> TreeBatch:
        batch, device = len(self.context.sequences), self.context.device
        law = ProposalLaw.DETERMINISTIC if self._probs is None else self.context.law
        widths = [self.shape.parents.count(node) for node in range(len(self.shape))]
        return TreeBatch(
            tokens=self.tokens.flatten(),
            parents=upload(self.shape.parents, device).repeat(batch),
            depths=upload(self.shape.depths, device).repeat(batch),
            ancestors=upload(
                ancestor_words(self.shape.ancestor_bits, len(self.shape)), device
            ).repeat(batch, 1),
            laws=torch.full((self.tokens.numel(),), law, dtype=torch.int8, device=device),
            draft_probs=None if self._probs is None else self._probs.flatten(0, 1),
            sizes=(len(self.shape),) * batch,
            laws_used=frozenset({law}),
            max_depth=self.shape.depths[-1],
            max_children=max(widths),
            draft_tokens=None if self._names is None else self._names.flatten(0, 1),
            host_parents=self.shape.parents * batch,
        )


def _inner_levels(shape: Topology) -> list[tuple[int, ...]]:
    """Nodes below the root that have children, by depth."""
    levels: dict[int, list[int]] = {}
    for node in sorted(shape.inner - {0}):
        levels.setdefault(shape.depths[node], []).append(node)
    return [tuple(nodes) for nodes in levels.values()]
