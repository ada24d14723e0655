"""Linear layers that read the same input, as one matrix, without a second copy of their weights.

The layers' parameters become views of the packed storage. They stay the parameters that they were:
they can be saved, loaded into and trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Packed:
    """Several linear layers on top of each other; or one, as it is."""

    layers: tuple[nn.Linear, ...]
    weight: Tensor  # [sum of outputs, D]
    bias: Tensor | None  # [sum of outputs]


@torch.no_grad()
def pack(layers: Sequence[nn.Linear]) -> Packed:
    """Puts the weights of some layers into one storage, unless they lie in one already.

    Args:
        layers: with one input size, dtype and device; all with a bias, or none.
    """
    weight = _pack([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return Packed(tuple(layers), weight, _pack(biases) if biases else None)


@torch.no_grad()
def unpack(packed: Packed) -> None:
    """Gives every layer a storage of its own again, but for parameters replaced since."""
    if len(packed.layers) == 1:
        return
    for layer in packed.layers:
        for parameter, whole in ((layer.weight, packed.weight), (layer.bias, packed.bias)):
            if parameter is not None and whole is not None and _shares(parameter, whole):
                parameter.data = parameter.data.clone()


def _pack(parameters: Sequence[Tensor]) -> Tensor:
    first = parameters[0].data
    rows = sum(len(parameter) for parameter in parameters)
    size = (rows, *first.shape[1:])
    if _adjoin(parameters):
        return first.new_empty(0).set_(
            first.untyped_storage(), first.storage_offset(), size, first.stride()
        )
    whole = first.new_empty(size)
    for parameter, part in zip(
        parameters, whole.split([len(parameter) for parameter in parameters]), strict=True
    ):
        part.copy_(parameter)
        parameter.data = part
    return whole


def _adjoin(parameters: Sequence[Tensor]) -> bool:
    """Whether parameters follow one another in one storage."""
    first = parameters[0]
    offset, address = first.storage_offset(), first.untyped_storage().data_ptr()
    for parameter in parameters:
        same = parameter.untyped_storage().data_ptr() == address
        if not same or parameter.storage_offset() != offset or not parameter.is_contiguous():
            return False
        offset += parameter.numel()
    return True


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
