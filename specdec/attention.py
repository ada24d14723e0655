"""Tree attention: one operator over a paged tree KV cache, several backends.

Row r of a forward sees the committed prefix of its sequence and its own ancestors in the tree,
itself included, and nothing else. `specdec.kernels.reference` is the definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from specdec.kernels import reference, sdpa
from specdec.kernels.partition import MODES, Mode
from specdec.pages import LayerPages

if TYPE_CHECKING:
    from specdec.kernels.worklist import Schedule, Tiling

Backend = Literal["auto", "reference", "sdpa", "triton", "gluon"]

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_PAGE = 16
"""Tokens of the smallest page that `triton` reads: each page of a tile is a product of its own."""


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """All that attention knows about one forward: device tensors, and bounds the host knows.

    `page_table` and `prefix_lens` are the cache's own: a plan holds until the next commit.

    Letters: R rows (queries), B requests (runs of rows of one sequence), S sequences of the cache,
    W words of ancestor bits.
    """

    page_table: Tensor  # [S, pages] int64
    prefix_lens: Tensor  # [S] int64, committed tokens of each sequence
    page_size: int
    row_starts: Tensor  # [B + 1] int32, rows of request b are row_starts[b]:row_starts[b + 1]
    sequence: Tensor  # [R] int64, rows of one sequence side by side
    nodes: Tensor  # [R] int64, place of each row's own key behind the prefix
    # [R, W] int32 over places behind the prefix, no bit behind the request's last; None: all up to
    # the own
    ancestors: Tensor | None
    slots: Tensor  # [R] int64, where each row's key and value are written
    positions: Tensor  # [R] int64, prefix length + depth
    max_rows: int  # of one request
    max_places: int  # keys behind all prefixes together, at most
    max_prefix: int  # of one sequence, at most
    shared: bool  # whether prefixes may share pages
    chain_starts: Tensor | None = None  # like `row_starts`, with long chains in parts
    _on_device: dict[torch.device, AttentionPlan] = field(init=False, default_factory=dict)
    _dense: list[sdpa.DenseGroup] = field(init=False, default_factory=list)
    _schedules: dict[tuple[object, ...], Schedule] = field(init=False, default_factory=dict)

    def held(self, last: Tensor | int) -> AttentionPlan:
        """The same plan with no position beyond `last`, [R] int64 or one for all rows.

        For rows that cannot matter, so that they do not ask the model for positions it lacks.
        """
        return replace(self, positions=self.positions.clamp_max(last))

    def on(self, device: torch.device) -> AttentionPlan:
        """The same plan for layers on another device; copied once."""
        if device == self.slots.device:
            return self
        if device not in self._on_device:
            self._on_device[device] = replace(
                self,
                page_table=self.page_table.to(device),
                prefix_lens=self.prefix_lens.to(device),
                row_starts=self.row_starts.to(device),
                chain_starts=None if self.chain_starts is None else self.chain_starts.to(device),
                sequence=self.sequence.to(device),
                nodes=self.nodes.to(device),
                ancestors=None if self.ancestors is None else self.ancestors.to(device),
                slots=self.slots.to(device),
                positions=self.positions.to(device),
            )
        return self._on_device[device]

    @property
    def dense(self) -> list[sdpa.DenseGroup]:
        """What the `sdpa` backend needs, worked out at the first layer and kept for the others."""
        if not self._dense:
            self._dense.extend(
                sdpa.dense_groups(
                    self.page_table,
                    self.prefix_lens,
                    self.page_size,
                    self.sequence,
                    self.nodes,
                    self.ancestors,
                )
            )
        return self._dense

    def schedule(
        self,
        heads: int,
        kv_heads: int,
        window: int | None,
        mode: Mode,
        tiling: Tiling,
        programs: int,
    ) -> Schedule:
        """What the `triton` backend needs, worked out at the first layer of its kind."""
        from specdec.kernels import schedule  # needs Triton

        key = (heads, kv_heads, window, mode, tiling, programs)
        if key not in self._schedules:
            self._schedules[key] = schedule.build(
                self.page_table,
                self.prefix_lens,
                self.page_size,
                self.row_starts if self.chain_starts is None else self.chain_starts,
                self.sequence,
                self.nodes,
                self.ancestors,
                max_places=self.max_places,
                max_prefix=self.max_prefix,
                shared=self.shared,
                groups=heads // kv_heads,
                kv_heads=kv_heads,
                window=window,
                mode=mode,
                tiling=tiling,
                programs=programs,
            )
        return self._schedules[key]


def tree_attention(
    query: Tensor,
    pages: LayerPages,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    backend: Backend = "auto",
    mode: Mode = "auto",
) -> Tensor:
    """Attention of packed tree nodes to their prefixes and ancestors.

    The rows' own keys and values must already lie in the pages.

    Args:
        query: [R, Hq, Dk]; Hq is a multiple of the pages' Hkv.
        pages: keys [pages, page_size, Hkv, Dk] and values [pages, page_size, Hkv, Dv].
        plan: which keys each row sees.
        scale: factor on the scores; 1 / sqrt(Dk) by default.
        window: a row sees only keys less than `window` positions back, itself included. Positions,
            not slots: siblings share one.
        softcap: scores become `softcap * tanh(score / softcap)` before the mask.
        sinks: [Hq], a logit of each head that takes part in the softmax and has no value.
        lse: [R, Hq] float32, filled with the natural logarithm of the sum of the exponentials of
            the scores a row sees, without the sink.
        backend: `reference`, `sdpa`, `triton`, `gluon`, or `auto`: `triton` for float32, float16
            and bfloat16 on a GPU with pages of at least 16 tokens, else `sdpa`. `triton` runs on
            the current device. `gluon` is `triton` with another kernel where that is faster, see
            docs/tree-attention.md; it needs a Hopper GPU. Once a plan is in use, nothing may write
            keys and values before its `prefix_lens` until the last call with it.
        mode: how `triton` cuts the work; see docs/tree-attention.md. The result is the same.

    Returns:
        [R, Hq, Dv] in the dtype of the query.

    Raises:
        ValueError: shapes do not fit, or the backend is unknown or cannot run here. A backend
            that is asked for by name either runs or raises.
    """
    kv_heads = pages.keys.shape[2]
    if query.ndim != 3 or query.shape[1] % kv_heads or query.shape[2] != pages.keys.shape[3]:
        raise ValueError(
            f"query: expected [R, Hq, {pages.keys.shape[3]}] with Hq a multiple of {kv_heads}, "
            f"got {list(query.shape)}"
        )
    if len(query) != len(plan.slots):
        raise ValueError(f"query: the plan has {len(plan.slots)} rows, got {len(query)}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 position, got {window}")
    if (scale is not None and scale <= 0) or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale, softcap: expected positive numbers, got {scale}, {softcap}")
    if lse is not None and (lse.shape != query.shape[:2] or lse.dtype != torch.float32):
        raise ValueError(
            f"lse: expected {list(query.shape[:2])} float32, got {list(lse.shape)} {lse.dtype}"
        )
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks: expected [{query.shape[1]}], got {list(sinks.shape)}")
    scale = 1 / math.sqrt(query.shape[2]) if scale is None else scale
    if backend == "auto":
        fits = query.dtype in TRITON_DTYPES and plan.page_size >= TRITON_PAGE
        backend = "triton" if query.is_cuda and fits else "sdpa"
    match backend:
        case "triton" | "gluon":
            gluon = backend == "gluon"
            return _triton(query, pages, plan, scale, window, softcap, sinks, lse, mode, gluon)
        case "sdpa":
            return sdpa.tree_attention(
                query, pages.keys, pages.values, plan.dense, scale, window, softcap, sinks, lse
            )
        case "reference":
            return reference.tree_attention(
                query,
                pages.keys,
                pages.values,
                plan.page_table,
                plan.prefix_lens,
                plan.sequence,
                plan.nodes,
                plan.ancestors,
                scale,
                window,
                softcap,
                sinks,
                lse,
            )
        case _:
            expected = ", ".join(get_args(Backend))
            raise ValueError(f"backend: expected {expected}, got {backend!r}")


def _triton(
    query: Tensor,
    pages: LayerPages,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    lse: Tensor | None,
    mode: Mode,
    gluon: bool,
) -> Tensor:
    import triton

    from specdec.kernels import flash, tiles  # need Triton

    if not query.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"backend: triton needs a GPU, got tensors on {query.device}; use sdpa")
    if query.dtype not in TRITON_DTYPES:
        raise ValueError(f"backend: triton computes in {TRITON_DTYPES}, got {query.dtype}")
    if plan.page_size < TRITON_PAGE:
        raise ValueError(
            f"backend: triton reads pages of at least {TRITON_PAGE} tokens, got {plan.page_size}; "
            "use sdpa, or a larger page_size"
        )
    if lse is not None and not lse.is_contiguous():
        raise ValueError(f"lse: expected a contiguous tensor, got strides {lse.stride()}")
    if mode not in MODES:
        raise ValueError(f"mode: expected {', '.join(MODES)}, got {mode!r}")
    heads, kv_heads = query.shape[1], pages.keys.shape[2]
    if gluon:
        tiles.check_gluon(query.device)
        gluon = (window, softcap, sinks, lse) == (None,) * 4  # what its kernel was checked with
    tiling, programs = tiles.choose(
        query,
        pages.keys,
        pages.values,
        plan.max_rows,
        plan.max_prefix,
        plan.shared,
        causal=plan.ancestors is None,
        gluon=gluon,
    )
    query = query if query.stride(2) == 1 else query.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    schedule = plan.schedule(heads, kv_heads, window, mode, tiling, programs)
    return flash.tree_attention(
        query, pages.keys, pages.values, schedule, scale, softcap, sinks, lse
    )
