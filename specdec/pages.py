"""The physical store of keys and values: pages, counted references, layer groups."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.kernels import cache as kernels
from specdec.transfer import upload

TRASH_PAGE = 0
"""Rows that belong to no sequence write here. Nothing ever reads it for a real row."""
FIRST_SHARE = 128
"""The part of a GPU's memory that the first pages take, as its inverse."""


class OutOfPages(RuntimeError):
    """The pool cannot grow and has fewer free pages than needed. The pool is unchanged."""

    def __init__(self, need: int, have: int, limit: int, page_size: int) -> None:
        self.need, self.have, self.limit = need, have, limit
        super().__init__(
            f"need {need} pages of {page_size} tokens, have {have} free of {limit}: "
            "raise max_pages, lower max_new_tokens, or run fewer sequences at once"
        )


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores for a token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class LayerGroup:
    """The layers that have one shape: a single K and a single V tensor for all of them.

    keys is [L, pages, page_size, Hkv, Dk] and values is [L, pages, page_size, Hkv, Dv].
    """

    shape: LayerShape
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LayerPages:
    """One layer's part of the pool, as views: [pages, page_size, Hkv, D]."""

    keys: Tensor
    values: Tensor


@dataclass(eq=False)
class DraftLayers:
    """A drafter's layers in a target's pool, under the same page ids. Made by `PagePool.register`.

    What becomes of a page - moved rows, copies, sharing, eviction - becomes of it in these layers,
    too. But the drafter writes them when it can, so not every page that has the target's K and V
    has the drafter's: `filled` has those that do, among the full pages that may be found again.
    """

    groups: list[LayerGroup]
    filled: set[int] = field(default_factory=set)
    _place: dict[int, tuple[LayerGroup, int]] = field(default_factory=dict)

    def layer(self, index: int) -> LayerPages:
        """Where a layer's keys and values lie."""
        return _layer(self._place, index)


