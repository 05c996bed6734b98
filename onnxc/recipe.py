"""Recipes: TOML <-> an ordered list of passes with their settings.

    seed = 0
    include = ["/features/*"]           # which nodes the passes may touch; nothing means all

    [target]
    name = "auto"

    [calibration]
    samples = 100
    preset = "imagenet"

    [[pass]]
    name = "fold"

    [[pass]]
    name = "quantize"
    per_channel = true

Every key is the field of a frozen dataclass, read by its type (see `onnxc.typed`). Reading what was
written gives an equal recipe: `loads(dump(recipe)) == recipe`. Some recipes come with onnxc, and go
by a name (`shipped`).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import passes  # noqa: F401 - importing it fills PASSES
from calib.data import Preprocess
from onnxc.core import PASSES, Pass
from onnxc.errors import OptionError
from onnxc.selectors import Selector
from onnxc.typed import (
    Table,
    build,
    construct,
    keys,
    read,
    read_as,
    refuse_unknown,
    settings,
    suggest,
)

SHIPPED = Path(__file__).parent / "recipes"
TOP_KEYS = ("seed", "include", "exclude", "target", "calibration", "pass")


@dataclass(frozen=True)
class Calibration:
    """Table [calibration]: which data the statistics come from, and which judge the result.

    Without val, a part of the data judges, and no statistic sees it. stats: a statistics file, used
    before any data. max_memory is in bytes.
    """

    data: str | None = None
    val: str | None = None
    stats: str | None = None
    samples: int | None = None
    max_memory: int | None = None
    preprocess: Preprocess = field(default_factory=Preprocess)


@dataclass(frozen=True)
class Recipe:
    """What to do to a model, complete enough to replay it byte for byte."""

    passes: tuple[Pass, ...] = ()
    seed: int = 0
    target: str = "auto"
    calibration: Calibration = field(default_factory=Calibration)
    only: Selector = Selector()


@dataclass(frozen=True)
class _Target:
    """Table [target]."""

    name: str = "auto"


def shipped() -> dict[str, Path]:
    """The recipes that come with onnxc, by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.toml"))}


def load(path: str | Path) -> Recipe:
    """Read a recipe: a file, or one that comes with onnxc. Raises OptionError naming the key."""
    file, known = Path(path), shipped()
    if not file.exists() and not file.suffix:
        if str(path) not in known:
            hint = suggest(str(path), known)
            raise OptionError(
                f"there is no recipe {path}{hint}; give a TOML file or one of: {', '.join(known)}"
            )
        file = known[str(path)]
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the recipe {path}: {_why(error)}") from error
    try:
        return loads(text)
    except OptionError as error:
        raise OptionError(f"recipe {path}: {error}") from error


def loads(text: str) -> Recipe:
    """Read a recipe from TOML text. Raises OptionError naming the key and the known ones."""
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise OptionError("not valid TOML: it is nested too deep") from error
    except ValueError as error:  # also of a number with too many digits
        raise OptionError(f"not valid TOML: {error}") from error
    refuse_unknown(table, TOP_KEYS, "the top level")
    patterns = tuple[str, ...]
    include = read(table.get("include", []), patterns, "include")
    exclude = read(table.get("exclude", []), patterns, "exclude")
    return Recipe(
        passes=tuple(_pass(entry) for entry in _list_of_tables(table.get("pass", []))),
        seed=read(table.get("seed", 0), int, "seed"),
        target=build(_Target, _subtable(table, "target"), "[target]").name,
        calibration=build(Calibration, _subtable(table, "calibration"), "[calibration]"),
        only=Selector.parse(include, exclude),
    )


def dump(recipe: Recipe) -> str:
    """TOML text with every setting written out, so that a later default cannot change it."""
    top: dict[str, Any] = {"seed": recipe.seed}
    top |= {k: v for k in ("include", "exclude") if (v := getattr(recipe.only, k))}
    tables: list[tuple[str, Table]] = [("", top), ("[target]", {"name": recipe.target})]
    tables.append(("[calibration]", dict(settings(recipe.calibration))))
    tables += [("[[pass]]", {"name": p.name, **dict(settings(p))}) for p in recipe.passes]
    return "\n".join(_to_text(header, table) for header, table in tables if table)


def override(
    recipe: Recipe,
    *,
    seed: int | None = None,
    target: str | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    preprocess: Preprocess | None = None,
    **calibration: Any,
) -> Recipe:
    """A recipe with the keys replaced that are given, those of a Preprocess one by one.

    calibration: keys of [calibration]. Raises OptionError for a pattern that makes no sense.
    """
    given = {k: v for k, v in calibration.items() if v is not None}
    images = {k: v for k, v in settings(preprocess or Preprocess()) if v is not None}
    merged = replace(recipe.calibration.preprocess, **images)
    only = recipe.only if include is None else replace(recipe.only, include=tuple(include))
    only = only if exclude is None else replace(only, exclude=tuple(exclude))
    return replace(
        recipe,
        seed=recipe.seed if seed is None else seed,
        target=recipe.target if target is None else target,
        only=Selector.parse(only.include, only.exclude),
        calibration=replace(recipe.calibration, preprocess=merged, **given),
    )


def adjust(planned: Iterable[Pass], given: Mapping[str, Any]) -> tuple[Pass, ...]:
    """Passes with keys replaced wherever they take the value.

    Raises OptionError for a key that no pass has, or a value that none takes.
    """
    adjusted = tuple(planned)
    for key, value in given.items():
        owners = [p for p in adjusted if key in keys(type(p))]
        takers = [p for p in owners if read_as(value, keys(type(p))[key])[0]]
        if not takers:
            why = f"takes {key} = {value!r}" if owners else f"has the key {key!r}"
            raise OptionError(f"no pass of the recipe {why}; change the recipe instead")
        adjusted = tuple(
            construct(type(p), {**dict(settings(p)), key: value}) if p in takers else p
            for p in adjusted
        )
    return adjusted


def _pass(table: Table) -> Pass:
    name = table.get("name")
    if name not in PASSES:
        known = ", ".join(sorted(PASSES))
        what = "has no name" if name is None else f"has an unknown name {name!r}"
        raise OptionError(f"a [[pass]] {what}{suggest(str(name), PASSES)}; the passes are: {known}")
    rest = {key: value for key, value in table.items() if key != "name"}
    return build(PASSES[name], rest, f"[[pass]] {name}")


def _list_of_tables(value: Any) -> list[Table]:
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return value
    raise OptionError("pass must be tables headed [[pass]]")


def _subtable(table: Table, key: str) -> Table:
    value = table.get(key, {})
    if isinstance(value, dict):
        return value
    raise OptionError(f"{key} must be a table headed [{key}], not {value!r}")


def _why(error: OSError | UnicodeDecodeError) -> str:
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error.strerror)


def _to_text(header: str, table: Table) -> str:
    lines = [header] if header else []
    lines += [f"{key} = {_to_toml(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _to_toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "[" + ", ".join(_to_toml(item) for item in value) + "]"
