"""Which Hugging Face models can be driven, and why others are refused before anything runs."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
SWITCHING_ROPES = {"dynamic", "longrope"}


class UnsupportedModel(ValueError):
    """The model cannot be driven with token trees; the message names it and says why."""

    def __init__(self, model: object, reason: str) -> None:
        super().__init__(f"{type(model).__name__} is not supported: {reason}")


def causal_model(model: Any) -> PreTrainedModel:
    """The Hugging Face model behind `model`: itself, or the one that PEFT put its adapters into.

    Raises:
        TypeError: it is neither.
        UnsupportedModel: a PEFT method that is not made of layers inside the model.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if hasattr(model, "get_base_model") and hasattr(model, "active_peft_config"):
        if model.active_peft_config.is_prompt_learning:
            kind = model.active_peft_config.peft_type.value
            raise UnsupportedModel(
                model, f"PEFT method {kind} adds virtual tokens that have no token ids"
            )
        return causal_model(model.get_base_model())
    hint = "; wrap the model itself, or use model.compile()" if hasattr(model, "_orig_mod") else ""
    raise TypeError(
        f"model: expected a transformers model or a PEFT model, got {type(model).__name__}{hint}"
    )


def check_model(model: PreTrainedModel) -> None:
    """Refuses what is known not to work from the configuration alone.

    Warns where the model itself says something else of a token when others are computed with it.

    Raises:
        UnsupportedModel: with the reason.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(
            model, "it has cross-attention to an encoder; use a decoder-only model"
        )
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise UnsupportedModel(
            model, "it has no language modeling head; load it as AutoModelForCausalLM"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if kinds:
        raise UnsupportedModel(
            model,
            f"its {', '.join(sorted(kinds))} layers keep a state or a mask that a tree of "
            "candidates cannot share or roll back",
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(
            model, "its layers keep a recurrent state that cannot be rolled back"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModel(model, "some of its layers read the keys and values of others")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(
            model,
            "it ignores transformers' `AttentionInterface`, so tree attention cannot be plugged in",
        )
    threshold = getattr(getattr(model.config, "quantization_config", None), "llm_int8_threshold", 0)
    if getattr(model, "is_loaded_in_8bit", False) and threshold > 0:
        warnings.warn(
            f"llm_int8_threshold={threshold}: a large input of one token changes what this model "
            "computes for the others of its pass, so answers can differ from transformers'; load "
            "it with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)",
            stacklevel=4,
        )


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuses runs behind the last learned position, or in which rotary frequencies would change.

    `dynamic` and `longrope` positions recompute every frequency once the text outgrows the original
    length; keys that are already cached would no longer fit, and rows of one batch would disagree.

    Args:
        model: the model that runs.
        length: prompt and new tokens of the longest request.

    Raises:
        UnsupportedModel: the run could cross the original length, or the last position.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    last = getattr(config, "max_position_embeddings", None)
    if not rope and last is not None and length > last and _learns_positions(model, last):
        raise UnsupportedModel(
            model,
            f"it has learned positions for {last} tokens and this run could reach {length}; lower "
            "max_new_tokens or shorten the prompt",
        )
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = parameters.get("rope_type")
        if kind not in SWITCHING_ROPES:
            continue
        original = parameters.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        if length > original:
            raise UnsupportedModel(
                model,
                f"its {kind!r} rotary positions change beyond {original} tokens and this run could "
                f"reach {length}; lower max_new_tokens or shorten the prompt",
            )


def _learns_positions(model: PreTrainedModel, count: int) -> bool:
    """Whether there is a table of so many positions; some have a few rows more in front."""
    tokens = model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and count <= module.num_embeddings < count + 8
        for module in model.modules()
    )
