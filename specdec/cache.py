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
from types import TracebackType

import torch
from torch import Tensor

from specdec.attention import AttentionPlan
from specdec.pages import TRASH_PAGE, PagePool
from specdec.transfer import upload
from specdec.tree import TreeBatch

NULL_SEQUENCE = 0
"""A sequence of length 0 whose every slot lies in the trash page, for rows that pad a batch."""


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
        self._pages: dict[int, list[int]] = {}
        self._bounds: dict[int, int] = {}
        self._leased: dict[int, int] = {}

    @property
    def sequences(self) -> list[int]:
        """The sequences that are admitted and not yet released."""
        return list(self._pages)

    def length_bound(self, sequence: int) -> int:
        """An upper bound of a sequence's committed length, known without asking the device."""
        return self._bounds[sequence]

    def admit(self) -> int:
        """Opens an empty sequence and returns its number."""
        sequence = next(s for s in range(1, len(self._pages) + 2) if s not in self._pages)
        if sequence >= len(self.lengths):
            extra = max(sequence + 1 - len(self.lengths), len(self.lengths))
            self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(extra)])
            width = self.page_table.shape[1]
            rows = self.page_table.new_full((extra, width), TRASH_PAGE)
            self.page_table = torch.cat([self.page_table, rows])
        self.lengths[sequence] = 0
        self._pages[sequence], self._bounds[sequence] = [], 0
        return sequence

    def release(self, sequence: int) -> None:
        """Gives a sequence's pages back. An open speculation on it becomes void."""
        self.pool.free(self._pages.pop(sequence))
        self._bounds.pop(sequence)
        self._leased.pop(sequence, None)
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
        for sequence, count in zip(sequences, rows, strict=True):
            if sequence not in self._pages:
                raise ValueError(f"sequences: expected admitted ones, got {sequence}")
            if sequence in self._leased:
                raise RuntimeError(f"sequence {sequence} already has an open speculation")
            if count < 1:
                raise ValueError(f"rows: expected at least 1 for each sequence, got {count}")
        self._reserve(sequences, rows)
        for sequence, count in zip(sequences, rows, strict=True):
            self._leased[sequence] = count
        return Speculation(self, tuple(sequences), tuple(rows))

    def _reserve(self, sequences: Sequence[int], rows: Sequence[int]) -> None:
        size = self.pool.page_size
        missing = {
            sequence: max(
                0, -(-(self._bounds[sequence] + ahead) // size) - len(self._pages[sequence])
            )
            for sequence, ahead in zip(sequences, rows, strict=True)
        }
        fresh = self.pool.allocate(sum(missing.values()))
        if not fresh:
            return
        width = max(len(self._pages[s]) + missing[s] for s in sequences)
        if width > self.page_table.shape[1]:
            extra = max(width, 2 * self.page_table.shape[1]) - self.page_table.shape[1]
            columns = self.page_table.new_full((len(self.page_table), extra), TRASH_PAGE)
            self.page_table = torch.cat([self.page_table, columns], dim=1)
        for sequence, count in missing.items():
            if count:
                have = len(self._pages[sequence])
                new, fresh = fresh[:count], fresh[count:]
                self._pages[sequence] += new
                self.page_table[sequence, have : have + count] = upload(new, self.device)

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
        self.pool.check_integrity(list(self._pages.values()))
        lengths, table = self.lengths.tolist(), self.page_table.tolist()
        for sequence in range(len(lengths)):
            pages = self._pages.get(sequence, [])
            row = table[sequence]
            if row[: len(pages)] != pages or set(row[len(pages) :]) - {TRASH_PAGE}:
                raise RuntimeError(f"sequence {sequence}: page table {row} is not {pages}")
            bound = self._bounds.get(sequence, 0)
            need = bound + self._leased.get(sequence, 0)
            if not 0 <= lengths[sequence] <= bound or need > len(pages) * self.pool.page_size:
                raise RuntimeError(
                    f"sequence {sequence}: length {lengths[sequence]}, bound {bound}, "
                    f"{need} tokens needed in {len(pages)} pages"
                )


class Speculation:
    """Rows leased behind the committed end of some sequences.

    Leaving the `with` block without a commit rolls back, also when an exception passes through.
    Nothing a rejected row wrote can be read afterwards.
    """

    def __init__(self, cache: TreeKVCache, sequences: tuple[int, ...], rows: tuple[int, ...]):
        self.cache = cache
        self.sequences = sequences
        self.rows = rows
        self.open = True
        self._longest: tuple[int, ...] = ()
        self._sequence_index = upload(sequences, cache.device)

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
        return self.plan(trees.tree, trees.nodes, trees.depths, trees.ancestors)

    def plan_chains(self) -> AttentionPlan:
        """The plan of a forward over all leased rows, each sequence's a chain of any length."""
        sizes = upload(self.rows, self.cache.device)
        index = torch.arange(len(self.rows), device=self.cache.device)
        member = torch.repeat_interleave(index, sizes, output_size=sum(self.rows))
        starts = torch.cumsum(sizes, 0) - sizes
        nodes = torch.arange(sum(self.rows), device=self.cache.device) - starts[member]
        return self.plan(member, nodes, nodes, None)

    def plan(
        self, member: Tensor, nodes: Tensor, depths: Tensor, ancestors: Tensor | None
    ) -> AttentionPlan:
        """The plan of a forward over some of the leased rows.

        Args:
            member: [R] int64, index into `sequences`; rows of one sequence side by side.
            nodes: [R] int64, the leased row of each query, which is also its key's place.
            depths: [R] int64, distance from the committed end.
            ancestors: [R, W] int32 bit words over the leased rows, the own bit included; None for
                chains, in which every row sees the rows before it.
        """
        if not self.open:
            raise RuntimeError("this speculation is already committed or rolled back")
        cache = self.cache
        sequence = self._sequence_index[member]
        prefix = cache.lengths[sequence]
        return AttentionPlan(
            page_table=cache.page_table,
            prefix_lens=cache.lengths,
            page_size=cache.pool.page_size,
            sequence=sequence,
            nodes=nodes,
            ancestors=ancestors,
            slots=cache.slots(sequence, prefix + nodes),
            positions=prefix + depths,
        )

    def commit(self, paths: Tensor | None = None) -> None:
        """Keeps the leased rows named by `paths`, in that order, and forgets the others.

        Never waits for the device: the host's bound grows by the longest possible path.

        Args:
            paths: [B, D] int64, leased rows from the top down, rising, -1 behind the last; None
                to keep all rows, as for a chain.
        """
        if not self.open:
            raise RuntimeError("this speculation is already committed or rolled back")
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
            cache.pool.move(cache.slots(owners, sources), cache.slots(owners, targets))
            cache.lengths[index] += kept.sum(1)
            longest = [min(rows, paths.shape[1]) for rows in self.rows]
        self._longest = tuple(longest)
        for sequence, rows in zip(self.sequences, longest, strict=True):
            cache._bounds[sequence] += rows
        self._close()

    def settle(self, kept: Sequence[int]) -> None:
        """Tells the cache how many rows the commit kept, once the host knows.

        May come after later commits: only the difference to the longest path is taken back.
        """
        for sequence, longest, rows in zip(self.sequences, self._longest, kept, strict=True):
            self.cache._bounds[sequence] -= longest - rows

    def rollback(self) -> None:
        """Forgets all leased rows."""
        if not self.open:
            raise RuntimeError("this speculation is already committed or rolled back")
        self._close()

    def _close(self) -> None:
        self.open = False
        for sequence in self.sequences:
            self.cache._leased.pop(sequence, None)
