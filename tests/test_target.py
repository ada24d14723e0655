"""Every supported architecture decodes as transformers does; the others are refused by name."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

import specdec
from specdec.attention import tree_attention
from specdec.batch import TreeBatch
from specdec.support import UnsupportedModel
from specdec.target import Target
from specdec.testing import ARCHITECTURES, TINY, OracleDrafter, RandomDrafter, tiny_model
from specdec.tree import TokenTree

VOCAB = TINY["vocab_size"]


def greedy(model: Any, prompts: Tensor, new: int = 64) -> Tensor:
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=False
    )
    assert isinstance(out, Tensor)
    return out


def worst_logit_error(model: Any, prompt: Tensor) -> float:
    """A random tree scored in one pass, against the model's own forward over each node's path.

    Relative to the spread of the logits.
    """
    generator = torch.Generator().manual_seed(3)
    parents = [-1] + [int(torch.randint(n, (), generator=generator)) for n in range(1, 12)]
    tokens = torch.randint(1, VOCAB, (12,), generator=generator).tolist()
    tree = TokenTree.from_lists(tokens, parents)
    target = Target(model)
    sequence = target.cache.admit()
    target.prefill([sequence], [prompt])
    with target.speculate([sequence], TreeBatch.pack([tree], vocab_size=VOCAB)) as scored:
        logits = scored.logits
    worst = 0.0
    for node, bits in enumerate(tree.ancestor_bits):
        path = [token for j, token in enumerate(tokens) if bits >> j & 1]
        with torch.no_grad():
            expected = model(torch.cat([prompt, torch.tensor(path)])[None]).logits[0, -1]
        worst = max(worst, float((logits[node] - expected).abs().max() / expected.std()))
    return worst


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_node_is_scored_as_the_end_of_its_own_text(name: str) -> None:
    assert worst_logit_error(tiny_model(name), torch.randint(1, VOCAB, (20,))) < 1e-4


DROPPED = {
    "window": ["Mistral", "Gemma2", "Gemma3Text", "Cohere2", "GptOss"],
    "softcap": ["Gemma2"],
    "sinks": ["GptOss"],
    "everything": list(ARCHITECTURES),
}


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part, names in DROPPED.items() for name in names]
)
def test_the_scoring_test_notices_what_attention_leaves_out(
    monkeypatch: pytest.MonkeyPatch, part: str, name: str
) -> None:
    def without(query: Tensor, *args: Any, **options: Any) -> Tensor:
        if part == "everything":
            return torch.zeros_like(query)
        return tree_attention(query, *args, **{**options, part: None})

    monkeypatch.setattr("specdec.hooks.tree_attention", without)
    assert worst_logit_error(tiny_model(name), torch.randint(1, VOCAB, (20,))) > 1e-2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_equal_those_of_transformers(name: str) -> None:
    model: Any = tiny_model(name)
    before = model.config._attn_implementation
    prompts = torch.randint(1, VOCAB, (3, 9))
    expected = greedy(model, prompts)
    other = prompts.clone()
    other[:, 0] = other[:, 0] % (VOCAB - 1) + 1
    assert not torch.equal(greedy(model, other)[:, 9:], expected[:, 9:]), "the prefix must matter"
    for drafter in (
        RandomDrafter(VOCAB),
        OracleDrafter(expected.tolist(), corrupt=0.3, vocab_size=VOCAB),
    ):
        wrapped: Any = specdec.wrap(model, drafter, nodes=24)
        out = wrapped.generate(
            prompts, max_new_tokens=64, do_sample=False, return_dict_in_generate=True
        )
        assert torch.equal(out.sequences, expected)  # without any near-tie
        if isinstance(drafter, OracleDrafter):
            assert out.stats.tokens_per_step > 2
        cache = wrapped.cache
        cache.check_integrity()
        assert not cache.sequences
        cache.prefixes.clear()
        assert cache.pool.num_free == cache.pool.num_pages
    assert model.config._attn_implementation == before
    assert torch.equal(greedy(model, prompts), expected)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss"])
def test_the_reference_backend_agrees_on_whole_models(name: str) -> None:
    model: Any = tiny_model(name)
    prompts = torch.randint(1, VOCAB, (2, 9))
    expected = greedy(model, prompts, 12)
    oracle = OracleDrafter(expected.tolist(), corrupt=0.3, vocab_size=VOCAB)
    out = greedy(specdec.wrap(model, oracle, backend="reference"), prompts, 12)
    assert torch.equal(out, expected)


def test_rows_of_a_model_on_several_devices_are_named_by_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accelerate would move a tensor to the first device; the rows may lie on another one."""
    model: Any = tiny_model("Llama")
    prompts = torch.randint(1, VOCAB, (3, 9))
    expected = greedy(model, prompts, 12)
    wrapped: Any = specdec.wrap(model, RandomDrafter(VOCAB), nodes=8)
    wrapped._driven()._spread = True
    forward, named = type(model).forward, []

    @functools.wraps(forward)
    def recording(*args: Any, **kwargs: Any) -> Any:
        named.append(kwargs["logits_to_keep"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(model), "forward", recording)
    assert torch.equal(greedy(wrapped, prompts, 12), expected)
    assert not any(isinstance(rows, torch.Tensor) for rows in named)
    assert any(isinstance(rows, list) for rows in named)


def test_long_prompts_are_prefilled_in_chunks_across_requests() -> None:
    model: Any = tiny_model("Mistral")
    target = Target(model)
    prompts = [torch.randint(1, VOCAB, (length,)) for length in (70, 1, 33)]
    sequences = [target.cache.admit() for _ in prompts]
    target.prefill(sequences, [prompt[:-1] for prompt in prompts], chunk=16)
    roots = [TokenTree.root(int(prompt[-1])) for prompt in prompts]
    trees = TreeBatch.pack(roots, vocab_size=VOCAB)
    with target.speculate(sequences, trees) as scored:
        for row, prompt in enumerate(prompts):
            with torch.no_grad():
                expected = model(prompt[None]).logits[0, -1]
            torch.testing.assert_close(scored.logits[row], expected, rtol=1e-4, atol=1e-4)
    target.cache.check_integrity()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Mamba": ({"state_size": 4}, "(linear_attention layers|recurrent)"),
    "Lfm2": ({"layer_types": ["conv", "full_attention"]}, "conv layers keep a state"),
    "Qwen3Next": (
        {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "head_dim": 16},
        "linear_attention layers keep a state",
    ),
    "Bloom": ({"n_layer": 2}, "ignores transformers' `AttentionInterface`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name(name: str) -> None:
    changes, reason = REFUSED[name]
    options = {**TINY, **changes}
    config = getattr(transformers, f"{name}Config")(
        **{key: value for key, value in options.items() if value is not None or "token" in key}
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        UnsupportedModel, match=f"^{type(model).__name__} is not supported: .*{reason}"
    ):
        specdec.wrap(model)


def test_encoder_decoders_and_headless_models_are_refused() -> None:
    small = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB}
    t5: Any = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    with pytest.raises(UnsupportedModel, match="cross-attention to an encoder"):
        specdec.wrap(t5)
    with pytest.raises(UnsupportedModel, match="no language modeling head"):
        specdec.wrap(tiny_model("Llama").model)
    with pytest.raises(
        TypeError, match="expected a transformers model or a PEFT model, got Linear"
    ):
        specdec.wrap(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_switch_are_refused_where_a_run_could_cross(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4}
    if kind == "dynamic":
        rope["factor"] = 2.0
    else:
        rope |= {
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        }
    limit = 256 if kind == "dynamic" else 64
    model: Any = tiny_model("Llama", rope_parameters=rope)
    prompts = torch.randint(1, VOCAB, (1, 9))
    expected = greedy(model, prompts, limit - 9)
    wrapped: Any = specdec.wrap(model, RandomDrafter(VOCAB))
    assert torch.equal(greedy(wrapped, prompts, limit - 9), expected)
    with pytest.raises(
        UnsupportedModel, match=f"change beyond {limit} tokens .* reach {limit + 1}"
    ):
        greedy(wrapped, prompts, limit - 8)


def test_learned_positions_may_be_used_to_the_last() -> None:
    """Nodes deeper than the length limit must not ask for positions that do not exist."""
    model: Any = tiny_model("GPT2")
    prompts = torch.randint(1, VOCAB, (1, 200))
    expected = greedy(model, prompts, 56)
    oracle = OracleDrafter(expected.tolist(), corrupt=0.1, vocab_size=VOCAB)
    for drafter in (oracle, RandomDrafter(VOCAB)):
        wrapped: Any = specdec.wrap(model, drafter, nodes=16)
        assert torch.equal(greedy(wrapped, prompts, 56), expected)
        with pytest.raises(UnsupportedModel, match=r"learned positions for 256 .* reach 257"):
            greedy(wrapped, prompts, 57)


def test_weights_without_values_are_refused() -> None:
    model: Any = tiny_model("Llama")
    with pytest.raises(UnsupportedModel, match="its weights are on the meta device"):
        Target(model.to("meta"))


def test_bidirectional_attention_is_refused() -> None:
    model: Any = tiny_model("Gemma3Text")
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(UnsupportedModel, match="its attention takes bidirectional attention"):
        Target(model)


def test_threads_take_turns() -> None:
    """The way of a TextIteratorStreamer: generate in a thread, several at once."""
    model: Any = tiny_model("Llama")
    prompts = torch.randint(1, VOCAB, (2, 9))
    expected = greedy(model, prompts, 24)
    shared: Any = specdec.wrap(model, RandomDrafter(VOCAB))
    wrappers = [shared, shared, specdec.wrap(model, "ngram"), specdec.wrap(model, "none")]
    with ThreadPoolExecutor(len(wrappers)) as threads:
        outs = list(threads.map(lambda wrapped: greedy(wrapped, prompts, 24), wrappers * 2))
    assert all(torch.equal(out, expected) for out in outs)
    assert model.config._attn_implementation != "specdec"
    shared.cache.check_integrity()
    assert not shared.cache.sequences


class Boom(Exception):
    pass


def test_an_exception_in_the_model_leaves_nothing_behind() -> None:
    model: Any = tiny_model("Llama")
    prompts = torch.randint(1, VOCAB, (2, 9))
    wrapped: Any = specdec.wrap(model, RandomDrafter(VOCAB))
    expected = greedy(wrapped, prompts, 8)
    calls = 0

    def fail_in_the_third_pass(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Boom

    hook = model.model.layers[1].register_forward_hook(fail_in_the_third_pass)
    before = model.config._attn_implementation
    with pytest.raises(Boom):
        greedy(wrapped, prompts, 8)
    hook.remove()
    assert model.config._attn_implementation == before
    cache = wrapped.cache
    cache.check_integrity()
    assert not cache.sequences
    assert torch.equal(greedy(wrapped, prompts, 8), expected)


def test_offloaded_weights_come_and_go() -> None:
    from accelerate import cpu_offload

    model: Any = tiny_model("Llama")
    prompts = torch.randint(1, VOCAB, (2, 9))
    expected = greedy(model, prompts, 16)
    cpu_offload(model, torch.device("cpu"))
    out = greedy(specdec.wrap(model, RandomDrafter(VOCAB)), prompts, 16)
    assert torch.equal(out, expected)
