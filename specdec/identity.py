"""Whether a model is still the one that computed what is cached."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator

from torch import Tensor, nn

Identity = tuple[int, int, int]


class Weights:
    """Tells the states of a model's weights apart, without reading them.

    A state is the tensors themselves - which they are, where they lie, how often torch has seen
    them written - the kinds of modules around them, and, for PEFT layers, which adapters act and
    how strongly. Switching an adapter back returns to the state before. Writes that torch does not
    count, through `.data` or from outside, are not noticed unless they change one of these.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors: list[weakref.ref[Tensor]] = []
        self._identities: list[Identity] = []
        self._generation = 0

    @property
    def generation(self) -> int:
        """Grows whenever `state` finds a tensor replaced or written."""
        return self._generation

    def state(self) -> Hashable:
        """Equal for two moments between which K and V of a text are the same."""
        tensors: list[Tensor] = []
        adapters: list[Hashable] = []
        hooks: list[int] = []  # their numbers, which torch gives only once; -1: another forward
        modules = modules_of(self._model)
        for module in modules:
            tensors += [p for p in module._parameters.values() if p is not None]
            passing = module._non_persistent_buffers_set
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in passing:
                    tensors.append(buffer)
            hooks += [*module._forward_hooks, *module._forward_pre_hooks]
            if "forward" in vars(module):
                hooks.append(-1)
            if hasattr(type(module), "active_adapters"):
                adapters += _adapters(module)
        identities = [_identity(tensor) for tensor in tensors]
        # An address may be used again: an equal identity counts for a tensor that lived on.
        alive = all(ref() is t for ref, t in zip(self._tensors, tensors, strict=False))
        if not alive or identities != self._identities:
            self._tensors = [weakref.ref(tensor) for tensor in tensors]
            self._identities = identities
            self._generation += 1
        return self._generation, tuple(adapters), tuple(hooks), tuple(map(type, modules))


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once: `model.modules()` in a tenth of the time."""
    found, stack = {id(model): model}, [model]
    while stack:
        for child in stack.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                stack.append(child)
    return list(found.values())


def _identity(tensor: Tensor) -> Identity:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), version, 0 if tensor.is_meta else tensor.data_ptr()


def _adapters(module: nn.Module) -> Iterator[Hashable]:
    """What PEFT says of one of its layers, by PEFT's own names."""
    active = getattr(module, "active_adapters", None)
    if isinstance(active, list | tuple) and hasattr(module, "merged_adapters"):
        scaling = getattr(module, "scaling", {})
        yield (
            tuple(active),
            tuple(module.merged_adapters),  # type: ignore[arg-type]
            bool(getattr(module, "disable_adapters", False)),
            tuple((name, float(scaling[name])) for name in active if name in scaling),
        )
