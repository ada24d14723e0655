"""What command lines and grids name, as objects: models, drafters, trees, prompts."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from specdec import models
from specdec.drafters import DRAFTERS, Beam, Chains, DraftModel
from specdec.drafting import Drafter, SequenceDrafter
from specdec.topology import Topology
from specdec.tree import MAX_NODES


def load_model(name: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """The model and tokenizer behind a name, folder or hub id; safetensors only.

    Args:
        name: from `specdec models list`, or what `from_pretrained` takes.
        dtype: float32 on a CPU and bfloat16 elsewhere by default.
        device: the first CUDA device if there is one by default.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    where = models.resolve(name)
    kind = parse_dtype(dtype or ("float32" if device == "cpu" else "bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(where, dtype=kind, use_safetensors=True)
    placed: Any = model
    return placed.to(device).eval(), AutoTokenizer.from_pretrained(where)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"--device: expected one that torch has, got {name!r}: {why}") from None


def parse_dtype(name: str) -> torch.dtype:
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype: expected a torch dtype such as float32, got {name!r}")
    return kind


def make_drafter(
    drafter: str, tree: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[Drafter, int | None]:
    """A drafter and a node budget from `--drafter` and `--tree`.

    Args:
        drafter: a name in `DRAFTERS`, `file.py:Name`, or a smaller model (name, folder or hub id).
        tree: a number of nodes; for a model also a shape, `chain:5` or `4,2,1`, or `beam:8x6`; for
            a drafter that looks at one sequence at a time also `chain:5`.

    Raises:
        ValueError: one of them cannot be read, or they do not go together.
    """
    nodes = None if tree is None else node_budget(tree)
    shape = None if tree is None or tree.isdecimal() else parse_shape(tree)
    file, colon, name = drafter.rpartition(":")
    if drafter in DRAFTERS:
        found = DRAFTERS[drafter]()
    elif colon and file.endswith(".py"):
        found = drafter_from_file(Path(file), name)
    else:
        try:
            small, _ = load_model(drafter, str(dtype).removeprefix("torch."), str(device))
        except OSError as error:
            raise ValueError(
                f"--drafter: expected one of {', '.join(DRAFTERS)}, file.py:Name or a model, got "
                f"{drafter!r}, which is no model that can be loaded: {error}"
            ) from error
        return DraftModel(small, shape), nodes
    if shape is None:
        return found, nodes
    chain = isinstance(shape, Topology) and shape == Topology.chain(len(shape))
    if not isinstance(found, SequenceDrafter) or not chain:
        shapes = " or chain:5" if isinstance(found, SequenceDrafter) else ""
        raise ValueError(f"--tree: {drafter} takes a number of nodes{shapes}, got {tree!r}")
    return Chains(found), nodes


def node_budget(tree: str) -> int:
    """Nodes of `--tree`, the root included."""
    if tree.isdecimal():
        return int(tree)
    shape = parse_shape(tree)
    if isinstance(shape, Topology):
        return len(shape)
    nodes = tree.split(":")[2:]
    return int(nodes[0]) if nodes else min(1 + shape.width * shape.depth, MAX_NODES)


def parse_shape(text: str) -> Topology | Beam:
    """What `parse_topology` reads, or `beam:8x6`: 8 nodes of each depth are run, down to depth 6.

    The tree has as many nodes and the root; `beam:8x6:32` has the 32 likeliest, root included.
    """
    if not text.startswith("beam:"):
        return parse_topology(text)
    found = re.fullmatch(r"beam:(\d+)x(\d+)(?::[1-9]\d*)?", text)
    if found is None:
        raise ValueError(f"--tree: expected beam:8x6 or, with its nodes, beam:8x6:32, got {text!r}")
    return Beam(int(found[1]), int(found[2]))


def parse_topology(text: str) -> Topology:
    """`chain:5` or the number of children at each depth, `4,2,1`."""
    kind, _, count = text.partition(":")
    if kind == "chain" and count.isdecimal() and int(count) > 0:
        return Topology.chain(int(count))
    widths = text.split(",")
    if all(width.isdecimal() for width in widths):
        return Topology.branching([int(width) for width in widths])
    raise ValueError(f"--tree: expected a number of nodes, chain:5 or 4,2,1, got {text!r}")


def drafter_from_file(file: Path, name: str) -> Drafter:
    """The drafter called `name` in a Python file: an instance, or what is called to make one.

    Raises:
        ValueError: there is no such file or name, or it gives no `Drafter`.
    """
    if not file.is_file():
        raise ValueError(f"--drafter: there is no file {str(file)!r}")
    spec = importlib.util.spec_from_file_location(f"specdec_user_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up there
    spec.loader.exec_module(module)
    made = getattr(module, name, None)
    if made is not None and not isinstance(made, Drafter):
        made = made()
    if not isinstance(made, Drafter):
        raise ValueError(
            f"--drafter: expected {name!r} in {file} to be a Drafter or to make one, "
            f"got {type(made).__name__}"
        )
    return made


def encode(tokenizer: Any, prompt: str | Sequence[dict[str, str]], *, raw: bool = False) -> Any:
    """A prompt in the model's own chat template: [1, L] `input_ids` and `attention_mask`.

    Args:
        tokenizer: of the model.
        prompt: what the user says, or the messages of a conversation, `role` and `content` each.
        raw: only the contents, without a template; so are models that have none.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if raw or tokenizer.chat_template is None:
        return tokenizer("\n\n".join(m["content"] for m in messages), return_tensors="pt")
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
