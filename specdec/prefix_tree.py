"""The prefix tree: full pages of text that was computed before, found again by its tokens.

A radix tree over pages. Every edge holds a run of whole pages and the tokens in them, and children
are told apart by the tokens of their first page, so two texts are never taken for each other. Full
pages are immutable; the tree and the sequences that use a page hold one reference each. It is
SGLang's radix cache (arXiv 2312.07104, section 3) in pages, and the prefix tree of ChunkAttention
(arXiv 2402.15220, section 3.1) that outlives its sequences.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from specdec.pages import DraftLayers, PagePool

Tokens = tuple[int, ...]


@dataclass(eq=False)
class PrefixNode:
    """A run of full pages below `parent`; only the roots are empty."""

    tokens: Tokens
    pages: list[int]
    parent: PrefixNode | None
    last_used: int = 0
    children: dict[Tokens, PrefixNode] = field(default_factory=dict)
    """By the tokens of their first page."""


class Pin:
    """Holds a prefix in the cache, used or not, until it is released or its block is left."""

    def __init__(self, tree: PrefixTree, pages: list[int]) -> None:
        self.pages = pages
        self._tree = tree
        tree.pool.share(pages)
        tree._pins.append(self)

    def release(self) -> None:
        """Lets the prefix be evicted again. Once is enough."""
        if self in self._tree._pins:
            self._tree._pins.remove(self)
            self._tree.pool.free(self.pages)

    def __enter__(self) -> Pin:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class PrefixTree:
    """Finds the pages of texts that begin alike.

    There is one tree for each key. A key stands for everything besides the tokens that K and V
    depend on (the weights), and for who may share with whom (a salt); texts under different keys
    never meet.

    Args:
        pool: where the pages live. The tree holds one reference to each of its own.
        max_bytes: the tree lets go of the least recently used pages beyond that; None for no limit
            but the pool's. Pages that a sequence or a pin uses too stay.
    """

    def __init__(self, pool: PagePool, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes: expected 0 or more, got {max_bytes}")
        self.pool = pool
        self.max_bytes = max_bytes
        self.evicted = 0
        """Pages evicted since the beginning."""
        self._roots: dict[Hashable, PrefixNode] = {}
        self._pins: list[Pin] = []
        self._held = 0
        self._clock = 0

    @property
    def num_pages(self) -> int:
        """Pages in the tree, whether sequences use them or not."""
        return self._held

    @property
    def roots(self) -> dict[Hashable, PrefixNode]:
        """The root of each key, to look at."""
        return dict(self._roots)

    def nodes(self) -> Iterator[PrefixNode]:
        """All nodes but the roots, depth first."""
        stack = [child for root in self._roots.values() for child in root.children.values()][::-1]
        while stack:
            node = stack.pop()
            yield node
            stack += reversed(node.children.values())

    def match(
        self, tokens: Sequence[int], key: Hashable = None, *, own: DraftLayers | None = None
    ) -> list[int]:
        """The pages of the longest known prefix, in whole pages; they count as used now.

        Args:
            tokens: of a text.
            key: see the class.
            own: a drafter's layers, which the pages have to be filled in; all pages do by default.
        """
        pages = self._find(tuple(tokens), key)[2]
        if own is not None:
            lacking = (at for at, page in enumerate(pages) if page not in own.filled)
            pages = pages[: next(lacking, len(pages))]
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[int], key: Hashable = None) -> int:
        """Takes a text into the tree; the pages that it lacks get one more reference.

        Args:
            tokens: those of `pages`, in order; tokens behind the last page are left out.
            pages: full ones, whose contents nobody changes any more.
            key: see the class.

        Returns:
            How many pages the tree took. Where it has the text already it keeps its own, which get
            what they lack of drafters' layers.
        """
        size = self.pool.page_size
        if len(tokens) < len(pages) * size:
            raise ValueError(
                f"tokens: expected {len(pages) * size} for {len(pages)} pages, got {len(tokens)}"
            )
        if not pages:
            return 0
        text = tuple(tokens[: len(pages) * size])
        self._roots.setdefault(key, PrefixNode((), [], None))
        node, agree, known = self._find(text, key)
        self.pool.complete(known, pages[: len(known)])
        new = list(pages[len(known) :])
        if new:
            rest = text[len(known) * size :]
            self.pool.share(new)
            self._held += len(new)
            if agree < len(node.pages):
                node = self._split(node, agree)
            if node.parent is not None and not node.children:  # a leaf goes on
                node.tokens += rest
                node.pages += new
            else:
                node.children[rest[:size]] = PrefixNode(rest, new, node, self._clock)
        self.trim()
        return len(new)

    def pin(self, tokens: Sequence[int], key: Hashable = None) -> Pin:
        """Keeps the known part of a text from being evicted; `pages` of the pin says which."""
        return Pin(self, self.match(tokens, key))

    def evict(self, pages: int) -> int:
        """Gives up to `pages` pages back to the pool, from the ends of the least used leaves.

        Returns:
            How many were freed. Pages that sequences or pins use are not, since that frees nothing.
        """
        leaves = [(n.last_used, i, n) for i, n in enumerate(self.nodes()) if not n.children]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < pages:
            _, order, leaf = heapq.heappop(leaves)
            while leaf.pages and freed < pages and not self.pool.is_shared(leaf.pages[-1]):
                self.pool.free([leaf.pages.pop()])
                freed += 1
            if leaf.pages:
                leaf.tokens = leaf.tokens[: len(leaf.pages) * self.pool.page_size]
                continue
            parent = self._detach(leaf)
            if parent is not None and parent.parent is not None and not parent.children:
                heapq.heappush(leaves, (parent.last_used, order, parent))
        self._held -= freed
        self.evicted += freed
        return freed

    def trim(self) -> None:
        """Evicts what is beyond `max_bytes`, as far as it is not in use."""
        if self.max_bytes is not None:
            over = self._held - self.max_bytes // self.pool.page_bytes
            if over > 0:
                self.evict(over)

    def clear(self) -> None:
        """Forgets every text. Pages in use stay with their users."""
        for node in self.nodes():
            self.pool.free(node.pages)
        self._roots.clear()
        self._held = 0

    def owned(self) -> list[list[int]]:
        """The pages that nodes and pins hold a reference to."""
        return [*(node.pages for node in self.nodes()), *(pin.pages for pin in self._pins)]

    def check_integrity(self) -> None:
        """Checks the shape of the tree.

        Raises:
            RuntimeError: what was found.
        """
        size, held = self.pool.page_size, 0
        for node in self.nodes():
            held += len(node.pages)
            if not node.pages or len(node.tokens) != len(node.pages) * size:
                raise RuntimeError(f"a node has {len(node.tokens)} tokens, {len(node.pages)} pages")
            if node.parent is None or node.parent.children.get(node.tokens[:size]) is not node:
                raise RuntimeError(f"the node of pages {node.pages} is not its parent's child")
            if node.last_used > node.parent.last_used:
                raise RuntimeError(f"the node of pages {node.pages} was used after its parent")
        if held != self._held:
            raise RuntimeError(f"the tree has {held} pages but counts {self._held}")

    def _find(self, text: Tokens, key: Hashable) -> tuple[PrefixNode, int, list[int]]:
        """The last node on the way down, how many of its pages agree, and all pages that do."""
        size = self.pool.page_size
        self._clock += 1
        node, agree = self._roots.get(key) or PrefixNode((), [], None), 0
        node.last_used = self._clock
        pages: list[int] = []
        while agree == len(node.pages):
            at = len(pages) * size
            child = node.children.get(text[at : at + size])
            if child is None:
                break
            node = child
            node.last_used = self._clock
            most = min(len(node.pages), len(text) // size - len(pages))
            agree = _agreeing(node.tokens, text[at : at + most * size], size)
            pages += node.pages[:agree]
        return node, agree, pages

    def _split(self, node: PrefixNode, pages: int) -> PrefixNode:
        """Cuts a node behind its first `pages` pages; returns the upper part."""
        parent, size = node.parent, self.pool.page_size
        assert parent is not None, "a root has no pages to split"
        upper = PrefixNode(node.tokens[: pages * size], node.pages[:pages], parent, node.last_used)
        parent.children[upper.tokens[:size]] = upper
        node.tokens, node.pages = node.tokens[pages * size :], node.pages[pages:]
        node.parent = upper
        upper.children[node.tokens[:size]] = node
        return upper

    def _detach(self, leaf: PrefixNode) -> PrefixNode | None:
        """Takes an empty leaf out; returns its parent."""
        parent, first = leaf.parent, leaf.tokens[: self.pool.page_size]
        assert parent is not None, "a root is no leaf"
        del parent.children[first]
        if parent.parent is None and not parent.children:
            self._roots = {key: root for key, root in self._roots.items() if root is not parent}
        return parent


def _agreeing(ours: Tokens, theirs: Tokens, size: int) -> int:
    """How many whole pages two runs of tokens have in common, `theirs` being no longer."""
    if ours[: len(theirs)] == theirs:
        return len(theirs) // size
    differ = next(at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    return differ // size
