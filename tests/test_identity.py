"""Whether a model is still the one that computed what is cached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from specdec.identity import Weights


def model() -> Any:
    made: Any = nn.Sequential(
        nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU())
    )
    made.register_buffer("kept", torch.ones(2))
    made.register_buffer("passing", torch.ones(2), persistent=False)
    made[0].register_forward_hook(lambda *_: None)
    return made


def in_place(m: Any) -> None:
    with torch.no_grad():
        m[1][0].weight.mul_(2)


def without_hooks(m: Any) -> None:
    m[0]._forward_hooks = OrderedDict()


def swapped(m: Any) -> None:
    m[1]._modules = dict(reversed(m[1]._modules.items()))


CHANGES: dict[str, Callable[[Any], object]] = {
    "a write": in_place,
    "a new parameter": lambda m: setattr(m[0], "bias", nn.Parameter(torch.zeros(3))),
    "no parameter": lambda m: setattr(m[0], "bias", None),
    "other memory": lambda m: setattr(m[0].weight, "data", m[0].weight.clone()),
    "a buffer": lambda m: m.kept.add_(1),
    "a module": lambda m: setattr(m[1], "0", nn.Linear(3, 3, bias=False)),
    "another kind of module": lambda m: setattr(m[1], "1", nn.GELU()),
    "one module more": lambda m: m.append(nn.Identity()),
    "the order of modules": swapped,
    "another class": lambda m: setattr(m[1][1], "__class__", nn.Sigmoid),
    "a hook": lambda m: m[1].register_forward_pre_hook(lambda *_: None),
    "a hook less": without_hooks,
    "another forward": lambda m: setattr(m[1], "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_another_state(change: Callable[[Any], object]) -> None:
    changed = model()
    weights = Weights(changed)
    before = weights.state()
    assert weights.state() == before
    change(changed)
    after = weights.state()
    assert after != before
    assert weights.state() == after


def test_what_no_layer_reads_is_no_change() -> None:
    changed = model()
    weights = Weights(changed)
    before = weights.state()
    changed.passing.add_(1)
    changed[1].eval()
    assert weights.state() == before
