"""Wrapped `generate()` is transformers' `generate()`: options, shapes, padding, streams, errors."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BatchEncoding,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import specdec
from specdec import (
    DraftContext,
    Drafter,
    OutOfPages,
    ProposalLaw,
    SequenceDrafter,
    SpeculativeModel,
    TokenTree,
    TreeBatch,
)
from specdec.drafters import DraftModel
from specdec.generation import SpeculativeOutput
from specdec.testing import TINY, OracleDrafter, RandomDrafter, degraded, tiny_model

VOCAB = TINY["vocab_size"]


def greedy(model: Any, prompts: Tensor, new: int) -> Tensor:
    out = model.generate(prompts, max_new_tokens=new, do_sample=False)
    assert isinstance(out, Tensor)
    return out


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture
def prompts() -> Tensor:
    return torch.randint(1, VOCAB, (3, 8))


def oracle(model: Any, prompts: Tensor, **options: Any) -> OracleDrafter:
    """Knows the greedy continuations, so that accepted paths run over every stop."""
    texts = []
    for row in range(len(prompts)):
        mask = options.get("attention_mask")
        prompt = prompts[row] if mask is None else prompts[row][mask[row] != 0]
        texts.append(greedy(model, prompt[None], 60)[0].tolist())
    return OracleDrafter(texts, corrupt=0.1, vocab_size=VOCAB)


def wrap(model: Any, prompts: Tensor, **options: Any) -> Any:
    return specdec.wrap(model, oracle(model, prompts, **options), nodes=16)


def left_padded(prompts: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(prompts)
    mask[0, :5], mask[2, :1] = 0, 0
    return {"input_ids": prompts * mask, "attention_mask": mask}


def test_left_padded_batches_come_back_as_from_transformers(model: Any, prompts: Tensor) -> None:
    inputs = left_padded(prompts)
    options: dict[str, Any] = {**inputs, "max_new_tokens": 30, "do_sample": False}
    expected = model.generate(**options)
    eos = int(expected[1, 8 + 11])  # row 1 ends in the middle, the others go on or end elsewhere
    for stop in ({}, {"eos_token_id": eos}, {"eos_token_id": [eos, int(expected[0, 8 + 4])]}):
        expected = model.generate(**options, **stop, pad_token_id=0)
        wrapped = wrap(model, prompts, attention_mask=inputs["attention_mask"])
        assert torch.equal(wrapped.generate(**options, **stop, pad_token_id=0), expected)


def test_pads_are_found_without_a_mask_and_never_computed(model: Any, prompts: Tensor) -> None:
    inputs = left_padded(prompts)
    expected = model.generate(inputs["input_ids"], max_new_tokens=10, do_sample=False)
    wrapped: Any = specdec.wrap(model)
    out = wrapped.generate(
        inputs["input_ids"], max_new_tokens=10, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, expected)
    assert out.stats.prompt_tokens == int(inputs["attention_mask"].sum())


@pytest.mark.parametrize("new", [1, 2, 7, 8])
def test_length_limits_cut_accepted_paths(model: Any, prompts: Tensor, new: int) -> None:
    wrapped = wrap(model, prompts)
    for limit in ({"max_new_tokens": new}, {"max_length": 8 + new}):
        expected = model.generate(prompts, **limit, do_sample=False)
        assert torch.equal(wrapped.generate(prompts, **limit, do_sample=False), expected)


class StopAt(StoppingCriteria):
    """Stops each row at a length of its own, and remembers what it was shown."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.seen: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


def test_a_users_stopping_criterion_sees_every_token(model: Any, prompts: Tensor) -> None:
    prompt = prompts[:1]
    full = model.generate(prompt, max_new_tokens=30, do_sample=False)
    stop = int(full[0, 8 + 13])
    options = {"max_new_tokens": 30, "do_sample": False}
    theirs, ours = StopAt(stop), StopAt(stop)
    expected = model.generate(prompt, stopping_criteria=StoppingCriteriaList([theirs]), **options)
    out = wrap(model, prompt).generate(
        prompt, stopping_criteria=StoppingCriteriaList([ours]), **options
    )
    assert torch.equal(out, expected)
    assert ours.seen == theirs.seen


