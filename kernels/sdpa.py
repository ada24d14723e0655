"""Tree attention through torch's scaled_dot_product_attention, one call per sequence.

Keys are never repeated for grouped heads: the heads of a group become rows of one product. Where
a sequence's pages are neighbours, its keys are a view of the pool.

Letters: R rows, n rows of one sequence, K keys it sees, S sequences, P pages, Hq/Hkv query and
key/value heads, G = Hq / Hkv, Dk/Dv head dims.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

WORD_BITS = 32


@dataclass
class DenseGroup:
    """The rows of one sequence and the keys they see."""

    rows: slice
    slots: slice | Tensor  # where the K keys lie
    prefix: int
    visible: Tensor  # [n, K - prefix] bool
    _masks: dict[tuple[int | None, int, torch.dtype], Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, repeat: int, dtype: torch.dtype) -> Tensor | None:
        """[repeat * n, K], 0 where a row sees a key and -inf where not; None if it sees all.

        Worked out at the first layer that needs it and kept for the others.
        """
        if (window, repeat, dtype) not in self._masks:
            self._masks[window, repeat, dtype] = self._mask(window, repeat, dtype)
        return self._masks[window, repeat, dtype]

    def _mask(self, window: int | None, repeat: int, dtype: torch.dtype) -> Tensor | None:
        n, tree = self.visible.shape
        full = torch.cat([self.visible.new_ones(n, self.prefix), self.visible], 1)
        if window is not None and window < self.prefix + tree:
            # Visible keys are ordered by position, one per position, so the distance to a key is
            # the number of visible keys behind it.
            distance = full.flip(1).cumsum(1).flip(1) - 1
            full &= distance < window
        if bool(full.all()):
            return None
        mask = torch.zeros(full.shape, dtype=dtype, device=full.device)
        return mask.masked_fill_(~full, float("-inf")).repeat(repeat, 1)


def dense_groups(
    page_table: Tensor,  # [S, pages]
    prefix_lens: Tensor,  # [S]
    page_size: int,
    sequence: Tensor,  # [R]
    nodes: Tensor,  # [R]
    ancestors: Tensor | None,  # [R, W] int32
) -> list[DenseGroup]:
    """Splits the rows by sequence and finds the keys of each. Waits for the device."""
    owners, counts = torch.unique_consecutive(sequence, return_counts=True)
    prefixes = prefix_lens[owners].tolist()
    tables = page_table[owners].tolist()
    groups, start = [], 0
    for count, prefix, table in zip(counts.tolist(), prefixes, tables, strict=True):
        rows = slice(start, start + count)
        start += count
        own = nodes[rows]
        place = torch.arange(int(own.max()) + 1, device=own.device)
        if ancestors is None:
            visible = place <= own[:, None]
        else:
            words = ancestors[rows][:, place // WORD_BITS]
            visible = (words >> (place % WORD_BITS)) & 1 != 0
        slots = _slots(table, prefix + len(place), page_size, own.device)
        groups.append(DenseGroup(rows, slots, prefix, visible))
    return groups


def _slots(table: list[int], count: int, page_size: int, device: torch.device) -> slice | Tensor:
    """Where a sequence's first `count` keys lie: a slice if its pages are neighbours."""
    pages = table[: -(-count // page_size)]
    if pages == list(range(pages[0], pages[0] + len(pages))):
        return slice(pages[0] * page_size, pages[0] * page_size + count)
    offsets = torch.arange(page_size, device=device)
    first = torch.tensor(pages, device=device)[:, None] * page_size
    return (first + offsets).flatten()[:count]


def tree_attention(
    query: Tensor,  # [R, Hq, Dk]
    keys: Tensor,  # [P, page_size, Hkv, Dk]
    values: Tensor,  # [P, page_size, Hkv, Dv]
    groups: list[DenseGroup],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,  # [Hq]
    lse: Tensor | None,  # [R, Hq] float32, filled
) -> Tensor:  # [R, Hq, Dv]
    """See `reference.tree_attention`, the definition."""
    flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
    heads, kv_heads = query.shape[1], keys.shape[2]
    out = []
    for group in groups:
        k = flat_keys[group.slots].transpose(0, 1).to(query.dtype)  # [Hkv, K, Dk]
        v = flat_values[group.slots].transpose(0, 1).to(query.dtype)
        q = query[group.rows]
        n = len(q)
        # [n, Hkv, G, Dk] -> [Hkv, G * n, Dk]
        q = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        mask = group.mask(window, heads // kv_heads, query.dtype)
        if softcap is None and sinks is None and lse is None:
            o = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale)[0]
        else:
            o, log_sum = _explicit(q, k, v, mask, scale, softcap, sinks, n)
            if lse is not None:
                lse[group.rows] = log_sum.unflatten(1, (-1, n)).permute(2, 0, 1).flatten(1)
        out.append(o.unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(out) if len(out) > 1 else out[0]


def _explicit(
    q: Tensor,  # [Hkv, G * n, Dk]
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    n: int,
) -> tuple[Tensor, Tensor]:
    """Scores in full, for what torch's fused attention does not offer; and their log-sum-exp."""
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(1, 2)).to(compute) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    log_sum = scores.logsumexp(-1)
    if sinks is not None:
        column = sinks.to(compute).view(len(q), -1, 1).expand(-1, -1, n).flatten(1)[..., None]
        scores = torch.cat([scores, column], -1)
    return scores.softmax(-1)[..., : k.shape[1]].to(v.dtype) @ v, log_sum
