"""Trees grow along the paths that a draft model finds likeliest; its rows see their own paths."""

from __future__ import annotations

import heapq
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdec import Topology
from specdec.bits import ancestor_words, tree_words
from specdec.drafters import Beam, DraftModel
from specdec.drafters.growth import BeamGrowth, Growth, Level, ShapeGrowth
from specdec.testing import tiny_model
from specdec.tree import ProposalLaw, TokenTree

VOCAB = 11
Path = tuple[int, ...]


@cache
def logits(path: Path) -> Tensor:
    """[VOCAB] float32, of an imaginary model behind a path, root first."""
    generator = torch.Generator().manual_seed(hash(path) % 2**31)
    return 2 * torch.randn(VOCAB, generator=generator)


class Model:
    """Answers levels, and finds the path of each node by the rows that it says it sees."""

    def __init__(self, roots: list[int]) -> None:
        self.roots = roots
        self.rows: list[dict[int, int]] = [{} for _ in roots]

    def __call__(self, level: Level) -> Tensor:
        out = []
        for tree, root in enumerate(self.roots):
            for node, token in enumerate(level.tokens[tree].tolist()):
                self.rows[tree][level.first + node] = token
            for node in range(level.tokens.shape[1]):
                words = [word & 0xFFFFFFFF for word in level.ancestors[tree, node].tolist()]
                bits = sum(word << 32 * place for place, word in enumerate(words))
                seen = [row for row in range(bits.bit_length()) if bits >> row & 1]
                assert seen[-1] == level.first + node
                assert len(seen) == level.depth
                out.append(logits((root, *(self.rows[tree][row] for row in seen))))
        return torch.stack(out).view(len(self.roots), -1, VOCAB)


def grown(growth: Growth, roots: list[int]) -> list[TokenTree]:
    there = torch.tensor(roots)
    behind = torch.stack([logits((root,)) for root in roots])
    trees = growth.grow(there, behind, Model(roots))
    pairs = zip(trees.tokens.tolist(), trees.parents.tolist(), strict=True)
    return [TokenTree.from_lists(tokens, parents) for tokens, parents in pairs]


