"""Every sampling option, on trees, against transformers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, WatermarkingConfig

import specdec
from specdec.drafters import DraftModel
from specdec.request import RequestError
from specdec.rules import RULES
from specdec.sampling import Sampler, Text
from specdec.testing import TINY, RandomDrafter, degraded, tiny_model
from specdec.topology import Topology

VOCAB = TINY["vocab_size"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def wrapped(model: Any) -> Any:
    """Trees that are mostly right, so that paths run through what options forbid."""
    return specdec.wrap(
        model, DraftModel(degraded(model, bits=6), Topology.branching([3, 2, 1])), nodes=16
    )


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCAB, (3, 8))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :1] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


class Calm(LogitsProcessor):
    """A user's own: forbids the last token, and has a bias for each row of the batch."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.bias = torch.randn(rows, VOCAB, generator=generator)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return (scores + self.bias).scatter(1, input_ids[:, -1:], -torch.inf)


def evens_after_odds(row: int, sent: Tensor) -> list[int]:
    return [t for t in range(VOCAB) if (t + int(sent[-1]) + row) % 2]


DETERMINISTIC: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.7},
    "no-repeat n-gram": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.7},
    "bad words": {"bad_words_ids": [[3], [5, 7], [11, 2]]},
    "sequence bias": {"sequence_bias": [[[4], 3.0], [[4, 9], -8.0], [[6, 2], 6.0]]},
    "suppressed tokens": {"suppress_tokens": list(range(0, VOCAB, 3))},
    "suppressed at the beginning": {"begin_suppress_tokens": list(range(0, VOCAB, 2))},
    "minimal length": {"min_length": 20, "eos_token_id": list(range(1, VOCAB, 4))},
    "minimal new tokens": {"min_new_tokens": 9, "eos_token_id": list(range(1, VOCAB, 4))},
    "forced end": {"forced_eos_token_id": 7, "eos_token_id": 7},
    "decay of length": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 7},
    "encoder's repetition penalty": {"encoder_repetition_penalty": 1.6},
    "encoder's n-grams": {"encoder_no_repeat_ngram_size": 1},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": evens_after_odds},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="lefthash")},
    "guidance": {"guidance_scale": 1.8},
    "guidance by a negative prompt": {
        "guidance_scale": 2.5,
        "negative_prompt_ids": torch.arange(5, 20).view(3, 5),
        "repetition_penalty": 1.2,
    },
    "invalid values": {"remove_invalid_values": True},
    "renormalized": {"renormalize_logits": True},
    "a user's processor": {"logits_processor": LogitsProcessorList([Calm(3)])},
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_greedy_decoding_with_an_option_equals_transformers(
    model: Any, wrapped: Any, inputs: dict[str, Tensor], name: str
) -> None:
    options = {**DETERMINISTIC[name], "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    assert torch.equal(wrapped.generate(**inputs, **options), expected)


def test_a_forced_beginning_equals_transformers(model: Any, wrapped: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "forced_bos_token_id": 9}
    prompt = torch.tensor([[5]])
    expected = model.generate(prompt, **options)
    assert expected[0, 1] == 9
    assert torch.equal(wrapped.generate(prompt, **options), expected)


def test_options_repeat_each_row_of_num_return_sequences(
    model: Any, wrapped: Any, inputs: dict[str, Tensor]
) -> None:
    options: dict[str, Any] = {
        **DETERMINISTIC["prefix_allowed_tokens_fn"],
        **DETERMINISTIC["repetition penalty"],
    }
    many = wrapped.generate(
        **inputs, **options, max_new_tokens=12, do_sample=True, num_return_sequences=2, seed=1
    )
    for row, line in enumerate(many.tolist()):
        for before, token in itertools.pairwise(line[7:]):
            assert (before + token + row // 2) % 2


SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "top-h": {"top_h": 0.5},
    "typical-p": {"typical_p": 0.6},
    "epsilon cut-off": {"epsilon_cutoff": 0.02},
    "eta cut-off": {"eta_cutoff": 0.05},
    "all at once": {
        "temperature": 1.3,
        "top_k": 30,
        "min_p": 0.02,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5, 7]],
    },
}


@pytest.mark.parametrize("name", SAMPLED)
def test_scores_of_a_sampled_run_are_those_of_transformers(
    model: Any, wrapped: Any, inputs: dict[str, Tensor], name: str
) -> None:
    """Each token was drawn from what transformers would have drawn it from."""
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, **SAMPLED[name]}
    outputs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = wrapped.generate(**inputs, **options, **outputs, max_new_tokens=10, seed=3)
    text = out.sequences
    assert len(out.scores) == len(out.logits) == 10

    processors: Any = model._get_logits_processor(
        _config(model, options, inputs),
        input_ids_seq_length=8,
        model_kwargs=inputs,
        device="cpu",
    )
    for token in range(10):
        prefix = text[:, : 8 + token]
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, token).long()], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(prefix, attention_mask=mask, position_ids=positions).logits[:, -1]
        torch.testing.assert_close(out.logits[token], logits, rtol=1e-4, atol=1e-4)
        expected = processors(prefix, out.logits[token].clone())
        torch.testing.assert_close(out.scores[token], expected)
        assert expected.gather(1, text[:, 8 + token, None]).isfinite().all()


def _config(model: Any, options: dict[str, Any], inputs: dict[str, Tensor]) -> Any:
    config, _ = model._prepare_generation_config(None, **options)
    model._prepare_special_tokens(config, True, device="cpu")
    return config


