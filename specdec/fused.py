"""The forward of the standard decoder families in few launches: nine or ten for each layer.

The model's own weights are used. Products that read the same input are packed into one matrix,
whose rows the model's parameters become. What stands between the products - norms, rotation and
page write, activation - is one kernel each. A model that this does not fit keeps the forward of
transformers, and `unfit` says why.

Letters: R rows, D hidden size, V vocabulary, Hq/Hkv heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from specdec.attention import AttentionPlan, Backend, tree_attention
from specdec.hooks import AttentionCall, Taps
from specdec.identity import modules_of
from specdec.packing import Packed, pack, unpack
from specdec.pages import PagePool
from specdec.support import SWITCHING_ROPES

if TYPE_CHECKING:
    from specdec.kernels.layers import Activation, NormKind


@dataclass(frozen=True)
class Family:
    """How the layers of a family are put together: the names of its norms, by place."""

    kind: NormKind
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


LLAMA = Family("cast, scale")
FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "Phi3ForCausalLM": LLAMA,
    "GraniteForCausalLM": LLAMA,
    "GemmaForCausalLM": Family("one plus"),
    "Gemma2ForCausalLM": Family(
        "one plus",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    "Olmo2ForCausalLM": Family(
        "scale, cast",
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
    ),
}
ACTIVATIONS: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_pytorch_tanh",
    "GELUActivation": "gelu",
}
"""By the class that transformers gives them."""

Norm = tuple[Tensor, float]  # weight and epsilon


@dataclass(frozen=True)
class Layer:
    """A decoder layer: its packed products, and its norms where it has them."""

    qkv: Packed
    out: Packed
    gate_up: Packed
    down: Packed
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    multiplier: float
    heads: tuple[int, int, int]  # query heads, key/value heads, values of a head
    scale: float | None
    window: int | None
    softcap: float | None

    @property
    def products(self) -> tuple[Packed, ...]:
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True)
class Branch:
    """What a part of a layer adds to the residual stream."""

    value: Tensor  # [R, D], or [S, R, D] float32 parts of it
    norm: Norm | None
    multiplier: float


class FusedModel:
    """A model's forward over packed rows; see `Target.forward`.

    Args:
        model: one that `unfit` says nothing against. Its parameters become views of packed ones.
        calls: what its attention layers ask for, in order.
        graphs: passes are captured: products of few rows are ours then, which take the GPU less
            time than cuBLAS's, but the host longer to launch.
    """

    def __init__(
        self, model: PreTrainedModel, calls: Sequence[AttentionCall], *, graphs: bool
    ) -> None:
        self.model = model
        self.graphs = graphs
        self.family = FAMILIES[type(model).__name__]
        body: Any = model.model
        self.embeddings: nn.Module = body.embed_tokens
        self.embedding_multiplier = float(getattr(body, "embedding_multiplier", 1.0))
        self.rotary: Any = body.rotary_emb
        self.layers = [
            self._layer(layer, call) for layer, call in zip(body.layers, calls, strict=True)
        ]
        self.activation = ACTIVATIONS[type(_activation(body.layers[0].mlp)).__name__]
        self.norm = _norm(body.norm)
        self.head: Any = model.get_output_embeddings()
        self.logits_scaling = float(getattr(model.config, "logits_scaling", 1.0))
        self.logits_cap = getattr(model.config, "final_logit_softcapping", None)
        self._parts = _parts(model)

    def _layer(self, layer: Any, call: AttentionCall) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, gate_up = _joined(layer)

        def norm(name: str | None) -> Norm | None:
            return None if name is None else _norm(getattr(layer, name))

        family = self.family
        return Layer(
            qkv=pack(qkv),
            out=pack([attention.o_proj]),
            gate_up=pack(gate_up),
            down=pack([mlp.down_proj]),
            before_attention=norm(family.before_attention),
            after_attention=norm(family.after_attention),
            before_mlp=norm(family.before_mlp),
            after_mlp=norm(family.after_mlp),
            query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            multiplier=float(getattr(layer, "residual_multiplier", 1.0)),
            heads=(call.query.shape[1], call.key.shape[1], call.value.shape[3]),
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
        )

    @property
    def current(self) -> bool:
        """Whether the model's modules and parameters are still those that are used here."""
        return _parts(self.model) == self._parts

    def unpack(self) -> None:
        """Gives every parameter of the model a storage of its own again; it is not used anymore."""
        while self.layers:  # the packed weights of a layer go before those of the next are copied
            for product in self.layers.pop().products:
                unpack(product)

    def forget(self) -> None:
        """Lets go of the packed weights, which are the model's parameters still or nobody's."""
        self.layers.clear()

    def forward(
        self,
        tokens: Tensor,
        plan: AttentionPlan,
        pool: PagePool,
        backend: Backend,
        keep: int | Tensor,
        taps: Taps | None = None,
    ) -> Tensor:
        """[kept rows, V] logits; see `Target.forward`."""
        from specdec.kernels import layers  # needs Triton

        graphs = self.graphs and taps is None

        hidden = self.embeddings(tokens)
        if self.embedding_multiplier != 1.0:
            hidden = hidden * self.embedding_multiplier
        # OLMo-2 rotates in float32.
        dtype = torch.float32 if self.family.kind == "scale, cast" else hidden.dtype
        frequencies, scaling = self.rotary.inv_freq, float(self.rotary.attention_scaling)
        cos, sin = layers.rotary(plan.positions, frequencies.float(), scaling, dtype)
        branch: Branch | None = None
        for index, layer in enumerate(self.layers):
            given = self._enter(hidden, branch, layer.before_attention)
            if taps is not None:
                taps.see(index, hidden, layers=len(self.layers))
            value = self._attend(layer, given, plan, pool, index, cos, sin, backend, graphs)
            branch = Branch(value, layer.after_attention, layer.multiplier)
            given = self._enter(hidden, branch, layer.before_mlp)
            branch = Branch(self._mlp(layer, given, graphs), layer.after_mlp, layer.multiplier)
        out = self._enter(hidden, branch, self.norm)
        if taps is not None:
            taps.see(len(self.layers), out, layers=len(self.layers))
        out = out[keep] if isinstance(keep, Tensor) else out[-keep:]
        logits = F.linear(out, self.head.weight, self.head.bias)
        if self.logits_scaling != 1.0:
            logits = logits / self.logits_scaling
        if self.logits_cap is not None:
            logits = torch.tanh(logits / self.logits_cap) * self.logits_cap
        return logits

    def _enter(self, hidden: Tensor, branch: Branch | None, norm: Norm | None) -> Tensor:
        """Adds the last branch to the residual stream, and what the next one reads of it."""
        from specdec.kernels import layers  # needs Triton

        weight, eps = norm or (None, 0.0)
        if branch is None:
            return layers.add_norm(hidden, None, weight, eps, self.family.kind)
        branch_weight, branch_eps = branch.norm or (None, 0.0)
        return layers.add_norm(
            hidden,
            branch.value,
            weight,
            eps,
            self.family.kind,
            branch_weight=branch_weight,
            branch_eps=branch_eps,
            multiplier=branch.multiplier,
        )

    def _attend(
        self,
        layer: Layer,
        given: Tensor,
        plan: AttentionPlan,
        pool: PagePool,
        index: int,
        cos: Tensor,
        sin: Tensor,
        backend: Backend,
        graphs: bool,
    ) -> Tensor:
        from specdec.kernels import layers, moves  # need Triton

        pages = pool.layer(index)
        query_heads, kv_heads, value_dim = layer.heads
        key_dim = pages.keys.shape[3]
        widths = query_heads * key_dim, kv_heads * key_dim, kv_heads * value_dim
        packed = _linear(given, layer.qkv, graphs)
        if layer.query_norm is not None and layer.key_norm is not None:
            layers.norm_heads(
                packed, layer.query_norm, layer.key_norm, widths[:2], self.family.kind
            )
        query, keys, values = packed.split(widths, 1)
        rotated = moves.rotate_and_write(
            query.unflatten(1, (query_heads, key_dim)),
            pages.keys,
            pages.values,
            plan.slots,
            keys.unflatten(1, (kv_heads, key_dim)),
            values.unflatten(1, (kv_heads, value_dim)),
            cos,
            sin,
        )
        out = tree_attention(
            rotated,
            pages,
            plan,
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
            backend=backend,
        )
        return _summed(out.flatten(1), layer.out, graphs)

    def _mlp(self, layer: Layer, given: Tensor, graphs: bool) -> Tensor:
        from specdec.kernels import layers, products  # need Triton

        gate_up = layer.gate_up
        if graphs and products.fits(given, gate_up.weight):
            gated = products.gated(given, gate_up.weight, gate_up.bias, self.activation)
        else:
            gated = layers.gate(F.linear(given, gate_up.weight, gate_up.bias), self.activation)
        return _summed(gated, layer.down, graphs)


