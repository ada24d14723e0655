"""One case as tensors: page table, many pools of keys and values, queries, the exact answer.

Letters: S sequences, R rows, Hq/Hkv heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from specdec.attention import AttentionPlan
from specdec.bits import ancestor_bits, ancestor_words
from specdec.eval.attention.cases import Case, parents_of
from specdec.pages import LayerPages

MEMORY = 24e9  # for all pools of a case


@dataclass
class Layout:
    """Which tokens lie where: the host's view of a case."""

    prefixes: list[int]  # committed tokens of each request
    tables: list[list[int]]  # pages of each request
    pages: int
    unique: int  # keys that lie in the pages, shared ones once


def lay_out(case: Case, seed: int = 0) -> Layout:
    """Gives every page of every request a place; full pages of shared nodes are one page."""
    generator = np.random.default_rng(seed)
    paths = _paths(case, generator)
    size = case.page_size
    owners: dict[tuple[object, int], int] = {}
    tables = []
    unique = case.requests * case.rows
    counted: set[tuple[object, int]] = set()
    for request, path in enumerate(paths):
        ends = np.cumsum([tokens for _, tokens in path])
        prefix = int(ends[-1])
        table = []
        for page in range(-(-(prefix + case.rows) // size)):
            # Requests share a page if they share the node that its last token lies in.
            last = (page + 1) * size - 1
            depth = int(np.searchsorted(ends, last, side="right"))
            owner: object = path[depth][0] if depth < len(path) else ("request", request)
            key = (owner, page)
            table.append(owners.setdefault(key, len(owners)))
            if key not in counted:
                counted.add(key)
                unique += max(0, min(size, prefix - page * size))
        tables.append(table)
    order = generator.permutation(len(owners))
    tables = [[int(order[page]) for page in table] for table in tables]
    return Layout([sum(t for _, t in path) for path in paths], tables, len(owners), unique)


def _paths(case: Case, generator: np.random.Generator) -> list[list[tuple[object, int]]]:
    """For each request its nodes of the prefix tree from the top, as (name, tokens)."""
    lengths = [case.levels[-1][1]] * case.requests
    if case.ragged:
        drawn = generator.lognormal(0, 0.8, case.requests)
        lengths = [max(1, int(x)) for x in drawn / drawn.mean() * case.levels[-1][1]]
    paths = []
    for request in range(case.requests):
        path: list[tuple[object, int]] = [
            ((level, request * nodes // case.requests), tokens)
            for level, (nodes, tokens) in enumerate(case.levels[:-1])
        ]
        paths.append([*path, ((len(case.levels) - 1, request), lengths[request])])
    return paths


class Data:
    """The tensors of a case.

    Args:
        sets: how many pools and queries to make; None for enough that the L2 cache is cold when
            they are used in turn: four times its size in all.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        sets: int | None = None,
        seed: int = 0,
    ) -> None:
        self.case, self.device, self.dtype = case, torch.device(device), dtype
        self.layout = layout = lay_out(case, seed)
        rows, requests = case.rows, case.requests
        self.parents = parents_of(case.tree, rows)
        bits = ancestor_bits(self.parents)
        self.words = ancestor_words(bits, rows)
        self.visible_in_tree = sum(b.bit_count() for b in bits)
        self.depths = torch.tensor([b.bit_count() - 1 for b in bits])
        size = case.page_size
        width = max(len(table) for table in layout.tables)
        self.table = torch.tensor([t + [0] * (width - len(t)) for t in layout.tables])
        self.prefixes = torch.tensor(layout.prefixes)
        self.sequence = torch.arange(requests).repeat_interleave(rows)
        self.nodes = torch.arange(rows).repeat(requests)
        place = self.prefixes[self.sequence] + self.nodes
        self.slots = self.table[self.sequence, place // size] * size + place % size
        element = dtype.itemsize
        self.kv_bytes = layout.unique * case.kv_heads * case.dim * 2 * element
        self.bytes = self.kv_bytes + 2 * requests * rows * case.heads * case.dim * element
        seen = rows * int(self.prefixes.sum()) + requests * self.visible_in_tree
        self.flops = 4 * case.dim * case.heads * seen
        if sets is None:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            sets = max(2, math.ceil(4 * cache / self.kv_bytes))
            sets = int(min(sets, max(2, MEMORY // self.kv_bytes)))
        self.sets = sets
        generator = torch.Generator(self.device).manual_seed(seed + 1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, generator=generator).to(dtype)

        shape = (layout.pages, size, case.kv_heads, case.dim)
        self.pools = [LayerPages(normal(*shape), normal(*shape)) for _ in range(sets)]
        self.queries = [normal(requests * rows, case.heads, case.dim) for _ in range(sets)]

    @cached_property
    def plan(self) -> AttentionPlan:
        return self.new_plan()

    def new_plan(self) -> AttentionPlan:
        """A plan whose schedules are not built yet."""
        case, layout = self.case, self.layout

        def on(tensor: Tensor) -> Tensor:
            return tensor.to(self.device)

        starts = torch.arange(case.requests + 1, dtype=torch.int32) * case.rows
        return AttentionPlan(
            page_table=on(self.table),
            prefix_lens=on(self.prefixes),
            page_size=case.page_size,
            row_starts=on(starts),
            sequence=on(self.sequence),
            nodes=on(self.nodes),
            ancestors=None if case.tree == "chain" else on(self.words.repeat(case.requests, 1)),
            slots=on(self.slots),
            positions=on(self.prefixes[self.sequence] + self.depths.repeat(case.requests)),
            max_rows=case.rows,
            max_places=case.requests * case.rows,
            max_prefix=max(layout.prefixes),
            shared=len(case.levels) > 1,
        )

    @cached_property
    def checked(self) -> list[int]:
        """The requests whose result is compared: three of a batch, two of a large one."""
        last = self.case.requests - 1
        picked = sorted({0, last // 2, last})
        big = max(self.layout.prefixes) * self.case.kv_heads >= 1 << 18
        return picked[:2] if big else picked

    def mask(self) -> Tensor:
        """[T, T] bool, which nodes of a tree each row sees."""
        place = torch.arange(self.case.rows)
        return (self.words[:, place // 32] >> (place % 32)) & 1 != 0

    def keys_of(self, request: int) -> Tensor:
        """[prefix + T] slots of all keys of a request."""
        size, length = self.case.page_size, self.layout.prefixes[request] + self.case.rows
        place = torch.arange(length)
        slots = self.table[request, place // size] * size + place % size
        return slots.to(self.device)

    def exact(self, index: int) -> Tensor:
        """[checked, T, Hq, D] float64 from set `index`, with the mask written out."""
        case, out = self.case, []
        pool, query = self.pools[index], self.queries[index]
        groups = case.heads // case.kv_heads
        tree = self.mask().to(self.device)
        for request in self.checked:
            slots = self.keys_of(request)
            rows = query[request * case.rows : (request + 1) * case.rows]
            result = torch.empty(rows.shape, dtype=torch.float64, device=self.device)
            for head in range(case.kv_heads):
                k = pool.keys.flatten(0, 1)[slots, head].double()
                v = pool.values.flatten(0, 1)[slots, head].double()
                q = rows[:, head * groups : (head + 1) * groups].double()
                scores = q @ k.T / math.sqrt(case.dim)  # [T, G, K]
                scores[:, :, -case.rows :].masked_fill_(~tree[:, None], float("-inf"))
                result[:, head * groups : (head + 1) * groups] = scores.softmax(-1) @ v
            out.append(result)
        return torch.stack(out)

    def error(self, out: Tensor, exact: Tensor) -> float:
        """The largest relative L2 error of a (request, head); NaN if anything is not finite."""
        case = self.case
        if not bool(torch.isfinite(out).all()):
            return float("nan")
        out = out.reshape(case.requests, case.rows, case.heads, case.dim)[self.checked].double()
        return float(((out - exact).norm(dim=(1, 3)) / exact.norm(dim=(1, 3))).max())
