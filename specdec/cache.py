"""The paged tree KV cache: sequences, speculation as a transaction, commit and rollback.

Who owns which slot of a sequence, by position:

    [0, length)                 committed: attention may read it, nobody writes it
    [length, length + rows)     leased to the open speculation, row i belongs to tree node i
    [.., pages * page_size)     owned by the sequence, contents undefined

True lengths live on the device. The host keeps an upper bound for each and allocates pages for it,
so neither reserving nor committing waits for the device: a step can be prepared while the one
before still runs. `Speculation.settle` tightens the bound once the host knows what was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from specdec.attention import AttentionPlan
from specdec.batch import TreeBatch
from specdec.pages import TRASH_PAGE, PagePool
from specdec.transfer import upload

NULL_SEQUENCE = 0
"""A sequence of length 0 whose every slot lies in the trash page, for rows that pad a batch."""


@dataclass(eq=False)
class _Sequence:
    """What the host knows of one admission. Leases hold it, so they never act on a stranger."""

    number: int
    pages: list[int] = field(default_factory=list)
    bound: int = 0  # of the committed length
    lease: Speculation | None = None
    released: bool = False


class TreeKVCache:
    """Page tables and lengths of many sequences over one pool.

    Args:
        pool: where keys and values live.
        device: where lengths and page tables live; the device on which tokens are chosen.
    """

    def __init__(self, pool: PagePool, device: torch.device | str = "cpu") -> None:
        self.pool = pool
        self.device = torch.device(device)
        self.lengths = torch.zeros(1, dtype=torch.int64, device=self.device)  # [S], by sequence
        self.page_table = torch.full((1, 1), TRASH_PAGE, dtype=torch.int64, device=self.device)
        self._sequences: dict[int, _Sequence] = {}

    @property
    def sequences(self) -> list[int]:
        """The sequences that are admitted and not yet released."""
        return list(self._sequences)

    def length_bound(self, sequence: int) -> int:
        """An upper bound of a sequence's committed length, known without asking the device."""
        return self._sequences[sequence].bound

    def admit(self) -> int:
        """Opens an empty sequence and returns its number, the lowest that is free."""
        number = next(s for s in range(1, len(self._sequences) + 2) if s not in self._sequences)
        if number >= len(self.lengths):
            extra = max(number + 1 - len(self.lengths), len(self.lengths))
            rows = self.page_table.new_full((extra, self.page_table.shape[1]), TRASH_PAGE)
            self.lengths, self.page_table = (
                torch.cat([self.lengths, self.lengths.new_zeros(extra)]),
                torch.cat([self.page_table, rows]),
            )
        self._sequences[number] = _Sequence(number)
        return number

    def release(self, sequence: int) -> None:
        """Gives a sequence's pages back. An open speculation on it is rolled back."""
        released = self._sequences.pop(sequence)
        released.released = True
        if released.lease is not None:
            released.lease.rollback()
        self.pool.free(released.pages)
        self.page_table[sequence] = TRASH_PAGE
        self.lengths[sequence] = 0

    def speculate(self, sequences: Sequence[int], rows: Sequence[int]) -> Speculation:
        """Leases rows behind the committed end of some sequences, as a context manager.

        Pages are allocated for the upper bound of each length, all or none.

        Args:
            sequences: each admitted, at most once, with no lease open.
            rows: how many rows each of them gets, at least 1.

        Raises:
            OutOfPages: nothing was reserved.
        """
        members = []
        for number, count in zip(sequences, rows, strict=True):
            if number not in self._sequences:
                raise ValueError(f"sequences: expected admitted ones, got {number}")
            if self._sequences[number].lease is not None:
                raise RuntimeError(f"sequence {number} already has an open speculation")
            if count < 1:
                raise ValueError(f"rows: expected at least 1 for each sequence, got {count}")
            members.append(self._sequences[number])
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences: expected each at most once, got {list(sequences)}")
        self._reserve(members, rows)
        return Speculation(self, members, tuple(rows))

    def _reserve(self, members: Sequence[_Sequence], rows: Sequence[int]) -> None:
        size = self.pool.page_size
        missing = [
            max(0, -(-(member.bound + ahead) // size) - len(member.pages))
            for member, ahead in zip(members, rows, strict=True)
        ]
        if not any(missing):
            return
        self._widen(max(len(m.pages) + n for m, n in zip(members, missing, strict=True)))
        fresh = self.pool.allocate(sum(missing))
        given = []
        try:
            for member, count in zip(members, missing, strict=True):
                have = len(member.pages)
                new, fresh = fresh[:count], fresh[count:]
                member.pages += new
                given.append((member, have))
                if new:
                    row = self.page_table[member.number]
                    row[have : have + count] = upload(new, self.device)
        except BaseException:  # all or none, also when the device has no memory left for the copy
            for member, have in given:
                fresh += member.pages[have:]
                del member.pages[have:]
                self.page_table[member.number, have:] = TRASH_PAGE
            self.pool.free(fresh)
            raise

    def _widen(self, pages: int) -> None:
        """Makes room in the page table for sequences of that many pages."""
        width = self.page_table.shape[1]
        if pages > width:
            extra = max(pages, 2 * width) - width
            columns = self.page_table.new_full((len(self.page_table), extra), TRASH_PAGE)
            self.page_table = torch.cat([self.page_table, columns], dim=1)

    def slots(self, sequences: Tensor, positions: Tensor) -> Tensor:
        """Where tokens lie: [R] int64 slots for [R] sequences and positions within them."""
        size = self.pool.page_size
        page = (positions // size).clamp_max(self.page_table.shape[1] - 1)
        return self.page_table[sequences, page] * size + positions % size

    def check_integrity(self) -> None:
        """Checks every invariant that the host and the device share. Waits for the device.

        Raises:
            RuntimeError: a page is leaked or shared by mistake, a length exceeds its bound, or the
                device's page table differs from the host's.
        """
        self.pool.check_integrity([member.pages for member in self._sequences.values()])
        lengths, table = self.lengths.tolist(), self.page_table.tolist()
        nobody = _Sequence(NULL_SEQUENCE)
        for number, (length, row) in enumerate(zip(lengths, table, strict=True)):
            member = self._sequences.get(number, nobody)
            pages = member.pages
            if row[: len(pages)] != pages or set(row[len(pages) :]) - {TRASH_PAGE}:
                raise RuntimeError(f"sequence {number}: page table {row} is not {pages}")
            need = member.bound + (member.lease.rows_of(member) if member.lease else 0)
            if not 0 <= length <= member.bound or need > len(pages) * self.pool.page_size:
                raise RuntimeError(
                    f"sequence {number}: length {length}, bound {member.bound}, "
                    f"{need} tokens needed in {len(pages)} pages"
                )


class Speculation:
    """Rows leased behind the committed end of some sequences.

    Leaving the `with` block without a commit rolls back, also when an exception passes through.
    Nothing a rejected row wrote can be read afterwards.
    """

    def __init__(
        self, cache: TreeKVCache, members: Sequence[_Sequence], rows: tuple[int, ...]
    ) -> None:
        self.cache = cache
        self.rows = rows
        self.open = True
        self._members = tuple(members)
        self._longest: tuple[int, ...] | None = None  # rows that the commit may have kept
        self._sequence_index = upload(self.sequences, cache.device)
        for member in members:
            member.lease = self

    @property
    def sequences(self) -> tuple[int, ...]:
        """The leased sequences, in order."""
        return tuple(member.number for member in self._members)

    def rows_of(self, member: _Sequence) -> int:
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
        sequence = upload(owner, cache.device)
        prefix = cache.lengths[sequence]
        return AttentionPlan(
            page_table=cache.page_table,
            prefix_lens=cache.lengths,
            page_size=cache.pool.page_size,
            row_starts=upload(torch.tensor(starts, dtype=torch.int32), cache.device),
            sequence=sequence,
            nodes=nodes,
            ancestors=ancestors,
            slots=cache.slots(sequence, prefix + nodes),
            positions=prefix + depths,
            max_rows=max(counts),
            max_places=sum(self.rows) + fill,
            max_prefix=max(member.bound for member in self._members),
            shared=any(cache.pool.is_shared(m.pages[0]) for m in self._members if m.pages),
        )

    def commit(self, paths: Tensor | None = None) -> None:
        """Keeps the leased rows named by `paths`, in that order, and forgets the others.

        Never waits for the device: the host's bound grows by the longest possible path.

        Args:
            paths: [B, D] int64, leased rows from the top down, rising, -1 behind the last; None
                to keep all rows, as for a chain.
        """
        self._check_open()
        cache, index = self.cache, self._sequence_index
        if paths is None:
            cache.lengths[index] += upload(self.rows, cache.device)
            longest: Sequence[int] = self.rows
        else:
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
            longest = [min(rows, paths.shape[1]) for rows in self.rows]
        self._longest = tuple(longest)
        for member, count in zip(self._members, longest, strict=True):
            member.bound += count
        self._close()

    def settle(self, kept: Sequence[int]) -> None:
        """Tells the cache, once, how many rows the commit kept, as soon as the host knows.

        May come after later commits, since only the difference to the longest path is taken back,
        and after sequences were released, which then are left alone.
        """
        if self._longest is None:
            raise RuntimeError("settle: expected once, after a commit")
        for member, longest, rows in zip(self._members, self._longest, kept, strict=True):
            if not 0 <= rows <= longest:
                raise ValueError(f"kept: expected 0 to {longest} rows, got {rows}")
            member.bound -= longest - rows
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