@dataclass
class PagePool:
    """Pages for all layers of a model, addressed by the same page ids in every layer group.

    The pool grows on demand up to `max_pages`; growing copies, so it happens between forwards.
    Page 0 is the trash page and is never handed out.

    Drafters may register layers of their own. `groups` are those of all.

    Args:
        layers: the shape of each layer, in order.
        page_size: tokens in a page.
        max_pages: upper bound for the pages handed out; None for as many as memory holds.
    """

    layers: Sequence[LayerShape]
    page_size: int = 16
    max_pages: int | None = None
    groups: list[LayerGroup] = field(init=False)

    def __post_init__(self) -> None:
        check_count("page_size", self.page_size)
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size: expected a power of two, got {self.page_size}")
        if self.max_pages is not None:
            check_count("max_pages", self.max_pages)
        self._references = [1]  # by page; the trash page references itself
        self._free: list[int] = []  # a heap: the lowest page is handed out first
        self.groups, self._place = self._grouped(self.layers)
        self._registered: list[DraftLayers] = []

    def _grouped(
        self, layers: Sequence[LayerShape]
    ) -> tuple[list[LayerGroup], dict[int, tuple[LayerGroup, int]]]:
        """Groups for some layers, with all pages that there are, and where each layer lies."""
        members: dict[LayerShape, list[int]] = {}
        for layer, shape in enumerate(layers):
            members.setdefault(shape, []).append(layer)
        pages = len(self._references)
        groups = [
            LayerGroup(
                shape,
                self._empty(shape, len(indices), pages, shape.key_dim),
                self._empty(shape, len(indices), pages, shape.value_dim),
            )
            for shape, indices in members.items()
        ]
        place = {
            layer: (group, index)
            for group, indices in zip(groups, members.values(), strict=True)
            for index, layer in enumerate(indices)
        }
        return groups, place

    def register(self, layers: Sequence[LayerShape]) -> DraftLayers:
        """Gives every page room for a drafter's layers, of any shape, dtype and device.

        Args:
            layers: the shape of each, in order; at least one.

        Raises:
            ValueError: there is none.
            torch.OutOfMemoryError: there is no memory for them; nothing is registered.
        """
        if not layers:
            raise ValueError("layers: expected at least one shape, got none")
        groups, place = self._grouped(layers)
        own = DraftLayers(groups, _place=place)
        self.groups = [*self.groups, *groups]
        self._registered.append(own)
        return own

    def unregister(self, own: DraftLayers) -> None:
        """Gives up a drafter's layers, and their memory with them."""
        self._registered.remove(own)
        self.groups = [group for group in self.groups if group not in own.groups]
        own.filled.clear()

    @property
    def registered(self) -> tuple[DraftLayers, ...]:
        """The drafters' layers."""
        return tuple(self._registered)

    def _empty(self, shape: LayerShape, layers: int, pages: int, dim: int) -> Tensor:
        size = (layers, pages, self.page_size, shape.kv_heads, dim)
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)

    @property
    def num_pages(self) -> int:
        """Pages that exist, free or not, without the trash page."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        """Pages that exist and belong to nobody."""
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers together."""
        return sum(
            tensor[:, 0].numel() * tensor.element_size()
            for group in self.groups
            for tensor in (group.keys, group.values)
        )

    def layer(self, index: int) -> LayerPages:
        """Where a layer of the model has its keys and values."""
        return _layer(self._place, index)

    def allocate(self, count: int) -> list[int]:
        """Hands out `count` pages with one reference each, or raises and hands out none.

        Raises:
            OutOfPages: `max_pages` does not allow it.
        """
        if count > len(self._free):
            self._grow(count)
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def _grow(self, need: int) -> None:
        """Adds pages until `need` are free, and half as many again if the limit allows.

        CUDA graphs refer to the pages where they lie, so on a GPU the first ones are many.
        """
        missing = need - self.num_free
        extra = max(missing, self.num_pages // 2, self._worthwhile)
        if self.max_pages is not None:
            room = self.max_pages - self.num_pages
            if room < missing:
                raise OutOfPages(need, self.num_free + room, self.max_pages, self.page_size)
            extra = min(extra, room)
        try:  # all new tensors exist before the first old one is dropped
            grown = [(_longer(g.keys, extra), _longer(g.values, extra)) for g in self.groups]
        except torch.OutOfMemoryError as error:
            raise OutOfPages(need, self.num_free, self.num_pages, self.page_size) from error
        for group, (keys, values) in zip(self.groups, grown, strict=True):
            group.keys, group.values = keys, values
        first = len(self._references)
        free = sorted([*self._free, *range(first, first + extra)])  # a sorted list is a heap
        self._references, self._free = [*self._references, *[0] * extra], free

    @property
    def _worthwhile(self) -> int:
        """Pages that a GPU has room for without anybody noticing."""
        device = self.groups[0].shape.device
        if device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(device)
        return min(total // FIRST_SHARE, free // 8) // self.page_bytes

    def expect(self, count: int) -> None:
        """Grows now if `count` pages would make it grow later, as far as it may.

        On a GPU half of the memory that is free is left for other things.
        """
        if self.max_pages is not None:
            count = min(count, self.max_pages - self.num_pages + self.num_free)
        device = self.groups[0].shape.device
        if device.type == "cuda":
            spare = torch.cuda.mem_get_info(device)[0] // 2 // self.page_bytes
            # The old pages are there until all are copied.
            count = min(count, self.num_free + max(0, spare - self.num_pages))
        if count > len(self._free):
            with suppress(OutOfPages):
                self._grow(count)

    def share(self, pages: Sequence[int]) -> None:
        """Adds one reference to each page."""
        for page in pages:
            self._references[page] += 1

    def is_shared(self, page: int) -> bool:
        """Whether more than one owner holds the page."""
        return self._references[page] > 1

    def references(self, page: int) -> int:
        """How many owners hold the page."""
        return self._references[page]

    def free(self, pages: Sequence[int]) -> None:
        """Drops one reference from each page; a page without references can be handed out again.

        Raises:
            RuntimeError: a page has no reference to drop.
        """
        for page in pages:
            if self._references[page] < 1 or page == TRASH_PAGE:
                raise RuntimeError(f"page {page} is freed but not owned")
            self._references[page] -= 1
            if self._references[page] == 0:
                heapq.heappush(self._free, page)
                for own in self._registered:
                    own.filled.discard(page)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copies K and V rows of every layer from slot to slot: one launch a group on a GPU.

        Args:
            sources, targets: [B, N] int64 slots (page * page_size + offset), B paths of N rows. A
                path's sources and targets may overlap, and are moved as if all rows were read
                before the first is written, if no target is the source of a later row. Paths do
                not touch each other's slots, except for rows that stay where they are.
        """
        for group in self.groups:
            device = group.shape.device
            here, there = sources.to(device), targets.to(device)
            if group.keys.is_cuda:
                from specdec.kernels import moves  # needs Triton

                with torch.cuda.device(device):
                    moves.move_rows(group.keys, group.values, here, there)
            else:
                for pages in (group.keys, group.values):
                    kernels.move_rows(pages, here.flatten(), there.flatten())

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies whole pages of every layer, for owners that part (copy on write).

        Args:
            sources, targets: page ids, as many of each; no page is in both.
        """
        _copy(self.groups, sources, targets)

    def complete(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Fills what drafters' layers lack in some pages from other pages of the same text.

        Nobody reads what is written to here: where a drafter's rows are missing, they are computed.

        Args:
            targets, sources: page ids, as many of each.
        """
        for own in self._registered:
            pairs = [
                (target, source)
                for target, source in zip(targets, sources, strict=True)
                if source in own.filled and target not in own.filled
            ]
            if pairs:
                _copy(own.groups, [source for _, source in pairs], [page for page, _ in pairs])
                own.filled.update(page for page, _ in pairs)

    def check_integrity(self, owned: Sequence[Sequence[int]]) -> None:
        """Checks that every page is free or owned as often as it is referenced.

        Args:
            owned: the pages of each owner; a page may occur for several owners.

        Raises:
            RuntimeError: a page is leaked, handed out twice, or both free and owned.
        """
        count = [0] * len(self._references)
        count[TRASH_PAGE] = 1
        for pages in owned:
            for page in pages:
                count[page] += 1
        wrong = [p for p, (a, b) in enumerate(zip(count, self._references, strict=True)) if a != b]
        if wrong:
            raise RuntimeError(
                f"page {wrong[0]} is owned {count[wrong[0]]} times "
                f"but has {self._references[wrong[0]]} references"
            )
        for own in self._registered:
            if stale := sorted(page for page in own.filled if not self._references[page]):
                raise RuntimeError(f"page {stale[0]} is free, but a drafter's layers count on it")
        unowned = sorted(page for page, owners in enumerate(count) if owners == 0)
        if unowned != sorted(self._free):
            raise RuntimeError(f"free pages {sorted(self._free)} are not the unowned {unowned}")


def check_count(name: str, value: object, most: int | None = None) -> None:
    """Refuses what is not a positive integer, or one that is too large.

    Raises:
        TypeError, ValueError: with the argument's name.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1 or (most is not None and value > most):
        allowed = "at least 1" if most is None else f"1 to {most}"
        raise ValueError(f"{name}: expected {allowed}, got {value}")


def check_flag(name: str, value: object) -> None:
    """Refuses what is neither True nor False: the string "no" is true.

    Raises:
        TypeError: with the argument's name.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def _layer(places: dict[int, tuple[LayerGroup, int]], index: int) -> LayerPages:
    group, place = places[index]
    return LayerPages(group.keys[place], group.values[place])


def _copy(groups: Sequence[LayerGroup], sources: Sequence[int], targets: Sequence[int]) -> None:
    for group in groups:
        here, there = upload(sources, group.shape.device), upload(targets, group.shape.device)
        for pages in (group.keys, group.values):
            kernels.copy_pages(pages, here, there)


def _longer(tensor: Tensor, pages: int) -> Tensor:
    """[L, P, ...] with zeroed pages added behind."""
    size = (tensor.shape[0], pages, *tensor.shape[2:])
    return torch.cat([tensor, tensor.new_zeros(size)], 1)
