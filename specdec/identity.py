"""Whether a model is still the one that computed what is cached."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

Identity = tuple[int, int, int]
KEPT = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
"""Where a module keeps what matters here."""


class Weights:
    """Tells the states of a model's weights apart, without reading them.

    A state is the tensors themselves - which they are, where they lie, how often torch has seen
    them written - the kinds of modules around them, and, for PEFT layers, which adapters act and
    how strongly. Switching an adapter back returns to the state before. Writes that torch does not
    count, through `.data` or from outside, are not noticed unless they change one of these.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layout = _Layout(model)
        self._tensors: list[weakref.ref[Tensor]] = []
        self._identities: list[Identity] = []
        self._generation = 0

    @property
    def generation(self) -> int:
        """Grows whenever `state` finds a tensor replaced or written."""
        return self._generation

    def state(self) -> Hashable:
        """Equal for two moments between which K and V of a text are the same."""
        if not self._layout.current():
            self._layout = _Layout(self._model)
        layout = self._layout
        tensors = layout.tensors()
        identities = [_identity(tensor) for tensor in tensors]
        # An address may be used again: an equal identity counts for a tensor that lived on.
        alive = all(ref() is t for ref, t in zip(self._tensors, tensors, strict=False))
        if not alive or identities != self._identities:
            self._tensors = [weakref.ref(tensor) for tensor in tensors]
            self._identities = identities
            self._generation += 1
        adapters = tuple(layout.adapters())
        return self._generation, adapters, layout.forwards(), tuple(map(type, layout.modules))


class _Layout:
    """The modules of a model, and the dictionaries that they keep their state in.

    This is asked several times a call, and there are hundreds of modules: what can be is done for
    all of them at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = modules_of(model)
        self._vars = [vars(module) for module in self.modules]
        self._kept = {name: [inside[name] for inside in self._vars] for name in KEPT}
        self._children = self._flat("_modules")
        self._counts = [*map(len, self._kept["_modules"])]

    def _flat(self, name: str) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._kept[name]))]

    def current(self) -> bool:
        """Whether the model still consists of these modules, and these of these dictionaries."""
        return (
            [*map(len, self._kept["_modules"])] == self._counts
            and all(map(is_, self._flat("_modules"), self._children))
            and all(
                all(map(is_, [inside[name] for inside in self._vars], self._kept[name]))
                for name in KEPT
            )
        )

    def tensors(self) -> list[Tensor]:
        """All parameters and persistent buffers."""
        found = [tensor for tensor in self._flat("_parameters") if tensor is not None]
        for inside in self._vars:
            if inside["_buffers"]:
                passing = inside["_non_persistent_buffers_set"]
                for name, buffer in inside["_buffers"].items():
                    if buffer is not None and name not in passing:
                        found.append(buffer)
        return found

    def forwards(self) -> tuple[int, ...]:
        """The numbers of all hooks, which torch gives only once, and who has a forward of its own.

        The latter are counted from -1 down.
        """
        hooks = chain.from_iterable(self._kept["_forward_hooks"])
        before = chain.from_iterable(self._kept["_forward_pre_hooks"])
        own = (-1 - n for n, inside in enumerate(self._vars) if "forward" in inside)
        return (*hooks, *before, *own)

    def adapters(self) -> Iterator[Hashable]:
        """What PEFT's layers say of themselves."""
        for module in self.modules:
            if hasattr(type(module), "active_adapters"):
                yield from _adapters(module)


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
