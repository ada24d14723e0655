"""A Hugging Face model behind tree attention and a paged cache.

Nothing in the model is replaced: the name of the attention implementation is set around our own
forward and restored after it.
"""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.attention import TRITON_PAGE, AttentionPlan, Backend
from specdec.batch import TreeBatch
from specdec.cache import Speculation, TreeKVCache
from specdec.captured import StepGraphs
from specdec.drafting import Drafter
from specdec.fused import FusedModel, unfit
from specdec.hooks import (
    ATTENTION,
    AttentionCall,
    AttentionHandler,
    NoHandler,
    PagedAttention,
    PassThroughCache,
    Probe,
    Taps,
    attention_name,
    configs_of,
)
from specdec.identity import Weights
from specdec.pages import DraftLayers, LayerShape, PagePool
from specdec.passes import PassGraphs
from specdec.support import UnsupportedModel, causal_model, check_model

Layers = Literal["auto", "fused", "transformers"]

CACHED_SHARE = 10
"""The part of the device's memory that texts which are over may take, as its inverse."""

_LOCKS: weakref.WeakKeyDictionary[PreTrainedModel, threading.RLock] = weakref.WeakKeyDictionary()
"""One lock for each model: the name of its attention changes for the time of a forward."""


class Target:
    """A causal language model that scores packed token trees against a paged cache.

    `lock` is held by whoever takes a step; all targets of one model share it, so several threads
    may generate with one model, in turns. The model's own forward must not run meanwhile.

    Args:
        model: a decoder-only transformers model, or a PEFT model of layers around one. It keeps
            working as before.
        page_size: tokens in a page of the cache, a power of two; 64 on a CUDA device, where pages
            are copied whole, and 16 elsewhere by default.
        max_pages: upper bound for the cache; None to grow as needed.
        max_cached_bytes: what the cache keeps of texts that are over, at most; a tenth of the
            device's memory by default.
        backend: the backend of tree attention.
        layers: who computes a layer: `fused` kernels for the standard families, or `transformers`;
            `auto` takes the first on a GPU where they fit. `layers` tells which, `unfit` why.
        capture: run steps as CUDA graphs where they can be.
        last_position: positions behind this one are held there. For a draft model, whose guesses
            may be poor but must not fail, when the target's text outgrows it.

    Raises:
        UnsupportedModel: the model cannot be driven; the message says why.
    """

    def __init__(
        self,
        model: Any,
        *,
        page_size: int | None = None,
        max_pages: int | None = None,
        max_cached_bytes: int | None = None,
        backend: Backend = "auto",
        layers: Layers = "auto",
        capture: bool = True,
        last_position: int | None = None,
    ) -> None:
        if layers not in get_args(Layers):
            raise ValueError(f"layers: expected {', '.join(get_args(Layers))}, got {layers!r}")
        if backend not in get_args(Backend):
            raise ValueError(f"backend: expected {', '.join(get_args(Backend))}, got {backend!r}")
        if max_cached_bytes is not None and max_cached_bytes < 0:
            raise ValueError(f"max_cached_bytes: expected 0 or more, got {max_cached_bytes}")
        self.model = causal_model(model)
        check_model(self.model)
        self.backend = backend
        self.capture = capture
        self.last_position = last_position
        self.lock = _LOCKS.setdefault(self.model, threading.RLock())
        self.device = _input_device(self.model)
        held = {weight.device for weight in self.model.parameters()}
        self._spread = len(held - {torch.device("meta")}) > 1
        self._configs = configs_of(self.model)
        self._no_cache = PassThroughCache()
        # The name until transformers 5.23, and since.
        names = inspect.signature(type(self.model).forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self.weights = Weights(self.model)
        with torch.inference_mode(False):  # tensors that outlive the caller's inference mode
            calls, self.vocab_size = self._probe()
            if page_size is None:
                page_size = 64 if self.device.type == "cuda" else 16
            pool = PagePool([_shape(call) for call in calls], page_size, max_pages)
            self._calls, self._asked = calls, layers
            self.unfit: str | None = None
            """Why the layers are computed by transformers; None if they are not."""
            self.fused: FusedModel | None = None
            self._fit()
            self._state = self.weights.state()
            if max_cached_bytes is None:
                max_cached_bytes = _memory(self.device) // CACHED_SHARE
            self.cache = TreeKVCache(pool, self.device, max_cached_bytes=max_cached_bytes)
        # By id, since drafters need not be hashable; they are kept alive with it.
        self._draft_layers: dict[int, tuple[Drafter, DraftLayers]] = {}
        self.graphs = StepGraphs(weakref.proxy(self))
        """The captured steps over this cache."""
        self.passes = PassGraphs(weakref.proxy(self))
        """The captured passes over this cache."""

    def weights_state(self) -> Hashable:
        """What cached K and V depend on besides the tokens; forgets what can never match again.

        Also looks whether the layers can still be computed as before.
        """
        before = self.weights.generation
        state = self.weights.state()
        if state != self._state:
            self._fit()
            state = self._state = self.weights.state()
        if self.weights.generation != before:
            self.cache.prefixes.clear()
        return state

    def _fit(self) -> None:
        """Chooses who computes the layers, by what the model is now."""
        self.unfit = self._unfit(self._asked, self._calls)
        if self.fused is not None:
            if self.unfit is None and self.fused.current:
                return
            self.fused.forget()  # there may be no room for two
        self.fused = None
        if not self.unfit:
            self.fused = FusedModel(self.model, self._calls, graphs=self.capture)

    def unpack(self) -> None:
        """Lets the model's parameters lie where they would without a wrapper."""
        if self.fused is not None:
            with self.lock:
                self.fused.unpack()
                self.fused, self.unfit = None, "the model was unwrapped"

    @torch.no_grad()
    def _probe(self) -> tuple[list[AttentionCall], int]:
        """Runs two tokens to learn what each attention layer stores and asks for."""
        probe = Probe([])
        tokens = torch.zeros(2, dtype=torch.int64, device=self.device)
        try:
            logits = self._run(tokens, torch.arange(2, device=self.device), probe, 1)
        except NoHandler:
            raise UnsupportedModel(
                self.model, "it does not hand keyword arguments down to its attention"
            ) from None
        if len(logits) != 1:
            raise UnsupportedModel(self.model, "it ignores `logits_to_keep`")
        calls = sorted(probe.calls, key=lambda call: call.layer)
        config = self.model.config.get_text_config(decoder=True)
        if [call.layer for call in calls] != list(range(config.num_hidden_layers)):
            raise UnsupportedModel(
                self.model,
                f"expected one attention call for each of {config.num_hidden_layers} layers, "
                f"got calls for layers {[call.layer for call in probe.calls]}",
            )
        unknown = sorted(set().union(*(call.unknown for call in calls)))
        if unknown:
            raise UnsupportedModel(
                self.model, f"its attention takes {', '.join(unknown)}, which trees cannot honour"
            )
        kinds = getattr(config, "layer_types", None) or [None] * len(calls)
        for call, kind in zip(calls, kinds, strict=True):
            if kind == "sliding_attention" and call.window is None:
                raise UnsupportedModel(
                    self.model, f"layer {call.layer} slides but does not say how wide its window is"
                )
        return calls, logits.shape[-1]

    def _unfit(self, layers: Layers, calls: Sequence[AttentionCall]) -> str | None:
        if layers == "transformers":
            return "transformers was asked for"
        if layers == "auto" and self.device.type != "cuda":
            return f"the model is on {self.device.type}"
        why = unfit(self.model, calls)
        if why is None and not _runs_triton(self.device):
            why = f"the model is on {self.device.type}, where Triton's kernels do not run"
        if why is not None and layers == "fused":
            raise UnsupportedModel(self.model, f"layers='fused' does not fit: {why}")
        return why

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor,
        handler: AttentionHandler,
        keep: int | Tensor,
        taps: Taps | None = None,
    ) -> Tensor:
        # Rows are looked up where the last norm lies, but accelerate moves tensors to the first
        # device. To name them by numbers, the host has to wait for them.
        rows = keep.tolist() if self._spread and isinstance(keep, Tensor) else keep
        with self.lock, attention_name(self._configs, ATTENTION):
            output = self.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                **{self._cache_name: self._no_cache},
                use_cache=True,
                logits_to_keep=rows,
                specdec_handler=handler,
                **({} if taps is None else {"output_hidden_states": True}),
            )
        if taps is not None:
            for layer, state in enumerate(output.hidden_states):
                taps.see(layer, state[0], layers=len(output.hidden_states) - 1)
        logits: Tensor = output.logits[0]
        return logits.to(self.device)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        plan: AttentionPlan,
        keep: int | Tensor = 0,
        taps: Taps | None = None,
    ) -> Tensor:
        """One pass of the model over packed rows; their keys and values are written to the pool.

        It is replayed from a CUDA graph where there can be one, see `uncaptured`.

        Args:
            tokens: [R] int64.
            plan: where each row is written and what it sees.
            keep: which rows' logits to compute: an index tensor, or the number of last rows, 0
                for all.
            taps: what is to be kept of the layers' outputs.

        Returns:
            [kept rows, V] logits in the dtype of the model's head.
        """
        if taps is not None:
            return self.compute(tokens, plan, keep, taps)
        with self.lock:
            return self.passes.forward(tokens, plan, keep)

    @torch.no_grad()
    def compute(
        self,
        tokens: Tensor,
        plan: AttentionPlan,
        keep: int | Tensor = 0,
        taps: Taps | None = None,
    ) -> Tensor:
        """`forward`, launched piece by piece; a graph that is being captured can hold it."""
        if self.last_position is not None:
            plan = plan.held(self.last_position)
        if self.fused is not None:
            with self.lock, torch.cuda.device_of(tokens):
                return self.fused.forward(tokens, plan, self.cache.pool, self.backend, keep, taps)
        handler = PagedAttention(self.cache.pool, plan, self.backend)
        return self._run(tokens, plan.positions, handler, keep, taps)

    @property
    def uncaptured(self) -> str | None:
        """Why no pass can be a CUDA graph; None if passes can."""
        if not self.capture:
            return "capture is off"
        if self.fused is None:
            return f"layers by transformers: {self.unfit}"
        ours = self.backend in ("auto", "triton", "gluon")
        triton = ours and self.cache.pool.page_size >= TRITON_PAGE
        if self.device.type == "cuda" and not triton:
            return "only attention by triton is captured"
        return None

    @property
    def places(self) -> Hashable:
        """Where everything lies that a captured pass refers to."""
        cache = self.cache
        pages = [
            (g.keys.data_ptr(), g.values.data_ptr(), g.keys.shape[1]) for g in cache.pool.groups
        ]
        table = (cache.page_table.data_ptr(), tuple(cache.page_table.shape))
        return self.fused, cache.lengths.data_ptr(), table, tuple(pages)

    def layers_of(self, drafter: Drafter) -> DraftLayers | None:
        """A drafter's own layers in the cache, registered when first asked for; None for none.

        Raises:
            ValueError: it wants outputs of a layer that the model does not have.
        """
        if id(drafter) not in self._draft_layers:
            shapes = drafter.layer_shapes(self)
            if not shapes:
                return None
            # In the caller's inference mode, tensors could not be written to outside of it.
            with self.lock, torch.inference_mode(False), torch.no_grad():
                self._prepare(Taps(frozenset(drafter.hidden_layers)))
                self._draft_layers[id(drafter)] = drafter, self.cache.pool.register(shapes)
        return self._draft_layers[id(drafter)][1]

    def _prepare(self, taps: Taps) -> None:
        """Checks taps, and lets transformers leave the hooks in the model that it needs for them.

        Later they would look like a change of the model, whose cached K and V no longer count.
        """
        taps.check(len(self._calls))
        if self.fused is None and taps.layers:
            places = torch.arange(2, device=self.device)
            self._run(torch.zeros_like(places), places, Probe([]), 1, taps)

    def forget(self, drafter: Drafter) -> None:
        """Gives up a drafter's own layers, and their memory with them."""
        if id(drafter) in self._draft_layers:
            self.cache.pool.unregister(self._draft_layers.pop(id(drafter))[1])

    def prefill(
        self, sequences: Sequence[int], prompts: Sequence[Tensor], *, chunk: int = 512
    ) -> None:
        """Commits prompts, packed without padding and cut into passes of at most `chunk` tokens.

        Args:
            sequences: admitted sequences, one for each prompt.
            prompts: [length] int64 on the target's device; empty ones are left alone.
        """
        for part in _chunks([len(prompt) for prompt in prompts], chunk):
            members = [sequences[index] for index, _, _ in part]
            tokens = torch.cat([prompts[index][start:stop] for index, start, stop in part])
            rows = [stop - start for _, start, stop in part]
            with self.cache.speculate(members, rows) as lease:
                self.forward(tokens, lease.plan_chains(), keep=1)
                lease.commit()

    def speculate(
        self, sequences: Sequence[int], trees: TreeBatch, *, last_positions: Tensor | None = None
    ) -> Scored:
        """Leases room for one tree for each sequence, to be scored in one pass of the model.

        Use as `with target.speculate(...) as scored`: leaving without a commit rolls back.

        Args:
            sequences: admitted sequences whose cache ends just before the trees' roots.
            trees: on the target's device.
            last_positions: [B] int64, the last position each request may fill. Deeper nodes cannot
                matter; their positions are held there, within what the model can embed.

        Raises:
            OutOfPages: nothing was leased.
        """
        lease = self.cache.speculate(sequences, trees.sizes)
        plan = lease.plan_trees(trees)
        if last_positions is not None:
            plan = plan.held(last_positions[trees.tree])
        return Scored(self, trees, plan, lease)


