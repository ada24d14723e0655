"""Shared fixtures."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported, which the next imports may do
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers.utils import logging

from specdec import models


def pytest_configure() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer; fetched once, then read from disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.fetch()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
