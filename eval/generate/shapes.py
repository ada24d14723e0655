"""The models of the benchmark: a real one, and shapes with random weights where none can be had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from specdec import models

REAL = "smollm2-135m"

SHAPES: dict[str, Any] = {
    "llama-3.1-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    ),
    "llama-3.2-1b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": lambda: Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
}
"""Configurations as their checkpoints have them, made when they are asked for."""


@dataclass(frozen=True)
class Subject:
    """A model to time."""

    name: str
    model: Any
    tokenizer: Any | None
    """None where weights, and so texts, are random."""

    @property
    def weight_bytes(self) -> int:
        """What a step has to read: every weight but the embeddings that are only looked up."""
        model, skipped = self.model, 0
        if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
            table = model.get_input_embeddings().weight
            skipped = table.numel() * table.element_size()
        return sum(int(p.numel() * p.element_size()) for p in model.parameters()) - int(skipped)


def load(name: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """The model by that name.

    Raises:
        ValueError: there is none.
    """
    if name == REAL:
        folder = models.fetch(name)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        return Subject(name, model, AutoTokenizer.from_pretrained(folder))
    if name not in SHAPES:
        raise ValueError(f"model: expected one of {', '.join([REAL, *SHAPES])}, got {name!r}")
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[name](), dtype=dtype).eval()
    return Subject(name, model, None)
