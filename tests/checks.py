"""What several tests ask of a wrapped model."""

from __future__ import annotations

from typing import Any

import torch


def greedy(hf_model: Any, prompt: list[int], new: int) -> list[int]:
    """The tokens that transformers puts behind a prompt."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = hf_model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def nothing_left(model: Any) -> None:
    """No sequence runs, and once what is cached goes, every page is free."""
    cache = model.cache
    cache.check_integrity()
    assert not cache.sequences
    cache.prefixes.clear()
    assert cache.pool.num_free == cache.pool.num_pages