def test_sampled_runs_with_options_do_not_depend_on_drafts(
    model: Any, wrapped: Any, inputs: dict[str, Tensor]
) -> None:
    plain: Any = specdec.wrap(model, "none")
    for options in SAMPLED.values():
        run = {**inputs, "top_k": 0, **options, "do_sample": True, "max_new_tokens": 12, "seed": 5}
        assert torch.equal(wrapped.generate(**run), plain.generate(**run))


def test_scores_and_logits_of_a_greedy_run_equal_transformers(
    model: Any, wrapped: Any, inputs: dict[str, Tensor]
) -> None:
    options: dict[str, Any] = {
        **inputs,
        "max_new_tokens": 12,
        "do_sample": False,
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    theirs, ours = model.generate(**options), wrapped.generate(**options)
    for name in ("scores", "logits"):
        assert len(getattr(ours, name)) == 12
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for normalize in (False, True):
        torch.testing.assert_close(
            wrapped.compute_transition_scores(
                ours.sequences, ours.scores, normalize_logits=normalize
            ),
            model.compute_transition_scores(
                theirs.sequences, theirs.scores, normalize_logits=normalize
            ),
            rtol=1e-4,
            atol=1e-4,
        )
    assert ours.stats.tokens_per_step > 1.5
    only = wrapped.generate(**{**options, "output_logits": False})
    assert only.logits is None
    assert len(only.scores) == 12


class Closing(LogitsProcessor):
    """Masks everything in row 1 once its text is 14 tokens long."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        if input_ids.shape[1] >= 14:
            scores[1] = -torch.inf
        return scores


@pytest.mark.parametrize("sample", [False, True])
def test_a_request_without_a_next_token_is_named_and_the_others_run_on(
    wrapped: Any, inputs: dict[str, Tensor], sample: bool
) -> None:
    options: dict[str, Any] = {**inputs, "max_new_tokens": 20, "do_sample": sample, "seed": 2}
    expected = wrapped.generate(**options)
    message = r"request 1: no token .* for new token 6; .*processors"
    with pytest.raises(RequestError, match=message) as caught:
        wrapped.generate(**options, logits_processor=LogitsProcessorList([Closing()]))
    sequences = caught.value.sequences
    assert sequences is not None
    assert torch.equal(sequences[[0, 2]], expected[[0, 2]])
    wrapped.cache.check_integrity()
    assert not wrapped.cache.sequences


def test_texts_that_cannot_occur_are_not_asked_about(model: Any) -> None:
    """A trie of allowed texts knows no others."""
    allowed = {token: [(token + 1) % 10, (token + 3) % 10] for token in range(10)}
    options: dict[str, Any] = {
        "prefix_allowed_tokens_fn": lambda _, sent: allowed[int(sent[-1])],
        "max_new_tokens": 12,
        "do_sample": False,
    }
    prompt = torch.tensor([[1, 2, 3, 4]])
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    wild: Any = specdec.wrap(model, RandomDrafter(VOCAB), nodes=16)
    assert torch.equal(wild.generate(prompt, **options), expected)


def test_greedy_decoding_follows_an_infinite_score(wrapped: Any) -> None:
    class Forced(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.index_fill(1, torch.tensor([7]), torch.inf)

    prompt, processors = torch.tensor([[1, 2, 3]]), LogitsProcessorList([Forced()])
    out = wrapped.generate(prompt, logits_processor=processors, max_new_tokens=4, do_sample=False)
    assert out.tolist() == [[1, 2, 3, 7, 7, 7, 7]]


class EvensOnly(LogitsProcessor):
    """Odd tokens are impossible, and after one everything is."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        scores[(input_ids[:, 4:] % 2 == 1).any(1)] = -torch.inf
        return scores


@pytest.mark.parametrize("rule", [name for name in RULES if name != "greedy"])
def test_a_node_that_cannot_be_reached_fails_nobody(model: Any, rule: str) -> None:
    wild = specdec.wrap(model, RandomDrafter(VOCAB), rule=rule, nodes=16)
    out: Any = wild.generate(
        torch.tensor([[2, 4, 6, 8]]),
        logits_processor=LogitsProcessorList([EvensOnly()]),
        max_new_tokens=12,
        do_sample=True,
        seed=3,
    )
    assert out.shape == (1, 16)
    assert bool((out % 2 == 0).all())


def test_greedy_logits_are_not_copied() -> None:
    logits = torch.zeros(3, 5, dtype=torch.bfloat16)
    trees = specdec.TreeBatch.pack([specdec.TokenTree.chain(1, [2, 3])], vocab_size=5)
    assert Sampler().scores(logits, trees, [Text([1], 0)]) is logits


def test_processors_that_cannot_work_on_trees_are_refused(
    wrapped: Any, inputs: dict[str, Tensor]
) -> None:
    from transformers import SynthIDTextWatermarkLogitsProcessor as SynthID

    keyed = SynthID(
        ngram_len=3,
        keys=[1, 2],
        sampling_table_size=8,
        sampling_table_seed=0,
        context_history_size=8,
        device=torch.device("cpu"),
    )
    with pytest.raises(NotImplementedError, match=r"SynthID.*it remembers its last call"):
        wrapped.generate(**inputs, logits_processor=LogitsProcessorList([keyed]))
