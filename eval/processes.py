"""The processes of `accelerate launch`, each of which takes a share of the prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""For a process whose prompts take longer; a process that dies ends the others at once."""


@dataclass(frozen=True)
class Processes:
    """This process among those that were launched together."""

    index: int
    count: int
    device: torch.device
    wait: Callable[[], None]
    """Until all processes are here."""

    @classmethod
    def current(cls, device: str | None) -> Processes:
        """What the launcher says, or one process alone.

        Args:
            device: as asked for; by default the process's own GPU, or the CPU.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
            return cls(0, 1, torch.device(chosen), lambda: None)
        from accelerate import PartialState

        on_cpu = device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.device, state.wait_for_everyone)

    @property
    def first(self) -> bool:
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th of them."""
        return items[self.index :: self.count]
