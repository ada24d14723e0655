"""Fused layers give what the layers of transformers give, from the same weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import specdec
from specdec import UnsupportedModel
from specdec.batch import TreeBatch
from specdec.fused import ACTIVATIONS, FAMILIES, FusedModel, unfit
from specdec.kernels import layers, products
from specdec.target import Target
from specdec.testing import TINY, tiny_model
from specdec.tree import TokenTree
from tests import plain_steps

VOCAB = TINY["vocab_size"]
ONE: dict[str, Any] = {"num_hidden_layers": 1}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
CASES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 3, "head_dim": 16},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    "Qwen3": {},
    "Phi3": {"sliding_window": 3, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "Granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
        "attention_bias": True,
    },
    "Gemma": {"head_dim": 16},
    "Gemma2": {
        "num_hidden_layers": 2,
        "sliding_window": 3,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 7,
    },
    "Olmo2": {},
}


def target(model: Any, layers: Any = "fused") -> Target:
    return Target(model, layers=layers, backend="sdpa")


def logits(target: Target) -> Tensor:
    """Behind a prompt and the nodes of a tree."""
    tree = TreeBatch.pack([TokenTree.from_lists([5, 6, 7, 8], [-1, 0, 0, 2])], vocab_size=VOCAB)
    sequence = target.cache.admit()
    target.prefill([sequence], [torch.tensor([11, 12, 13, 14])])
    with target.speculate([sequence], tree) as scored:
        return scored.logits.clone()


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_every_family_is_here() -> None:
    assert {f"{name}ForCausalLM" for name in CASES} == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str) -> None:
    model = tiny_model(name, **{**ONE, **CASES[name]})
    expected = logits(target(model, "transformers"))
    assert far(logits(target(model)), expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_so_are_they_with_products_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With biases, and with sums in parts under multipliers and norms of a branch."""
    taken, parts = [], [1]
    product_parts = products.product_parts

    def fits(given: Tensor, weight: Tensor) -> bool:  # the interpreter computes in float32, too
        taken.append(weight.shape)
        return True

    def counted(given: Tensor, weight: Tensor) -> Tensor:
        found = product_parts(given, weight)
        parts.append(len(found))
        return found

    model = tiny_model(name, **{**ONE, **CASES[name]})
    expected = logits(target(model, "transformers"))
    monkeypatch.setattr(products, "fits", fits)
    monkeypatch.setattr(products, "BLOCK_K", 16)
    monkeypatch.setattr(products, "product_parts", counted)
    assert far(logits(target(model)), expected) < 1e-5
    assert taken
    assert max(parts) > 1 or CASES[name].get("attention_bias")
    taken.clear()
    logits(Target(model, layers="fused", backend="sdpa", capture=False))
    assert not taken, "launching them takes the host longer"


def without(**changes: Any) -> Callable[[FusedModel], None]:
    def change(fused: FusedModel) -> None:
        fused.layers = [replace(layer, **changes) for layer in fused.layers]

    return change


def with_(**changes: Any) -> Callable[[FusedModel], None]:
    return lambda fused: fused.__dict__.update(changes)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("Gemma2", with_(family=replace(FAMILIES["Gemma2ForCausalLM"], kind="cast, scale"))),
        ("Gemma2", without(window=None)),
        ("Gemma2", without(softcap=None)),
        ("Gemma2", without(after_mlp=None)),
        ("Gemma2", with_(logits_cap=None)),
        ("Granite", without(multiplier=1.0)),
        ("Granite", without(scale=1.0)),
        ("Granite", with_(embedding_multiplier=1.0)),
        ("Qwen3", without(query_norm=None)),
        ("Llama", with_(activation="gelu")),
    ],
)
def test_mistakes_would_be_seen(name: str, mistake: Callable[[FusedModel], None]) -> None:
    model = tiny_model(name, **{**ONE, **CASES[name]})
    fused = target(model)
    assert fused.fused is not None
    mistake(fused.fused)
    assert far(logits(fused), logits(target(model, "transformers"))) > 1e-3


# Packing


def storages(model: nn.Module) -> list[int]:
    return [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["Qwen2", "Phi3"])
def test_parameters_stay_what_they_are_and_lie_together(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, **ONE)
    before = {key: (parameter, parameter.clone()) for key, parameter in model.named_parameters()}
    assert len(set(storages(model))) == len(before)
    target(model)
    for key, parameter in model.named_parameters():
        assert parameter is before[key][0]
        assert torch.equal(parameter, before[key][1])
    joined = {"Qwen2": 3 - 1 + 3 - 1 + 2 - 1, "Phi3": 0}[name]  # weights, biases; gate and up
    assert len(set(storages(model))) == len(before) - joined
    if joined:
        attention = model.model.layers[0].self_attn
        assert attention.k_proj.weight.data_ptr() == (
            attention.q_proj.weight.data_ptr() + 4 * attention.q_proj.weight.numel()
        )

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter, before[key][1])