def _linear(given: Tensor, layer: Packed, graphs: bool) -> Tensor:
    """[R, N] of [R, K]."""
    from specdec.kernels import products  # needs Triton

    if graphs and products.fits(given, layer.weight):
        return products.product(given, layer.weight, layer.bias)
    return F.linear(given, layer.weight, layer.bias)


def _summed(given: Tensor, layer: Packed, graphs: bool) -> Tensor:
    """[R, N] of [R, K], or [S, R, N] float32, parts of it that `add_norm` adds."""
    from specdec.kernels import products  # needs Triton

    if graphs and layer.bias is None and products.fits(given, layer.weight):
        return products.product_parts(given, layer.weight)
    return F.linear(given, layer.weight, layer.bias)


def unfit(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> str | None:
    """Why a model keeps the forward of transformers; None if it need not.

    Args:
        model: any that can be driven.
        calls: what its attention layers ask for, in order.
    """
    if type(model).__name__ not in FAMILIES:
        return f"{type(model).__name__} is not one of {', '.join(FAMILIES)}"
    if not type(model).__module__.startswith("transformers.models."):
        return f"{type(model).__name__} is not transformers' own"
    devices = {parameter.device for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(devices) != 1 or len(dtypes) != 1:
        return f"its weights are of {_names(dtypes)} on {_names(devices)}"
    if not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        return f"its weights are of {_names(dtypes)}"
    if any(parameter.is_inference() for parameter in model.parameters()):
        return "its weights were made in inference mode"
    for name, module in model.named_modules():
        name, kind = name or "the model", type(module)
        if not kind.__module__.startswith(("transformers.", "torch.nn.modules.")):
            return f"{name} is a {kind.__module__}.{kind.__name__}"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(map(_matters, hooks)) or hasattr(module, "_hf_hook"):
            return f"{name} has a forward hook"
        if "forward" in vars(module):
            return f"{name} has a forward of its own"
    body: Any = model.model
    if len(body.layers) != len(calls):
        return f"it uses {len(calls)} of its {len(body.layers)} layers"
    if type(model.get_output_embeddings()) is not nn.Linear:
        return f"its head is a {type(model.get_output_embeddings()).__name__}"
    weights = [
        id(part.weight)
        for layer in body.layers
        for part in layer.modules()
        if isinstance(part, nn.Linear)
    ]
    if len(set(weights)) < len(weights):
        return "some of its layers share weights"
    for layer in body.layers:
        for name, part in [*layer.self_attn.named_children(), *layer.mlp.named_children()]:
            if name.endswith("_proj") and type(part) is not nn.Linear:
                return f"its {name} is a {type(part).__name__}, not a plain linear layer"
            if name.endswith("_proj") and type(part.weight) is not nn.Parameter:
                return f"the weight of its {name} is a {type(part.weight).__name__}"
            if name.endswith("_proj") and part.weight.grad is not None:
                return f"its {name} is being trained"
        for parts in _joined(layer):
            if len({part.bias is None for part in parts}) > 1:
                return "only some of the products that read one input have a bias"
        if type(_activation(layer.mlp)).__name__ not in ACTIVATIONS:
            return f"its activation is {type(_activation(layer.mlp)).__name__}"
    if any(call.sinks is not None for call in calls):
        return "its attention has sinks"
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in SWITCHING_ROPES:
        return f"its {rope['rope_type']!r} rotary positions look at the length on the host"
    return None


def _matters(hook: Any) -> bool:
    """Whether a hook may do something in a forward of ours.

    transformers leaves its own in a model that was once asked for hidden states; they only look on.
    """
    return getattr(hook, "__module__", "") != "transformers.utils.output_capturing"


def _joined(layer: Any) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """The products of a layer that read the same input: for queries, keys, values; gate and up."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        [attention.qkv_proj]
        if hasattr(attention, "qkv_proj")
        else [attention.q_proj, attention.k_proj, attention.v_proj],
        [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj],
    )


def _parts(model: nn.Module) -> list[tuple[nn.Module, int, bool, tuple[int, ...]]]:
    """The modules that a model is made of, what was added to them, and where their tensors lie."""
    return [
        (
            module,
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            "forward" in vars(module),
            tuple(
                0 if tensor is None else tensor.data_ptr()
                for tensors in (module._parameters, module._buffers)
                for tensor in tensors.values()
            ),
        )
        for module in modules_of(model)
    ]


def _norm(module: Any) -> Norm:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return module.weight, float(eps)


def _activation(mlp: Any) -> nn.Module:
    found: nn.Module = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
    return found


def _names(things: set[Any]) -> str:
    return ", ".join(sorted(map(str, things)))
