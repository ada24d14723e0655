"""The paged tree KV cache: sequences that begin, branch, share pages and end.

Who owns which slot of a sequence, by position:

    [0, length)                 committed: attention may read it, nobody writes it
    [length, length + rows)     leased to the open speculation, row i belongs to tree node i
    [.., pages * page_size)     owned by the sequence, contents undefined

Committed pages may have several owners: sequences that were forked, and the prefix tree, which
keeps the full pages of text for later. A full page is never written again. The page that holds the
end of a sequence is, so it is copied before rows are leased in it while somebody else holds it too.

True lengths live on the device. The host keeps an upper bound for each and allocates pages for it,
so neither reserving nor committing waits for the device: a step can be prepared while the one
before still runs. `Speculation.settle` tightens the bound once the host knows what was kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.pages import TRASH_PAGE, DraftLayers, OutOfPages, PagePool
from specdec.prefix_tree import PrefixTree
from specdec.speculation import NULL_SEQUENCE, SequenceState, Speculation
from specdec.transfer import upload

FIRST_TABLE = 64, 128
"""Sequences, and pages of each, that a GPU has a table for at first. CUDA graphs refer to the table
where it lies, so it should seldom grow."""


@dataclass(frozen=True)
class CacheUsage:
    """Who owns the bytes of a pool, in whole pages; the four parts add up to all of it."""

    committed: int
    """Pages with committed tokens of sequences; shared ones count once."""
    speculative: int
    """Pages of sequences behind their committed end."""
    cached: int
    """Pages of the prefix tree and its pins that no sequence uses."""
    free: int


class TreeKVCache:
    """Page tables and lengths of many sequences over one pool.

    Args:
        pool: where keys and values live.
        device: where lengths and page tables live; the device on which tokens are chosen.
        max_cached_bytes: bound for the prefix tree; see `PrefixTree`.
    """

    def __init__(
        self,
        pool: PagePool,
        device: torch.device | str = "cpu",
        *,
        max_cached_bytes: int | None = None,
    ) -> None:
        self.pool = pool
        self.prefixes = PrefixTree(pool, max_cached_bytes)
        self.device = torch.device(device)
        sequences, pages = FIRST_TABLE if self.device.type == "cuda" else (1, 1)
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=self.device)  # [S]
        self.page_table = torch.full(
            (sequences, pages), TRASH_PAGE, dtype=torch.int64, device=self.device
        )
        self._sequences: dict[int, SequenceState] = {}

    @property
    def sequences(self) -> list[int]:
        """The sequences that are admitted and not yet released."""
        return list(self._sequences)

    def length_bound(self, sequence: int) -> int:
        """An upper bound of a sequence's committed length, known without asking the device."""
        return self._sequences[sequence].bound

    def pages_of(self, sequence: int) -> list[int]:
        """The pages of a sequence, in order."""
        return list(self._sequences[sequence].pages)

    def filled(self, sequence: int, own: DraftLayers) -> int | None:
        """How many committed tokens from the beginning a drafter's layers have; None for all."""
        member = self._sequences[sequence]
        filled = member.filled.get(own, 0)
        if filled >= member.bound:
            return None
        return min(filled, member.bound - member.unsettled)

    def admit(
        self,
        prompt: Sequence[int] = (),
        *,
        key: Hashable = None,
        own: DraftLayers | None = None,
    ) -> int:
        """Opens a sequence and returns its number, the lowest that is free.

        It begins with the longest run of full pages of the prompt that the prefix tree knows;
        `length_bound` says how many tokens that is.

        Args:
            prompt: token ids; none for an empty sequence.
            key: what K and V depend on besides the tokens, and who may share them.
            own: a drafter's layers, which the pages have to be filled in.
        """
        member = self._open(key, self.prefixes.match(prompt, key, own=own))
        self._note_filled(member)
        return member.number

    def adopt(
        self,
        sequence: int,
        prompt: Sequence[int],
        *,
        key: Hashable = None,
        own: DraftLayers | None = None,
    ) -> int:
        """What `admit` does with a prompt, for a sequence that is still empty.

        Returns:
            How many tokens of the prompt it has now.
        """
        member = self._sequences[sequence]
        if member.bound or member.lease is not None:
            raise RuntimeError(f"sequence {sequence}: expected an empty one, it has tokens or rows")
        self.pool.free(member.pages)
        member.pages, member.key = [], key
        self._begin(member, self.prefixes.match(prompt, key, own=own))
        self._note_filled(member)
        return member.bound

    def fork(self, sequence: int, length: int | None = None) -> int:
        """Opens a sequence that begins like another one, in the same pages, and returns its number.

        Args:
            sequence: with no lease open and its last commit settled, unless `length` ends before
                what is not.
            length: how many of its tokens; all by default.
        """
        parent = self._sequences[sequence]
        if length is None or parent.lease is not None or length > parent.bound - parent.unsettled:
            parent = self._settled(sequence)
        length = parent.bound if length is None else length
        if not 0 <= length <= parent.bound:
            raise ValueError(f"length: expected 0 to {parent.bound} tokens, got {length}")
        child = self._open(parent.key, parent.pages[: self._pages_for(length)], length)
        child.left_out = parent.left_out
        child.filled = dict(parent.filled)
        child.cap_filled(length)
        return child.number

    def view(self, sequence: int, pages: Sequence[int]) -> int:
        """Opens a sequence that sees only some pages of another one, and returns its number.

        For drafts that may be approximate. K and V stay where they are; to attention the view is a
        shorter sequence with an ordinary page table, and its rows go on at the positions behind the
        whole text. What is written in it is its own. A layer's sliding window is measured in the
        keys that the view shows.

        Args:
            sequence: with no lease open and its last commit settled.
            pages: which of its pages, rising; the one that holds its end is the last. `views` has
                functions that choose them.
        """
        parent = self._settled(sequence)
        count = self._pages_for(parent.bound)
        if not count or list(pages) != sorted({*pages, count - 1}) or min(pages) < 0:
            raise ValueError(
                f"pages: expected some of 0 to {count - 1}, rising, the last one among them, "
                f"got {list(pages)}"
            )
        left_out = (count - len(pages)) * self.pool.page_size
        chosen = [parent.pages[page] for page in pages]
        view = self._open(parent.key, chosen, parent.bound - left_out)
        view.left_out = parent.left_out + left_out
        size = self.pool.page_size
        for own, filled in parent.filled.items():
            whole = filled >= parent.bound
            shown = sum((page + 1) * size <= filled for page in pages) * size
            view.filled[own] = view.bound if whole else shown
        return view.number

    def prune(self, sequence: int, length: int) -> None:
        """Cuts a sequence back to its first tokens and gives back the pages behind them.

        Args:
            sequence: with no lease open and its last commit settled.
            length: how many tokens to keep.
        """
        member = self._settled(sequence)
        self._refuse_view(member, "cut")
        if not 0 <= length <= member.bound:
            raise ValueError(f"length: expected 0 to {member.bound} tokens, got {length}")
        keep = self._pages_for(length)
        self.page_table[sequence, keep:] = TRASH_PAGE
        self.lengths[sequence] = length
        dropped, member.pages = member.pages[keep:], member.pages[:keep]
        member.bound = length
        member.cap_filled(length)
        self.pool.free(dropped)

    def remember(self, sequence: int, tokens: Sequence[int]) -> None:
        """Takes the full pages of a sequence into the prefix tree, for those who begin like it.

        Args:
            sequence: one admitted here.
            tokens: what it holds, from the beginning; may go on behind the committed end.
        """
        member = self._sequences[sequence]
        self._refuse_view(member, "remembered")
        known, size = min(len(tokens), member.bound - member.unsettled), self.pool.page_size
        for own in self.pool.registered:
            filled = min(known, member.filled.get(own, 0))
            own.filled.update(member.pages[: filled // size])
        self.prefixes.insert(tokens, member.pages[: known // size], member.key)

    def release(self, sequence: int) -> None:
        """Gives a sequence's pages back. An open speculation on it is rolled back."""
        released = self._sequences.pop(sequence)
        released.released = True
        if released.lease is not None:
            released.lease.rollback()
        self.pool.free(released.pages)
        self.prefixes.trim()
        self.page_table[sequence] = TRASH_PAGE
        self.lengths[sequence] = 0

    def _open(
        self, key: Hashable, pages: Sequence[int], length: int | None = None
    ) -> SequenceState:
        """A new sequence that starts in pages that others own too, or none if anything fails."""
        number = next(s for s in range(1, len(self._sequences) + 2) if s not in self._sequences)
        if number >= len(self.lengths):
            extra = max(number + 1 - len(self.lengths), len(self.lengths))
            rows = self.page_table.new_full((extra, self.page_table.shape[1]), TRASH_PAGE)
            self.lengths, self.page_table = (
                torch.cat([self.lengths, self.lengths.new_zeros(extra)]),
                torch.cat([self.page_table, rows]),
            )
        member = self._sequences[number] = SequenceState(number, key)
        try:
            self._begin(member, pages, length)
        except BaseException:
            self.release(number)
            raise
        return member

    def _begin(
        self, member: SequenceState, pages: Sequence[int], length: int | None = None
    ) -> None:
        """Lets an empty sequence start in pages that others own too; all full by default."""
        if not pages:
            return
        length = len(pages) * self.pool.page_size if length is None else length
        self._widen(len(pages))
        self.page_table[member.number, : len(pages)] = upload(pages, self.device)
        self.lengths[member.number] = length
        self.pool.share(pages)
        member.pages, member.bound = list(pages), length

    def _note_filled(self, member: SequenceState) -> None:
        """Finds out which drafters' layers are filled in the pages that a sequence begins with."""
        for own in self.pool.registered:
            lacking = (at for at, page in enumerate(member.pages) if page not in own.filled)
            first = next(lacking, len(member.pages))
            member.filled[own] = first * self.pool.page_size

    def _settled(self, sequence: int) -> SequenceState:
        member = self._sequences[sequence]
        if member.lease is not None or member.unsettled:
            raise RuntimeError(
                f"sequence {sequence}: expected every speculation closed and settled before a fork "
                "or a cut"
            )
        return member

    def _refuse_view(self, member: SequenceState, done: str) -> None:
        if member.left_out:
            raise ValueError(
                f"sequence: {member.number} is a view, which cannot be {done}: "
                f"it lacks {member.left_out} tokens"
            )

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_size)

    def expect(self, sequences: Sequence[int], tokens: Sequence[int]) -> None:
        """Makes room for sequences to grow, so that nothing has to be moved while they do.

        What there is no memory for is left out: whoever needs it later will see.

        Args:
            sequences: admitted ones.
            tokens: how long each may become.
        """
        pages = [self._pages_for(count) for count in tokens]
        self._widen(max(pages))
        owned = [len(self._sequences[number].pages) for number in sequences]
        self.pool.expect(sum(max(0, a - b) for a, b in zip(pages, owned, strict=True)))

    def reserve(self, sequences: Sequence[int], rows: Sequence[int]) -> None:
        """Gives sequences room for rows behind their ends, all or none; nothing is leased yet.

        Raises:
            OutOfPages: nothing was reserved.
        """
        self._reserve([self._sequences[number] for number in sequences], rows)

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

    def _reserve(self, members: Sequence[SequenceState], rows: Sequence[int]) -> None:
        """Gives each sequence pages for its rows that it alone may write to, or raises."""
        missing, parting = [], []
        for member, ahead in zip(members, rows, strict=True):
            missing.append(max(0, self._pages_for(member.bound + ahead) - len(member.pages)))
            at = (member.bound - member.unsettled) // self.pool.page_size
            page = member.pages[at] if at < len(member.pages) else None
            parting.append(page is not None and self.pool.is_shared(page))
            if page is not None and not parting[-1]:  # after a cut it may have been full before
                for own in self.pool.registered:
                    own.filled.discard(page)
        if not any(missing) and not any(parting):
            return
        self._widen(max(len(m.pages) + n for m, n in zip(members, missing, strict=True)))
        fresh = self._allocate(sum(missing) + sum(parting))
        after, entries, left = [], [], list(fresh)  # entries: (sequence, place, page now, before)
        for member, count, parts in zip(members, missing, parting, strict=True):
            pages = list(member.pages)
            if parts:
                at = (member.bound - member.unsettled) // self.pool.page_size
                page = left.pop(0)
                entries.append((member.number, at, page, pages[at]))
                pages[at] = page
            for page in left[:count]:
                entries.append((member.number, len(pages), page, TRASH_PAGE))
                pages.append(page)
            del left[:count]
            after.append(pages)
        copied = [(old, new) for _, _, new, old in entries if old != TRASH_PAGE]
        try:
            if copied:
                self.pool.copy([old for old, _ in copied], [new for _, new in copied])
            row, place, page, _ = upload(entries, self.device).T
            self.page_table[row, place] = page
        except BaseException:  # all or none, also when the device has no memory left for the copy
            for number, at, _, before in entries:
                self.page_table[number, at] = before
            self.pool.free(fresh)
            raise
        for member, pages in zip(members, after, strict=True):
            member.pages = pages
        self.pool.free([old for old, _ in copied])

    def _allocate(self, count: int) -> list[int]:
        """Pages from the pool, and if it has too few, from the prefix tree."""
        try:
            return self.pool.allocate(count)
        except OutOfPages as error:
            self.prefixes.evict(error.need - error.have)
            return self.pool.allocate(count)

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

    def usage(self) -> CacheUsage:
        """Bytes of the pool by owner, as the host knows them: bounds stand for lengths."""
        committed: set[int] = set()
        owned: set[int] = set()
        for member in self._sequences.values():
            committed.update(member.pages[: self._pages_for(member.bound)])
            owned.update(member.pages)
        cached = {page for pages in self.prefixes.owned() for page in pages} - owned
        parts = (len(committed), len(owned - committed), len(cached), self.pool.num_free)
        return CacheUsage(*(count * self.pool.page_bytes for count in parts))

    def check_integrity(self) -> None:
        """Checks every invariant that the host and the device share. Waits for the device.

        Raises:
            RuntimeError: a page is leaked or shared by mistake, a length exceeds its bound, or the
                device's page table differs from the host's.
        """
        owned = [member.pages for member in self._sequences.values()]
        self.pool.check_integrity([*owned, *self.prefixes.owned()])
        self.prefixes.check_integrity()
        lengths, table = self.lengths.tolist(), self.page_table.tolist()
        nobody = SequenceState(NULL_SEQUENCE)
        for number, (length, row) in enumerate(zip(lengths, table, strict=True)):
            member = self._sequences.get(number, nobody)
            pages = member.pages
            if row[: len(pages)] != pages or set(row[len(pages) :]) - {TRASH_PAGE}:
                raise RuntimeError(f"sequence {number}: page table {row} is not {pages}")
            need = member.bound + (member.lease.rows_of(member) if member.lease else 0)
            floor = member.bound - member.unsettled
            if not 0 <= floor <= length <= member.bound or need > len(pages) * self.pool.page_size:
                raise RuntimeError(
                    f"sequence {number}: length {length}, bound {member.bound}, "
                    f"{need} tokens needed in {len(pages)} pages"
                )
            if member.lease and any(
                map(self.pool.is_shared, pages[floor // self.pool.page_size :])
            ):
                raise RuntimeError(f"sequence {number}: rows are leased in a page others hold")


__all__ = ["NULL_SEQUENCE", "CacheUsage", "Speculation", "TreeKVCache"]
