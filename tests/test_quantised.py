"""Quantised models, as transformers loads them: not captured, and the same tokens.

The libraries are not among the packages for development; without one its cases skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

import specdec
from specdec.support import UnsupportedModel
from specdec.testing import TINY, tiny_model

GPU = torch.cuda.is_available()
GROUP = 32  # weights that share a scale


def float_model() -> Any:
    return tiny_model("Llama", hidden_size=128, intermediate_size=256)


def on_loading(folder: Path, config: Any) -> Any:
    """The tiny model, quantised by transformers while it is loaded."""
    float_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=config,
        device_map="cuda" if GPU else "cpu",
        dtype=torch.float32,
    )


def torchao(folder: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return on_loading(folder, TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def bitsandbytes_int8(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    # Any other threshold lets the rows of a pass decide about each other, see docs/models.md.
    return on_loading(folder, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))


def bitsandbytes_nf4(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return on_loading(folder, config)


def quanto(folder: Path) -> Any:
    pytest.importorskip("optimum.quanto")
    return on_loading(folder, QuantoConfig(weights="int4"))


def checkpoint(folder: Path, layers: dict[str, dict[str, Tensor]], **config: Any) -> Any:
    """The tiny model with some linear layers' tensors replaced, loaded from files."""
    model = float_model()
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.removesuffix(".weight") not in layers
    }
    for layer, parts in layers.items():
        tensors |= {f"{layer}.{name}": part.contiguous() for name, part in parts.items()}
    model.config.quantization_config = config
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)


def levels() -> Iterator[tuple[str, Tensor, Tensor]]:
    """The decoder's linear layers: name, [N, K] levels of 0 to 15, [N, K / GROUP] scales.

    A weight is (level - 8) * scale.
    """
    for name, weight in float_model().state_dict().items():
        if "_proj" in name:
            groups = weight.unflatten(1, (-1, GROUP))
            scales = groups.abs().amax(-1) / 7
            level = (groups / scales[..., None]).round().long() + 8
            yield name.removesuffix(".weight"), level.flatten(1), scales


def packed(level: Tensor, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """[R, C / 8] int32 of [R, C] levels; `order` says which of eight comes next."""
    eights = level.unflatten(1, (-1, 8))[..., order]
    words: Tensor = (eights << torch.arange(0, 32, 4)).sum(-1)
    return words.to(torch.int32)


def gptq(folder: Path) -> Any:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum.gptq")
    layers = {
        name: {
            "qweight": packed(level).t(),
            "qzeros": packed(torch.full_like(scales.t(), 7, dtype=torch.long)),  # less one
            "scales": scales.t().half(),
            "g_idx": torch.arange(level.shape[1], dtype=torch.int32) // GROUP,
        }
        for name, level, scales in levels()
    }
    return checkpoint(
        folder, layers, quant_method="gptq", bits=4, group_size=GROUP, sym=True, desc_act=False
    )


def awq(folder: Path) -> Any:
    pytest.importorskip("gptqmodel")
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    layers = {
        name: {
            "qweight": packed(level.t(), order),
            "qzeros": packed(torch.full_like(scales.t(), 8, dtype=torch.long)),
            "scales": scales.t().half(),
        }
        for name, level, scales in levels()
    }
    return checkpoint(folder, layers, quant_method="awq", bits=4, group_size=GROUP, zero_point=True)


def compressed_tensors(folder: Path) -> Any:
    pytest.importorskip("compressed_tensors")
    layers = {
        name: {
            "weight_packed": packed(level),
            "weight_scale": scales,
            "weight_shape": torch.tensor(level.shape),
        }
        for name, level, scales in levels()
    }
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    return checkpoint(
        folder,
        layers,
        quant_method="compressed-tensors",
        format="pack-quantized",
        quantization_status="compressed",
        config_groups={"all": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
    )


CASES = {
    torchao: "the weight of its q_proj is a Int8Tensor",
    bitsandbytes_int8: "its weights are of torch.float32, torch.int8",
    bitsandbytes_nf4: "its weights are of torch.float32, torch.uint8",
    quanto: r"_proj is a optimum\.quanto",
    gptq: r"_proj is a gptqmodel\.",
    awq: r"_proj is a gptqmodel\.",
    compressed_tensors: r"its weights are of torch.float32, torch\.int",
}
"""How a quantised model is made, and why its layers are not fused."""


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.__name__)
def quantised(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    model = request.param(tmp_path_factory.mktemp("model"))
    return model.eval(), CASES[request.param]


@torch.no_grad()
def assert_same(model: Any, tokens: Tensor, expected: Any) -> None:
    """Rows are equal, or first differ where passes of two sizes do not agree on what is best.

    Some kernels round to half precision inside of a float32 model: a row then depends a little on
    how many are computed with it, in transformers as here.
    """
    steps = torch.stack(expected.logits, 1)
    start = tokens.shape[1] - steps.shape[1]
    at_once = model(expected.sequences).logits[:, start - 1 : -1]
    spread = (steps - at_once).abs().max()
    for ours, theirs, logits in zip(tokens, expected.sequences, steps, strict=True):
        for place in (ours != theirs).nonzero()[:1, 0].tolist():
            best = logits[place - start].topk(2).values
            assert best[0] - best[1] <= 2 * spread


def test_tokens_are_those_of_transformers(quantised: tuple[Any, str]) -> None:
    model, _ = quantised
    ids = torch.randint(1, TINY["vocab_size"], (2, 28), device=model.device)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    options["return_dict_in_generate"] = True
    # Its own drafts are mostly accepted, and a quantised draft model is tried with it.
    wrapped: Any = specdec.wrap(model, model)
    out = wrapped.generate(ids, **options)
    assert out.stats.accepted > 0
    assert "captured" not in out.stats.paths
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), output_logits=True, **options
    )
    assert_same(model, out.sequences, expected)
    assert wrapped.unwrap() is model
    assert torch.equal(
        model.generate(ids, attention_mask=torch.ones_like(ids), **options).sequences,
        expected.sequences,
    )


def test_fused_layers_are_refused_with_what_does_not_fit(quantised: tuple[Any, str]) -> None:
    model, why = quantised
    with pytest.raises(UnsupportedModel, match=why):
        specdec.wrap(model, layers="fused")


def test_a_model_whose_tokens_meddle_with_each_other_is_warned_about() -> None:
    model = float_model()
    model.is_loaded_in_8bit = True
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.warns(UserWarning, match=r"llm_int8_threshold=6.0: .*llm_int8_threshold=0.0"):
        specdec.wrap(model).cache  # noqa: B018 - looks at the model
