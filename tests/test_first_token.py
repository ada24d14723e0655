"""The pass that ends a prompt gives the first token: the one that a step with a bare root gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec import NoDraft, Verified
from specdec.drafters import NGram
from specdec.drafting import Observation
from specdec.rules import RULES
from specdec.target import Target
from specdec.testing import TINY, RandomDrafter, tiny_model
from tests.checks import greedy, nothing_left

VOCAB = TINY["vocab_size"]
PAGE = 16
PIECE = 2 * PAGE
NEW = 12


@pytest.fixture(scope="module")
def hf_model() -> Any:
    return tiny_model("Llama")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every pass of the model."""
    rows: list[int] = []
    forward = Target.forward

    def counting(self: Target, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(tokens))
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Target, "forward", counting)
    return rows


def random_text(length: int) -> list[int]:
    return torch.randint(1, VOCAB, (length,)).tolist()


@pytest.mark.parametrize("length", [1, 2, PAGE, PAGE + 1, *range(PIECE - 1, PIECE + 3), 2 * PIECE])
def test_prompts_that_end_at_the_edges_of_pages_and_pieces(
    hf_model: Any, passes: list[int], length: int
) -> None:
    model, prompt = specdec.wrap(hf_model, page_size=PAGE), random_text(length)
    with model.engine(step_tokens=PIECE) as engine:
        handle = engine.submit(prompt, max_new_tokens=NEW, do_sample=False)
        emissions = [emission for _ in range(0, length, PIECE) for emission in engine.step()]
        assert passes == [min(PIECE, length - start) for start in range(0, length, PIECE)]
        (emission,) = emissions
        assert emission.tokens == handle.tokens == greedy(hf_model, prompt, 1)
        assert emission.request.cached == length, "all tokens before the new root"
        assert handle.result() == greedy(hf_model, prompt, NEW)
    stats = engine.stats
    left_over = length % PIECE == 1  # the root alone, which is decoded
    assert stats.first_tokens == (0 if left_over else 1)
    assert stats.prefilled_tokens == length - 1
    assert stats.tokens == NEW
    assert stats.tokens_per_step == (NEW - stats.first_tokens) / stats.steps
    nothing_left(model)


def test_one_token_takes_one_pass(hf_model: Any, passes: list[int]) -> None:
    """Also with prompts of many lengths, and where the first token ends the text."""
    model = specdec.wrap(hf_model)
    prompts = [random_text(length) for length in (3, 40, 17)]
    first = [greedy(hf_model, prompt, 1) for prompt in prompts]
    ends = [token for tokens in first for token in tokens]
    for limit in ({"max_new_tokens": 1}, {"max_new_tokens": NEW, "eos_token_id": ends}):
        passes.clear()
        model.cache.prefixes.clear()
        with model.engine() as engine:
            handles = [engine.submit(p, do_sample=False, **limit) for p in prompts]
            emissions = engine.step()
            assert engine.idle
        assert passes == [60]
        assert [handle.result() for handle in handles] == first
        assert sorted(e.tokens for e in emissions) == sorted(first)
        assert (engine.stats.steps, engine.stats.tokens_per_step) == (0, 0.0)
        nothing_left(model)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.samples])
def test_it_is_the_token_of_a_step_with_a_bare_root(hf_model: Any, rule: str) -> None:
    """The second call finds the prompts cached whole, and steps at once."""
    model: Any = specdec.wrap(hf_model, NoDraft(), rule=rule, page_size=PAGE)
    ids = torch.tensor([[0] * PAGE + random_text(PAGE + 1), random_text(PIECE + 1)])
    mask = torch.ones_like(ids)
    mask[0, :PAGE] = 0
    options: dict[str, Any] = {
        "do_sample": True, "temperature": 1.5, "repetition_penalty": 1.3, "seed": 3,
        "output_scores": True, "return_dict_in_generate": True,
    }  # fmt: skip
    one, two = (
        model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options) for _ in range(2)
    )
    assert (one.stats.first_tokens, two.stats.first_tokens) == (2, 0)
    assert (one.stats.steps, two.stats.steps) == (2 * NEW - 2, 2 * NEW)
    assert torch.equal(one.sequences, two.sequences)
    torch.testing.assert_close(one.scores, two.scores, rtol=1e-4, atol=1e-4)
    if rule == "sample-and-match":
        drafted: Any = specdec.wrap(hf_model, RandomDrafter(VOCAB), rule=rule)
        out = drafted.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
        assert torch.equal(out.sequences, one.sequences)