def test_num_return_sequences_and_seeds(model: Any, prompts: Tensor) -> None:
    wrapped: Any = specdec.wrap(model)
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 4}
    first = wrapped.generate(prompts, **options, seed=1)
    assert first.shape == (12, 20)
    assert len({tuple(row) for row in first.tolist()}) > 3
    assert torch.equal(wrapped.generate(prompts, **options, seed=1), first)
    assert not torch.equal(wrapped.generate(prompts, **options, seed=2), first)
    set_seed(5)
    by_global = wrapped.generate(prompts, **options)
    set_seed(5)
    assert torch.equal(wrapped.generate(prompts, **options), by_global)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    runs = [wrapped.generate(prompts, **options, generator=g) for g in generators]
    assert torch.equal(*runs)
    set_seed(5)
    state = torch.get_rng_state()
    greedy(wrapped, prompts, 3)
    assert torch.equal(torch.get_rng_state(), state), "greedy decoding draws nothing"


def test_statistics_end_where_the_text_ends(model: Any, prompts: Tensor) -> None:
    prompt = prompts[:1]
    full = greedy(model, prompt, 30)
    eos = int(full[0, 8 + 2])
    text = OracleDrafter(full.tolist(), corrupt=0.0, vocab_size=VOCAB)
    out = specdec.wrap(model, text, nodes=30).generate(
        prompt, max_new_tokens=30, do_sample=False, eos_token_id=eos, return_dict_in_generate=True
    )
    assert isinstance(out, SpeculativeOutput)
    assert out.stats is not None
    assert out.stats.first_tokens == 1
    assert out.stats.tokens - 1 == out.stats.accepted <= 2
    assert max(out.stats.accepted_at) == out.stats.accepted


class StopLong(StoppingCriteria):
    """Stops at a length."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 8)


def test_rows_that_ran_ahead_to_the_length_limit_are_cut_back(model: Any) -> None:
    """Without an end-of-sequence token, transformers stops all rows with the last one."""
    prompts = torch.randint(1, VOCAB, (2, 3))
    mask = torch.ones_like(prompts)
    text = model.generate(prompts[:1], attention_mask=mask[:1], max_new_tokens=8, do_sample=False)
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "stopping_criteria": StoppingCriteriaList([StopLong()]),
    }
    expected = model.generate(prompts, **options)
    fast: Any = specdec.wrap(model, OracleDrafter(text.tolist(), corrupt=0.0, vocab_size=VOCAB))
    assert torch.equal(fast.generate(prompts, **options), expected)


class StopRows(StoppingCriteria):
    """A length of its own for each row."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("eos", [VOCAB - 1, None])
def test_criteria_may_have_a_setting_for_each_row(model: Any, prompts: Tensor, eos: Any) -> None:
    """Without an eos token transformers lets stopped rows go on until the last one stops."""
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    stop: Any = StoppingCriteriaList([StopRows([20, 11, 13])])
    options |= {"eos_token_id": eos, "stopping_criteria": stop}
    expected = model.generate(prompts, **options)
    wrapped: Any
    for wrapped in (wrap(model, prompts), specdec.wrap(model, "none")):
        assert torch.equal(wrapped.generate(prompts, **options), expected)


def test_none_overrides_the_models_defaults(prompts: Tensor) -> None:
    model: Any = tiny_model("Llama")
    full = greedy(model, prompts, 12)
    model.generation_config.eos_token_id = int(full[0, 10])
    model.generation_config.top_k = 1
    wrapped: Any = specdec.wrap(model)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(wrapped.generate(prompts, **options), full)
    sampled = wrapped.generate(
        prompts, max_new_tokens=6, do_sample=True, top_k=None, num_return_sequences=10, seed=1
    )
    assert len({tuple(row) for row in sampled.tolist()}) > 3


