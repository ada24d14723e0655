"""The operator by itself: two draft trees below one prompt, whose keys are stored once.

python examples/tree_attention.py
"""

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specdec.attention import AttentionPlan, tree_attention
from specdec.batch import TreeBatch
from specdec.cache import TreeKVCache
from specdec.kernels.cache import write_rows
from specdec.pages import LayerPages, LayerShape, PagePool
from specdec.tree import TokenTree

HEADS, KV_HEADS, DIM = 8, 2, 64
TREES = [  # tokens do not matter here; a node sees the prompt, its ancestors and itself
    TokenTree.from_lists(tokens=[5, 1, 2, 3, 4], parents=[-1, 0, 0, 1, 3]),
    TokenTree.from_lists(tokens=[6, 1, 2], parents=[-1, 0, 1]),
]
KEPT = torch.tensor([[0, 1, 3], [0, -1, -1]])  # accepted nodes, -1 behind the last


def write(pages: LayerPages, plan: AttentionPlan, keys: Tensor, values: Tensor) -> None:
    write_rows(pages.keys, plan.slots, keys)
    write_rows(pages.values, plan.slots, values)


def verify(prompt: int, device: torch.device) -> tuple[Tensor, Tensor, TreeKVCache]:
    """One layer's attention for all nodes [8, HEADS, DIM], what torch makes of it, the cache."""
    torch.manual_seed(0)
    pool = PagePool([LayerShape(KV_HEADS, DIM, DIM, torch.float32, device)], page_size=16)
    cache = TreeKVCache(pool, device)
    batch = TreeBatch.pack(TREES, vocab_size=10, device=device)
    keys, values = torch.randn(2, prompt + len(batch.tokens), KV_HEADS, DIM, device=device)
    query = torch.randn(len(batch.tokens), HEADS, DIM, device=device)

    first = cache.admit()
    with cache.speculate([first], [prompt]) as lease:
        write(pool.layer(0), lease.plan_chains(), keys[:prompt], values[:prompt])
        lease.commit()
    with cache.speculate([first, cache.fork(first)], batch.sizes) as lease:
        plan = lease.plan_trees(batch)  # for all layers of a forward
        write(pool.layer(0), plan, keys[prompt:], values[prompt:])
        ours = tree_attention(query, pool.layer(0), plan)
        lease.commit(KEPT.to(device))  # what is not kept is forgotten: nothing is left to free

    mask = torch.eye(len(query), dtype=torch.bool)
    starts = batch.offsets[batch.tree].tolist()
    for row, (start, parent) in enumerate(zip(starts, batch.parents.tolist(), strict=True)):
        if parent >= 0:
            mask[row] |= mask[start + parent]
    mask = torch.cat([torch.ones(len(query), prompt, dtype=torch.bool), mask], 1).to(device)
    q, k, v = (x.transpose(0, 1) for x in (query, keys, values))
    torchs = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return ours, torchs.transpose(0, 1), cache


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours, torchs, cache = verify(300, device)
    Console().print("difference to torch with a mask", float((ours - torchs).abs().max()))
    Console().print("tokens of both sequences now", cache.lengths[cache.sequences].tolist())


if __name__ == "__main__":
    main()
