"""Models and drafters of known quality, for tests and tables. Nothing here is a speed claim."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.drafting import SequenceDrafter
from specdec.noise import uniform
from specdec.tree import TokenTree

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Phi3": {},
    "Gemma2": {"head_dim": 16, "sliding_window": 7, "attn_logit_softcapping": 1.0},
    "Gemma3Text": {
        "head_dim": 16,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Olmo2": {},
    "Granite": {},
    "Cohere2": {"sliding_window": 7, "num_hidden_layers": 4},
    "GPTNeoX": {"num_key_value_heads": None},
    "GPT2": {},
    "GptOss": {**_EXPERTS, "num_local_experts": 4, "sliding_window": 7},  # sinks
}


def tiny_model(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of a few thousand weights with a vocabulary of 97.

    Every part matters to what it generates - attention, windows, caps, sinks, biases - and its
    logits are far enough apart that greedy decoding is well defined.

    Args:
        name: a key of `ARCHITECTURES`, or any other causal model of transformers.
        changes: to its configuration.
    """
    options = {**TINY, **ARCHITECTURES.get(name, {}), **changes}
    if name == "GPT2":
        options |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    options = {key: value for key, value in options.items() if value is not None or "token" in key}
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**options)
    # Some versions of transformers leave out the soft cap in their sdpa attention.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager" if capped else None
    ).eval()
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "embed" in part or "wte" in part:
                weight.normal_()
            elif weight.ndim > 1:
                gain = 6.0 if weight is model.get_output_embeddings().weight else 2.0
                weight.normal_(std=gain * weight.shape[-1] ** -0.5)
            elif "sinks" in part:
                weight.normal_()
            elif not weight.any():
                weight.normal_(std=0.1)  # biases start at zero, where mistakes would not show
    assert isinstance(model, PreTrainedModel)
    return model


@torch.no_grad()
def degraded(
    model: PreTrainedModel, *, bits: int | None = None, layers: int | None = None
) -> PreTrainedModel:
    """A worse copy of a model, to draft for the original where no smaller model exists.

    It costs as much as the original to run, so its acceptance means something and its speed does
    not. Greedy acceptance at depth 1 on SmolLM2-135M-Instruct is listed in `docs/drafters.md`.

    Args:
        model: left as it is.
        bits: round every weight matrix of the decoder to that many bits, symmetrically along its
            last dimension; 2 to 8. The head and the token embeddings keep their precision.
        layers: keep that many decoder layers: the first and the last ones, and of the others those
            spread evenly.
    """
    worse = copy.deepcopy(model)
    if bits is not None:
        if not 2 <= bits <= 8:
            raise ValueError(f"bits: expected 2 to 8, got {bits}")
        embeddings: Any = (worse.get_input_embeddings(), worse.get_output_embeddings())
        precise = {id(part.weight) for part in embeddings}
        top = 2 ** (bits - 1) - 1
        for weight in worse.get_decoder().parameters():
            if weight.ndim > 1 and id(weight) not in precise:
                scale = weight.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
                weight.copy_((weight / scale).round() * scale)
    if layers is not None:
        stack = worse.get_decoder().layers
        if not 2 <= layers <= len(stack):
            raise ValueError(f"layers: expected 2 to {len(stack)}, got {layers}")
        kept = sorted({round(i * (len(stack) - 1) / (layers - 1)) for i in range(layers)})
        worse.get_decoder().layers = nn.ModuleList(stack[index] for index in kept)
        for index, layer in enumerate(worse.get_decoder().layers):
            layer.self_attn.layer_idx = index
        config = worse.config.get_text_config(decoder=True)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index] for index in kept]
    return worse


class RandomDrafter(SequenceDrafter):
    """Random tokens on random trees: never right but by accident, so it exercises rollback."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(seed)

    def _integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self._generator))

    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        size = 1 + self._integer(nodes)
        drafts = [self._integer(self._vocab_size) for _ in range(size - 1)]
        parents = [-1, *(self._integer(node) for node in range(1, size))]
        return TokenTree.from_lists([tokens[-1], *drafts], parents)


class OracleDrafter(SequenceDrafter):
    """Knows the answers and spoils each token of them with a given probability.

    The tree is a chain of the true continuation with a wrong sibling beside every node; where a
    token is spoiled, the chain goes on below the wrong one.

    Args:
        texts: whole texts, prompt and answer; the one that starts like the sequence is used.
        corrupt: probability of spoiling a token.
        vocab_size: to choose wrong tokens from.
        seed: of the spoiling.
    """

    def __init__(
        self, texts: Sequence[Sequence[int]], *, corrupt: float, vocab_size: int, seed: int = 0
    ) -> None:
        self._texts = [list(text) for text in texts]
        self._corrupt = corrupt
        self._vocab_size = vocab_size
        self._seed = torch.tensor(seed)

    def draft(self, tokens: Sequence[int], nodes: int) -> TokenTree:
        known = len(tokens)
        text = next((t for t in self._texts if t[:known] == list(tokens)), [])
        out, parents, node = [tokens[-1]], [-1], 0
        for place in range(known, len(text)):
            if len(out) + 2 > nodes:
                break
            wrong = (text[place] + 1) % self._vocab_size
            spoiled = float(uniform(self._seed, torch.tensor(place), known)) < self._corrupt
            out += [wrong, text[place]] if spoiled else [text[place], wrong]
            parents += [node, node]
            node = len(out) - 2
        return TokenTree.from_lists(out, parents)