def test_packing_again_takes_nothing_and_a_copy_is_independent() -> None:
    model = tiny_model("Llama", **ONE)
    target(model)
    before = storages(model)
    target(model)
    assert storages(model) == before
    twin = copy.deepcopy(model)
    assert not set(storages(twin)) & set(before)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert next(model.parameters()).any()


def test_unwrapping_gives_every_parameter_its_own_storage_and_other_wrappers_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain_steps.stand_in(monkeypatch)
    model: Any = tiny_model("Qwen2", **ONE)
    ids = torch.randint(1, VOCAB, (1, 9))
    call: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **call)
    one: Any = specdec.wrap(model, layers="fused")
    other: Any = specdec.wrap(model, layers="fused")
    assert torch.equal(one.generate(ids, **call), expected)
    stream = one.stream(ids, **call)
    got = [token for _ in range(2) for token in next(stream).tokens[0]]
    assert one.unwrap() is model
    assert len(set(storages(model))) == len(storages(model))
    got += [token for step in stream for token in step.tokens[0]]  # what had begun goes on
    assert torch.equal(torch.tensor([got]), expected[:, 9:])
    out = other.generate(ids, return_dict_in_generate=True, **call)
    assert torch.equal(out.sequences, expected)
    assert out.stats.paths["captured"] > 0
    assert len(set(storages(model))) < len(storages(model))
    other.unwrap()
    assert len(set(storages(model))) == len(storages(model))


def train(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def load(model: Any, **options: Any) -> None:
    model.load_state_dict({k: v.flip(0) for k, v in model.state_dict().items()}, **options)


def replace_norm(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.flip(0) + 1)


def move_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight.data = torch.randn(TINY["hidden_size"])


@pytest.mark.parametrize(
    "change", [train, load, lambda m: load(m, assign=True), replace_norm, move_norm]
)
def test_a_change_of_the_weights_is_seen(change: Callable[[Any], None]) -> None:
    model = tiny_model("Llama", **ONE)
    fused = target(model)
    before = logits(fused)
    change(model)
    fused.weights_state()
    after = logits(fused)
    assert far(after, before) > 1e-3
    assert far(after, logits(target(model, "transformers"))) < 1e-5


# What does not fit


def lora(model: Any, *modules: str) -> None:
    config = LoraConfig(r=2, target_modules=list(modules), init_lora_weights=False)
    get_peft_model(model, config)


def own_forward(model: Any) -> None:
    whole = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda hidden: 2 * whole(hidden)


class Doubled(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * nn.functional.rms_norm(hidden, hidden.shape[-1:], self.weight)


def doubled_norm(model: Any) -> None:
    model.model.norm = Doubled(model.model.norm)


def doubled_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _module, _given, out: 2 * out)


ADDITIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "adapter": (lambda model: lora(model, "q_proj"), r"self_attn\.q_proj is a peft\."),
    "adapter on the head": (lambda model: lora(model, "lm_head"), r"lm_head is a peft\."),
    "hook": (doubled_head, "lm_head has a forward hook"),
    "forward": (own_forward, r"layers\.0\.mlp has a forward of its own"),
    "module": (doubled_norm, r"model\.norm is a .*Doubled"),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions_keep_the_forward_of_transformers(name: str) -> None:
    model = tiny_model("Llama", **ONE)
    add, why = ADDITIONS[name]
    add(model)
    with pytest.raises(UnsupportedModel, match=why):
        target(model)


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions_to_a_wrapped_model_are_heard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `auto` on a GPU, which a CPU stands in for here, its layers are transformers' then."""
    plain_steps.stand_in(monkeypatch)
    model: Any = tiny_model("Llama", **ONE)
    add, why = ADDITIONS[name]
    ids = torch.randint(1, VOCAB, (1, 9))
    call: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    strict: Any = specdec.wrap(model, layers="fused", nodes=4)
    strict.generate(ids, **call)
    with monkeypatch.context() as patch:
        patch.setattr(Target, "_unfit", lambda self, _, calls: unfit(self.model, calls))
        wrapped: Any = specdec.wrap(model, nodes=4)
        running = wrapped.stream(ids, max_new_tokens=30, do_sample=False)
        for _ in range(2):  # the token that comes with the prompt, and a step
            next(running)
        add(model)
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **call)
        out = wrapped.generate(ids, return_dict_in_generate=True, **call)
        assert torch.equal(out.sequences, expected)
        assert not out.stats.paths["captured"]
        assert len(list(running)) > 0, "what runs goes on with the changed model"
        wrapped.cache.check_integrity()
    with pytest.raises(UnsupportedModel, match=f"layers='fused' does not fit: .*{why}"):
        strict.generate(ids, **call)
    assert not strict.cache.sequences
    strict.cache.check_integrity()


def other_class(model: Any) -> None:
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "somewhere.else"})


