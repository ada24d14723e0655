"""The cost model and the losslessness check of a suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec.batch import TreeBatch
from specdec.drafters import Beam, DraftModel
from specdec.eval.compare import compare
from specdec.eval.cost import StepCost, measure_step
from specdec.eval.loading import node_budget, parse_shape
from specdec.eval.lossless import Tally, judge, load_questions
from specdec.eval.rules import expected_lengths
from specdec.eval.verify_lossless import verify_lossless
from specdec.noise import split_seeds
from specdec.rules import RULES
from specdec.target import Target
from specdec.testing import TINY, RandomDrafter, degraded, tiny_model
from specdec.topology import Topology
from specdec.tree import ProposalLaw, TokenTree
from specdec.verify import Noise


@pytest.mark.parametrize(
    ("tree", "shape", "nodes"),
    [
        ("chain:5", Topology.chain(5), 5),
        ("3,2", Topology.branching([3, 2]), 10),
        ("beam:8x6", Beam(8, 6), 49),
        ("beam:8x6:32", Beam(8, 6), 32),
    ],
)
def test_shapes_are_read_from_the_command_line(tree: str, shape: object, nodes: int) -> None:
    assert parse_shape(tree) == shape
    assert node_budget(tree) == nodes


def test_the_budget_follows_the_cost_of_rows() -> None:
    free = StepCost((1, 8, 32), (1.0, 1.0, 1.0))
    linear = StepCost((1, 8, 32), (1.0, 8.0, 32.0))
    cpu = StepCost((1, 16, 32), (1.0, 2.8, 3.7))
    assert free.best_nodes() == 32
    assert linear.best_nodes() == 1
    assert 4 <= cpu.best_nodes() <= 8
    assert cpu.best_nodes(accept=0.9) > cpu.best_nodes(accept=0.5)
    assert linear.at(4) == 4.0


def test_measuring_leaves_the_cache_empty() -> None:
    target = Target(tiny_model("Llama"))
    cost = measure_step(target, context=20, rows=(1, 4), repeats=1)
    assert all(seconds > 0 for seconds in cost.seconds)
    target.cache.check_integrity()
    assert not target.cache.sequences


def test_compare_counts_both_arms_with_the_same_code() -> None:
    model: Any = tiny_model("Llama")
    prompts = torch.randint(1, TINY["vocab_size"], (1, 9))
    wrapped = specdec.wrap(model, RandomDrafter(TINY["vocab_size"]), nodes=6)
    result = compare(wrapped, inputs=prompts, max_new_tokens=20, do_sample=False)
    assert result.same_tokens
    assert result.plain.tokens == result.drafted.tokens == 20
    assert result.plain.drafted == 0 < result.drafted.drafted


def test_a_first_difference_counts_unless_it_is_a_near_tie() -> None:
    model: Any = tiny_model("Llama")
    reference = model.generate(torch.tensor([[3, 4]]), max_new_tokens=6, do_sample=False)[0]
    wrong = reference.clone()
    wrong[4] += 1
    assert judge(model, reference, reference) == "equal"
    assert judge(model, wrong, reference) == "different"
    assert judge(model, reference[:-1], reference) == "different"
    with torch.no_grad():
        model.lm_head.weight[:2] = 10 * model.lm_head.weight[reference[4]]
    assert judge(model, wrong, reference) == "near-tie"


def test_questions_are_taken_by_category(tmp_path: Path) -> None:
    lines = [
        {"question_id": i, "category": "big" if i < 15 else "small", "turns": [f"q{i}", "x"]}
        for i in range(20)
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    chosen = load_questions(file, small=2, large=3)
    assert [question.id for question in chosen] == [0, 1, 2, 15, 16]
    assert chosen[0].text == "q0"


def test_tallies_are_ratios_of_sums() -> None:
    assert Tally(tokens=9, steps=4).tokens_per_step == pytest.approx(2.25)
    assert Tally().tokens_per_step == 0


def test_verify_lossless_accepts_the_rules_and_notices_a_lossy_one() -> None:
    model: Any = tiny_model("Llama")
    drafter = DraftModel(degraded(model, bits=4), Topology.branching([2, 2]))
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 0.95, "samples": 400}
    prompt = torch.tensor([[5, 6, 7]])
    verdicts = {
        rule: verify_lossless(
            specdec.wrap(model, drafter, rule=rule, nodes=7), prompt, batch=200, **options
        )
        for rule in ("traversal", "typical")
    }
    assert verdicts["traversal"].passed
    assert not verdicts["typical"].passed
    assert verdicts["typical"].rule == "typical (lossy)"
    assert 0.1 < verdicts["traversal"].detectable < 0.3
    with pytest.raises(ValueError, match="samples: expected at least 320 for 64 cells, got 100"):
        verify_lossless(specdec.wrap(model), prompt, samples=100)


def test_expected_lengths_are_what_the_rules_accept_on_average() -> None:
    """Each rule decides 4,000 times on one tree; the laws say how much it keeps on average."""
    shape, count = Topology.branching([2, 1]), 4000
    tokens = torch.tensor([0, 1, 2, 2, 3])
    draft = torch.rand(5, 4).softmax(-1)
    target = (3 * torch.rand(5, 4)).softmax(-1)
    tree = TokenTree(tokens, torch.tensor(shape.parents), ProposalLaw.WITHOUT_REPLACEMENT, draft)
    one = TreeBatch.pack([tree], vocab_size=4)
    many = TreeBatch.pack([tree] * count, vocab_size=4)
    lengths = expected_lengths(one, target)
    assert set(lengths) == {"sample-and-match", "without-replacement", "traversal"}
    noise = Noise(split_seeds(1, count), torch.full((count,), 9))
    for name, length in lengths.items():
        outcome = RULES[name]().verify(many, target.repeat(count, 1), noise)
        assert float((outcome.lengths - 1).double().mean()) == pytest.approx(
            float(length), abs=0.05
        )
