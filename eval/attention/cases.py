"""What is measured: prefix trees, draft trees and heads from the papers and from serving.

A case is a prefix tree, given by its levels as FastTree gives them (nodes, tokens of each node;
children spread evenly over parents), with one request below every node of the last level and a
draft tree of `rows` nodes in every request.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

Level = tuple[int, int]  # nodes, tokens of each


@dataclass(frozen=True)
class Case:
    """One point of the benchmark."""

    family: str
    name: str
    levels: tuple[Level, ...]
    rows: int  # queries of each request: the nodes of its draft tree
    tree: str = "random"  # or chain, star, apps
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page_size: int = 64
    ragged: bool = False  # lengths of the last level are drawn, lognormal, with the same mean

    @property
    def requests(self) -> int:
        return self.levels[-1][0]

    @property
    def prefix(self) -> int:
        """Tokens before each request's tree; their mean where the case is ragged."""
        return sum(tokens for _, tokens in self.levels)

    @property
    def label(self) -> str:
        return f"{self.family}: {self.name}"


def private(rows: int, length: int, batch: int, **options: object) -> Case:
    """A batch of texts of one length that share nothing."""
    case = Case("private", f"T{rows} L{length} B{batch}", ((batch, length),), rows)
    return replace(case, **options)  # type: ignore[arg-type]


def shared(rows: int, prefix: int, length: int, batch: int, **options: object) -> Case:
    """A batch with a common prefix, then `length` tokens for each."""
    family = "shared decode" if rows == 1 else "shared verify"
    name = f"T{rows} S{prefix} L{length} B{batch}"
    case = Case(family, name, ((1, prefix), (batch, length)), rows)
    return replace(case, **options)  # type: ignore[arg-type]


APPS = {
    32: {1: 4, 2: 8, 3: 16, 4: 3},
    64: {1: 10, 2: 28, 3: 23, 4: 2},
    128: {1: 5, 2: 20, 3: 80, 4: 22},
    256: {1: 6, 2: 30, 3: 150, 4: 69},
}
"""Nodes by depth of DeFT's recorded draft trees (LINs-lab/DeFT, APPS_tree_size*.json)."""

FASTTREE: list[tuple[Level, ...]] = [
    ((1, 256), (2, 32), (64, 32)),
    ((1, 4000), (10, 400)),
    ((1, 2048), (1024, 32)),
    ((1, 1024), (16, 256), (64, 32)),
    ((1, 1024), (4, 256), (16, 128), (512, 32)),
]


def all_cases() -> Iterator[Case]:
    """Every case, the most telling first."""
    for rows in (1, 16, 64, 8, 32):
        for length in (1024, 4096, 16384):
            for batch in (1, 8, 32):
                yield private(rows, length, batch)
    for rows in (1, 16, 64, 8, 32):
        for batch in (1, 8):
            yield private(rows, 65536, batch)
    for batch in (8, 32, 64):
        for prefix in (4096, 16384):
            yield shared(1, prefix, 256, batch)
    for batch in (8, 32):
        for rows in (8, 16, 64):
            yield shared(rows, 4096, 256, batch)
    yield Case("DeFT", "Table 14: 64 leaves over 4096", ((1, 4096), (64, 0)), 1)
    yield Case("DeFT", "star verify, 4096 + 64", ((1, 4096),), 64, tree="star")
    levels: tuple[Level, ...]
    for leaves in (20, 50):
        levels = ((1, 4000), (leaves, 199))
        yield Case("DeFT", f"few-shot 4000 + 200, {leaves} leaves", levels, 1, page_size=16)
    for nodes in APPS:
        for length in (1000, 4000):
            name = f"recorded tree, {nodes} nodes over {length}"
            yield Case("DeFT trees", name, ((1, length),), nodes, tree="apps")
    for prompt in (1024, 2048, 4096):
        for common in (prompt, prompt // 2, 0):
            levels = ((1, common), (32, prompt - common)) if common else ((32, prompt),)
            name = f"Table 3: n_p {prompt} n_s {common}"
            yield Case("ChunkAttention", name, levels, 1, kv_heads=32)
    for rows in (1, 16, 64):
        for length in (1024, 4096):
            yield private(rows, length, 1, family="SmolLM2", heads=9, kv_heads=3, dim=64)
    for levels in FASTTREE:
        name = ",".join(str(n) for n, _ in levels) + " | " + ",".join(str(t) for _, t in levels)
        yield Case("FastTree", name, levels, 1, page_size=32)
    for rows in (1, 16, 64):
        yield private(rows, 4096, 16, family="ragged", ragged=True)
    for rows in (8, 64, 16, 32):
        for length in (1024, 4096, 16384):
            for batch in (1, 8):
                yield private(rows, length, batch, family="chain", tree="chain")
    for size in (16, 32, 128):
        for rows, length in ((64, 4096), (1, 4096), (64, 16384), (1, 16384)):
            case = private(rows, length, 1, family="page size", page_size=size)
            yield replace(case, name=f"{case.name} page {size}")


def select(pattern: str) -> list[Case]:
    """The cases whose label holds a match of the regular expression `pattern`."""
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"only: expected a regular expression, got {pattern!r}: {error}") from None
    chosen = [case for case in all_cases() if wanted.search(case.label)]
    if not chosen:
        raise ValueError(f"only: expected a match of a case's label, got {pattern!r}")
    return chosen


def parents_of(kind: str, nodes: int) -> list[int]:
    """Parents of a draft tree, the root's -1."""
    if kind == "chain":
        return list(range(-1, nodes - 1))
    if kind == "star":
        return [-1] * nodes  # DeFT's: independent one-token leaves, no root
    if kind == "apps":
        return _by_depth({0: 1, **APPS[nodes]}, nodes)
    generator = np.random.default_rng(0)
    parents, depths = [-1], [1]
    for node in range(1, nodes):
        open_nodes = [n for n in range(node) if depths[n] < 8]
        parent = int(generator.choice(open_nodes))
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


def _by_depth(histogram: dict[int, int], nodes: int) -> list[int]:
    parents, above = [-1], [0]
    for depth in range(1, max(histogram) + 1):
        level = [above[i % len(above)] for i in range(histogram[depth])]
        first = len(parents)
        parents += sorted(level)
        above = list(range(first, len(parents)))
    return parents[:nodes]