class Scored:
    """Trees that the target scores; open until committed or rolled back."""

    def __init__(
        self, target: Target, trees: TreeBatch, plan: AttentionPlan, lease: Speculation
    ) -> None:
        self._target, self._trees, self._plan, self._lease = target, trees, plan, lease
        self.lengths = lease.lengths
        """[B] int64, committed lengths before this step: the roots' positions."""

    def __enter__(self) -> Scored:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lease.open:
            self._lease.rollback()

    @cached_property
    def logits(self) -> Tensor:
        """[R, V], behind every node; the pass of the model runs when they are first asked for."""
        return self._target.forward(self._trees.tokens, self._plan)

    def commit(self, paths: Tensor) -> None:
        """Keeps the nodes on `paths` [B, D] (-1 behind the last) and forgets the others."""
        self._lease.commit(paths)

    def settle(self, kept: Sequence[int]) -> None:
        """Tells the cache how many nodes of each path were kept, once the host knows."""
        self._lease.settle(kept)


def _chunks(lengths: Sequence[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts texts into packs of at most `chunk` tokens: (index, start, stop) of each piece."""
    part: list[tuple[int, int, int]] = []
    room = chunk
    for index, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            part.append((index, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield part
                part, room = [], chunk
    if part:
        yield part


def _shape(call: AttentionCall) -> LayerShape:
    """What an attention layer stores for a token."""
    value = call.value
    return LayerShape(
        call.key.shape[1], call.key.shape[3], value.shape[3], value.dtype, value.device
    )


def _input_device(model: PreTrainedModel) -> torch.device:
    embeddings: Any = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    if device.type == "meta":
        # Offloaded by accelerate, whose hook says where the layer runs; or without values at all.
        if not hasattr(embeddings, "_hf_hook"):
            raise UnsupportedModel(
                model, "its weights are on the meta device, without values; load them first"
            )
        device = torch.device(embeddings._hf_hook.execution_device)
    return device


def _runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on a GPU, or by its interpreter."""
    if device.type == "cuda":
        return True
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _memory(device: torch.device) -> int:
    """Bytes of memory that a device has, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):  # Windows does not say without further libraries
        return 8 * 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
