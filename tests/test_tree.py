"""Token trees: builders, packed form, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.batch import TreeBatch
from specdec.bits import ancestor_words
from specdec.topology import Topology
from specdec.tree import ProposalLaw, TokenTree


def unpack_words(words: torch.Tensor, nodes: int) -> torch.Tensor:
    index = torch.arange(nodes)
    return (words[..., index // 32] >> (index % 32)) & 1 != 0


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 80) -> TokenTree:
    size = draw(st.integers(1, max_nodes))
    parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, size)]
    tokens = draw(st.lists(st.integers(0, 96), min_size=size, max_size=size))
    return TokenTree.from_lists(tokens, parents)


@given(trees())
def test_ancestors_are_those_found_by_walking_up(tree: TokenTree) -> None:
    parents = tree.parents.tolist()
    for node, bits in enumerate(tree.ancestor_bits):
        path, at = set(), node
        while at >= 0:
            path.add(at)
            at = parents[at]
        assert {j for j in range(len(tree)) if bits >> j & 1} == path
        assert tree.depths[node] == len(path) - 1


@given(st.lists(trees(), min_size=1, max_size=4))
def test_packing_keeps_every_tree(batch: list[TokenTree]) -> None:
    packed = TreeBatch.pack(batch, vocab_size=97)
    widest = max(len(tree) for tree in batch)
    bits = unpack_words(packed.ancestors, widest)
    row = 0
    for index, tree in enumerate(batch):
        rows = slice(row, row + len(tree))
        assert packed.tokens[rows].tolist() == tree.tokens.tolist()
        assert packed.tree[rows].tolist() == [index] * len(tree)
        assert packed.nodes[rows].tolist() == list(range(len(tree)))
        assert packed.depths[rows].tolist() == tree.depths
        for node in range(len(tree)):
            seen = bits[row + node].nonzero().flatten().tolist()
            assert seen == [j for j in range(len(tree)) if tree.ancestor_bits[node] >> j & 1]
            kids = [kid - row for kid in packed.children[row + node].tolist() if kid >= 0]
            assert kids == tree.children(node)
        row += len(tree)


def test_the_top_bit_of_a_word_survives() -> None:
    bits = [1 << 31, 1 << 32, (1 << 64) - 1]
    words = ancestor_words(bits, 64)
    assert words.dtype == torch.int32
    unpacked = unpack_words(words, 64)
    assert [row.nonzero().flatten().tolist() for row in unpacked] == [[31], [32], list(range(64))]


def test_builders_make_the_trees_they_name() -> None:
    assert TokenTree.root(7).paths() == [[7]]
    assert TokenTree.chain(7, [1, 2]).paths() == [[7, 1, 2]]
    assert TokenTree.star(7, [1, 2]).paths() == [[7, 1], [7, 2]]
    merged = TokenTree.from_paths(7, [[1, 2, 3], [1, 4], [1, 2, 5]], nodes=16)
    assert sorted(merged.paths()) == [[7, 1, 2, 3], [7, 1, 2, 5], [7, 1, 4]]
    choices = TokenTree.from_choices(7, [(0,), (1,), (0, 2)], [[1, 2], [3, 4, 5]])
    assert sorted(choices.paths()) == [[7, 1, 5], [7, 2]]
    shape = Topology.branching([2, 1])
    assert TokenTree.static(shape, [7, 1, 2, 3, 4]).paths() == [[7, 1, 3], [7, 2, 4]]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_best_first_takes_the_likeliest_nodes(n: int, depth: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(depth, width, generator=generator).sort(1, descending=True).values
    tokens = torch.arange(depth * width).view(depth, width)
    tree = TokenTree.best_first(0, tokens, probs, n)
    levels: list[list[tuple[int, ...]]] = [[()]]
    for _ in range(depth):
        levels.append([(*path, k) for path in levels[-1] for k in range(width)])
    chance = {
        path: float(torch.stack([probs[d, k] for d, k in enumerate(path)]).double().prod())
        for level in levels[1:]
        for path in level
    }
    best = sorted(chance.values(), reverse=True)[: n - 1]
    got = []
    for bits in tree.ancestor_bits[1:]:
        path = [int(t) for j, t in enumerate(tree.tokens) if bits >> j & 1][1:]
        got.append(chance[tuple(token % width for token in path)])
    assert sorted(got, reverse=True) == pytest.approx(best)


def test_cut_keeps_law_and_probabilities() -> None:
    probs = torch.rand(4, 9).softmax(-1)
    tree = TokenTree(
        torch.tensor([5, 1, 2, 3]), torch.tensor([-1, 0, 1, 0]), ProposalLaw.IID, probs
    )
    cut = tree.cut(depth=1)
    assert cut.tokens.tolist() == [5, 1, 3]
    assert cut.parents.tolist() == [-1, 0, 0]
    assert cut.law == ProposalLaw.IID
    assert cut.draft_probs is not None
    assert torch.equal(cut.draft_probs, probs[[0, 1, 3]])


def test_drawn_and_chosen_trees_and_groups_may_be_mixed() -> None:
    """The law belongs to each group of siblings; a cut may leave nothing that was drawn."""
    law = torch.tensor([ProposalLaw.DETERMINISTIC, ProposalLaw.IID, 0], dtype=torch.int8)
    mixed = TokenTree(
        torch.tensor([5, 1, 2]), torch.tensor([-1, 0, 1]), law, torch.rand(3, 9).softmax(-1)
    )
    packed = TreeBatch.pack([mixed, TokenTree.root(3)], vocab_size=9)
    assert packed.laws.tolist() == [0, 1, 0, 0]
    assert packed.laws_used == {ProposalLaw.DETERMINISTIC, ProposalLaw.IID}
    assert packed.draft_probs is not None
    assert not packed.draft_probs[3].any()
    bare = mixed.cut(depth=0)
    assert bare.draft_probs is None
    assert TreeBatch.pack([bare], vocab_size=9).laws_used == {ProposalLaw.DETERMINISTIC}


def test_topologies() -> None:
    assert Topology.chain(3).parents == (-1, 0, 1)
    assert Topology.branching([2, 2]).parents == (-1, 0, 0, 1, 1, 2, 2)
    fading = Topology.fading(16)
    assert len(fading) == 16
    assert fading.cut(depth=1).depths[-1] == 1
    assert fading.cut(depth=9, nodes=5).parents == fading.parents[:5]


@pytest.mark.parametrize(
    ("tokens", "parents", "error", "match"),
    [
        ([1, 2], [-1, 1], ValueError, "earlier node"),  # its own parent
        ([1, 2, 3], [-1, 2, 0], ValueError, "earlier node"),  # a child before its parent
        ([1, 2], [0, 0], ValueError, "earlier node"),  # no root
        ([1, 2], [-1, -1], ValueError, "earlier node"),  # two roots
        ([1, 2], [-1], ValueError, "one shape"),
        ([], [], ValueError, "1 to 256 nodes"),
        ([0] * 257, list(range(-1, 256)), ValueError, "1 to 256 nodes"),
        ([-3], [-1], ValueError, "token ids"),
    ],
)
def test_a_malformed_tree_is_refused(
    tokens: list[int], parents: list[int], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        TokenTree(torch.tensor(tokens, dtype=torch.int64), torch.tensor(parents, dtype=torch.int64))


def test_wrong_dtypes_laws_and_vocabularies_are_refused() -> None:
    root, top = torch.tensor([3]), torch.tensor([-1])
    with pytest.raises(TypeError, match=r"tokens: expected int64, got torch\.int32"):
        TokenTree(root.int(), top)
    with pytest.raises(TypeError, match="parents: expected int64"):
        TokenTree(root, top.float())
    with pytest.raises(ValueError, match="draft_probs: needed exactly when"):
        TokenTree(root, top, ProposalLaw.IID)
    with pytest.raises(ValueError, match=r"draft_probs: expected \[1, V\]"):
        TokenTree(root, top, ProposalLaw.IID, torch.rand(2, 9))
    with pytest.raises(ValueError, match="probabilities that sum to one"):
        TokenTree(root, top, ProposalLaw.IID, torch.ones(1, 9))
    with pytest.raises(ValueError, match="on one device"):
        TokenTree(root, top.to("meta"))
    with pytest.raises(ValueError, match="vocabulary size 3, got 3"):
        TreeBatch.pack([TokenTree.root(3)], vocab_size=3)
    drawn = TokenTree(root, top, ProposalLaw.IID, torch.rand(1, 9).softmax(-1))
    with pytest.raises(ValueError, match=r"draft_probs: expected \[1, 7\], got \[1, 9\]"):
        TreeBatch.pack([drawn], vocab_size=7)
    with pytest.raises(ValueError, match="orphan"):
        TokenTree.from_choices(7, [(0, 1)], [[1], [2, 3]])
    with pytest.raises(ValueError, match="level order"):
        Topology((-1, 0, 1, 0))


def test_drafts_that_name_their_candidates_are_never_as_wide_as_the_vocabulary() -> None:
    names = torch.tensor([[4, 7], [1, 0], [2, 2]])
    probs = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    tokens, parents = torch.tensor([5, 7, 1]), torch.tensor([-1, 0, 1])
    tree = TokenTree(tokens, parents, ProposalLaw.IID, probs, names)
    other = TokenTree(tokens[:2], parents[:2], ProposalLaw.IID, torch.ones(2, 1), names[:2, :1])
    packed = TreeBatch.pack([tree, TokenTree.root(3), other], vocab_size=9)
    assert packed.draft_probs is not None
    assert packed.draft_probs.shape == (6, 2)
    dense = packed.draft_rows(torch.arange(6), 9)
    assert dense is not None
    assert dense[0].nonzero().flatten().tolist() == [4, 7]
    assert dense[2, 2] == 1.0
    assert not dense[3].any()
    assert dense[4, 4] == 1.0
    mixed = TokenTree(tokens, parents, ProposalLaw.IID, dense[:3])
    both = TreeBatch.pack([tree, mixed], vocab_size=9)
    assert both.draft_tokens is None
    assert both.draft_probs is not None
    assert torch.equal(both.draft_probs[:3], both.draft_probs[3:])
    kept = tree.cut(depth=1)
    assert kept.draft_tokens is not None
    assert torch.equal(kept.draft_tokens, names[:2])
    with pytest.raises(ValueError, match="draft_tokens: expected int64 in the shape of draft_pr"):
        TokenTree(tokens, parents, ProposalLaw.IID, probs, names[:, :1])
    with pytest.raises(ValueError, match=r"sum of 1\.5 for the children of node 1"):
        TokenTree(tokens, parents, ProposalLaw.IID, probs * torch.tensor([[1], [1.5], [1]]), names)


def test_the_first_chain_of_a_tree_keeps_the_first_child_of_every_node() -> None:
    tree = TokenTree.from_lists([9, 1, 2, 3, 4, 5], [-1, 0, 0, 2, 1, 1])
    assert tree.first_chain().paths() == [[9, 1, 4]]
    chain = TokenTree.chain(1, [2, 3])
    assert chain.first_chain() is chain


def test_shapes_are_walked_from_the_leaves_up_and_level_by_level() -> None:
    tree = TokenTree.from_lists([0] * 6, [-1, 0, 0, 1, 1, 2])
    batch = TreeBatch.pack([tree, TokenTree.chain(0, [1, 2])], vocab_size=5)
    by_place = batch.postorder.argsort().tolist()
    assert by_place == [3, 4, 1, 5, 2, 0, 8, 7, 6]
    assert [rows.tolist() for rows in batch.inner_levels] == [[0, 6], [1, 2, 7]]
