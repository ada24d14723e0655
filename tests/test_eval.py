"""The cost model and the losslessness check of a suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec.eval.compare import compare
from specdec.eval.cost import StepCost, measure_step
from specdec.eval.lossless import Tally, judge, load_questions
from specdec.target import Target
from specdec.testing import TINY, RandomDrafter, tiny_model


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
