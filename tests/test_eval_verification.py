"""What the verification tables are made by, on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from specdec.drafters import DraftModel
from specdec.eval import proofs, rules
from specdec.testing import TINY, degraded, tiny_model
from specdec.topology import Topology
from specdec.tree import ProposalLaw

VOCAB = TINY["vocab_size"]


@pytest.fixture(scope="module")
def model() -> Any:
    model: Any = tiny_model("Llama")
    model.generation_config.eos_token_id = 7
    return model


def test_samples_of_one_law_pass_and_of_two_do_not(model: Any) -> None:
    prompt = torch.tensor([[1, 2, 3]])
    tree = DraftModel(degraded(model, bits=6), Topology.branching([2]))
    runs: dict[str, Any] = {
        "none": specdec.wrap(model, "none"),
        "drawn": specdec.wrap(model, tree, rule="traversal", nodes=4),
        "other law": specdec.wrap(model, tree, rule="typical", nodes=4),
    }
    rows = proofs.compare_samples(runs, prompt, count=400, new=8, batch=200, temperature=2.0)
    assert [row.tokens_per_step > 1 for row in rows] == [False, True, True]
    assert rows[0].loglik_p == rows[0].length_p == 1.0
    assert min(rows[1].loglik_p, rows[1].length_p) > proofs.REJECT
    assert rows[2].loglik_p < proofs.REJECT, "typical acceptance is lossy, and noticed"


def test_the_kolmogorov_test_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = torch.randn(400).double(), torch.randn(300).double() + 0.15
    expected = stats.ks_2samp(first.numpy(), second.numpy(), method="asymp").pvalue
    assert proofs.kolmogorov(first, second) == pytest.approx(expected, rel=0.2)


def test_ties_are_counted_against_transformers(model: Any) -> None:
    prompts = [torch.randint(8, VOCAB, (1, 6)) for _ in range(3)]
    rows = proofs.compare_ties(model, specdec.wrap(model, "ngram"), prompts, 12)
    assert [(row.different, row.prompts, row.widest_gap) for row in rows] == [(0, 3, 0.0)] * 2
    assert rows[0].low == 0.0
    assert 0.4 < rows[0].high < 0.7
    other: Any = tiny_model("Llama", hidden_size=16)
    assert proofs.compare_ties(model, specdec.wrap(other, "ngram"), prompts, 12)[1].different == 3


def test_rules_are_measured_on_a_padded_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules.SHAPES, "small", Topology.branching([2, 2]))
    prompts = [torch.randint(8, VOCAB, (1, length)) for length in (4, 7)]
    rows = rules.measure(
        model,
        degraded(model, bits=4),
        prompts,
        temperature=1.0,
        shape="small",
        law=ProposalLaw.IID,
        new=6,
    )
    assert {row.rule for row in rows} == {"sample-and-match", "multi-round", "traversal"}
    assert all(0 < row.mean < 2 and row.trees >= 4 for row in rows)


def test_the_cost_of_verification_can_be_measured() -> None:
    pytest.importorskip("triton")
    from specdec.eval import verify_cost

    rows = verify_cost.measure((1,), 3, 128, torch.bfloat16, torch.device("cpu"))
    assert len(rows) == len(verify_cost.CASES)
    assert all(row.alike == 1 for row in rows), "kernels decide as torch does"
