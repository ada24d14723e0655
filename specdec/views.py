"""Which pages of a long text a draft looks at: choices for `TreeKVCache.view`."""

from __future__ import annotations

from specdec.pages import check_count


def sinks_and_window(pages: int, *, sinks: int, window: int) -> list[int]:
    """The first pages and the last ones (StreamingLLM, arXiv 2309.17453).

    Args:
        pages: of the whole text.
        sinks: pages to keep at the beginning, 0 for none.
        window: pages to keep at the end, at least 1.
    """
    check_count("window", window)
    if sinks < 0:
        raise ValueError(f"sinks: expected 0 or more pages, got {sinks}")
    return sorted({*range(min(sinks, pages)), *range(max(0, pages - window), pages)})


def every_nth(pages: int, n: int) -> list[int]:
    """Every n-th page, counted back from the last.

    Args:
        pages: of the whole text.
        n: at least 1, which keeps all.
    """
    check_count("n", n)
    return list(range(pages - 1, -1, -n))[::-1]
