"""Every lossless rule, exactly: the shipped law summed over all trees that could have been drawn.

A tree of N nodes over V tokens can come out in V ** (N - 1) ways. All of them are one batch; the
law of what a step emits is the sum over trees, paths and next tokens. It must be the target's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specdec import rules
from specdec.batch import TreeBatch
from specdec.bits import ancestor_words
from specdec.laws import sibling_law
from specdec.noise import Purpose
from specdec.rules import RULES, Block, MultiRound, Traversal, traversal_law
from specdec.topology import Topology
from specdec.tree import ProposalLaw
from specdec.verify import AcceptanceRule, Noise

V = 3
CHOSEN, IID, ONCE = ProposalLaw
SHAPES = {
    "chain of 1": Topology.chain(2),
    "chain of 3": Topology.chain(4),
    "2 children": Topology.branching([2]),
    "3 children": Topology.branching([3]),
    "2 x 2": Topology.branching([2, 2]),
    "uneven": Topology((-1, 0, 0, 1, 1, 4)),
}


class Language:
    """A random distribution after every text."""

    def __init__(self, seed: int, sharp: float = 1.5, zeros: bool = False) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._sharp, self._zeros = sharp, zeros
        self._after: dict[tuple[int, ...], Tensor] = {}

    def after(self, text: tuple[int, ...]) -> Tensor:
        if text not in self._after:
            scores = torch.randn(V, generator=self._generator, dtype=torch.float64) * self._sharp
            if self._zeros:  # as top-k leaves them
                scores[scores.argmin()] = -torch.inf
            self._after[text] = scores.softmax(-1)
        return self._after[text]

    def chance(self, text: Sequence[int], of: tuple[int, ...] = ()) -> float:
        return math.prod(float(self.after((*of, *text[:i]))[token]) for i, token in enumerate(text))


@dataclass
class Drawn:
    """All trees of a shape, with the chance of each."""

    trees: TreeBatch
    target: Tensor
    chances: Tensor
    texts: list[tuple[int, ...]]


def all_trees(shape: Topology, law: ProposalLaw, target: Language, draft: Language) -> Drawn:
    chosen = tuple((2 * node) % V for node in range(1, len(shape)))
    drafts = [chosen] if law == CHOSEN else itertools.product(range(V), repeat=len(shape) - 1)
    tokens, chances, texts = [], [], []
    for drawn in drafts:
        line = (0, *drawn)
        path: list[tuple[int, ...]] = [()]
        chance = 1.0
        left: dict[int, Tensor] = {}
        for node in range(1, len(shape)):
            parent = shape.parents[node]
            path.append((*path[parent], line[node]))
            share = left.get(parent, draft.after(path[parent]))
            if law == ONCE and float(share.sum()) == 0:  # chosen, by the caller: any token will do
                chance *= float(line[node] == 0)
            elif law != CHOSEN:
                chance *= float(share[line[node]])
            if law == ONCE:
                share = share.clone()
                share[line[node]] = 0
                left[parent] = share / share.sum() if float(share.sum()) > 0 else share
        if chance > 0:
            tokens.append(line)
            chances.append(chance)
            texts += path
    count, size = len(tokens), len(shape)
    probs = torch.stack([draft.after(text) for text in texts])
    trees = TreeBatch(
        tokens=torch.tensor(tokens).flatten(),
        parents=torch.tensor(shape.parents).repeat(count),
        depths=torch.tensor(shape.depths).repeat(count),
        ancestors=ancestor_words(shape.ancestor_bits, size).repeat(count, 1),
        laws=torch.full((count * size,), law, dtype=torch.int8),
        draft_probs=None if law == CHOSEN else probs,
        sizes=(size,) * count,
        laws_used=frozenset({law}),
        max_depth=max(shape.depths),
        max_children=max(shape.parents.count(node) for node in range(size)),
    )
    rows = torch.stack([target.after(text) for text in texts])
    return Drawn(trees, rows, torch.tensor(chances, dtype=torch.float64), texts)


def endings(rule: AcceptanceRule, drawn: Drawn) -> tuple[Tensor, Tensor]:
    """[R], the chance that the path ends at each row, and [R, V], the next token then."""
    trees, target = drawn.trees, drawn.target
    rows = torch.arange(len(trees.tokens))
    if isinstance(rule, Traversal):
        entered, accept = traversal_law(trees, target)
        ends = torch.zeros_like(accept)
        for tree in range(len(trees.sizes)):
            mine = rows[trees.tree == tree]
            order = mine[trees.postorder[mine].argsort()]
            missed = torch.cat([accept.new_ones(1), (1 - accept[order])[:-1]]).cumprod(0)
            ends[order] = accept[order] * missed
        return ends, rules._law(trees, target, rows, entered).residual
    law = rules._law(trees, target, rows)
    reach, ends = torch.ones(len(rows)).double(), torch.zeros(len(rows)).double()
    for row in rows.tolist():
        left = reach[row].clone()
        for child, chance in zip(trees.children[row].tolist(), law.chances[row], strict=True):
            if child >= 0:
                reach[child] = left * chance
                left = left * (1 - chance)
        ends[row] = left
    return ends, law.residual


def emitted(drawn: Drawn, ends: Tensor, residual: Tensor, target: Language, length: int) -> Tensor:
    """The law of the first `length` tokens, when the target goes on after the step."""
    out = torch.zeros((V,) * length, dtype=torch.float64)
    chance = drawn.chances[drawn.trees.tree] * ends
    for row, text in enumerate(drawn.texts):
        for token in range(V):
            begun = (*text, token)
            for rest in itertools.product(range(V), repeat=length - len(begun)):
                out[(*begun, *rest)] += (
                    chance[row] * residual[row, token] * target.chance(rest, of=begun)
                )
    return out


def law_of(target: Language, length: int) -> Tensor:
    texts = itertools.product(range(V), repeat=length)
    return torch.tensor([target.chance(text) for text in texts], dtype=torch.float64).view(
        (V,) * length
    )


CASES = [
    (name, law, shape)
    for name, rule in RULES.items()
    if issubclass(rule, MultiRound | Traversal)
    for law in sorted(rule.legal_laws)
    for shape in SHAPES
    if not rule.chains or shape.startswith("chain")
]


@pytest.mark.parametrize(("name", "law", "shape"), CASES)
def test_a_step_emits_the_target_exactly(name: str, law: ProposalLaw, shape: str) -> None:
    for seed, zeros in ((0, False), (2, True)):
        target = Language(10 + seed, zeros=zeros)
        draft = Language(20 + seed, sharp=1.0, zeros=zeros)
        topology = SHAPES[shape]
        drawn = all_trees(topology, law, target, draft)
        assert float(drawn.chances.sum()) == pytest.approx(1, abs=1e-12)
        length = max(topology.depths) + 1
        ends, residual = endings(RULES[name](), drawn)
        out = emitted(drawn, ends, residual, target, length)
        torch.testing.assert_close(out, law_of(target, length), rtol=0, atol=1e-12)


@pytest.mark.parametrize("law", list(ProposalLaw))
@pytest.mark.parametrize("shape", ["chain of 3", "3 children", "uneven"])
def test_sample_and_match_emits_the_target_exactly(law: ProposalLaw, shape: str) -> None:
    """Sums the shipped match over everything that the target could have sampled at the nodes."""
    target, draft = Language(1), Language(2)
    topology = Topology(SHAPES[shape].parents[:4])
    drawn = all_trees(topology, law, target, draft)
    trees, length = drawn.trees, max(topology.depths) + 1
    out = torch.zeros((V,) * length, dtype=torch.float64)
    for samples in itertools.product(range(V), repeat=len(topology)):
        choice = torch.tensor(samples).repeat(len(trees.sizes))
        chance = drawn.target.gather(1, choice[:, None])[:, 0].view(-1, len(topology)).prod(1)
        outcome = rules._match(trees, choice)
        for tree, path in enumerate(outcome.paths.tolist()):
            last = trees.offsets[tree] + max(path)
            begun = (*drawn.texts[int(last)], int(outcome.next_tokens[tree]))
            for rest in itertools.product(range(V), repeat=length - len(begun)):
                out[(*begun, *rest)] += (
                    drawn.chances[tree] * chance[tree] * target.chance(rest, of=begun)
                )
    torch.testing.assert_close(out, law_of(target, length), rtol=0, atol=1e-12)


@pytest.mark.parametrize("law", [CHOSEN, IID, ONCE])
def test_traversal_and_block_accept_at_least_as_much(law: ProposalLaw) -> None:
    """On chains block verification is optimal; the weights make the difference."""
    target, draft = Language(3), Language(4)
    drawn = all_trees(SHAPES["chain of 3"], law, target, draft)
    depths = drawn.trees.depths * drawn.chances[drawn.trees.tree]
    lengths = {
        name: float((endings(RULES[name](), drawn)[0] * depths).sum())
        for name in ("token-level", "block", "traversal")
    }
    assert lengths["block"] == lengths["traversal"]
    if law == CHOSEN:
        assert lengths["block"] == pytest.approx(lengths["token-level"], abs=1e-12)
    else:
        assert lengths["block"] > lengths["token-level"] + 1e-3


class Grid(Noise):
    """Uniform numbers from a grid, in place of random ones: one tree for each point."""

    def __init__(self, accept: Tensor, sample: Tensor) -> None:
        object.__setattr__(self, "accept", accept)  # [B, nodes or ranks]
        object.__setattr__(self, "sample", sample)  # [B]

    def at(self, trees: Tensor, depths: Tensor | int, purpose: int | Tensor) -> Tensor:
        if isinstance(purpose, int) and purpose == Purpose.SAMPLE:
            return self.sample[trees]  # type: ignore[attr-defined,no-any-return]
        index = purpose - Purpose.ACCEPT + 0 * trees
        return self.accept[trees, index]  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("rule", [MultiRound(), Traversal(), Block()])
def test_a_draw_over_a_grid_of_uniforms_follows_the_law(rule: AcceptanceRule) -> None:
    """One drawn tree, 24 ** 3 points: paths and next tokens come as often as the law says."""
    shape = Topology.chain(3) if rule.chains else Topology.branching([2])
    drawn = all_trees(shape, IID, Language(5), Language(6))
    picked = next(
        t for t in range(9) if len(set(drawn.trees.tokens.view(9, 3)[t, 1:].tolist())) > 1
    )
    ends, residual = endings(rule, drawn)
    ends, residual = ends.view(9, 3)[picked], residual.view(9, 3, V)[picked]
    points = (torch.arange(24).double() + 0.5) / 24
    grid = torch.cartesian_prod(points, points, points)
    count = len(grid)
    nothing = torch.zeros(count).double()
    # Multi-round asks by rank, traversal by node; the root's own test always succeeds.
    accept = (
        grid[:, :2] if type(rule) is MultiRound else torch.cat([nothing[:, None], grid[:, :2]], 1)
    )
    trees = TreeBatch(
        tokens=drawn.trees.tokens.view(9, 3)[picked].repeat(count),
        parents=torch.tensor(shape.parents).repeat(count),
        depths=torch.tensor(shape.depths).repeat(count),
        ancestors=ancestor_words(shape.ancestor_bits, 3).repeat(count, 1),
        laws=torch.full((3 * count,), IID, dtype=torch.int8),
        draft_probs=drawn.trees.draft_probs.view(9, 3, V)[picked].repeat(count, 1),  # type: ignore[union-attr]
        sizes=(3,) * count,
        laws_used=frozenset({IID}),
        max_depth=max(shape.depths),
        max_children=drawn.trees.max_children,
    )
    target = drawn.target.view(9, 3, V)[picked].repeat(count, 1)
    outcome = rule.verify(trees, target, Grid(accept, grid[:, 2]))
    got = torch.zeros(3, V).double()
    got.index_put_((outcome.paths.amax(1), outcome.next_tokens), torch.ones(count).double(), True)
    torch.testing.assert_close(got / count, ends[:, None] * residual, rtol=0, atol=0.03)


def test_a_child_that_nothing_was_left_to_draw_from_counts_as_chosen() -> None:
    target = torch.tensor([[0.2, 0.5, 0.3]]).double()
    law = sibling_law(
        target,
        torch.tensor([[1.0, 0.0, 0.0]]).double(),
        torch.tensor([[0, 2]]),
        torch.ones(1, 2, dtype=torch.bool),
        torch.tensor([ONCE], dtype=torch.int8),
    )
    torch.testing.assert_close(law.chances, torch.tensor([[0.2, 0.375]]).double())
    torch.testing.assert_close(law.residual, torch.tensor([[0.0, 1.0, 0.0]]).double())
