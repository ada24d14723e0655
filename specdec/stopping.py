"""When the rows of a batch end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from specdec.request import Request


class Stopping:
    """When the rows of a batch end, as transformers decides it.

    A criterion is asked after every token of a row. It is handed a whole batch, so that it may have
    a setting for each row, but all of it is that row's text: rows are not equally far.

    Without an end-of-sequence token transformers does not pad rows that a criterion has stopped:
    they go on until the last one stops.
    """

    def __init__(self, input_ids: Tensor, criteria: Sequence[StoppingCriteria]) -> None:
        self._input_ids = input_ids
        self._eos = {
            token
            for criterion in criteria
            if isinstance(criterion, EosTokenCriteria)
            for token in criterion.eos_token_id.tolist()
        }
        built_in = (MaxLengthCriteria, EosTokenCriteria)
        self._others = [c for c in criteria if not isinstance(c, built_in)]
        self._stopped: dict[int, int] = {}  # rows that wait for the others, and where they stopped
        self._requests: dict[int, Request] = {}

    def watch(self, requests: Sequence[Request]) -> None:
        """Tells it the request of each row, so that nobody waits for one that has failed."""
        self._requests = dict(enumerate(requests))

    def of_row(self, row: int) -> Callable[[Request], bool]:
        """Whether a row ends with its last token."""
        prompt = self._input_ids[row].tolist()

        def ends(request: Request) -> bool:
            if self._eos or not self._others:
                return request.tokens[-1] in self._eos or self._asked(row, prompt, request)
            emitted = len(request.tokens) - request.prompt_length
            full = emitted >= request.max_new_tokens
            if row not in self._stopped and (full or self._asked(row, prompt, request)):
                self._stopped[row] = emitted
            last = max(self._stopped.values(), default=0)
            if len(self._stopped.keys() | self._failed) < len(self._input_ids) or emitted < last:
                return False
            for other in self._requests.values():
                if other is request or other.finished:  # they had run ahead of the others
                    del other.tokens[other.prompt_length + last :]
            return True

        return ends

    @property
    def _failed(self) -> set[int]:
        """Rows that ended without having stopped; nobody waits for them."""
        return {row for row, request in self._requests.items() if request.error is not None}

    def _asked(self, row: int, prompt: list[int], request: Request) -> bool:
        if not self._others:
            return False
        ids = self._input_ids
        text = torch.tensor([prompt + request.emitted], device=ids.device).expand(len(ids), -1)
        # Without output_scores transformers has no scores to hand over either.
        answers = [torch.as_tensor(criterion(text, None)) for criterion in self._others]
        return any(bool(a[row] if a.ndim else a) for a in answers)
