"""Chains of other drafters: on the host, and the same ones inside of captured steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.drafters import NGram
from specdec.drafters.chains import Chains, first_chains
from specdec.drafting import DraftBuffers
from specdec.tree import TokenTree

TEXTS = (
    [1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2],  # branches behind 2
    [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7],
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],  # nothing to copy
)


def test_first_chains_are_those_of_the_trees_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    trees = [
        [-1, *(int(torch.randint(node, (), generator=generator)) for node in range(1, size))]
        for size in (1, 2, 5, 9, 16, 16, 16)
    ]
    parents = torch.tensor([tree + [0] * (16 - len(tree)) for tree in trees])
    counts = torch.tensor([len(tree) for tree in trees])
    for nodes in (1, 2, 3, 8):
        found = first_chains(parents, counts, nodes).tolist()
        for tree, chain in zip(trees, found, strict=True):
            expected = TokenTree.from_lists(list(range(len(tree))), tree).first_chain()
            expected = expected.cut(depth=nodes - 1)
            assert [node for node in chain if node < 16] == expected.tokens.tolist()


@pytest.mark.parametrize("nodes", [1, 2, 5, 8])
def test_a_captured_step_drafts_the_chains_of_the_host(nodes: int) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drafter = Chains(NGram())
    there = drafter.on_device(len(TEXTS), nodes, device)
    assert there is not None
    rows = len(TEXTS) * nodes

    def empty() -> Tensor:
        return torch.full((rows,), 99, dtype=torch.int32, device=device)

    buffers = DraftBuffers(
        sequences=torch.ones(len(TEXTS), dtype=torch.int64, device=device),
        text=torch.tensor(TEXTS, dtype=torch.int32, device=device),
        lengths=torch.tensor([len(text) for text in TEXTS], device=device),
        tokens=empty().long(),
        parents=empty(),
        counts=empty()[: len(TEXTS)],
        longest=64,
        shared=False,
    )
    there.draft(buffers)
    for row, text in enumerate(TEXTS):
        expected = drafter.draft(text, nodes)
        count = int(buffers.counts[row])
        own = slice(row * nodes, row * nodes + count)
        assert buffers.tokens[own].tolist() == expected.tokens.tolist()
        assert buffers.parents[own].tolist() == expected.parents.tolist()
        fillers = slice(row * nodes + count, (row + 1) * nodes)
        assert buffers.parents[fillers].tolist() == [0] * (nodes - count)
