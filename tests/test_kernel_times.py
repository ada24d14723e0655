"""What kernels that overlap are said to cost."""

from __future__ import annotations

import pytest

from specdec.eval import serving
from specdec.eval.generate import bench
from specdec.eval.kernel_times import shares
from specdec.kernels import flash


def test_kernels_count_for_what_they_add() -> None:
    kernels = [
        (0.0, 4.0, "product"),
        (1.0, 6.0, "norm"),  # waited for the product until 4
        (2.0, 5.0, "early"),  # was over before the norm
        (8.0, 9.0, "product"),  # nothing ran before it
        (9.5, 9.5, "nothing"),
    ]
    found = shares(reversed(kernels))
    assert found == {"product": (2, 5.0), "norm": (1, 2.0), "early": (1, 0.0), "nothing": (1, 0.0)}
    assert sum(seconds for _, seconds in found.values()) == pytest.approx(7.0)  # all but two gaps


def test_all_attention_counts_as_attention() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from specdec.kernels import hopper

    for kernel in (flash._attend_kernel, hopper.attend_kernel):
        for words in (serving.ATTENTION, bench.PARTS["attention"]):
            assert any(word in kernel.__name__ for word in words), kernel.__name__
