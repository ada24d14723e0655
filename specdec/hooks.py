"""Where a Hugging Face model meets our attention and cache: transformers' public hooks.

The attention function is registered with transformers; no mask function is, so models build no
mask. A `Cache` hands new keys and values straight to it. One keyword argument, which models hand
down to their attention unchanged, carries the handler of the running forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from specdec.attention import AttentionPlan, Backend, tree_attention
from specdec.kernels import cache as kernels
from specdec.pages import PagePool

ATTENTION = "specdec"

HARMLESS_ARGUMENTS = {
    "attention_interface",
    "cache_position",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}
"""What models hand to every attention function and tree attention may ignore."""


@dataclass(frozen=True)
class AttentionCall:
    """What one attention layer asks for."""

    layer: int
    query: Tensor  # [1, Hq, R, Dk]
    key: Tensor  # [1, Hkv, R, Dk]
    value: Tensor  # [1, Hkv, R, Dv]
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    unknown: set[str]  # arguments with a value that tree attention does not know


@dataclass
class Taps:
    """Outputs of layers that a forward is to keep.

    Layers are counted as in transformers' `hidden_states`: 0 is what the first layer reads, the
    last, which is also -1, what the head reads.
    """

    layers: frozenset[int]
    states: dict[int, Tensor] = field(default_factory=dict)  # [R, H] each, filled in by the forward

    def see(self, layer: int, state: Tensor, *, layers: int) -> None:
        """Keeps a copy of the output number `layer` of `layers` + 1 if it is wanted."""
        for name in self.layers & {layer, layer - layers - 1}:
            self.states[name] = state.clone()

    def check(self, layers: int) -> None:
        """Raises ValueError if a layer is wanted that the model does not have."""
        if wrong := sorted(n for n in self.layers if not -layers - 1 <= n <= layers):
            raise ValueError(
                f"hidden_layers: expected {-layers - 1} to {layers} for a model of {layers} "
                f"layers, got {wrong[0]}"
            )


class AttentionHandler(Protocol):
    def __call__(self, call: AttentionCall) -> Tensor:
        """Attention output [1, R, Hq, Dv]."""


class NoHandler(RuntimeError):
    """The attention function was reached by a call that is not ours."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    specdec_handler: AttentionHandler | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: every layer of every model arrives here."""
    if specdec_handler is None:
        raise NoHandler(
            f"{type(module).__name__} was called without a plan: the model is generating with "
            "specdec in another thread, or does not hand keyword arguments down to its attention"
        )
    causal = rest.pop("is_causal", None) is not False and getattr(module, "is_causal", True)
    unknown = {
        name for name, given in rest.items() if given is not None and name not in HARMLESS_ARGUMENTS
    }
    if attention_mask is not None:
        unknown.add("a mask of its own")
    if not causal:
        unknown.add("bidirectional attention")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    call = AttentionCall(layer, query, key, value, scaling, sliding_window, softcap, s_aux, unknown)
    return specdec_handler(call), None


AttentionInterface.register(ATTENTION, _attention)


class PassThroughCache(Cache):
    """Stands in for the model's cache: hands new keys and values to the attention function.

    The model is always given positions and never builds a mask, so the lengths it could ask for
    are never used; `get_mask_sizes` raises in case a model asks all the same.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        raise RuntimeError("the model builds an attention mask although none is registered")


@dataclass
class Probe:
    """Records what the attention layers look like during one small forward."""

    calls: list[AttentionCall]

    def __call__(self, call: AttentionCall) -> Tensor:
        self.calls.append(call)
        repeat = call.query.shape[1] // call.value.shape[1]
        return call.value.repeat_interleave(repeat, 1).transpose(1, 2).contiguous()


@dataclass
class PagedAttention:
    """Writes new keys and values into the pool, then attends."""

    pool: PagePool
    plan: AttentionPlan
    backend: Backend

    def __call__(self, call: AttentionCall) -> Tensor:
        plan = self.plan.on(call.query.device)
        pages = self.pool.layer(call.layer)
        keys, values = call.key[0].transpose(0, 1), call.value[0].transpose(0, 1)
        with torch.cuda.device_of(call.query):  # the layers of a model may lie on several GPUs
            if keys.is_cuda:
                from specdec.kernels import moves  # needs Triton

                moves.write_rows(pages.keys, pages.values, plan.slots, keys, values)
            else:
                kernels.write_rows(pages.keys, plan.slots, keys)
                kernels.write_rows(pages.values, plan.slots, values)
            out = tree_attention(
                call.query[0].transpose(0, 1),
                pages,
                plan,
                scale=call.scale,
                window=call.window,
                softcap=call.softcap,
                sinks=call.sinks,
                backend=self.backend,
            )
        return out[None]


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that the model's parts read, each once."""
    found = {
        id(part.config): part.config
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
    }
    text = model.config.get_text_config(decoder=True)
    return list({**found, id(text): text}.values())


@contextmanager
def attention_name(configs: Sequence[PreTrainedConfig], name: str) -> Iterator[None]:
    """Sets the attention implementation for the time of one forward."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old
