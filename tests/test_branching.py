"""Branches against whole texts, and the examples on a tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import specdec
from specdec import Branch
from specdec.testing import TINY, tiny_model

EXAMPLES = Path(__file__).parent.parent / "examples"
VOCAB = TINY["vocab_size"]


@pytest.fixture(scope="module")
def hf_model() -> Any:
    return tiny_model("Llama")


@pytest.fixture
def model(hf_model: Any) -> Any:
    return specdec.wrap(hf_model)


def random_text(length: int) -> list[int]:
    return torch.randint(1, VOCAB, (length,)).tolist()


def greedy(hf_model: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = hf_model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return out[0].tolist()  # type: ignore[no-any-return]


def nothing_left(model: Any) -> None:
    model.cache.check_integrity()
    assert not model.cache.sequences


def example(name: str) -> Any:
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def direct_score(hf_model: Any, text: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = hf_model(torch.tensor([text + answer])).logits[0, len(text) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_branches_go_on_as_if_each_were_alone(hf_model: Any, prefix_cache: bool) -> None:
    model: Any = specdec.wrap(hf_model, prefix_cache=prefix_cache)
    prompt = random_text(37)
    with model.branch(prompt) as root:
        first, second = root.fork(2)
        second.append([5, 6, 7])
        model.extend([root, first, second], max_new_tokens=9, do_sample=False)
        assert root.tokens == first.tokens == greedy(hf_model, prompt, 9)
        assert second.tokens == greedy(hf_model, [*prompt, 5, 6, 7], 9)
        (third,) = first.append([8]).fork()
        first.prune()
        model.extend([third], max_new_tokens=4, do_sample=False)
        assert third.tokens == greedy(hf_model, [*root.tokens, 8], 4)
        model.cache.check_integrity()
        with pytest.raises(RuntimeError, match="this branch was pruned"):
            first.fork()
    nothing_left(model)


def test_forks_share_pages_and_only_new_tokens_are_computed(model: Any) -> None:
    with model.branch(random_text(64)) as root:
        branches = root.fork(4)
        model.extend(branches, max_new_tokens=1, do_sample=False)
        pages = {tuple(model.cache._sequences[b.sequence].pages[:3]) for b in branches}
        assert len(pages) == 1
        assert {b.cached for b in branches} == {64}
    nothing_left(model)


@pytest.mark.parametrize("rows", [512, 225])
def test_scores_and_log_probabilities_are_the_models(
    hf_model: Any, model: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.branching.PASS_ROWS", rows)
    prompt = random_text(20)
    answers = [random_text(count) for count in (1, 5, 220, 230)]
    with model.branch(prompt) as root:
        branches = root.fork(4)
        branches[3].append([9])
        scores = specdec.score(branches, answers)
        for index, answer in enumerate(answers):
            expected = direct_score(hf_model, branches[index].tokens, answer)
            assert float(scores[index]) == pytest.approx(expected, rel=1e-4)
        for _ in range(2):  # again, although the last token is cached now
            ahead = specdec.logprobs(branches)
            assert ahead.shape == (4, VOCAB)
            expected = direct_score(hf_model, branches[3].tokens, [17])
            assert float(ahead[3, 17]) == pytest.approx(expected, rel=1e-4)
        model.extend(branches[:1], max_new_tokens=5, do_sample=False)
        assert branches[0].tokens == greedy(hf_model, prompt, 5)
        with pytest.raises(ValueError, match="continuations: expected at least one token"):
            specdec.score([root], [[]])
    nothing_left(model)


def test_a_failure_leaves_every_branch_as_it_was(hf_model: Any) -> None:
    model: Any = specdec.wrap(hf_model, max_pages=6)
    prompt = random_text(40)
    with model.branch(prompt) as root:
        branches = root.fork(2)
        with pytest.raises(specdec.OutOfPages):
            model.extend(branches, max_new_tokens=100, do_sample=False)
        assert [branch.tokens for branch in branches] == [prompt] * 2
        model.cache.check_integrity()
        branches[1].prune()
        model.extend(branches[:1], max_new_tokens=3, do_sample=False)
        assert branches[0].tokens == greedy(hf_model, prompt, 3)
    nothing_left(model)


def test_wrong_branches_are_named(hf_model: Any, model: Any) -> None:
    other: Any = specdec.wrap(hf_model)
    with other.branch([1, 2]) as stranger, model.branch([1, 2]) as own:
        with pytest.raises(ValueError, match="branches: expected those of this model"):
            model.extend([own, stranger], max_new_tokens=1)
        with pytest.raises(ValueError, match="branches: expected each at most once"):
            model.extend([own, own], max_new_tokens=1)
        with pytest.raises(NotImplementedError, match="num_return_sequences=2"):
            model.extend([own], max_new_tokens=1, do_sample=True, num_return_sequences=2)
        two = GenerationConfig(num_return_sequences=2, do_sample=True, max_new_tokens=1)
        with pytest.raises(NotImplementedError, match="num_return_sequences=2"):
            model.extend([own], generation_config=two)
        with pytest.raises(NotImplementedError, match="attention_mask is not supported here"):
            model.extend([own], max_new_tokens=1, attention_mask=torch.ones(1, 2))
        with pytest.raises(ValueError, match="branches: expected those of this model"):
            specdec.score([own, stranger], [[1], [2]])
        with pytest.raises(ValueError, match="branches: expected at least one, got none"):
            specdec.logprobs([])
        with pytest.raises(ValueError, match="count: expected at least 1, got -1"):
            own.fork(-1)
        with pytest.raises(ValueError, match="tokens: expected ids from 0 to 96"):
            own.append([VOCAB])
        with pytest.raises(ValueError, match=r"tokens: expected \[L\], got \[1, 2\]"):
            own.append(torch.ones(1, 2, dtype=torch.int64))
        assert isinstance(own, Branch)
        assert own.tokens == [1, 2]
    with pytest.raises(ValueError, match=r"tokens: expected ids from 0 to 96, .* got 100000"):
        model.branch([100000, 2])
    with pytest.raises(TypeError, match="cache_key: expected something hashable"):
        model.branch([1, 2], cache_key=[])
    assert not model.cache.sequences
    with pytest.raises(ValueError, match="tokens: expected one prompt"):
        model.branch(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"at least one token, .* got \[0\]"):
        model.branch([])


@pytest.mark.parametrize(
    ("continuations", "message"),
    [
        ([[1]], "continuations: expected one for each of 2 branches, got 1"),
        ([[1], [2], [3]], "continuations: expected one for each of 2 branches, got 3"),
        ([[1], [VOCAB]], "continuations: expected ids from 0 to 96, the vocabulary, got 97"),
        ([[1], [-1]], "continuations: expected ids from 0 to 96, the vocabulary, got -1"),
        ([[1], [0.5]], "continuations: expected integer token ids, got torch.float32"),
    ],
)
def test_wrong_continuations_are_named(model: Any, continuations: Any, message: str) -> None:
    with model.branch([1, 2]) as first, model.branch([3]) as second:
        with pytest.raises((TypeError, ValueError), match=message):
            specdec.score([first, second], continuations)
        assert {first.cached, second.cached} == {0}
    nothing_left(model)


def test_branches_of_other_weights_or_keys_are_kept_apart() -> None:
    hf_model: Any = tiny_model("Llama")
    model: Any = specdec.wrap(hf_model)
    prompt = random_text(40)
    with model.branch(prompt, cache_key="ann") as ann, model.branch(prompt) as nobody:
        for branch, roots in ((ann, 1), (nobody, 2)):
            model.extend([branch], max_new_tokens=2, do_sample=False)
            assert len(model.cache.prefixes.roots) == roots
        with torch.no_grad():
            hf_model.model.layers[0].self_attn.k_proj.weight.neg_()
        for use in (
            lambda: ann.fork(),
            lambda: specdec.score([ann], [[1]]),
            lambda: specdec.logprobs([ann]),
            lambda: model.extend([ann], max_new_tokens=1),
        ):
            with pytest.raises(RuntimeError, match="weights or its active adapters have changed"):
                use()
    with model.branch(prompt) as again:
        model.extend([again], max_new_tokens=5, do_sample=False)
        assert again.tokens == greedy(hf_model, prompt, 5)
    nothing_left(model)


def test_few_shot_answers_are_those_of_whole_prompts(hf_model: Any, model: Any) -> None:
    examples, questions = random_text(50), [random_text(4) for _ in range(5)]
    answers = example("few_shot").ask(model, examples, questions, new=6)
    for question, answer in zip(questions, answers, strict=True):
        text = examples + question
        assert answer == greedy(hf_model, text, 6)[len(text) :]
    nothing_left(model)


def test_best_of_n_is_the_best_of_what_generate_samples(hf_model: Any, model: Any) -> None:
    prompt = random_text(20)
    answer, mean = example("best_of_n").best_of(model, prompt, n=4, new=8, seed=3)
    rows = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=True, seed=3, num_return_sequences=4
    )[:, 20:].tolist()
    means = [direct_score(hf_model, prompt, row) / 8 for row in rows]
    assert answer == rows[means.index(max(means))]
    assert mean == pytest.approx(max(means), rel=1e-4)
    nothing_left(model)


def test_beam_search_equals_that_of_transformers(hf_model: Any, model: Any) -> None:
    prompt = random_text(20)
    answer, total = example("beam_search").beam_search(model, prompt, beams=4, new=7)
    ids = torch.tensor([prompt])
    expected = hf_model.generate(ids, num_beams=4, max_new_tokens=7, do_sample=False)
    assert answer == expected[0, 20:].tolist()
    assert total == pytest.approx(direct_score(hf_model, prompt, answer), rel=1e-4)
    nothing_left(model)


def test_tree_of_thought_keeps_the_best_lines(hf_model: Any, model: Any) -> None:
    prompt, verdict = random_text(20), [3, 4]
    think = example("tree_of_thought").think
    line, scores = think(model, prompt, verdict, depth=3, width=3, keep=2, new=5, seed=1)
    assert len(line) == 15
    expected = direct_score(hf_model, prompt + line, verdict)
    assert scores[-1] == pytest.approx(expected, rel=1e-4)
    nothing_left(model)


def test_an_own_drafter_is_proved_lossless(hf_model: Any) -> None:
    module = example("own_drafter")
    habits = module.Habits([torch.randint(97, (3000,)).tolist()])
    prompt = torch.tensor([random_text(20)])
    verdict = module.prove(hf_model, habits, prompt, samples=400, tokens=2, bins=4, temperature=2.0)
    assert verdict.passed
    assert verdict.tokens_per_step > 1
