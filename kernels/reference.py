"""The definition of tree attention, one row at a time, in any floating dtype.

Letters: R rows, S sequences, P pages, Hq/Hkv query and key/value heads, Dk/Dv head dims.
"""

import torch
from torch import Tensor

WORD_BITS = 32


def tree_attention(
    query: Tensor,  # [R, Hq, Dk]
    keys: Tensor,  # [P, page_size, Hkv, Dk]
    values: Tensor,  # [P, page_size, Hkv, Dv]
    page_table: Tensor,  # [S, pages]
    prefix_lens: Tensor,  # [S]
    sequence: Tensor,  # [R]
    nodes: Tensor,  # [R]
    ancestors: Tensor | None,  # [R, W] int32
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,  # [Hq]
    lse: Tensor | None,  # [R, Hq] float32, filled
) -> Tensor:  # [R, Hq, Dv]
    """Row r sees the committed prefix of its sequence and its ancestors, itself included.

    Key j of the prefix stands at position j; an ancestor stands behind the prefix at its depth,
    which is its place among the row's ancestors, since parents precede children. A sink joins the
    softmax once and adds no value. Arithmetic is in float32, or in float64 for float64 queries.
    """
    page_size, groups = keys.shape[1], query.shape[1] // keys.shape[2]
    compute = torch.promote_types(query.dtype, torch.float32)
    flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
    out = query.new_empty(*query.shape[:2], values.shape[3])
    for row in range(len(query)):
        prefix = int(prefix_lens[sequence[row]])
        own = int(nodes[row])
        if ancestors is None:
            tree = list(range(own + 1))
        else:
            words = ancestors[row].tolist()
            tree = [j for j in range(own + 1) if words[j // WORD_BITS] >> (j % WORD_BITS) & 1]
        places = [*range(prefix), *(prefix + node for node in tree)]
        if window is not None:
            places = places[-window:]  # one key per position, in order of position
        place = torch.tensor(places, device=query.device)
        slots = page_table[sequence[row], place // page_size] * page_size + place % page_size
        k = flat_keys[slots].to(compute).repeat_interleave(groups, 1)  # [K, Hq, Dk]
        v = flat_values[slots].to(compute).repeat_interleave(groups, 1)  # [K, Hq, Dv]
        scores = torch.einsum("hd,khd->hk", query[row].to(compute), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if lse is not None:
            lse[row] = scores.logsumexp(-1)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(compute)[:, None]], 1)
        weights = scores.softmax(-1)[:, : len(places)]
        out[row] = torch.einsum("hk,khd->hd", weights, v).to(query.dtype)
    return out
