"""Tree attention: one operator over a paged tree KV cache, several backends.

Row r of a forward sees the committed prefix of its sequence and its own ancestors in the tree,
itself included, and nothing else. `specdec.kernels.reference` is the definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from specdec.kernels import reference, sdpa
from specdec.pages import LayerPages

Backend = Literal["auto", "reference", "sdpa"]


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """All that attention knows about one forward, as device tensors.

    `page_table` and `prefix_lens` are the cache's own: a plan holds until the next commit.

    Letters: R rows (queries), S sequences of the cache, W words of ancestor bits.
    """

    page_table: Tensor  # [S, pages] int64
    prefix_lens: Tensor  # [S] int64, committed tokens of each sequence
    page_size: int
    sequence: Tensor  # [R] int64, rows of one sequence side by side
    nodes: Tensor  # [R] int64, place of each row's own key behind the prefix
    ancestors: Tensor | None  # [R, W] int32 over places behind the prefix; None: all up to the own
    slots: Tensor  # [R] int64, where each row's key and value are written
    positions: Tensor  # [R] int64, prefix length + depth
    _on_device: dict[torch.device, AttentionPlan] = field(init=False, default_factory=dict)
    _dense: list[sdpa.DenseGroup] = field(init=False, default_factory=list)

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


def tree_attention(
    query: Tensor,
    pages: LayerPages,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: Backend = "auto",
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
        backend: `reference`, `sdpa`, or `auto` (`sdpa`).

    Returns:
        [R, Hq, Dv] in the dtype of the query.

    Raises:
        ValueError: shapes do not fit, or the backend is unknown. A backend that is asked for by
            name either runs or raises.
    """
    heads, kv_heads = query.shape[1], pages.keys.shape[2]
    if query.ndim != 3 or heads % kv_heads or query.shape[2] != pages.keys.shape[3]:
        raise ValueError(
            f"query: expected [R, Hq, {pages.keys.shape[3]}] with Hq a multiple of {kv_heads}, "
            f"got {list(query.shape)}"
        )
    if len(query) != len(plan.slots):
        raise ValueError(f"query: the plan has {len(plan.slots)} rows, got {len(query)}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 position, got {window}")
    scale = 1 / math.sqrt(query.shape[2]) if scale is None else scale
    match backend:
        case "auto" | "sdpa":
            return sdpa.tree_attention(
                query, pages.keys, pages.values, plan.dense, scale, window, softcap, sinks
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
            )
        case _:
            raise ValueError(f"backend: expected auto, reference or sdpa, got {backend!r}")
