"""Speculation as a transaction: rows leased behind the committed end, then kept or forgotten."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.attention import AttentionPlan
from specdec.batch import TreeBatch
from specdec.transfer import upload

if TYPE_CHECKING:
    from specdec.cache import TreeKVCache
    from specdec.pages import DraftLayers

CHAIN = 128
"""Rows of a chain that are attended to as one: to them, those before are prefix like any other."""

NULL_SEQUENCE = 0
"""A sequence of length 0 whose every slot lies in the trash page, for rows that pad a batch."""


@dataclass(eq=False)
class SequenceState:
    """What the host knows of one admission. Leases hold it, so they never act on a stranger."""

    number: int
    key: Hashable = None  # of the prefix tree
    pages: list[int] = field(default_factory=list)
    bound: int = 0  # of the committed length
    unsettled: int = 0  # rows of the bound that commits may not have kept
    left_out: int = 0  # tokens that a view does not show: its positions are later by as many
    filled: dict[DraftLayers, int] = field(default_factory=dict)
    """Tokens from the beginning that drafters' layers have; what is beyond the end is void."""
    lease: Speculation | None = None
    released: bool = False

    def cap_filled(self, length: int) -> None:
        """Takes back what drafters' layers have behind some tokens."""
        self.filled = {own: min(filled, length) for own, filled in self.filled.items()}

    def keep(self, most: int, *, settled: bool, filled: Iterable[DraftLayers]) -> None:
        """Notes a commit of so many rows at most, and which drafters' layers have them, too."""
        whole = [own for own in filled if self.filled.get(own, 0) >= self.bound]
        if self.filled:
            self.cap_filled(self.bound - self.unsettled)
        self.bound += most
        self.unsettled += 0 if settled else most
        if whole:
            self.filled.update(dict.fromkeys(whole, self.bound))


