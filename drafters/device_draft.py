"""A draft model inside captured steps: its passes are part of the step's CUDA graph.

Every step begins with one pass over a fixed number of places behind what the draft model has
committed: the tokens that the step before gave, which are committed, and fillers. As many places as
a step can give tokens are enough. Then the tree grows level by level behind the text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from specdec.attention import AttentionPlan
from specdec.bits import chain_words
from specdec.cache import NULL_SEQUENCE, Speculation
from specdec.drafters.draft_cache import DraftCache, DraftText, fit
from specdec.drafters.growth import Growth, Level
from specdec.drafting import DeviceDrafter, DraftBuffers, DraftContext
from specdec.transfer import upload


class DeviceDraftModel(DeviceDrafter):
    """Drafts trees of all sizes up to some nodes for B texts.

    What the host knows of them is one or two steps old. It takes a text to be committed up to the
    root of the last step with drafts that it has read.

    Args:
        cache: the draft model and its cache.
        growth: trees of so many nodes over a vocabulary.
        requests: B.
        nodes: of the largest tree, the root included.
        device: of the texts and the draft model.
    """

    def __init__(
        self,
        cache: DraftCache,
        growth: Callable[[int, int], Growth],
        requests: int,
        nodes: int,
        device: torch.device,
    ) -> None:
        self._cache, self._grower = cache, growth
        largest = growth(nodes, cache.target.vocab_size)
        self.max_depth = largest.depth
        self.places = self.max_depth + 1
        """Of the pass that catches up: tokens that a step gives, at most."""
        self._rows = 3 * self.places + largest.rows
        """Behind what a text is known to have: two steps in flight and the next one."""
        self._growths: dict[int, Growth] = {}
        self._vocab_size = 0
        self._numbers = torch.zeros(requests, dtype=torch.int64, device=device)
        self._chain = torch.arange(self.places, device=device)
        self._chain_words = chain_words(self._chain, self.places)
        # What the host knows of the texts, in order.
        self._texts: list[DraftText] = []
        self._known: list[int] = []  # tokens
        self._limits: list[int] = []  # a text of so many tokens is over
        self._launched: deque[tuple[Speculation | None, int]] = deque()
        """Steps in flight: what they have leased, None without drafts, and tokens at most."""

    def load(self, context: DraftContext) -> None:
        self._cache.check(context)
        self._launched.clear()
        self._texts = self._cache.texts(context)
        self._known = [len(tokens) for tokens in context.tokens]
        self._limits = [
            known + depth + 1 for known, depth in zip(self._known, context.max_depths, strict=True)
        ]
        if self._vocab_size != context.vocab_size:
            self._growths.clear()
            self._vocab_size = context.vocab_size
        numbers = [text.number for text in self._texts]
        self._cache.target.cache.expect(numbers, [limit + self._rows for limit in self._limits])
        fill = [NULL_SEQUENCE] * (len(self._numbers) - len(numbers))
        self._numbers.copy_(upload([*numbers, *fill], self._numbers.device))

    @property
    def state(self) -> Hashable:
        return self._cache.target.places

    @property
    def lagging(self) -> bool:
        lag = max((known - text.cached for text, known, _ in self._going()), default=0)
        for lease, most in self._launched:
            lag = most if lease is not None else lag + most
        return lag > self.places

    def _going(self) -> list[tuple[DraftText, int, int]]:
        """The texts that are not over, as far as the device knows: it has a row, tokens, where."""
        rows = enumerate(zip(self._texts, self._known, self._limits, strict=True))
        return [(text, known, row) for row, (text, known, limit) in rows if known < limit]

    def catch_up(self, texts: Tensor) -> None:
        going = self._going()
        parts = [
            self._cache.known(texts[row, text.cached : known - 1].long())
            for text, known, row in going
        ]
        numbers = [text.number for text, _, _ in going]
        target = self._cache.target
        target.cache.reserve(numbers, [len(part) for part in parts])  # all of it, or nothing
        target.prefill(numbers, parts)
        for text, known, _ in going:
            text.cached = max(text.cached, known - 1)

    @contextmanager
    def launching(self, nodes: int, most: int) -> Iterator[None]:
        if nodes == 1:
            yield
            self._launched.append((None, most))
            return
        numbers = [text.number for text in self._texts]
        rows = self.places + self._growth(nodes).rows
        with self._cache.target.cache.speculate(numbers, [rows] * len(numbers)) as lease:
            yield
            lease.committed(self.places)
        self._launched.append((lease, most))

    def settle(self, emitted: Sequence[int]) -> None:
        lease, _ = self._launched.popleft()
        if lease is not None:
            kept = [0] * len(self._texts)
            for text, known, row in self._going():
                kept[row], text.cached = known - text.cached, known
            lease.settle(kept)
        self._known = [known + count for known, count in zip(self._known, emitted, strict=True)]

    def draft(self, buffers: DraftBuffers) -> None:
        growth = self._growth(buffers.nodes)
        batch, nodes = len(buffers.lengths), buffers.nodes
        # What is over leaves its pages to others.
        sequences = self._numbers.where(buffers.sequences > 0, NULL_SEQUENCE)
        roots = buffers.text.gather(1, buffers.lengths[:, None] - 1)[:, 0].long()
        logits = self._run_text(buffers, sequences)
        grown = growth.grow(roots, logits, lambda level: self._run(level, buffers, sequences))
        tokens, parents = buffers.tokens.view(batch, nodes), buffers.parents.view(batch, nodes)
        tokens.copy_(roots[:, None].expand(-1, nodes))
        tokens[:, : growth.size] = grown.tokens
        parents.zero_()
        parents[:, : growth.size] = grown.parents
        buffers.counts.fill_(growth.size)

    def _growth(self, nodes: int) -> Growth:
        """The same object every time: graphs refer to its tensors."""
        if nodes not in self._growths:  # in the first run of a step, which is not captured
            self._growths[nodes] = self._grower(nodes, self._vocab_size)
        return self._growths[nodes]

    def _run_text(self, buffers: DraftBuffers, sequences: Tensor) -> Tensor:
        """Commits the texts, roots included: [B, V] logits behind the roots."""
        target, count = self._cache.target, self.places
        cache = target.cache
        before = cache.lengths.index_select(0, sequences)
        missing = (buffers.lengths - before).clamp(1, count)
        at = (before[:, None] + self._chain).clamp_max(buffers.text.shape[1] - 1)
        tokens = self._cache.known(buffers.text.gather(1, at).long())
        words = self._chain_words.expand(len(sequences), -1, -1)
        plan = self._plan(buffers, sequences, before, self._chain, self._chain, words, count)
        ends = torch.arange(len(sequences), device=before.device) * count + missing - 1
        logits = target.compute(tokens.flatten(), plan, keep=ends)
        cache.lengths.scatter_(0, sequences, buffers.lengths.where(sequences > 0, 0))
        return fit(logits, self._vocab_size)

    def _run(self, level: Level, buffers: DraftBuffers, sequences: Tensor) -> Tensor:
        """[B, w, V] logits behind the nodes of a level, on rows behind the texts."""
        target, (batch, width) = self._cache.target, level.tokens.shape
        nodes = torch.arange(level.first, level.first + width, device=sequences.device)
        prefix = target.cache.lengths.index_select(0, sequences)
        # The root is committed, so what is run is a forest.
        depths = torch.full_like(nodes, level.depth - 1)
        rows = self._growth(buffers.nodes).rows
        plan = self._plan(buffers, sequences, prefix, nodes, depths, level.ancestors, rows)
        logits = target.compute(self._cache.known(level.tokens).flatten(), plan)
        return fit(logits, self._vocab_size).view(batch, width, -1)

    def _plan(
        self,
        buffers: DraftBuffers,
        sequences: Tensor,
        prefix: Tensor,
        nodes: Tensor,
        depths: Tensor,
        ancestors: Tensor,
        rows: int,
    ) -> AttentionPlan:
        """Some rows of every text, alike but for their ancestors.

        Args:
            buffers: of the step.
            sequences: [B] int64, in the draft model's cache.
            prefix: [B] int64, committed tokens.
            nodes: [w] int64, the rows behind them.
            depths: [w] int64, of the rows.
            ancestors: [B, w, W] int32.
            rows: of a text, at most.
        """
        cache, (batch, width) = self._cache.target.cache, ancestors.shape[:2]
        owners = sequences[:, None].repeat(1, width).flatten()  # kernels want it in one piece
        starts = torch.arange(batch + 1, dtype=torch.int32, device=sequences.device)
        return AttentionPlan(
            page_table=cache.page_table,
            prefix_lens=cache.lengths,
            page_size=cache.pool.page_size,
            row_starts=starts * width,
            sequence=owners,
            nodes=nodes.repeat(batch),
            ancestors=ancestors.flatten(0, 1).contiguous(),
            slots=cache.slots(owners, (prefix[:, None] + nodes).flatten()),
            positions=(prefix[:, None] + depths).flatten(),
            max_rows=width,
            max_places=batch * rows,
            max_prefix=buffers.longest,
            shared=buffers.shared,
        )
