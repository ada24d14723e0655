"""The drafter's side of a step: what it is told and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.batch import TreeBatch
from specdec.hooks import Taps
from specdec.sampling import Sampler
from specdec.transfer import upload
from specdec.tree import ProposalLaw, TokenTree

if TYPE_CHECKING:
    from specdec.attention import AttentionPlan
    from specdec.cache import Speculation, TreeKVCache
    from specdec.pages import DraftLayers, LayerShape
    from specdec.target import Target


@dataclass(frozen=True)
class OwnCache:
    """Where a drafter's own layers lie, beside the target's K and V."""

    layers: DraftLayers
    cache: TreeKVCache  # the target's
    sequences: tuple[int, ...]  # in the cache, those of a context, in order


@dataclass(frozen=True)
class TargetRows:
    """What the target has computed in a pass, of R rows.

    The rows are those of all requests of the pass, in prompts and in trees, also of requests with
    other drafters: whoever fills them shares more.
    """

    tokens: Tensor  # [R] int64
    hidden: dict[int, Tensor]  # [R, H], by the numbers in `hidden_layers`
    plan: AttentionPlan  # where the rows are written, and what they see
    layers: DraftLayers  # the drafter's own


@dataclass(frozen=True)
class DraftContext:
    """What a drafter may look at, for the B sequences of a step."""

    sequences: tuple[int, ...]  # numbers, the same from `begin` to `end` and never given twice
    tokens: tuple[Sequence[int], ...]  # all known tokens of each, prompt included, the root last
    max_depths: tuple[int, ...]  # deeper nodes could not be used before the length limit
    seeds: Tensor  # [B] int64, for `noise.uniform`, with the length of the text as the position
    # and `Purpose.DRAFT` plus the node: a step may look at drafts that the next one draws again
    sampler: Sampler  # the run's sampling options
    vocab_size: int
    device: torch.device  # where the trees must lie
    law: ProposalLaw  # for drafters that can draft under several
    chains: bool  # whether only chains can be verified
    cache_keys: tuple[Hashable, ...] | None = None  # who may share K and V; None: nobody
    own: OwnCache | None = None  # for drafters with layers of their own


@dataclass(frozen=True)
class Observation:
    """What became of the proposed trees."""

    sequences: tuple[int, ...]
    trees: TreeBatch
    paths: tuple[tuple[int, ...], ...]  # accepted nodes of each tree, the root first
    tokens: tuple[tuple[int, ...], ...]  # accepted tokens of each sequence, then the next token


@dataclass(frozen=True)
class DraftBuffers:
    """Where a drafter works inside a captured step: device tensors that stay where they are.

    They begin as trees of bare roots; only the roots' tokens are missing.

    Letters: B requests, T room for a text, N nodes of a tree, R = B * N rows.
    """

    sequences: Tensor  # [B] int64, in the target's cache; 0 for texts that are over, or none
    text: Tensor  # [B, T] int32
    lengths: Tensor  # [B] int64, tokens of each text; the last one is the root
    tokens: Tensor  # [R] int64, to be filled, fillers too
    parents: Tensor  # [R] int32, to be filled: index in the own tree, -1 for roots, 0 for fillers
    counts: Tensor  # [B] int32, to be filled: nodes of each tree that are not fillers
    longest: int  # no text has more tokens
    shared: bool  # whether some texts may begin alike

    @property
    def nodes(self) -> int:
        """N, the nodes of each tree, the root included."""
        return len(self.tokens) // len(self.lengths)


class DeviceDrafter(ABC):
    """The part of a drafter that runs inside captured steps, for B requests.

    One object serves steps with trees of all sizes. `draft` only launches work on the current
    stream: it reads and writes device tensors that stay where they are, allocates nothing that
    outlives it, and never asks the device for a number. The first run of a step is not captured.

    A drafter that keeps something for every text overrides the rest, too. The host calls `load`
    when it puts texts on the device, then `launching` around every step, and `settle` for every
    step in the same order, one or two steps later.
    """

    max_depth: int
    """No node is deeper."""

    @abstractmethod
    def draft(self, buffers: DraftBuffers) -> None:
        """Fills in a tree for each text."""

    @property
    def state(self) -> Hashable:
        """What captured steps depend on besides the buffers: they are made anew if it changes."""
        return None

    def load(self, context: DraftContext) -> None:  # noqa: B027 - optional
        """Other texts, at most B, take the place of those before; no step is in flight."""

    @property
    def lagging(self) -> bool:
        """Whether a step with drafts needs `catch_up` first, as it may after steps without."""
        return False

    def catch_up(self, text: Tensor) -> None:  # noqa: B027 - optional
        """Takes in what the texts, [B, T] int32, have become; no step is in flight.

        Raises:
            OutOfPages: of a cache of its own; nothing was done.
        """

    @contextmanager
    def launching(self, nodes: int, most: int) -> Iterator[None]:
        """Surrounds the launch of a step, and makes room for it.

        Args:
            nodes: of the trees; 1 for a step that does not ask for drafts.
            most: tokens that the step gives a text, at most.

        Raises:
            OutOfPages: of a cache of its own; nothing is launched.
        """
        yield

    def settle(self, emitted: Sequence[int]) -> None:  # noqa: B027 - optional
        """Learns how many tokens the oldest step in flight gave to each text."""


class Drafter(ABC):
    """Proposes a token tree for every sequence of a batch.

    `law` says how the children of a node come about; it decides which rules are lossless.
    Drafters that look at one sequence at a time subclass `SequenceDrafter` instead.
    """

    law: ProposalLaw = ProposalLaw.DETERMINISTIC

    hidden_layers: frozenset[int] = frozenset()
    """Of which layers of the target `fill` gets the outputs, counted as in `Taps`."""

    @property
    def can_draft(self) -> frozenset[ProposalLaw]:
        """The laws that a rule may ask for in `DraftContext.law`."""
        return frozenset({self.law})

    def on_device(self, requests: int, nodes: int, device: torch.device) -> DeviceDrafter | None:
        """Itself as a part of captured steps; None if it needs the host.

        In captured steps neither `propose` nor `observe` is called.

        Args:
            requests: B, of the steps.
            nodes: of the largest tree that they ask for, the root included.
            device: of the target.
        """
        return None

    @property
    def on_host(self) -> str:
        """Why `on_device` gives None, said of itself."""
        return "drafts on the host"

    def layer_shapes(self, target: Target) -> Sequence[LayerShape]:
        """Layers of its own that it keeps in the pages of a target's cache; none by default.

        Whatever becomes of the target's K and V - commits, rollbacks, copies, sharing, eviction -
        becomes of them. A text begins with pages that others have computed only if they are filled.
        """
        return ()

    def fill(self, rows: TargetRows) -> None:
        """Writes its own layers, in the slots of all rows; called if it has any.

        Comes before the target accepts: what becomes of the rows is the cache's business. A row may
        depend on the tokens before it and its own, as K and V do, and on nothing behind.
        """
        raise NotImplementedError(f"{type(self).__name__} has layers of its own, but no `fill`")

    def begin(self, sequences: Sequence[int]) -> None:  # noqa: B027 - optional
        """Sequences start."""

    @abstractmethod
    def propose(self, context: DraftContext, nodes: int) -> TreeBatch:
        """One tree of at most `nodes` nodes, the root included, for each sequence, in order.

        Sequences with other sampling options may be asked for before these are observed.
        """

    def observe(self, observation: Observation) -> None:  # noqa: B027 - optional
        """The target has verified the trees last proposed for these sequences.

        A token that comes with the pass over a prompt is not told: nothing was proposed for it.
        """

    def end(self, sequences: Sequence[int]) -> None:  # noqa: B027 - optional
        """Sequences are over, finished or not; may name some that never began."""


class SequenceDrafter(Drafter):
    """A drafter that looks at the tokens of one sequence at a time, on the host."""

    @abstractmethod
    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        """A tree of at most `nodes` nodes whose root is `tokens[-1]`."""

    def propose(self, context: DraftContext, nodes: int) -> TreeBatch:
        trees = []
        for tokens, depth in zip(context.tokens, context.max_depths, strict=True):
            tree = self.draft(tokens, nodes)
            name = type(self).__name__
            if not isinstance(tree, TokenTree):
                raise TypeError(f"{name}.draft: expected a TokenTree, got {type(tree).__name__}")
            if len(tree) > nodes:
                raise ValueError(f"{name}.draft: expected at most {nodes} nodes, got {len(tree)}")
            if int(tree.tokens[0]) != tokens[-1]:
                raise ValueError(
                    f"{name}.draft: expected the root to be the last token {tokens[-1]}, "
                    f"got {int(tree.tokens[0])}"
                )
            tree = tree.cut(depth=depth)
            trees.append(tree.first_chain() if context.chains else tree)
        return TreeBatch.pack(trees, vocab_size=context.vocab_size, device=context.device)


class RootsOnly(DeviceDrafter):
    """Trees of one node."""

    max_depth = 0

    def draft(self, buffers: DraftBuffers) -> None:
        last = buffers.text.gather(1, buffers.lengths[:, None] - 1)
        buffers.tokens.view(len(last), -1).copy_(last.expand(-1, buffers.nodes))


class NoDraft(Drafter):
    """Proposes nothing: plain decoding, the baseline, in the same loop."""

    def on_device(self, requests: int, nodes: int, device: torch.device) -> DeviceDrafter:
        return RootsOnly()

    def propose(self, context: DraftContext, nodes: int) -> TreeBatch:
        last = [tokens[-1] for tokens in context.tokens]
        return TreeBatch.roots(upload(last, context.device))


class Filling:
    """The drafters of a pass that have layers of their own, and what they are filled from.

    Args:
        target: the model and its cache.
        drafters: of all requests in the pass.
    """

    def __init__(self, target: Target, drafters: Iterable[Drafter]) -> None:
        distinct = {id(drafter): drafter for drafter in drafters}.values()
        owners = [(drafter, target.layers_of(drafter)) for drafter in distinct]
        self._owners = [(drafter, own) for drafter, own in owners if own is not None]
        wanted = frozenset[int]().union(*(drafter.hidden_layers for drafter, _ in self._owners))
        self.taps = Taps(wanted) if wanted else None

    def fill(self, tokens: Tensor, plan: AttentionPlan, lease: Speculation) -> None:
        """Lets them write, when the pass is over and before its lease is committed."""
        seen = {} if self.taps is None else self.taps.states
        for drafter, own in self._owners:
            hidden = {layer: seen[layer] for layer in drafter.hidden_layers}
            drafter.fill(TargetRows(tokens, hidden, plan, own))
            lease.fill(own)