def test_a_limit_below_the_prompt_still_gives_one_token(model: Any, prompts: Tensor) -> None:
    limit: Any = StoppingCriteriaList([MaxLengthCriteria(3)])
    expected = model.generate(prompts, stopping_criteria=limit, do_sample=False)
    out = wrap(model, prompts).generate(prompts, stopping_criteria=limit, do_sample=False)
    assert torch.equal(out, expected)


def test_inference_mode_does_not_outlive_the_call(model: Any, prompts: Tensor) -> None:
    for drafter in ("ngram", DraftModel(degraded(model, bits=4))):
        wrapped: Any = specdec.wrap(model, drafter)
        with torch.inference_mode():
            first = greedy(wrapped, prompts, 4)
        assert torch.equal(greedy(wrapped, prompts, 40)[:, :12], first)
        with torch.inference_mode():
            greedy(wrapped, prompts.repeat(2, 1), 100)
        assert torch.equal(greedy(wrapped, prompts, 4), first)
        assert_nothing_left(wrapped)


def test_logits_that_are_not_numbers_are_an_error(prompts: Tensor) -> None:
    model: Any = tiny_model("Llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    wrapped: Any = specdec.wrap(model)
    with pytest.raises(ValueError, match=r"request 0: no token could be drawn .* NaN or infinity"):
        wrapped.generate(prompts, max_new_tokens=3, do_sample=True)
    assert_nothing_left(wrapped)


class Reversed(Drafter):
    """Puts the trees in the wrong order."""

    def propose(self, context: DraftContext, nodes: int) -> TreeBatch:
        trees = [TokenTree.root(tokens[-1]) for tokens in reversed(context.tokens)]
        return TreeBatch.pack(trees, vocab_size=context.vocab_size)


def test_a_drafter_for_whole_batches_is_checked_too(model: Any, prompts: Tensor) -> None:
    wrapped: Any = specdec.wrap(model, Reversed())
    with pytest.raises(ValueError, match=r"Reversed\.propose: expected the root of tree 0 to be"):
        wrapped.generate(prompts, max_new_tokens=3)
    assert_nothing_left(wrapped)


def test_drafter_rule_and_nodes_may_be_changed(model: Any, prompts: Tensor) -> None:
    wrapped = wrap(model, prompts)
    expected = greedy(wrapped, prompts, 9)
    wrapped.drafter, wrapped.nodes, wrapped.rule = "none", 4, "multi-round"
    assert torch.equal(greedy(wrapped, prompts, 9), expected)
    assert wrapped.model is model.model, "all other names are the model's own"
    for name, value, message in (
        ("nodes", 257, "nodes: expected 1 to 256, got 257"),
        ("rule", "hope", "rule: expected auto"),
        ("drafter", None, "drafter: expected one of none, ngram, a model or a Drafter, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(wrapped, name, value)


def test_criteria_may_return_a_plain_bool(model: Any, prompts: Tensor) -> None:
    stop: Any = [lambda ids, scores, **_: ids.shape[1] >= 12]
    out = wrap(model, prompts).generate(prompts, max_new_tokens=30, stopping_criteria=stop)
    assert out.shape == (3, 12)


def test_any_integer_is_a_seed(model: Any, prompts: Tensor) -> None:
    wrapped: Any = specdec.wrap(model)
    for seed in (-1, 0, 2**63, 2**80):
        options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 4, "seed": seed}
        assert torch.equal(
            wrapped.generate(prompts, **options), wrapped.generate(prompts, **options)
        )


def test_generation_config_and_model_defaults_apply(model: Any, prompts: Tensor) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=5, pad_token_id=0)
    expected = model.generate(prompts, generation_config=config)
    wrapped = wrap(model, prompts)
    assert torch.equal(wrapped.generate(prompts, generation_config=config), expected)
    assert torch.equal(
        wrapped.generate(inputs=prompts, max_new_tokens=9),
        model.generate(inputs=prompts, max_new_tokens=9),
    )


def test_return_dict_has_statistics(model: Any, prompts: Tensor) -> None:
    out = wrap(model, prompts).generate(
        prompts, max_new_tokens=30, do_sample=False, return_dict_in_generate=True
    )
    stats = out.stats
    assert out["sequences"] is out.sequences
    assert stats.tokens == 90
    assert stats.first_tokens == 3
    assert stats.tokens_per_step == (stats.tokens - 3) / stats.steps > 2
    assert stats.accepted == sum(stats.accepted_at.values())
    assert 0 < stats.reached[1] <= stats.steps
    assert stats.tokens <= stats.accepted + stats.steps + stats.first_tokens
    assert all(0 <= rate <= 1 for rate in stats.acceptance_by_depth.values())
    known = [stats.seconds.get(phase, 0.0) for phase in specdec.stats.PHASES]
    assert 0 < sum(known) <= stats.seconds["total"]
    twice = stats + stats
    assert twice.tokens == 180
    assert twice.tokens_per_step == stats.tokens_per_step


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.chunks: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.chunks.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_every_token_once(model: Any, prompts: Tensor) -> None:
    prompt, recorder = prompts[:1], Recorder()
    out = wrap(model, prompt).generate(
        prompt,
        max_new_tokens=20,
        do_sample=False,
        streamer=recorder,
    )
    assert recorder.chunks[0] == prompt[0].tolist()
    assert list(chain.from_iterable(recorder.chunks)) == out[0].tolist()
    assert recorder.ended == 1
    with pytest.raises(ValueError, match=r"streamer: expected a batch of one, got 3 rows"):
        wrap(model, prompts).generate(prompts, streamer=recorder)
    assert recorder.ended == 2, "whoever reads from it does not wait for ever"


def test_a_program_may_end_in_the_middle_of_a_stream() -> None:
    program = """
import torch
import specdec
from specdec.testing import tiny_model

steps = specdec.wrap(tiny_model("Llama"), "ngram").stream(torch.arange(1, 20)[None])
next(steps)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stream_yields_steps_and_may_be_left_early(model: Any, prompts: Tensor) -> None:
    wrapped = wrap(model, prompts)
    expected = wrapped.generate(prompts, max_new_tokens=20, do_sample=False)
    rows: list[list[int]] = [[], [], []]
    for step in wrapped.stream(prompts, max_new_tokens=20, do_sample=False):
        for row, tokens in step.tokens.items():
            rows[row] += tokens
            assert step.accepted[row] <= step.drafted[row]
            assert len(tokens) <= step.accepted[row] + 1
    assert rows == expected[:, 8:].tolist()
    steps = wrapped.stream(prompts, max_new_tokens=20, do_sample=False)
    next(steps)
    assert wrapped.cache.sequences
    del steps
    gc.collect()
    assert_nothing_left(wrapped)


def assert_nothing_left(wrapped: SpeculativeModel) -> None:
    caches = [wrapped.cache]
    if isinstance(wrapped.drafter, DraftModel):
        caches.append(wrapped.drafter._target.cache)
    for cache in caches:
        cache.check_integrity()
        assert not cache.sequences
        assert cache.pool.num_free + cache.prefixes.num_pages == cache.pool.num_pages


class Failing(SequenceDrafter):
    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        self.calls += 1
        if self.calls > 4:
            raise self.error
        return TokenTree.chain(tokens[-1], [1, 2, 3])


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_an_error_in_the_drafter_leaves_nothing_behind(
    model: Any, prompts: Tensor, error: BaseException
) -> None:
    wrapped, recorder = specdec.wrap(model, Failing(error)), Recorder()
    with pytest.raises(type(error)):
        wrapped.generate(prompts[:1], max_new_tokens=20, streamer=recorder)
    assert recorder.ended == 1
    assert_nothing_left(wrapped)


def test_running_out_of_pages_says_so_and_leaves_nothing_behind(
    model: Any, prompts: Tensor
) -> None:
    wrapped: Any = specdec.wrap(model, RandomDrafter(VOCAB), nodes=8, max_pages=5)
    with pytest.raises(
        OutOfPages, match=r"need \d pages of 16 tokens, have \d free of 5"
    ) as caught:
        wrapped.generate(prompts, max_new_tokens=100, do_sample=False)
    assert caught.value.need > caught.value.have
    assert_nothing_left(wrapped)
    expected = model.generate(prompts[:1], max_new_tokens=40, do_sample=False)
    assert torch.equal(wrapped.generate(prompts[:1], max_new_tokens=40, do_sample=False), expected)
    drafter = DraftModel(degraded(model, bits=4), max_pages=3)
    starved: Any = specdec.wrap(model, drafter, nodes=8)
    with pytest.raises(OutOfPages):
        starved.generate(prompts, max_new_tokens=100, do_sample=False)
    assert_nothing_left(starved)


def test_a_malformed_proposal_is_named_and_leaves_nothing_behind(
    model: Any, prompts: Tensor
) -> None:
    class Wrong(SequenceDrafter):
        def __init__(self, tree: TokenTree) -> None:
            self.tree = tree

        def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
            return self.tree

    first = int(greedy(model, prompts[:1], 1)[0, -1])  # the root of the first tree
    other = TokenTree.root((first + 1) % VOCAB)
    cases = [
        (other, "Wrong.draft: expected the root to be the last token"),
        (TokenTree.chain(first, [1] * 20), "Wrong.draft: expected at most 8 nodes"),
        (TokenTree.chain(first, [VOCAB]), f"vocabulary size {VOCAB}, got {VOCAB}"),
    ]
    for tree, message in cases:
        wrapped: Any = specdec.wrap(model, Wrong(tree), nodes=8)
        with pytest.raises(ValueError, match=message):
            wrapped.generate(prompts[:1], max_new_tokens=20)
        assert_nothing_left(wrapped)


def test_trees_that_are_not_what_the_drafter_declares_are_refused(
    model: Any, prompts: Tensor
) -> None:
    class Liar(SequenceDrafter):
        law = ProposalLaw.IID

        def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
            root, parent = torch.tensor([tokens[-1], 3]), torch.tensor([-1, 0])
            probs = torch.full((2, VOCAB), 1 / VOCAB)
            return TokenTree(root, parent, ProposalLaw.WITHOUT_REPLACEMENT, probs)

    wrapped: Any = specdec.wrap(model, Liar(), rule="multi-round")
    with pytest.raises(ValueError, match="'multi-round' is not lossless for without_replacement"):
        wrapped.generate(prompts, max_new_tokens=20, do_sample=True)
    assert_nothing_left(wrapped)
    expected = greedy(model, prompts, 20)
    assert torch.equal(greedy(wrapped, prompts, 20), expected), "greedy is lossless for any law"


def test_custom_generate_runs_inside_the_models_own_generate(model: Any, prompts: Tensor) -> None:
    inputs = left_padded(prompts)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert torch.equal(
        model.generate(**inputs, **options, custom_generate=specdec.generate), expected
    )
    recorder = Recorder()
    chosen = specdec.generate.with_(
        drafter=oracle(model, prompts),
        nodes=16,
        streamer=recorder,
    )
    prompt = prompts[:1]
    out = model.generate(prompt, **options, custom_generate=chosen, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(prompt, **options))
    assert list(chain.from_iterable(recorder.chunks)) == out.sequences[0].tolist()
    assert out.stats.tokens_per_step > 2
    guided = {**options, "guidance_scale": 1.3}
    out = model.generate(prompt, **guided, custom_generate=specdec.generate)
    assert torch.equal(out, model.generate(prompt, **guided))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported: beams leave"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds=Tensor is not supported: pass"),
        ({"past_key_values": object()}, "past_key_values=object is not supported: pass the whole"),
        ({"assistant_model": object()}, "assistant_model=object is not supported: pass it as"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 .*drafter='ngram'"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not supported"),
        ({"cache_implementation": "static"}, "cache_implementation='static' is not supported"),
        ({"custom_generate": "some/repo"}, "custom_generate='some/repo' is not supported"),
        ({"position_ids": torch.zeros(1, 8)}, "position_ids=Tensor is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_options_are_refused_by_name(
    model: Any, prompts: Tensor, options: dict[str, Any], message: str
) -> None:
    wrapped: Any = specdec.wrap(model, "none")
    with pytest.raises(NotImplementedError, match=message):
        wrapped.generate(prompts[:1], max_new_tokens=4, **options)
    assert_nothing_left(wrapped)


def test_wrong_arguments_are_named(model: Any, prompts: Tensor) -> None:
    wrapped: Any = specdec.wrap(model)
    mask = torch.ones_like(prompts)
    mask[0, -2:] = 0
    with pytest.raises(ValueError, match="attention_mask: expected padding on the left only"):
        wrapped.generate(prompts, attention_mask=mask, max_new_tokens=4)
    with pytest.raises(ValueError, match="seed and generator: expected at most one"):
        wrapped.generate(prompts, seed=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="stop_strings: pass tokenizer="):
        wrapped.generate(prompts, stop_strings=["x"])
    with pytest.raises(ValueError, match="drafter: expected one of none, ngram"):
        specdec.wrap(model, "telepathy")
    with pytest.raises(ValueError, match="rule: expected auto"):
        specdec.wrap(model, rule="hope")
    with pytest.raises(ValueError, match="nodes: expected 1 to 256, got 0"):
        specdec.wrap(model, nodes=0)
    with pytest.raises(ValueError, match="typo"):
        wrapped.generate(prompts, typo=3)
    with pytest.raises(TypeError, match="nodes: expected an integer, got '8'"):
        specdec.wrap(model, nodes="8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="capture: expected True or False, got 'no'"):
        specdec.wrap(model, capture="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"page_size: expected an integer, got 2\.0"):
        specdec.wrap(model, page_size=2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"seed: expected an integer, got 1\.5"):
        wrapped.generate(prompts, do_sample=True, seed=1.5)
    with pytest.raises(
        ValueError, match="backend: expected auto, reference, sdpa, triton, gluon, got 'flash'"
    ):
        specdec.wrap(model, backend="flash")  # type: ignore[arg-type]
    with pytest.raises(
        NotImplementedError, match="streamer=Recorder is not supported: what stream"
    ):
        wrapped.stream(prompts, streamer=Recorder())
    with pytest.raises(ValueError, match="max_cached_bytes: expected 0 or more, got -1"):
        specdec.wrap(model, max_cached_bytes=-1)
    with pytest.raises(TypeError, match=r"model: expected a transformers model .* got NoneType"):
        specdec.wrap(None)


def test_what_is_no_batch_of_token_ids_is_named(model: Any, prompts: Tensor) -> None:
    wrapped: Any = specdec.wrap(model)
    for shape in (prompts[:0], prompts[:, :0], prompts[0]):
        with pytest.raises(ValueError, match=r"input_ids: expected \[B, L\] with at least one"):
            wrapped.generate(shape)
    with pytest.raises(TypeError, match=r"input_ids: .* got BatchEncoding; pass \*\*inputs"):
        wrapped.generate(BatchEncoding({"input_ids": prompts}))
    with pytest.raises(TypeError, match=r"input_ids: expected integer token ids, got torch\.float"):
        wrapped.generate(input_ids=prompts.float())
    with pytest.raises(ValueError, match=r"attention_mask: expected .* got \[1, 2\]"):
        wrapped.generate(prompts, attention_mask=torch.ones(1, 2))
    vocabulary = model.config.vocab_size
    for wrong in (-1, vocabulary):
        ids = prompts.clone()
        ids[-1, -1] = wrong
        with pytest.raises(ValueError, match=rf"ids from 0 to {vocabulary - 1}.* got {wrong}"):
            wrapped.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert_nothing_left(wrapped)


def test_training_mode_is_refused_and_the_model_stays_the_users(
    model: Any, prompts: Tensor, tmp_path: Any
) -> None:
    trainable: Any = tiny_model("Llama")
    wrapped: Any = specdec.wrap(trainable)
    before = {name: weight.clone() for name, weight in trainable.named_parameters()}
    assert wrapped.train() is wrapped
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"):
        wrapped.generate(prompts, max_new_tokens=4)
    wrapped(prompts, labels=prompts).loss.backward()  # training works while wrapped
    assert all(weight.grad is not None for weight in trainable.parameters())
    trainable.zero_grad()
    wrapped.eval()
    expected = trainable.generate(prompts, max_new_tokens=8, do_sample=False)
    assert torch.equal(wrapped.generate(prompts, max_new_tokens=8, do_sample=False), expected)
    wrapped.save_pretrained(tmp_path)
    again = type(trainable).from_pretrained(tmp_path)
    assert all(torch.equal(before[name], weight) for name, weight in again.named_parameters())
    assert again.config._attn_implementation == trainable.config._attn_implementation
    assert wrapped.unwrap() is trainable
    for use in (lambda: wrapped.generate(prompts), lambda: wrapped(prompts), wrapped.unwrap):
        with pytest.raises(RuntimeError, match="this wrapper was unwrapped"):
            use()


def test_a_model_that_was_cast_after_wrapping_gets_a_new_cache(prompts: Tensor) -> None:
    wrapped: Any = specdec.wrap(tiny_model("Llama"), "none")
    assert wrapped.cache.pool.layers[0].dtype == torch.float32
    assert wrapped.to(torch.bfloat16) is wrapped
    wrapped.generate(prompts, max_new_tokens=4)
    assert wrapped.cache.pool.layers[0].dtype == torch.bfloat16


def test_peft_adapters_are_used(model: Any, prompts: Tensor) -> None:
    from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

    base: Any = tiny_model("Llama")
    plain = greedy(base, prompts, 16)
    adapted: Any = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    expected = adapted.generate(input_ids=prompts, max_new_tokens=16, do_sample=False)
    wrapped: Any = specdec.wrap(adapted, RandomDrafter(VOCAB))
    assert torch.equal(wrapped.generate(prompts, max_new_tokens=16, do_sample=False), expected)
    assert not torch.equal(expected, plain)
    with adapted.disable_adapter():
        assert torch.equal(wrapped.generate(prompts, max_new_tokens=16, do_sample=False), plain)
    tuned = get_peft_model(
        tiny_model("Llama"), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    )
    with pytest.raises(specdec.UnsupportedModel, match="PROMPT_TUNING adds virtual tokens"):
        specdec.wrap(tuned)


class TestRealModel:
    """What needs a tokenizer, on SmolLM2."""

    def test_stop_strings_pipeline_and_text_streamers(self, smollm2: tuple[Any, Any]) -> None:
        model, tokenizer = smollm2
        wrapped: Any = specdec.wrap(model, "ngram")
        inputs = tokenizer("One, two, three, four, five. One, two, three,", return_tensors="pt")
        options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
        stop: dict[str, Any] = {"stop_strings": ["five"], "tokenizer": tokenizer}
        expected = model.generate(**inputs, **options, **stop)
        assert torch.equal(wrapped.generate(**inputs, **options, **stop), expected)
        assert tokenizer.decode(expected[0]).endswith("five")
        custom = specdec.generate.with_(**stop)
        assert torch.equal(model.generate(**inputs, **options, custom_generate=custom), expected)

        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        out = wrapped.generate(**inputs, **options, streamer=streamer)
        width = inputs["input_ids"].shape[1]
        assert "".join(streamer) == tokenizer.decode(out[0, width:])

        texts = ["The sea is", "Once upon a time there was"]
        tokenizer.padding_side = "left"
        pipes = [
            pipeline("text-generation", model=m, tokenizer=tokenizer, batch_size=2)
            for m in (model, wrapped)
        ]
        theirs, ours = (pipe(texts, **options) for pipe in pipes)
        assert ours == theirs
