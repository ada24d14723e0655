"""The repository's shape is part of its interface: names, links, and who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "drafters", "eval")
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("specdec", *LINKED)
    for path in sorted((ROOT / folder).rglob("*.py"))
    # What is reached through a link is checked under its own folder.
    if not (folder == "specdec" and path.relative_to(ROOT / folder).parts[0] in LINKED)
]

# Which parts of the package a part may import. `core` is all of specdec/ but the links.
LAW = {
    "kernels": {"kernels"},
    "core": {"core", "kernels"},
    "drafters": {"core", "kernels", "drafters"},
    "eval": {"core", "kernels", "drafters", "eval"},
}
# The command line sits on top of everything; wrap.py looks up, but not while it is imported.
ALSO_ANYWHERE = {
    "specdec/cli.py": {"drafters", "eval"},
    "specdec/cli_trace.py": {"eval"},
}
ALSO_IN_FUNCTIONS = {"specdec/wrap.py": {"drafters"}}


def violations(file: str, source: str) -> list[str]:
    """The imports in `source` that the law forbids to `file`, as "line: part"."""
    folder = PurePosixPath(file).parts[0]
    law = LAW["core" if folder == "specdec" else folder]
    found = []
    for line, module, in_function in imports(ast.parse(source), package_of(file)):
        allowed = law | ALSO_ANYWHERE.get(file, set())
        if in_function:
            allowed |= ALSO_IN_FUNCTIONS.get(file, set())
        part = part_of(module)
        if part is not None and part not in allowed:
            found.append(f"{line}: {part}")
    return found


def package_of(file: str) -> list[str]:
    """The package that a relative import in `file` starts from."""
    *folders, _ = PurePosixPath(file).parts
    return folders if folders[0] == "specdec" else ["specdec", *folders]


def part_of(module: str) -> str | None:
    top, *rest = module.split(".")
    if top != "specdec":
        return None
    return rest[0] if rest and rest[0] in LINKED else "core"


def imports(
    node: ast.AST, package: list[str], in_function: bool = False
) -> Iterator[tuple[int, str, bool]]:
    """Line, absolute name and whether it stands in a function, of every import below `node`."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield node.lineno, alias.name, in_function
    elif isinstance(node, ast.ImportFrom):
        start = package[: len(package) + 1 - node.level] if node.level else []
        base = [*start, *(node.module or "").split(".")] if node.module else start
        for alias in node.names:
            yield node.lineno, ".".join([*base, alias.name]), in_function
    below = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, package, below)


@pytest.mark.parametrize("file", FILES)
def test_imports_follow_the_law(file: str) -> None:
    assert violations(file, (ROOT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source", "part"),
    [
        ("specdec/tree.py", "import specdec.drafters", "drafters"),
        ("specdec/tree.py", "from specdec import eval", "eval"),
        ("specdec/tree.py", "from . import drafters", "drafters"),
        ("specdec/tree.py", "from .eval.prompts import Prompt", "eval"),
        ("specdec/tree.py", "def f():\n    from specdec.drafters import ngram", "drafters"),
        ("specdec/attention/plan.py", "from ..drafters import ngram", "drafters"),
        ("specdec/__init__.py", "from .drafters import ngram", "drafters"),
        ("specdec/wrap.py", "from specdec.drafters import ngram", "drafters"),
        ("specdec/wrap.py", "def f():\n    from .eval import prompts", "eval"),
        ("kernels/move.py", "from specdec.tree import TokenTree", "core"),
        ("kernels/move.py", "from .. import tree", "core"),
        ("kernels/move.py", "import specdec", "core"),
        ("drafters/ngram.py", "from ..eval import prompts", "eval"),
        ("drafters/ngram.py", "import specdec.eval.prompts as prompts", "eval"),
        ("drafters/training/loss.py", "from ...eval import prompts", "eval"),
    ],
)
def test_planted_violation_is_found(file: str, source: str, part: str) -> None:
    assert [entry.split(": ")[1] for entry in violations(file, source)] == [part]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("specdec/tree.py", "from .kernels import move"),
        ("specdec/__init__.py", "from specdec.wrap import wrap"),
        ("specdec/wrap.py", "def f():\n    from specdec.drafters import ngram"),
        ("specdec/cli.py", "from specdec.eval import prompts\nfrom .drafters import ngram"),
        ("kernels/move.py", "import torch\nfrom . import primitives"),
        ("drafters/ngram.py", "from ..tree import TokenTree\nfrom .grow import best_first"),
        ("eval/bench.py", "from specdec.kernels import move\nimport specdec.drafters"),
    ],
)
def test_lawful_import_is_let_through(file: str, source: str) -> None:
    assert violations(file, source) == []


@pytest.mark.parametrize("folder", LINKED)
def test_subpackage_is_a_relative_link_to_the_top_level_folder(folder: str) -> None:
    assert (ROOT / "specdec" / folder).readlink() == Path("..", folder)


def test_kernels_has_no_init() -> None:
    """With one, `import kernels` at the repository root would hide Hugging Face's package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run_at_root(code: str) -> None:
    # `python -c` puts the current folder on the path first, as notebooks and `python -m` do.
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_transformers_imports_from_the_repository_root() -> None:
    run_at_root("from transformers import LlamaForCausalLM")


def test_package_imports_without_triton() -> None:
    run_at_root(
        "import sys; sys.modules['triton'] = None\n"
        "import specdec, specdec.drafters, specdec.eval, specdec.models"
    )
