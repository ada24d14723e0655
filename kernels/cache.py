"""Writing and moving rows of a paged K/V store in torch; `moves.py` does the same in Triton.

Letters: L layers, P pages, S slots of a page, H key/value heads, D head dim, R rows.
A slot is `page * S + offset`.
"""

import torch
from torch import Tensor


def write_rows(pages: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Writes new rows of one layer in place.

    Args:
        pages: [P, S, H, D].
        slots: [R] int64.
        rows: [R, H, D], cast to the dtype of the pages.
    """
    pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, rows.to(pages.dtype))


def move_rows(pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copies rows of all layers from slot to slot, in place.

    The gather materialises every source before the first target is written, so the two may
    overlap. Targets may repeat only where the same row is written to them.

    Args:
        pages: [L, P, S, H, D].
        sources, targets: [M] int64 slots.
    """
    flat = pages.view(pages.shape[0], -1, *pages.shape[3:])
    flat.index_copy_(1, targets, torch.index_select(flat, 1, sources))


def copy_pages(pages: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copies whole pages of all layers, in place.

    Args:
        pages: [L, P, S, H, D].
        sources, targets: [M] int64 pages; none is both.
    """
    pages.index_copy_(1, targets, pages.index_select(1, sources))
