"""Products of few rows against torch's, and what `add_norm` makes of their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from specdec.fused import ACTIVATIONS
from specdec.kernels import layers, products

# The interpreter's bfloat16 products are wrong.
PLACES = [
    ("cpu", torch.float16),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]
SHAPES = [(1, 32, 40), (3, 80, 264), (17, 48, 136), (64, 800, 512), (2, 16, 1152)]
"""Rows, outputs, inputs: blocks that are not full, several parts, both heights and widths, and
inputs of which four parts would leave one empty."""


def operands(shape: Any, device: str, dtype: torch.dtype) -> Any:
    rows, outputs, inputs = shape
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    given, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, inputs), (outputs,))
    )
    return tuple(tensor.to(device, dtype) for tensor in (given, weight, bias))


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    """Equal but for the rounding of the result, and here and there of what it is made of."""
    tolerance = 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_product_is_that_of_torch(shape: Any, device: str, dtype: torch.dtype) -> None:
    given, weight, bias = operands(shape, device, dtype)
    exact = F.linear(given.double(), weight.double(), bias.double())
    assert_rounded(products.product(given, weight, bias), exact)
    assert_rounded(products.product(given, weight, None), exact - bias.double())


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS.values())))
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_gated_product_is_that_of_two_modules(
    shape: Any, activation: Any, device: str, dtype: torch.dtype
) -> None:
    given, weight, bias = operands(shape, device, dtype)
    both = F.linear(given.double(), weight.double(), bias.double()).to(dtype)
    gate, up = both.chunk(2, 1)
    expected = ACT2FN[activation](gate) * up
    got = products.gated(given, weight, bias, activation)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_the_parts_of_a_sum_are_added_to_the_residual_stream(
    shape: Any, device: str, dtype: torch.dtype
) -> None:
    given, weight, _ = operands(shape, device, dtype)
    parts = products.product_parts(given, weight)
    assert_rounded(parts.sum(0).to(dtype), F.linear(given.double(), weight.double()))
    hidden = torch.randn(shape[0], shape[1]).to(device, dtype)
    norm = torch.randn(shape[1]).to(device, dtype)
    for multiplier in (1.0, 0.5):
        streams = hidden.clone(), hidden.clone()
        sums = parts.sum(0).to(dtype)
        got, expected = (
            layers.add_norm(stream, branch, norm, 1e-5, "cast, scale", multiplier=multiplier)
            for stream, branch in zip(streams, (parts, sums), strict=True)
        )
        assert torch.equal(streams[0], streams[1])
        assert torch.equal(got, expected)


def test_sums_of_few_outputs_are_divided() -> None:
    given, weight, _ = operands((1, 32, 1024), "cpu", torch.float16)
    assert products.product_parts(given, weight).shape == (2, 1, 32)


@pytest.mark.parametrize("processors", [6, 78, 132])
def test_no_part_of_a_sum_is_empty(processors: int) -> None:
    found = set()
    for outputs in (16, 576, 896, 960, 1024, 2048, 4096):
        for inputs in range(64, 16384, 64):
            parts = products._parts(outputs, inputs, processors)
            turns = -(-inputs // products.BLOCK_K)
            assert (parts - 1) * -(-turns // parts) < turns, (outputs, inputs)
            found.add(parts)
    assert len(found) > 2
    # SmolLM2-360M: eight parts of three turns would be more than there is.
    assert products._parts(960, 2560, 132) == 7


@pytest.mark.gpu
def test_what_fits() -> None:
    given, weight, _ = operands((64, 32, 64), "cuda", torch.bfloat16)
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert products.fits(given, weight) == hopper
    assert not products.fits(given.float(), weight.float())
    assert not products.fits(given.repeat(2, 1), weight)
    assert not products.fits(given[:, :63].contiguous(), weight[:, :63].contiguous())
    assert not products.fits(given[:, 8:], weight[:, 8:])
    assert not products.fits(given, weight.half())