def test_observers_are_told_and_drafters_have_proposed_nothing(hf_model: Any) -> None:
    class Watching(NGram):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Observation] = []

        def observe(self, observation: Observation) -> None:
            self.seen.append(observation)

    drafter, verified = Watching(), list[Verified]()
    model: Any = specdec.wrap(hf_model, drafter)
    prompts = torch.tensor([random_text(20) for _ in range(2)])
    out = model.generate(
        prompts, max_new_tokens=NEW, do_sample=False, observer=verified.append,
        return_dict_in_generate=True,
    )  # fmt: skip
    first, *others = verified
    assert first.observation.trees.tokens.tolist() == prompts[:, -1].tolist()
    assert first.observation.paths == ((0,), (0,))
    assert first.scores.argmax(1).tolist() == out.sequences[:, 20].tolist()
    assert [step.observation for step in others] == drafter.seen
    rows: dict[int, list[int]] = {0: [], 1: []}
    for step in verified:
        for emission in step.emissions:
            rows[emission.request.row] += emission.tokens
    assert [rows[0], rows[1]] == out.sequences[:, 20:].tolist()


def test_it_comes_beside_trees_of_other_policies(hf_model: Any, passes: list[int]) -> None:
    model = specdec.wrap(hf_model, nodes=4)
    prompts = [random_text(20), random_text(40), random_text(9)]
    with model.engine(step_tokens=PIECE) as engine:
        running = engine.submit(prompts[0], max_new_tokens=NEW, do_sample=False)
        engine.step()
        others = [
            engine.submit(prompts[1], max_new_tokens=NEW, do_sample=False, drafter=NoDraft()),
            engine.submit(prompts[2], max_new_tokens=NEW, do_sample=True, top_k=1, seed=1),
        ]
        sizes = []
        while not all(handle.tokens for handle in others):
            sizes.append([len(emission.tokens) > 0 for emission in engine.step()])
        assert sizes == [[True], [True, True, True]], "a piece, then its end and the other prompt"
        engine.run_all()
    for prompt, handle in zip(prompts, [running, *others], strict=True):
        assert handle.tokens == greedy(hf_model, prompt, NEW)
    assert engine.stats.first_tokens == 3
    nothing_left(model)


def test_requests_that_were_preempted_go_on_with_it(hf_model: Any) -> None:
    model = specdec.wrap(hf_model, nodes=4, page_size=PAGE, max_pages=9, prefix_cache=False)
    prompts = [random_text(40 + index) for index in range(3)]
    with model.engine() as engine:
        handles = [engine.submit(p, max_new_tokens=30, do_sample=False) for p in prompts]
        engine.run_all()
    for prompt, handle in zip(prompts, handles, strict=True):
        assert handle.result() == greedy(hf_model, prompt, 30)
    stats = engine.stats
    assert stats.preemptions > 0
    assert stats.first_tokens == 3 + stats.preemptions
    assert stats.tokens == 90
    assert stats.tokens == stats.first_tokens + stats.steps + stats.accepted
    nothing_left(model)


@pytest.mark.parametrize("length", [PAGE // 2, 2 * PAGE + 5])
@pytest.mark.parametrize("ends", ["limit", "token"])
def test_equal_prompts_are_computed_once_also_where_the_first_token_ends_them(
    hf_model: Any, passes: list[int], length: int, ends: str
) -> None:
    """The first of them is over when the others may be forked from it."""
    model: Any = specdec.wrap(hf_model, page_size=PAGE)
    prompt = random_text(length)
    token = greedy(hf_model, prompt, 1)
    limits: dict[str, Any] = {"limit": {"max_new_tokens": 1}, "token": {"eos_token_id": token}}
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=1, num_return_sequences=5, **limits[ends]
    )
    assert out.tolist() == [prompt + token] * 5
    assert len(passes) == 2
    assert passes[0] == length
    nothing_left(model)
