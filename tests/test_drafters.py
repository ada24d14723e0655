"""Drafters propose what they say, and a draft model's cache follows the target's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specdec
from specdec import ProposalLaw, testing
from specdec.drafters import DraftModel, NGram
from specdec.testing import TINY, degraded, tiny_model
from specdec.topology import Topology

VOCAB = TINY["vocab_size"]
GREEDY: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}


def test_ngram_merges_what_followed_earlier_occurrences() -> None:
    text = [5, 1, 2, 3, 9, 5, 1, 2, 4, 9, 7, 1, 2, 6, 9, 5, 1, 2]
    tree = NGram(depth=2).draft(text, 16)
    assert tree.tokens[0] == 2
    assert sorted(tree.paths()) == [[2, 3, 9], [2, 4, 9], [2, 6, 9]]
    # The occurrences that agree on three tokens count more than the one that agrees on two, and
    # of two that agree alike the later one comes first.
    assert tree.tokens.tolist()[1:4] == [4, 9, 3]
    assert NGram().draft([1, 2, 3], 16).paths() == [[3]], "nothing to look up"
    assert NGram().draft([4], 16).paths() == [[4]]
    assert len(NGram().draft([1, 1, 1, 1, 1, 1], 4)) == 4


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 20))
def test_every_ngram_path_occurred_before(text: list[int], nodes: int) -> None:
    tree = NGram(depth=5).draft(text, nodes)
    assert len(tree) <= nodes
    written = " " + " ".join(map(str, text)) + " "
    for path in tree.paths():
        assert len(path) <= 6
        assert f" {' '.join(map(str, path))} " in written
    assert len({tuple(path) for path in tree.paths()}) == len(tree.paths()), "siblings differ"


def small_model(seed: int = 1, **changes: Any) -> Any:
    model = tiny_model("Llama", **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "topology",
    [None, Topology.chain(1), Topology.chain(6), Topology.branching([3, 2, 1])],
    ids=["default", "root", "chain", "branching"],
)
@pytest.mark.parametrize("law", list(ProposalLaw))
def test_a_draft_model_follows_the_target(topology: Topology | None, law: ProposalLaw) -> None:
    model: Any = tiny_model("Llama")
    prompts = torch.randint(1, VOCAB, (3, 7))
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    inputs: dict[str, Any] = {"input_ids": prompts, "attention_mask": mask}
    drafter = DraftModel(small_model(), topology, law=law)
    wrapped: Any = specdec.wrap(model, drafter, nodes=16)
    expected = model.generate(**inputs, **GREEDY)
    out = wrapped.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    if topology is None or len(topology) > 1:
        assert out.stats.tokens_per_step > 1.5
    sampled_run = wrapped.generate(**inputs, max_new_tokens=20, do_sample=True, seed=1)
    assert sampled_run.shape == (3, 27)
    cache = drafter._target.cache
    cache.check_integrity()
    assert not cache.sequences


def test_the_draft_cache_holds_the_committed_text_and_nothing_else() -> None:
    """With itself as the draft, chains are always accepted: one wrong key would show."""
    model: Any = tiny_model("Gemma2")
    prompts = torch.randint(1, VOCAB, (2, 7))
    options = {**GREEDY, "max_new_tokens": 41}  # one with the prompt, then 8 chains
    wrapped: Any = specdec.wrap(model, DraftModel(model, Topology.chain(5)), nodes=5)
    out = wrapped.generate(prompts, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, model.generate(prompts, **options))
    assert out.stats.tokens_per_step == 5.0


def test_sampled_drafts_from_the_target_itself_are_always_accepted() -> None:
    model: Any = tiny_model("Llama")
    prompts = torch.randint(1, VOCAB, (2, 7))
    drafter = DraftModel(model, Topology.chain(5), law=ProposalLaw.IID)
    wrapped: Any = specdec.wrap(model, drafter, nodes=5)
    options = {**GREEDY, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 1}
    options["max_new_tokens"] = 41  # one with the prompt, then 8 chains
    out = wrapped.generate(prompts, return_dict_in_generate=True, **options)
    assert out.stats.rule == "traversal"
    assert out.stats.tokens_per_step == 5.0


@pytest.mark.parametrize("vocab", [VOCAB - 7, VOCAB + 7])
def test_padded_vocabularies_are_tolerated(vocab: int) -> None:
    model: Any = tiny_model("Llama")
    prompts = torch.randint(1, VOCAB - 7, (2, 7))
    small = tiny_model("Llama", vocab_size=vocab)
    for law in ProposalLaw:
        drafter = DraftModel(small, law=law)
        wrapped: Any = specdec.wrap(model, drafter, nodes=12)
        assert torch.equal(wrapped.generate(prompts, **GREEDY), model.generate(prompts, **GREEDY))
        wrapped.generate(prompts, max_new_tokens=20, do_sample=True, seed=1)


def test_a_draft_model_with_another_vocabulary_is_refused() -> None:
    model: Any = tiny_model("Llama", vocab_size=5000)
    wrapped: Any = specdec.wrap(model, tiny_model("Llama"))
    with pytest.raises(ValueError, match=r"draft model: its vocabulary of 97 .* target's 5000"):
        wrapped.generate(torch.randint(1, 97, (1, 7)), max_new_tokens=4)


def test_a_draft_model_may_have_a_shorter_memory_than_the_target() -> None:
    """GPT-2's positions are learned: one behind the last would be an error."""
    model: Any = tiny_model("GPT2")
    small = tiny_model("GPT2", n_positions=40)
    prompts = torch.randint(1, VOCAB, (3, 30))
    expected = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=226, do_sample=False
    )
    for draft in (model, small):
        wrapped: Any = specdec.wrap(model, DraftModel(draft, Topology.branching([2, 1, 1, 1])))
        out = wrapped.generate(prompts, max_new_tokens=226, do_sample=False)
        assert torch.equal(out, expected)


