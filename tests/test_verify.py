"""Acceptance rules: draws, choices, and the joint law through the public generate()."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import specdec
from specdec import SequenceDrafter, rules, testing
from specdec.batch import TreeBatch
from specdec.drafters import DraftModel
from specdec.laws import SiblingLaw, sibling_law
from specdec.noise import Purpose, split_seeds, uniform
from specdec.rules import (
    RULES,
    Greedy,
    MultiRound,
    SampleAndMatch,
    Threshold,
    Traversal,
    Typical,
    select_rule,
)
from specdec.sampling import Sampler, draw
from specdec.topology import Topology
from specdec.tree import ProposalLaw, TokenTree
from specdec.verify import AcceptanceRule, Noise

V = 4


@pytest.mark.parametrize("grid", [1000])
def test_a_draw_over_a_grid_of_uniforms_gives_the_distribution(grid: int) -> None:
    probs = torch.tensor([0.0, 0.125, 0.0, 0.5, 0.375, 0.0])
    uniforms = (torch.arange(grid).double() + 0.5) / grid
    tokens = draw(probs.expand(grid, -1), uniforms)
    assert (torch.bincount(tokens, minlength=6) / grid).tolist() == probs.tolist()
    ends = draw(probs.expand(2, -1), torch.tensor([0.0, 1 - 2**-53]).double())
    assert ends.tolist() == [1, 4]  # never a token without probability


def test_the_noise_is_uniform_independent_and_a_function_of_its_key() -> None:
    seeds = split_seeds(1, 500)
    assert len(set(seeds.tolist())) == 500
    numbers = uniform(seeds[:, None], torch.arange(40)[None], Purpose.SAMPLE)
    assert torch.equal(numbers, uniform(seeds[:, None], torch.arange(40)[None], Purpose.SAMPLE))
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    others = [
        uniform(seeds[:, None], torch.arange(40)[None], Purpose.ACCEPT),
        uniform(seeds[:, None], torch.arange(1, 41)[None], Purpose.SAMPLE),
        uniform(seeds[:, None] + 1, torch.arange(40)[None], Purpose.SAMPLE),
    ]
    for other in others:
        pair = torch.stack([numbers.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.03


def noise(batch: int) -> Noise:
    return Noise(split_seeds(3, batch), torch.arange(batch) + 10)


def test_greedy_takes_the_deepest_path_of_likeliest_tokens() -> None:
    trees = [
        TokenTree.from_lists([9, 1, 2, 3, 4], [-1, 0, 0, 2, 3]),
        TokenTree.root(9),
        TokenTree.from_lists([9, 1, 1, 5], [-1, 0, 0, 2]),
    ]
    batch = TreeBatch.pack(trees, vocab_size=10)
    logits = torch.zeros(len(batch.tokens), 10)
    for row, token in enumerate([2, 0, 3, 7, 0, 6, 1, 8, 5, 0]):
        logits[row, token] = 1
    outcome = Greedy().verify(batch, logits, noise(3))
    assert outcome.paths.tolist() == [[0, 2, 3, -1], [0, -1, -1, -1], [0, 2, 3, -1]]
    assert outcome.next_tokens.tolist() == [7, 6, 0]
    assert outcome.continued.tolist() == [True, False, False]
    assert outcome.lengths.tolist() == [3, 1, 3]


@pytest.mark.parametrize("rule", [SampleAndMatch(), MultiRound(), Traversal(), Typical()])
def test_an_empty_tree_is_plain_sampling_with_the_same_numbers(rule: AcceptanceRule) -> None:
    batch = TreeBatch.pack([TokenTree.root(0)] * 50, vocab_size=V)
    probs = torch.rand(50, V).softmax(-1)
    plain = draw(probs, noise(50).at(torch.arange(50), 0, Purpose.SAMPLE))
    assert torch.equal(rule.verify(batch, probs, noise(50)).next_tokens, plain)


@pytest.mark.parametrize("rule", [SampleAndMatch(), MultiRound(), Traversal(), Typical()])
def test_the_place_in_the_batch_does_not_matter(rule: AcceptanceRule) -> None:
    generator = torch.Generator().manual_seed(5)
    trees = [
        TokenTree.from_lists([0, 1, 2, 3, 1], [-1, 0, 0, 1, 1]),
        TokenTree.root(2),
        TokenTree.chain(1, [3, 3, 0]),
    ]
    probs = [torch.rand(len(tree), V, generator=generator).softmax(-1) for tree in trees]
    together = rule.verify(TreeBatch.pack(trees, vocab_size=V), torch.cat(probs), noise(len(trees)))
    for index, tree in enumerate(trees):
        keyed = Noise(noise(3).seeds[index : index + 1], noise(3).next_positions[index : index + 1])
        alone = rule.verify(TreeBatch.pack([tree], vocab_size=V), probs[index], keyed)
        width = alone.paths.shape[1]
        assert together.paths[index, :width].tolist() == alone.paths[0].tolist()
        assert together.next_tokens[index] == alone.next_tokens[0]


def test_an_illegal_rule_is_refused_with_the_legal_ones_named() -> None:
    chosen, iid, once = ProposalLaw
    for law, best in ((chosen, "sample-and-match"), (iid, "traversal"), (once, "traversal")):
        rule, under = select_rule("auto", law, do_sample=True)
        assert (rule.name, under) == (best, law)
    assert select_rule("multi-round", iid, do_sample=False)[0].name == "greedy"
    with pytest.raises(
        ValueError, match="use one of auto, sample-and-match, token-level, without-"
    ):
        select_rule("multi-round", once, do_sample=True)
    with pytest.raises(ValueError, match="'without-replacement' is not lossless for iid proposals"):
        select_rule("without-replacement", iid, do_sample=True)
    with pytest.raises(ValueError, match="'greedy' decodes greedily"):
        select_rule("greedy", iid, do_sample=True)
    with pytest.raises(
        ValueError, match="expected auto, greedy, sample-and-match, token-level, mu"
    ):
        select_rule("lucky", iid, do_sample=True)


def test_a_rule_switches_a_drafter_to_the_law_it_draws_best_with() -> None:
    chosen, iid, once = ProposalLaw
    any_law = frozenset(ProposalLaw)
    wanted = {"multi-round": iid, "without-replacement": once, "traversal": once, "block": once}
    for name, law in wanted.items():
        assert select_rule(name, chosen, do_sample=True, can_draft=any_law)[1] == law
        assert select_rule(name, chosen, do_sample=False, can_draft=any_law)[1] == chosen
    for name in ("auto", "sample-and-match", "typical"):
        assert select_rule(name, chosen, do_sample=True, can_draft=any_law)[1] == chosen
    assert select_rule("traversal", iid, do_sample=True, can_draft=any_law)[1] == iid, "legal as is"
    assert select_rule("multi-round", once, do_sample=True, can_draft=any_law)[1] == iid
    assert select_rule("multi-round", chosen, do_sample=True)[1] == chosen, "a lookup cannot draw"


def test_lossy_rules_keep_the_deepest_acceptable_path_and_say_that_they_are_lossy() -> None:
    tree = TokenTree.from_lists([0, 1, 2, 3, 1, 0], [-1, 0, 0, 2, 3, 1])
    batch = TreeBatch.pack([tree, TokenTree.root(1)], vocab_size=V)
    likely = {0: (0.0, 0.45, 0.45, 0.1), 2: (0.0, 0.0, 0.05, 0.95), 3: (0.97, 0.01, 0.01, 0.01)}
    probs = torch.full((7, V), 0.25)
    for row, line in likely.items():
        probs[row] = torch.tensor(line)
    outcome = Threshold(least=0.4).verify(batch, probs, noise(2))
    assert outcome.paths.tolist() == [[0, 2, 3, -1], [0, -1, -1, -1]]
    assert outcome.continued.tolist() == [True, False]
    # After node 2 the entropy is small, so 0.09 is the bound; at node 3 it is 0.3 * exp(-H) > 0.01.
    assert Typical().verify(batch, probs, noise(2)).paths.tolist()[0] == [0, 2, 3, -1]
    for rule in RULES.values():
        assert rule.lossless == ("(lossy)" not in rule().label)
    assert Typical().label == "typical (lossy)"


# The joint law of three tokens, through the whole public generate(). Three tokens of a vocabulary
# of 4 make 64 texts. A law that is off by a total variation of 0.08 shifts the chi-square statistic
# of 3,000 samples by at least 77, and is noticed with a probability of 0.9 or more.

SAMPLES = 3000
BOUND = 1e-4  # p-value below which a rule counts as wrong


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model: LlamaForCausalLM = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )
    model.eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(12 if weight.ndim > 1 else 1)
    return model


PROMPT = torch.tensor([[1, 3, 2]])
OPTIONS: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 3, "top_p": 0.95}


def exact_law(model: LlamaForCausalLM) -> Tensor:
    """[64] probabilities of every three-token answer, from the model's own forward."""
    warpers = (TemperatureLogitsWarper(0.9), TopKLogitsWarper(3), TopPLogitsWarper(0.95))
    sampler = Sampler(True, warpers)
    answers = torch.tensor(list(itertools.product(range(V), repeat=3)))
    with torch.no_grad():
        logits = model(torch.cat([PROMPT.expand(len(answers), -1), answers], 1)).logits
    probs = sampler.draft_probs(logits[:, 2:5].flatten(0, 1)).view(len(answers), 3, V).double()
    return probs.gather(2, answers[..., None]).squeeze(2).prod(1)


