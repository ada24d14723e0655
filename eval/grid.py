"""What is to be compared: targets x drafters x trees x rules x temperatures, or a list by hand.

As a file (TOML):

    max_new_tokens = 64
    repetitions = 2
    suites = ["builtin", "gsm8k=gsm8k.jsonl"]

    [grid]
    targets = ["Qwen/Qwen3-8B"]
    drafters = ["ngram", "Qwen/Qwen3-0.6B"]
    trees = ["8", "32"]
    temperatures = [0.0, 1.0]
    baselines = ["hf-eager"]

    [[configuration]]
    name = "mine"
    drafter = "my_file.py:MyDrafter"
    tree = "16"

A `[[configuration]]` takes its target and temperature from the grid if it has none of its own. The
plain loop is added for every target and temperature: there is always something to compare with.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

from specdec import models
from specdec.eval.records import PLAIN, Configuration

BASELINES = ("hf-eager", "hf-compile", "hf-prompt-lookup", "hf-assisted")
"""transformers' own `generate`; `hf-assisted:MODEL` names the assistant."""


@dataclass(frozen=True)
class Settings:
    """What all configurations have in common."""

    max_new_tokens: int = 128
    repetitions: int = 1
    seed: int = 0
    """Every repetition and prompt draws from a seed of its own, made of this one."""
    limit: int | None = None
    """Prompts of each suite, at most, from its categories in turn."""
    dtype: str | None = None
    device: str | None = None
    capture: bool = True
    """Whether our own steps may run as CUDA graphs."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "repetitions", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")


@dataclass(frozen=True)
class Grid:
    """A grid and its settings."""

    settings: Settings = Settings()
    targets: tuple[str, ...] = (models.DEFAULT,)
    drafters: tuple[str, ...] = ("ngram",)
    trees: tuple[str | None, ...] = ("chain:8", "8")
    rules: tuple[str, ...] = ("auto",)
    temperatures: tuple[float, ...] = (0.0,)
    baselines: tuple[str, ...] = ()
    suites: tuple[str, ...] = ("builtin",)
    extra: tuple[dict[str, Any], ...] = field(default=())
    """Configurations given by hand."""

    def configurations(self) -> list[Configuration]:
        """All of them, the plain loop of each target and temperature first.

        Raises:
            ValueError: a baseline is unknown, or two configurations have one name.
        """
        found: list[Configuration] = []
        own = [_by_hand(item, self) for item in self.extra]
        places = [*product(self.targets, self.temperatures)]
        places += [(c.target, c.temperature) for c in own]
        for target, temperature in dict.fromkeys(places):
            found.append(Configuration(PLAIN, target, "none", temperature=temperature))
            found += [
                Configuration(baseline, target, _known(baseline), temperature=temperature)
                for baseline in self.baselines
            ]
            if (target, temperature) in product(self.targets, self.temperatures):
                found += [
                    Configuration(
                        " ".join(
                            filter(None, [drafter, tree, rule if len(self.rules) > 1 else None])
                        ),
                        target,
                        drafter,
                        tree,
                        rule=rule,
                        temperature=temperature,
                    )
                    for drafter, tree, rule in product(self.drafters, self.trees, self.rules)
                    if drafter != "none"
                ]
            found += [c for c in own if (c.target, c.temperature) == (target, temperature)]
        return _unique([_with_place(c, found) for c in found])

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `run.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Grid:
        """What `to_dict` made."""
        plain = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in data.items()
            if name != "settings"
        }
        return cls(settings=Settings(**data["settings"]), **plain)

    @classmethod
    def from_file(cls, file: Path) -> Grid:
        """A grid from a TOML file.

        Raises:
            ValueError: it cannot be read, or has a key that is none or not of its type.
        """
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"--config: {file}: {error}") from None
        grid, extra = data.pop("grid", {}), data.pop("configuration", [])
        suites = data.pop("suites", None)
        _check_keys(f"{file}", data, Settings)
        _check_keys(f"{file} [grid]", grid, Grid, {"settings", "suites", "extra"})
        made = cls(settings=Settings(**data), extra=tuple(extra))
        lists: dict[str, Any] = {
            name: _tuple(f"{file} {name}", value) for name, value in grid.items()
        }
        if "trees" in lists:
            lists["trees"] = tuple(str(tree) for tree in lists["trees"])
        if suites is not None:
            lists["suites"] = _tuple(f"{file} suites", suites)
        if extra and "drafters" not in grid:
            lists["drafters"] = ()
        return replace(made, **lists)


def _tuple(where: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {value!r}")
    return tuple(value)


def _check_keys(
    where: str, data: Mapping[str, Any], kind: type, hidden: Set[str] = frozenset()
) -> None:
    known = {f.name for f in fields(kind)} - hidden
    if unknown := sorted(data.keys() - known):
        raise ValueError(f"{where}: expected keys among {', '.join(sorted(known))}, got {unknown}")
    if kind is Settings:
        for name, hint in get_type_hints(Settings).items():
            if name in data and type(data[name]) not in (get_args(hint) or (hint,)):
                raise ValueError(f"{where}: {name}: expected {hint}, got {data[name]!r}")


def _by_hand(item: dict[str, Any], grid: Grid) -> Configuration:
    known = {"name", "target", "drafter", "tree", "rule", "temperature"}
    if (unknown := sorted(item.keys() - known)) or "drafter" not in item:
        raise ValueError(
            f"[[configuration]]: expected `drafter` and any of {', '.join(sorted(known))}, "
            f"got {unknown or sorted(item)}"
        )
    values = {"target": grid.targets[0], "temperature": grid.temperatures[0], **item}
    if values.get("tree") is not None:
        values["tree"] = str(values["tree"])
    values["temperature"] = float(values["temperature"])
    values.setdefault("name", " ".join(filter(None, [values["drafter"], values.get("tree")])))
    return Configuration(**values)


def _known(baseline: str) -> str:
    name, _, assistant = baseline.partition(":")
    if name not in BASELINES or (name == "hf-assisted") != bool(assistant):
        raise ValueError(
            f"--baseline: expected hf-eager, hf-compile, hf-prompt-lookup or hf-assisted:MODEL, "
            f"got {baseline!r}"
        )
    return baseline


def _with_place(configuration: Configuration, all_: list[Configuration]) -> Configuration:
    """The name says target and temperature where these vary."""
    name = configuration.name
    if len({c.target for c in all_}) > 1:
        name += f" on {configuration.target}"
    if len({c.temperature for c in all_}) > 1:
        name += f" T={configuration.temperature:g}"
    return replace(configuration, name=name)


def _unique(configurations: list[Configuration]) -> list[Configuration]:
    names = [c.name for c in configurations]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two configurations are called {twice!r}; give them different names")
    return configurations