def test_one_draft_model_serves_several_runs_at_once() -> None:
    model: Any = tiny_model("Llama")
    drafter = DraftModel(small_model(), Topology.chain(4))
    wrappers: list[Any] = [specdec.wrap(model, drafter), specdec.wrap(model, drafter)]
    prompts = [torch.randint(1, VOCAB, (2, 7)) for _ in range(3)]
    streams = [
        wrappers[index % 2].stream(prompt, max_new_tokens=30, do_sample=False)
        for index, prompt in enumerate(prompts)
    ]
    texts: list[dict[int, list[int]]] = [{0: [], 1: []} for _ in prompts]
    for steps in itertools.zip_longest(*streams):
        for text, step in zip(texts, steps, strict=True):
            for row, tokens in (step.tokens if step else {}).items():
                text[row] += tokens
    for prompt, text in zip(prompts, texts, strict=True):
        expected = model.generate(prompt, max_new_tokens=30, do_sample=False)[:, 7:]
        assert [text[0], text[1]] == expected.tolist()
    assert not drafter._target.cache.sequences


def test_degraded_copies_are_worse_in_a_known_way() -> None:
    model: Any = tiny_model("Llama", num_hidden_layers=5)
    tokens = torch.randint(1, VOCAB, (1, 30))
    with torch.no_grad():
        exact = model(tokens).logits
        errors = [
            float((degraded(model, bits=bits)(tokens).logits - exact).norm()) for bits in (8, 6, 4)
        ]
        fewer = degraded(model, layers=3)
        assert len(fewer.model.layers) == 3
        assert not torch.equal(fewer(tokens).logits, exact)
        assert torch.equal(model(tokens).logits, exact), "the original is left alone"
    assert 0 < errors[0] < errors[1] < errors[2]
    with pytest.raises(ValueError, match="bits: expected 2 to 8, got 1"):
        degraded(model, bits=1)
    with pytest.raises(ValueError, match="layers: expected 2 to 5, got 9"):
        degraded(model, layers=9)


def test_test_drafters_do_what_they_say() -> None:
    text = list(range(20))
    exact = testing.OracleDrafter([text], corrupt=0.0, vocab_size=VOCAB)
    tree = exact.draft(text[:5], 9)
    assert max(tree.paths(), key=len) == [4, 5, 6, 7, 8]
    assert len(tree) == 9
    spoiled = testing.OracleDrafter([text], corrupt=1.0, vocab_size=VOCAB).draft(text[:5], 9)
    assert [4, 5] in spoiled.paths()
    assert len(max(spoiled.paths(), key=len)) == 5


def test_drafts_that_are_not_numbers_count_as_chosen() -> None:
    model: Any = tiny_model("Llama")
    broken: Any = small_model()
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    prompts = torch.randint(1, VOCAB, (2, 7))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "seed": 1}
    plain: Any = specdec.wrap(model, "none")
    for law in (ProposalLaw.IID, ProposalLaw.WITHOUT_REPLACEMENT):
        drafter = DraftModel(broken, Topology.branching([2, 2]), law=law)
        wrapped: Any = specdec.wrap(model, drafter, rule="sample-and-match", nodes=7)
        assert torch.equal(wrapped.generate(prompts, **options), plain.generate(prompts, **options))
        wrapped.rule = "traversal"
        assert wrapped.generate(prompts, **options).shape == (2, 19)
