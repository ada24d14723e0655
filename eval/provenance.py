"""Where and with what numbers are made."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

import specdec

CLOCKS = (
    "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,temperature.gpu"
)


def provenance(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The device, its clocks, versions, the commit and the command."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "command": command(),
        **checkout(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        **(_gpu(device) if cuda else {}),
        "clocks": clocks(device) if cuda else {},
        "dtype": str(dtype).removeprefix("torch."),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "transformers": transformers.__version__,
        "specdec": specdec.__version__,
    }


def command() -> str:
    """What was typed, without the folders that programs lie in."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`, which argv hides
    begun = [Path(sys.argv[0]).name]
    if spec is not None:
        begun = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*begun, *sys.argv[1:]])


def _gpu(device: torch.device) -> dict[str, int]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }


def _triton() -> str | None:
    if find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def checkout() -> dict[str, Any]:
    """The commit that runs and whether its files were changed; null outside of a checkout."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=file.parent, capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie within somebody else's checkout.
    if git("ls-files", "--error-unmatch", str(file)) is None:
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": git("status", "--porcelain") != ""}


def clocks(device: torch.device) -> dict[str, str]:
    """What nvidia-smi says of a CUDA device; empty without it."""
    uuid = torch.cuda.get_device_properties(device).uuid
    query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(CLOCKS.split(","), values, strict=False)) if done.returncode == 0 else {}