class Speculation:
    """Rows leased behind the committed end of some sequences.

    Leaving the `with` block without a commit rolls back, also when an exception passes through.
    Nothing a rejected row wrote can be read afterwards.
    """

    def __init__(
        self, cache: TreeKVCache, members: Sequence[SequenceState], rows: tuple[int, ...]
    ) -> None:
        self.cache = cache
        self.rows = rows
        self.open = True
        self._members = tuple(members)
        self._longest: tuple[int, ...] | None = None  # rows that the commit may have kept
        self._chosen = 0  # how many of the sequences may have kept fewer
        self._filled: set[DraftLayers] = set()
        for member in members:
            member.lease = self

    @cached_property
    def _sequence_index(self) -> Tensor:
        return upload(self.sequences, self.cache.device)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The leased sequences, in order."""
        return tuple(member.number for member in self._members)

    def rows_of(self, member: SequenceState) -> int:
        """How many rows a sequence has leased here."""
        return self.rows[self._members.index(member)]

    def __enter__(self) -> Speculation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.open:
            self.rollback()

    @property
    def lengths(self) -> Tensor:
        """[B] int64, the committed lengths of the leased sequences."""
        return self.cache.lengths[self._sequence_index]

    def plan_trees(self, trees: TreeBatch) -> AttentionPlan:
        """The plan of a forward over whole trees, tree b for sequence b."""
        return self.plan(trees.sizes, trees.nodes, trees.depths, trees.ancestors)

    def plan_chains(self) -> AttentionPlan:
        """The plan of a forward over all leased rows, each sequence's a chain of any length."""
        nodes = torch.cat([torch.arange(rows) for rows in self.rows])
        nodes = upload(nodes, self.cache.device)
        return self.plan(self.rows, nodes, nodes, None)

    def plan(
        self,
        counts: Sequence[int],
        nodes: Tensor,
        depths: Tensor,
        ancestors: Tensor | None,
    ) -> AttentionPlan:
        """The plan of a forward over some of the leased rows.

        Args:
            counts: how many of the R rows each of `sequences` has; first those of the first
                sequence. Rows behind them only fill up a batch: with nodes from 0 on and no
                ancestor but themselves they see, and write, nothing but the trash page.
            nodes: [R] int64, the leased row of each query, which is also its key's place.
            depths: [R] int64, distance from the committed end.
            ancestors: [R, W] int32 bit words over the leased rows, the own bit included; None for
                chains, in which every row sees the rows before it.
        """
        self._check_open()
        cache = self.cache
        fill = len(nodes) - sum(counts)
        if len(counts) != len(self._members) or fill < 0:
            raise ValueError(
                f"counts: expected {len(self._members)} with a sum of at most {len(nodes)} rows, "
                f"got {list(counts)}"
            )
        numbers = [*self.sequences, NULL_SEQUENCE] if fill else self.sequences
        counts = [*counts, fill] if fill else counts
        owner, starts = [], [0]
        for number, count in zip(numbers, counts, strict=True):
            owner += [number] * count
            starts.append(len(owner))
        chain_starts, longest = None, 0
        if ancestors is None and max(counts) > CHAIN:
            pairs = zip(starts, counts, strict=False)
            parts = [start + row for start, count in pairs for row in range(0, count, CHAIN)]
            longest = max(counts)
            chain_starts = torch.tensor([*parts, starts[-1]], dtype=torch.int32)
            chain_starts = upload(chain_starts, cache.device)
        sequence = upload(owner, cache.device)
        prefix = cache.lengths[sequence]
        positions = prefix + depths
        if any(member.left_out for member in self._members):
            shifts = [*(member.left_out for member in self._members), 0]
            by_row = [s for s, count in zip(shifts, counts, strict=False) for _ in range(count)]
            positions = positions + upload(by_row, cache.device)
        return AttentionPlan(
            page_table=cache.page_table,
            prefix_lens=cache.lengths,
            page_size=cache.pool.page_size,
            row_starts=upload(torch.tensor(starts, dtype=torch.int32), cache.device),
            sequence=sequence,
            nodes=nodes,
            ancestors=ancestors,
            slots=cache.slots(sequence, prefix + nodes),
            positions=positions,
            max_rows=max(counts) if ancestors is not None else min(CHAIN, max(counts)),
            max_places=sum(self.rows) + fill,
            max_prefix=max(member.bound for member in self._members) + longest,
            shared=len({m.pages[0] for m in self._members}) < len(self._members),
            chain_starts=chain_starts,
        )

    def fill(self, own: DraftLayers) -> None:
        """Notes that a drafter has written its layers in the slots of all leased rows."""
        self._check_open()
        self._filled.add(own)

    def commit(self, paths: Tensor | None = None) -> None:
        """Keeps the leased rows named by `paths`, in that order, and forgets the others.

        Never waits for the device: the host's bound grows by the longest possible path.

        Args:
            paths: [B, D] int64, leased rows from the top down, rising, -1 behind the last. The
                sequences behind the first B keep all their rows, as chains do; None for all.
        """
        self._check_open()
        cache, chosen = self.cache, 0 if paths is None else len(paths)
        index, whole = self._sequence_index[:chosen], self._sequence_index[chosen:]
        longest = list(self.rows)
        if chosen < len(self.rows):
            cache.lengths[whole] += upload(self.rows[chosen:], cache.device)
        if paths is not None:
            kept = paths >= 0
            base = cache.lengths[index][:, None]
            step = torch.arange(paths.shape[1], device=paths.device)
            owners = index[:, None].expand_as(paths)
            # A row that is not kept is "moved" within the trash page.
            owners = torch.where(kept, owners, NULL_SEQUENCE).flatten()
            sources = torch.where(kept, base + paths, 0).flatten()
            targets = torch.where(kept, base + step, 0).flatten()
            here, there = cache.slots(owners, sources), cache.slots(owners, targets)
            # By position, targets do not lie behind their sources, and sources rise.
            cache.pool.move(here.view(paths.shape), there.view(paths.shape))
            cache.lengths[index] += kept.sum(1)
            longest[:chosen] = [min(rows, paths.shape[1]) for rows in self.rows[:chosen]]
        self._longest = tuple(longest)
        for place, (member, count) in enumerate(zip(self._members, longest, strict=True)):
            member.keep(count, settled=place >= chosen, filled=self._filled)
        self._chosen = chosen
        self._close()

    def committed(self, most: int) -> None:
        """Closes the lease after a commit of its trees that the device made by itself.

        Args:
            most: rows that any of the sequences may have kept; `settle` tells how many did.
        """
        self._check_open()
        self._longest, self._chosen = (most,) * len(self.rows), len(self.rows)
        for member in self._members:
            member.keep(most, settled=False, filled=self._filled)
        self._close()

    def settle(self, kept: Sequence[int]) -> None:
        """Tells the cache, once, how many rows the commit kept, as soon as the host knows.

        May come after later commits, since only the difference to the longest path is taken back,
        and after sequences were released, which then are left alone.
        """
        if self._longest is None:
            raise RuntimeError("settle: expected once, after a commit")
        members = enumerate(zip(self._members, self._longest, kept, strict=True))
        for place, (member, longest, rows) in members:
            if not 0 <= rows <= longest:
                raise ValueError(f"kept: expected 0 to {longest} rows, got {rows}")
            member.bound -= longest - rows
            member.unsettled -= longest if place < self._chosen else 0
        self._longest = None

    def rollback(self) -> None:
        """Forgets all leased rows."""
        self._check_open()
        self._close()

    def _check_open(self) -> None:
        if not self.open:
            raise RuntimeError("this speculation is already committed or rolled back")

    def _close(self) -> None:
        for member in self._members:
            member.lease = None
        self.open = False