def half_head(model: Any) -> None:
    model.lm_head.half()


def one_bias(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(32))


def shared_layers(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj = model.model.layers[0].mlp.gate_proj


def fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = 1


def gradients(model: Any) -> None:
    model(torch.tensor([[1, 2, 3]])).logits.mean().backward()


def dispatched(model: Any) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_class, "is not transformers' own|is a somewhere.else"),
        (half_head, "its weights are of torch.float16, torch.float32"),
        (one_bias, "only some of the products that read one input have a bias"),
        (shared_layers, "some of its layers share weights"),
        (fewer_layers, "it uses 1 of its 2 layers"),
        (gradients, "is being trained"),
        (dispatched, "has a forward hook|forward of its own"),
    ],
)
def test_what_does_not_fit_says_why(change: Callable[[Any], None], why: str) -> None:
    model: Any = tiny_model("Llama")
    calls = target(model)._calls[: 1 if change is fewer_layers else None]
    change(model)
    found = unfit(model, calls)
    assert found is not None
    assert re.search(why, found), found


def test_a_model_that_was_asked_for_hidden_states_fits_all_the_same() -> None:
    model: Any = tiny_model("Llama", **ONE)
    model(torch.ones(1, 3, dtype=torch.int64), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules()), "transformers left its hooks"
    assert target(model).unfit is None


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel is not one of LlamaForCausalLM, "):
        target(tiny_model("GPT2"))


def test_kernels_are_refused_where_triton_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(UnsupportedModel, match="the model is on cpu, where Triton's kernels"):
        target(tiny_model("Llama"))


def test_parameters_made_in_inference_mode_are_left_alone() -> None:
    with torch.inference_mode():
        model = tiny_model("Llama", **ONE)
        with pytest.raises(UnsupportedModel, match="its weights were made in inference mode"):
            target(model)


# The kernels, against the modules of transformers. Sizes that are no powers of two.

NORMS = {"cast, scale": LlamaRMSNorm, "scale, cast": Olmo2RMSNorm, "one plus": GemmaRMSNorm}


def norm(kind: str, size: int, dtype: torch.dtype) -> tuple[Any, Tensor, float]:
    module = NORMS[kind](size, eps=1e-5).to(dtype)
    module.weight.data = torch.randn(size).to(dtype)
    return module, module.weight.data, 1e-5


# Triton's interpreter cuts bfloat16 off instead of rounding it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", NORMS)
def test_norms_round_where_those_of_transformers_do(kind: Any, dtype: torch.dtype) -> None:
    size = 33
    own, weight, eps = norm(kind, size, dtype)
    inner, branch_weight, branch_eps = norm(kind, size, dtype)
    hidden, branch = torch.randn(3, size).to(dtype), torch.randn(3, size).to(dtype)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0, "atol": 0}
    with torch.no_grad():
        torch.testing.assert_close(
            layers.add_norm(hidden.clone(), None, weight, eps, kind), own(hidden), **tolerance
        )
        grown = hidden.clone()
        got = layers.add_norm(
            grown, branch, weight, eps, kind,
            branch_weight=branch_weight, branch_eps=branch_eps, multiplier=0.3,
        )  # fmt: skip
        expected = hidden + inner(branch) * 0.3
        torch.testing.assert_close(grown, expected, **tolerance)
        torch.testing.assert_close(got, own(expected), **tolerance)
        grown = hidden.clone()
        assert layers.add_norm(grown, branch, None, 0.0, kind) is grown
        assert torch.equal(grown, hidden + branch)


@pytest.mark.parametrize("together", [True, False])
def test_heads_are_normed_in_place_together_or_each(together: bool) -> None:
    heads, kv_heads, size = 3, 1, 6
    packed = torch.randn(2, (heads + 2 * kv_heads) * size)
    widths = heads * size, kv_heads * size
    sizes = widths if together else (size, size)
    modules = [norm("cast, scale", width, torch.float32) for width in sizes]
    parts = packed.split([*widths, kv_heads * size], 1)
    expected = [
        module(part.unflatten(1, (-1, width))).flatten(1)
        for (module, _, _), part, width in zip(modules, parts, sizes, strict=False)
    ]
    (_, *query), (_, *key) = modules
    got = packed.clone()
    layers.norm_heads(got, tuple(query), tuple(key), widths, "cast, scale")  # type: ignore[arg-type]
    torch.testing.assert_close(got, torch.cat([*expected, parts[2]], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS.values())))
def test_gates_are_those_of_transformers(activation: Any, dtype: torch.dtype) -> None:
    packed = 3 * torch.randn(3, 2 * 21).to(dtype)
    packed[0, :4] = torch.tensor([-90.0, 90.0, 0.0, -0.0])
    gate, up = packed.chunk(2, 1)
    expected = ACT2FN[activation](gate) * up
    torch.testing.assert_close(layers.gate(packed, activation), expected)
