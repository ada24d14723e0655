"""Continuous batching: every request gets the tokens it would get alone, whatever else runs."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

import specdec
from specdec import SequenceDrafter, TokenTree
from specdec.drafters import DraftModel
from specdec.rules import SampleAndMatch, Threshold
from specdec.testing import TINY, RandomDrafter, degraded, tiny_model
from tests.checks import greedy, nothing_left

VOCAB = TINY["vocab_size"]
NEW = 12


@pytest.fixture(scope="module")
def hf_model() -> Any:
    return tiny_model("Llama")


def random_text(length: int) -> list[int]:
    return torch.randint(1, VOCAB, (length,)).tolist()


def texts() -> list[list[int]]:
    """Prompts of many lengths; some begin alike, some are equal."""
    trunk = random_text(50)
    return [
        random_text(3),
        trunk + random_text(9),
        random_text(60),
        trunk,
        trunk + random_text(30),
        random_text(17),
        list(trunk),
        trunk[:20] + random_text(25),
        random_text(1),
    ]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(
    ("step_tokens", "max_running", "max_pages"),
    [(512, None, None), (20, None, None), (40, 3, None), (64, None, 14), (30, None, 9)],
)
def test_batch_equals_single(
    hf_model: Any,
    prefix_cache: bool,
    step_tokens: int,
    max_running: int | None,
    max_pages: int | None,
) -> None:
    """Alone and together, with and without sharing, in pieces, one after another, preempted."""
    model = specdec.wrap(hf_model, nodes=6, max_pages=max_pages, prefix_cache=prefix_cache)
    prompts = texts()
    drafters = [model.drafter, RandomDrafter(VOCAB), specdec.NoDraft()]
    with model.engine(step_tokens=step_tokens, max_running=max_running) as engine:
        handles = []
        for index, prompt in enumerate(prompts):  # some arrive while others run
            drafter = drafters[index % 3]
            options: dict[str, Any] = {"max_new_tokens": NEW + index, "do_sample": False}
            handles.append(engine.submit(prompt, drafter=drafter, nodes=2 + index % 5, **options))
            if index % 2:
                engine.step()
                model.cache.check_integrity()
        while not engine.idle:
            engine.step()
            model.cache.check_integrity()
            assert max_running is None or len(engine.scheduler.running) <= max_running
    for index, (prompt, handle) in enumerate(zip(prompts, handles, strict=True)):
        assert handle.finished
        assert handle.tokens == greedy(hf_model, prompt, NEW + index), index
    if max_pages == 9:
        assert engine.stats.preemptions > 0
    if prefix_cache:
        assert engine.stats.reused_tokens > 0
    nothing_left(model)


@pytest.mark.slow
def test_trees_and_pieces_of_prompts_share_a_pass_of_triton(hf_model: Any) -> None:
    model = specdec.wrap(hf_model, "none", backend="triton")
    trunk = random_text(17)
    prompts = [[*trunk, 3, 4], [*trunk, 5], random_text(30)]
    with model.engine(step_tokens=20) as engine:
        handles = [engine.submit(p, max_new_tokens=3, do_sample=False) for p in prompts]
        engine.run_all()
    assert [handle.tokens for handle in handles] == [greedy(hf_model, p, 3) for p in prompts]


def test_half_of_the_needed_pages_are_enough_with_preemption(hf_model: Any) -> None:
    prompts = [random_text(30) for _ in range(6)]
    need = 6 * -(-(30 + 40 + 4) // 16)
    model = specdec.wrap(hf_model, nodes=4, max_pages=need // 2)
    ids = torch.tensor(prompts)
    out: Any = model.generate(ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    assert out.sequences[:, 30:].tolist() == [greedy(hf_model, prompt, 40) for prompt in prompts]
    assert out.stats.preemptions > 0
    nothing_left(model)


def test_what_does_not_fit_alone_fails_alone(hf_model: Any) -> None:
    model = specdec.wrap(hf_model, nodes=4, max_pages=4)
    with model.engine() as engine:
        small = engine.submit(random_text(5), max_new_tokens=8, do_sample=False)
        large = engine.submit(random_text(20), max_new_tokens=90, do_sample=False)
        last = engine.submit(random_text(9), max_new_tokens=8, do_sample=False)
        with pytest.raises(
            specdec.OutOfPages, match=r"need 1 pages of 16 tokens, have 0 free of 4"
        ):
            large.result()
        assert large.done
        assert not large.finished
        assert len(small.result()) == len(last.result()) == 8
    nothing_left(model)


def test_requests_have_options_of_their_own(hf_model: Any) -> None:
    """Sampled, greedy and drafted by a model in one batch, each as alone with the same seed."""
    model: Any = specdec.wrap(hf_model, DraftModel(degraded(hf_model, bits=5)), nodes=5)
    settings: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "seed": 3},
        {"do_sample": True, "temperature": 0.8, "seed": 4},
        {"do_sample": True, "top_k": 5, "seed": 5},
        {"do_sample": True, "top_k": 5, "seed": 5, "drafter": specdec.NoDraft()},
    ]
    prompt = random_text(20)
    with model.engine() as engine:
        handles = [engine.submit(prompt, max_new_tokens=NEW, **options) for options in settings]
        engine.run_all()
        assert len(engine._policies) == 4, "equal options are verified together"
        assert engine.stats.rule == "mixed"
    for options, handle in zip(settings, handles, strict=True):
        with specdec.wrap(hf_model, "none").engine() as alone:
            alone_options = {**options, "drafter": None}
            expected = alone.submit(prompt, max_new_tokens=NEW, **alone_options).result()
        assert handle.tokens == expected
    assert len({tuple(handle.tokens) for handle in handles}) == 4
    nothing_left(model)
    assert not model.drafter._target.cache.sequences


def test_tokens_arrive_as_they_are_verified_and_cancelling_frees(hf_model: Any) -> None:
    model = specdec.wrap(hf_model)
    prompts = texts()[:3]
    with model.engine() as engine:
        first, second, third = (
            engine.submit(prompt, max_new_tokens=30, do_sample=False) for prompt in prompts
        )
        seen = [next(first), next(first)]
        assert 2 <= len(first.tokens) < 30
        second.cancel()
        some = second.tokens
        assert list(second) == some
        assert not second.finished
        assert seen + list(first) == greedy(hf_model, prompts[0], 30)
        third.cancel()
        assert engine.idle
        waiting = engine.submit(prompts[0], max_new_tokens=3)
        assert "waiting" in repr(waiting)
    assert not model.cache.sequences
    nothing_left(model)


def test_async_readers_share_the_engine(hf_model: Any) -> None:
    model = specdec.wrap(hf_model)
    prompts = texts()[:4]

    async def read(handle: specdec.Handle) -> list[int]:
        return [token async for token in handle]

    async def main() -> list[list[int]]:
        with model.engine() as engine:
            handles = [engine.submit(p, max_new_tokens=NEW, do_sample=False) for p in prompts]
            return await asyncio.gather(*(read(handle) for handle in handles))

    assert asyncio.run(main()) == [greedy(hf_model, prompt, NEW) for prompt in prompts]
    nothing_left(model)


def test_the_oldest_request_is_never_overtaken_for_ever(hf_model: Any) -> None:
    """Requests that share a prefix keep coming, but the one that does not gets its turn."""
    model = specdec.wrap(hf_model, "none")
    trunk = random_text(32)
    with model.engine(max_running=2) as engine:
        for _ in range(2):
            engine.submit([*trunk, *random_text(2)], max_new_tokens=3, do_sample=False)
        engine.step()
        lonely = engine.submit(random_text(10), max_new_tokens=3, do_sample=False)
        steps = 0
        while not lonely.done:
            for _ in range(2):
                engine.submit([*trunk, *random_text(2)], max_new_tokens=3, do_sample=False)
            engine.step()
            steps += 1
            assert steps < 60
        assert steps > 16, "others that share more went first"
        assert engine.scheduler.waiting
    nothing_left(model)


def test_requests_with_a_common_prefix_run_together(hf_model: Any) -> None:
    model = specdec.wrap(hf_model, "none")
    trunks = [random_text(32), random_text(32)]
    with model.engine(max_running=2) as engine:
        prompts = [[*trunks[index % 2], *random_text(3)] for index in range(4)]
        handles = [engine.submit(p, max_new_tokens=2, do_sample=False) for p in prompts]
        while not handles[0].done:
            engine.step()
        assert handles[2].tokens
        assert not handles[1].tokens
    nothing_left(model)


def test_runs_repeat_exactly(hf_model: Any) -> None:
    torch.manual_seed(7)
    prompts, records = texts(), []
    for _ in range(2):
        model = specdec.wrap(hf_model, nodes=6, max_pages=20)
        with model.engine(step_tokens=40) as engine:
            for seed, prompt in enumerate(prompts):
                engine.submit(prompt, max_new_tokens=NEW, do_sample=True, seed=seed)
            record = []
            while not engine.idle:
                emissions = engine.step()
                first = min((e.request.number for e in emissions), default=0)
                record.append([(e.request.number - first, e.tokens) for e in emissions])
            records.append((record, engine.stats.preemptions))
    assert records[0] == records[1]


class Failing(SequenceDrafter):
    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        raise ZeroDivisionError


def test_an_error_stops_all_requests_and_reaches_every_reader(hf_model: Any) -> None:
    model = specdec.wrap(hf_model)
    with model.engine() as engine:
        good = engine.submit(random_text(9), max_new_tokens=9)
        bad = engine.submit(random_text(9), max_new_tokens=9, drafter=Failing())
        with pytest.raises(ZeroDivisionError):
            good.result()
        with pytest.raises(ZeroDivisionError):
            bad.result()
        assert engine.idle
        assert len(engine.submit(random_text(9), max_new_tokens=9).result()) == 9
    nothing_left(model)


class Doing(StoppingCriteria, LogitsProcessor):
    """Does something in the middle of a step, once a text has seven tokens."""

    def __init__(self, act: Callable[[], object], answer: bool = False) -> None:
        self.act, self.answer = act, answer

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] >= 7:
            self.act()
        return self.answer if scores is None else scores


def interrupt() -> None:
    raise KeyboardInterrupt


def test_readers_of_an_engine_that_was_closed_or_interrupted_do_not_wait(hf_model: Any) -> None:
    model = specdec.wrap(hf_model)
    engine = model.engine()
    ended = engine.submit([1, 2], max_new_tokens=1, do_sample=False)
    handle = engine.submit([1, 2, 3], max_new_tokens=20, do_sample=False)
    next(handle)
    ended.result()
    engine.close()
    assert handle.done
    assert not handle.finished
    with pytest.raises(RuntimeError, match="stopped: the engine was closed or interrupted"):
        handle.result()
    assert handle.tokens == greedy(hf_model, [1, 2, 3], 20)[: len(handle.tokens)]
    assert ended.result() == greedy(hf_model, [1, 2], 1)

    waiting = engine.submit([4, 5], max_new_tokens=20, do_sample=False)
    stopping = StoppingCriteriaList([Doing(interrupt)])
    killer = engine.submit([1, 2, 3], max_new_tokens=20, stopping_criteria=stopping)
    with pytest.raises(KeyboardInterrupt):
        killer.result()
    with pytest.raises(RuntimeError, match="stopped: the engine was closed or interrupted"):
        waiting.result()
    nothing_left(model)


@pytest.mark.parametrize("hook", ["stopping_criteria", "logits_processor"])
@pytest.mark.parametrize(("victim", "answer"), [(0, False), (0, True), (1, False)])
def test_cancelling_inside_a_step_leaves_the_others_alone(
    hf_model: Any, hook: str, victim: int, answer: bool
) -> None:
    model = specdec.wrap(hf_model)
    handles: list[specdec.Handle] = []
    doing = Doing(lambda: handles[victim].cancel(), answer)
    with model.engine() as engine:
        options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
        handles.append(engine.submit([1, 2, 3], **{**options, hook: [doing]}))
        handles += [engine.submit([4, 5], **options), engine.submit([6], **options)]
        engine.run_all()
    for index, (prompt, handle) in enumerate(zip(([1, 2, 3], [4, 5], [6]), handles, strict=True)):
        expected = greedy(hf_model, prompt, 30)
        early = index == victim or (index == 0 and answer)
        count = len(handle.result())
        assert handle.tokens == expected[:count]
        assert (count < 30) == early
    nothing_left(model)


def test_a_step_inside_a_step_is_refused(hf_model: Any) -> None:
    model = specdec.wrap(hf_model)
    with model.engine() as engine:
        other = engine.submit([4, 5], max_new_tokens=30)
        waits = StoppingCriteriaList([Doing(other.result)])
        with pytest.raises(RuntimeError, match="step: called from inside a step"):
            engine.submit([1, 2, 3], max_new_tokens=30, stopping_criteria=waits).result()
    nothing_left(model)


def test_equal_settings_share_a_policy_and_others_do_not(hf_model: Any) -> None:
    model = specdec.wrap(hf_model)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": True, "seed": 1}
    ending: dict[str, Any] = {**options, "eos_token_id": 5, "min_new_tokens": 2}  # holds tensors
    settings = SampleAndMatch()
    settings.least = 1  # type: ignore[attr-defined]
    groups: list[dict[str, Any]] = [
        {**options, "rule": Threshold(0.1)},
        {**options, "rule": Threshold(0.9)},
        {**options, "rule": "sample-and-match"},
        {**options, "rule": settings},
        {**options, "return_dict_in_generate": True, "output_scores": True},
        ending,
        {**ending, "eos_token_id": 6},
        {**ending, "bad_words_ids": [[7], [8, 9]]},
    ]
    with model.engine() as engine:
        pairs = [[engine.submit([1, 2], **group) for _ in range(2)] for group in groups]
        policies = [[handle._request.policy for handle in pair] for pair in pairs]
        assert all(first is second for first, second in policies)
        assert len({id(first) for first, _ in policies}) == len(groups)
        engine.run_all()
        assert len(engine._policies) == len(groups)
        del pairs, policies
        engine.submit([1, 2], **options).result()
        gc.collect()
        assert len(engine._policies) == 1


def test_lossy_rules_show_in_the_statistics(hf_model: Any) -> None:
    model: Any = specdec.wrap(hf_model)
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": True, "seed": 1}
    with model.engine() as engine:
        for rule, label in (
            ("typical", "typical (lossy)"),
            ("typical", "typical (lossy)"),
            ("traversal", "mixed (lossy)"),
            ("traversal", "mixed (lossy)"),
        ):
            engine.submit([1, 2], rule=rule, drafter=RandomDrafter(VOCAB), **options).result()
            assert engine.stats.rule == label
    lossless = specdec.GenerationStats(rule="traversal")
    assert (engine.stats + lossless).rule == (lossless + engine.stats).rule == "mixed (lossy)"
    assert (lossless + specdec.GenerationStats(rule="greedy")).rule == "mixed"


def test_wrong_requests_are_named_and_not_submitted(hf_model: Any) -> None:
    model = specdec.wrap(hf_model)
    two = GenerationConfig(num_return_sequences=2, do_sample=True, max_new_tokens=2)
    with model.engine() as engine:
        for tokens, message in (
            ([5, VOCAB], "tokens: expected ids from 0 to 96, the vocabulary, got 97"),
            ([5, -3], "tokens: expected ids from 0 to 96, the vocabulary, got -3"),
            ([1.5, 2.0], "tokens: expected integer token ids, got torch.float32"),
            ("abc", "tokens: expected token ids, got 'abc'"),
        ):
            with pytest.raises((ValueError, TypeError), match=message):
                engine.submit(tokens, max_new_tokens=2)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"cache_key: expected something hashable, got \[1\]"):
            engine.submit([1, 2], cache_key=[1], max_new_tokens=2)  # type: ignore[arg-type]
        with pytest.raises(NotImplementedError, match="num_return_sequences=2"):
            engine.submit([1, 2], generation_config=two)
        for options, message in (
            ({"nodes": 0}, "nodes: expected 1 to 256, got 0"),
            ({"rule": "hope"}, "rule"),
            ({"drafter": "hope"}, "drafter: expected one of"),
            ({"num_return_sequences": 2}, "num_return_sequences=2"),
            ({"attention_mask": torch.ones(1, 2)}, "attention_mask is not supported here"),
        ):
            with pytest.raises((ValueError, NotImplementedError), match=message):
                engine.submit([1, 2], max_new_tokens=2, **options)
        assert engine.idle
    with pytest.raises(ValueError, match="step_tokens: expected at least 1, got 0"):
        model.engine(step_tokens=0)
    with pytest.raises(ValueError, match="max_running: expected at least 1, got 0"):
        model.engine(max_running=0)