def paths(tree: TokenTree) -> list[Path]:
    """The path to every node, in order."""
    tokens, found = tree.tokens.tolist(), list[Path]()
    for token, parent in zip(tokens, tree.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def children(path: Path, chance: float, width: int) -> list[tuple[float, Path]]:
    """The likeliest children of a path and the logarithms of their chances."""
    top = logits(path).log_softmax(0).topk(width)
    return [
        (chance + step, (*path, token))
        for step, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def best_first(root: int, nodes: int, depth: int) -> set[Path]:
    heap: list[tuple[float, Path]] = [(0.0, (root,))]
    chosen = set[Path]()
    while heap and len(chosen) < nodes:
        chance, path = heapq.heappop(heap)
        chosen.add(path)
        if len(path) <= depth:
            for step, below in children(path, -chance, VOCAB):
                heapq.heappush(heap, (-step, below))
    return chosen


def eagle(root: int, beam: Beam, nodes: int) -> list[Path]:
    """EAGLE-2's two phases, in plain Python."""
    level: list[tuple[float, Path]] = [(0.0, (root,))]
    offered = list[tuple[float, Path]]()
    for _ in range(beam.depth):
        below = [pair for chance, path in level for pair in children(path, chance, beam.width)]
        offered += below
        level = sorted(below, key=lambda pair: -pair[0])[: beam.width]
    best = sorted(offered, key=lambda pair: -pair[0])[: nodes - 1]
    return [(root,), *(path for _, path in best)]


@pytest.mark.parametrize("nodes", [2, 5, 9, 40])
@pytest.mark.parametrize("beam", [Beam(1, 4), Beam(3, 1), Beam(3, 4), Beam(8, 6)], ids=str)
def test_a_beam_is_what_eagle_2_says(beam: Beam, nodes: int) -> None:
    growth = BeamGrowth(beam, nodes, 99, VOCAB)
    for root, tree in zip((3, 4, 5), grown(growth, [3, 4, 5]), strict=True):
        assert len(tree) == growth.size <= nodes
        if nodes > beam.width:
            assert paths(tree) == eagle(root, beam, nodes)
        assert max(tree.depths) <= growth.depth <= beam.depth


@pytest.mark.parametrize(("nodes", "depth"), [(2, 3), (6, 3), (9, 9), (12, 5)])
def test_a_wide_beam_is_the_best_first_tree(nodes: int, depth: int) -> None:
    growth = BeamGrowth(Beam(VOCAB, depth), nodes, 99, VOCAB)
    for root, tree in enumerate(grown(growth, [0, 1, 2])):
        assert set(paths(tree)) == best_first(root, nodes, depth)


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 9), depth=st.integers(1, 5), root=st.integers(0, 99))
def test_smaller_trees_are_the_beginnings_of_larger_ones(width: int, depth: int, root: int) -> None:
    """The node budget counts on it."""
    (large,) = grown(BeamGrowth(Beam(width, depth), 24, 99, VOCAB), [root])
    for nodes in (1, 2, 8, 16):
        (tree,) = grown(BeamGrowth(Beam(width, depth), nodes, 99, VOCAB), [root])
        assert paths(tree) == paths(large)[: len(tree)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_a_failing_model_grows_trees_all_the_same(value: float) -> None:
    """Ties, and numbers that are none: what is no tree could hang a kernel."""
    growth = BeamGrowth(Beam(4, 3), 16, 99, VOCAB)
    behind = torch.randn(2, VOCAB)
    behind[1] = value

    def run(level: Level) -> Tensor:
        out = torch.randn(2, level.tokens.shape[1], VOCAB)
        out[:, 1], out[0, 2, 5:] = value, value
        return out

    trees = growth.grow(torch.tensor([1, 2]), behind, run)
    places = torch.arange(16)
    assert bool((trees.parents < places).all())
    assert bool((trees.parents[:, 1:] >= 0).all())


@pytest.mark.parametrize(
    "shape", [Topology.chain(6), Topology.branching([3, 2, 1]), Topology.fading(40)]
)
def test_a_shape_is_filled_with_the_likeliest_children(shape: Topology) -> None:
    for root, tree in enumerate(grown(ShapeGrowth(shape, torch.device("cpu")), [0, 1])):
        assert tuple(tree.parents.tolist()) == shape.parents
        found = paths(tree)
        assert found[0] == (root,)
        for node in shape.inner:
            own = [found[c] for c, parent in enumerate(shape.parents) if parent == node]
            assert own == [path for _, path in children(found[node], 0.0, len(own))]


@given(st.lists(st.lists(st.integers(0, 99), min_size=69, max_size=69), min_size=1, max_size=2))
def test_words_on_the_device_are_those_of_the_host(draws: list[list[int]]) -> None:
    parents = [[-1, *(draw % (node + 1) for node, draw in enumerate(line))] for line in draws]
    trees = [TokenTree.from_lists([0] * 70, line) for line in parents]
    depths, words = tree_words(torch.tensor(parents), max(max(tree.depths) for tree in trees))
    for tree, depth, word in zip(trees, depths, words, strict=True):
        assert depth.tolist() == list(tree.depths)
        assert torch.equal(word, ancestor_words(tree.ancestor_bits, 70))


def test_what_a_beam_cannot_be() -> None:
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        Beam(0, 3)
    with pytest.raises(ValueError, match=r"at most 256, got 64 \* 5"):
        Beam(64, 6)
    model = tiny_model("Llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"Beam\(width=2, depth=3\) chooses .* got iid"):
        DraftModel(model, Beam(2, 3), law=ProposalLaw.IID)
    with pytest.raises(TypeError, match="expected a Topology or a Beam, got 5"):
        DraftModel(model, 5)  # type: ignore[arg-type]
