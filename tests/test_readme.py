"""The README's code runs as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec.testing import TINY, tiny_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_custom_drafter_is_short_and_lossless() -> None:
    code = next(block for block in blocks() if "SequenceDrafter" in block)
    drafter_lines = code.split("model = specdec.wrap")[0].strip().splitlines()
    assert len(drafter_lines) <= 25
    hf_model: Any = tiny_model("Llama")
    names: dict[str, Any] = {"specdec": specdec, "hf_model": hf_model}
    exec(code, names)
    prompts = torch.randint(1, TINY["vocab_size"], (2, 9))
    expected = hf_model.generate(prompts, max_new_tokens=60, do_sample=False)
    out = names["model"].generate(
        prompts, max_new_tokens=60, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, expected)
    assert out.stats.accepted > 0


def test_the_first_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(blocks()[0], names)
    assert "One, two, three, four." in capsys.readouterr().out
    exec(blocks()[1].replace("hf_model.generate(", "again = hf_model.generate("), names)
    assert torch.equal(names["again"], names["output"].sequences)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