def p_value(model: LlamaForCausalLM, drafter: Any, rule: str) -> float:
    wrapped = specdec.wrap(model, drafter, rule=rule, nodes=8)
    counts = torch.zeros(V**3, dtype=torch.float64)
    place = torch.tensor([V * V, V, 1])
    for seed in range(SAMPLES // 1000):
        out = wrapped.generate(
            PROMPT, max_new_tokens=3, num_return_sequences=1000, seed=seed, **OPTIONS
        )
        assert isinstance(out, Tensor)
        counts += torch.bincount((out[:, 3:] * place).sum(1), minlength=V**3)
    expected = exact_law(model)
    possible = expected > 0
    if counts[~possible].any():
        return 0.0  # a text that the target cannot emit
    expected *= SAMPLES / expected.sum()  # float32 probabilities add up to nearly one
    return float(stats.chisquare(counts[possible].numpy(), expected[possible].numpy()).pvalue)


class Loose(SequenceDrafter):
    """Draws without replacement on the host, and names the few tokens it draws from."""

    law = ProposalLaw.WITHOUT_REPLACEMENT

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        names = torch.tensor([[3, 0, 1]]).repeat(4, 1)
        probs = torch.tensor([[0.5, 0.2, 0.3]]).repeat(4, 1)
        picks = torch.multinomial(probs[0], 3, generator=self.generator)
        picks = torch.cat([picks[:2], torch.multinomial(probs[0], 1, generator=self.generator)])
        return TokenTree(
            torch.cat([torch.tensor([tokens[-1]]), names[0][picks]]),
            torch.tensor([-1, 0, 0, 1]),
            self.law,
            probs,
            names,
        )


TREE = Topology.branching([2, 2])
DRAFTERS: dict[str, tuple[Callable[[], Any], Sequence[str]]] = {
    "none": (lambda: "none", []),
    "random trees": (lambda: testing.RandomDrafter(V), ["multi-round"]),
    "likeliest": (lambda: DraftModel(tiny(1), TREE), []),
    "draft model": (
        lambda: DraftModel(tiny(1), TREE),
        ["without-replacement", "traversal"],
    ),
    "draft chains": (lambda: DraftModel(tiny(1)), ["block"]),
    "drawn independently": (
        lambda: DraftModel(tiny(1), TREE, law=ProposalLaw.IID),
        ["sample-and-match", "multi-round"],
    ),
    "drawn on the host": (Loose, ["traversal"]),
}


@pytest.mark.parametrize(
    ("drafter", "rule"), [(d, r) for d, (_, rules) in DRAFTERS.items() for r in rules]
)
def test_three_sampled_tokens_have_the_joint_law_of_the_target(drafter: str, rule: str) -> None:
    assert p_value(tiny(0), DRAFTERS[drafter][0](), rule) > BOUND


def wrong_residual(target: Tensor, *rest: Any) -> SiblingLaw:
    """After a rejection the target is sampled as if nothing had been tried."""
    law = sibling_law(target, *rest)
    return SiblingLaw(law.chances, law.weight, target)


def no_replacement_correction(
    target: Tensor, draft: Tensor, tokens: Tensor, present: Tensor, laws: Tensor, *rest: Any
) -> SiblingLaw:
    """Children drawn without replacement are held against what the first was drawn from."""
    return sibling_law(target, draft, tokens, present, torch.full_like(laws, 1), *rest)


@pytest.mark.parametrize(
    ("mistake", "rule"),
    [
        (wrong_residual, "multi-round"),
        (no_replacement_correction, "without-replacement"),
    ],
)
def test_the_joint_law_test_notices_mistakes(
    monkeypatch: pytest.MonkeyPatch, mistake: Any, rule: str
) -> None:
    monkeypatch.setattr(rules, "sibling_law", mistake)
    assert p_value(tiny(0), DRAFTERS["draft model"][0](), rule) < BOUND


def test_the_joint_law_test_notices_a_depth_that_is_off_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each node's children are held against the distribution behind the node's parent."""
    shipped = rules._law

    def wrong(trees: TreeBatch, target: Tensor, rows: Tensor, *rest: Any) -> SiblingLaw:
        above = trees.offsets[trees.tree] + trees.parents.clamp_min(0)
        return shipped(trees, target[above], rows, *rest)

    monkeypatch.setattr(rules, "_law", wrong)
    assert p_value(tiny(0), DRAFTERS["draft model"][0](), "traversal") < BOUND


def test_with_a_seed_sample_and_match_gives_the_text_of_a_plain_run() -> None:
    model = tiny(0)
    options = {**OPTIONS, "max_new_tokens": 40, "num_return_sequences": 5, "seed": 11}
    baseline: Any = specdec.wrap(model, "none")
    plain = baseline.generate(PROMPT, **options)
    for make, _ in DRAFTERS.values():
        wrapped: Any = specdec.wrap(model, make(), rule="sample-and-match")
        assert torch.equal(wrapped.generate(PROMPT, **options), plain)
    assert not torch.equal(baseline.generate(PROMPT, **{**options, "seed": 12}), plain)
