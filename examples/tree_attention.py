"""The operator by itself: two draft trees below one prompt, whose keys are stored once.

python examples/tree_attention.py
"""

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specdec.attention import tree_attention
from specdec.batch import TreeBatch
from specdec.cache import TreeKVCache
from specdec.kernels.cache import write_rows
from specdec.pages import LayerShape, PagePool
from specdec.tree import TokenTree

HEADS, KV_HEADS, DIM = 8, 2, 64
TREES = [  # tokens do not matter here; a node sees the prompt, its ancestors and itself
    TokenTree.from_lists(tokens=[5, 1, 2, 3, 4], parents=[-1, 0, 0, 1, 3]),
    TokenTree.from_lists(tokens=[6, 1, 2], parents=[-1, 0, 1]),
]
PARENTS = [None, 0, 0, 1, 3, None, 5, 6]  # the same, as rows of one forward
KEPT = torch.tensor([[0, 1, 3], [0, -1, -1]])  # accepted nodes, -1 behind the last


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
        slots = lease.plan_chains().slots
        write_rows(pool.layer(0).keys, slots, keys[:prompt])
        write_rows(pool.layer(0).values, slots, values[:prompt])
        lease.commit()
    with cache.speculate([first, cache.fork(first)], batch.sizes) as lease:
        plan = lease.plan_trees(batch)  # for all layers of a forward
        write_rows(pool.layer(0).keys, plan.slots, keys[prompt:])
        write_rows(pool.layer(0).values, plan.slots, values[prompt:])
        ours = tree_attention(query, pool.layer(0), plan)
        lease.commit(KEPT.to(device))  # what is not kept is forgotten: nothing is left to free

    mask = torch.eye(len(query), dtype=torch.bool)
    for row, parent in enumerate(PARENTS):
        mask[row] |= mask[parent] if parent is not None else False
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
