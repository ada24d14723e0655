"""Weight-only quantised models, as transformers loads them: not captured, and the same tokens.

Needs torchao, which is not among the packages for development: where it is installed, transformers
loads it with every model, and it then remarks on CUDA libraries that a CPU does not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

import specdec
from specdec.support import UnsupportedModel
from specdec.testing import TINY, tiny_model

quantization = pytest.importorskip("torchao.quantization")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("model")
    tiny_model("Llama", hidden_size=64).save_pretrained(folder)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map=DEVICE, dtype=torch.float32
    ).eval()


def test_tokens_are_those_of_transformers(quantised: Any) -> None:
    ids = torch.randint(1, TINY["vocab_size"], (2, 20), device=DEVICE)
    ids = torch.cat([ids, ids[:, :8]], 1)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    expected = quantised.generate(ids, attention_mask=torch.ones_like(ids), **options)
    out: Any = specdec.wrap(quantised, "ngram").generate(
        ids, return_dict_in_generate=True, **options
    )
    assert torch.equal(out.sequences, expected)
    assert "captured" not in out.stats.paths


def test_fused_layers_are_refused_with_the_weight_that_does_not_fit(quantised: Any) -> None:
    with pytest.raises(UnsupportedModel, match="the weight of its q_proj is a Int8Tensor"):
        specdec.wrap(quantised, layers="fused")
