"""Pictures of a prefix tree: text for a terminal, SVG for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from rich.text import Text
from rich.tree import Tree

from specdec.pages import PagePool
from specdec.prefix_tree import PrefixNode, PrefixTree

Show = Callable[[Sequence[int]], str]

ROW, INDENT, WIDTH, TOKEN = 26, 28, 900, 0.5
"""Of the SVG in pixels: height of a line, shift of a level, width of all, width of a token."""


def as_text(tree: PrefixTree, show: Show = str) -> Tree:
    """The tree as a rich renderable: tokens, pages and how many sequences use each node.

    Args:
        tree: to be shown.
        show: how to write tokens, such as a tokenizer's `decode`.
    """
    count, held = len(list(tree.nodes())), tree.num_pages * tree.pool.page_bytes
    out = Tree(f"{tree.num_pages} pages in {count} nodes, {held / 2**20:.2f} MiB")
    for number, root in enumerate(tree.roots.values(), start=1):
        _branch(out.add(f"key {number}"), root, tree.pool, show)
    return out


def as_svg(tree: PrefixTree, show: Show = str) -> str:
    """The tree as an SVG image: a bar for each node as long as its text, used ones darker."""
    body: list[str] = []
    for root in tree.roots.values():
        stack = [(node, 0) for node in root.children.values()][::-1]
        while stack:
            node, depth = stack.pop()
            x, y = 10 + depth * INDENT, 10 + ROW * len(body)
            users = _users(node, tree.pool)
            bar = max(4.0, min(len(node.tokens) * TOKEN, WIDTH / 3))
            color = "#3b6fb6" if users else "#a9c4e6"
            body.append(
                f'<g><rect x="{x}" y="{y}" width="{bar:.0f}" height="14" fill="{color}"/>'
                f'<text x="{x + bar + 6:.0f}" y="{y + 12}">{escape(_label(node, users, show))}'
                "</text></g>"
            )
            stack += [(child, depth + 1) for child in node.children.values()][::-1]
    height = 20 + ROW * len(body)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="monospace" font-size="12">'
    )
    return "\n".join([head, *body, "</svg>\n"])


def _branch(out: Tree, node: PrefixNode, pool: PagePool, show: Show) -> None:
    for child in node.children.values():
        _branch(out.add(Text(_label(child, _users(child, pool), show))), child, pool, show)


def _users(node: PrefixNode, pool: PagePool) -> int:
    """Sequences and pins that hold the node's first page; the tree itself does not count."""
    return pool.references(node.pages[0]) - 1


def _label(node: PrefixNode, users: int, show: Show) -> str:
    text = " ".join(show(node.tokens).split())
    shown = text if len(text) <= 60 else f"{text[:29]} ... {text[-26:]}"
    used = f", used by {users}" if users else ""
    return f"{len(node.tokens)} tokens, {len(node.pages)} pages{used}: {shown}"
