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

Every key is the field of a frozen dataclass, read by its type: bool, int, float, str, a `Literal`,
a tuple of these, or any of them `| None`, for which the word "none" stands unless a string is
accepted too. A field that is itself a dataclass lends its fields to the same table. Reading what
was written gives an equal recipe: `loads(dump(recipe)) == recipe`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import passes  # noqa: F401 - importing it fills PASSES
from calib.data import Preprocess
from onnxc.core import PASSES, Pass
from onnxc.errors import OptionError
from onnxc.selectors import Selector

T = TypeVar("T")
Table = Mapping[str, Any]

TOP_KEYS = ("seed", "include", "exclude", "target", "calibration", "pass")


@dataclass(frozen=True)
class Calibration:
    """Table [calibration]: which data the statistics come from, and which judge the result.

    Without val, a part of the data judges, and no statistic sees it. max_memory is in bytes.
    """

    data: str | None = None
    val: str | None = None
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


def load(path: str | Path) -> Recipe:
    """Read a recipe file. Raises OptionError naming the file and the key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
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
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"not valid TOML: {error}") from error
    _refuse_unknown(table, TOP_KEYS, "the top level")
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
            _construct(type(p), {**dict(settings(p)), key: value}) if p in takers else p
            for p in adjusted
        )
    return adjusted


def settings(instance: Any) -> Iterator[tuple[str, Any]]:
    """Key and value of each field, those of nested dataclasses in line, without default Nones."""
    for spec in fields(instance):
        value = getattr(instance, spec.name)
        if is_dataclass(value):
            yield from settings(value)
        elif not (value is None and spec.default is None):
            yield spec.name, value


def keys(cls: type[Any]) -> dict[str, Any]:
    """Key and type of each field of a dataclass, those of nested dataclasses in line."""
    found: dict[str, Any] = {}
    for name, kind in hints(cls).items():
        found |= keys(cast(type[Any], kind)) if is_dataclass(kind) else {name: kind}
    return found


def build(cls: type[T], table: Table, where: str) -> T:
    """A dataclass from a table. Raises OptionError naming the key: unknown, or of a wrong type."""
    known = keys(cls)
    _refuse_unknown(table, known, where)
    values = {key: read(value, known[key], f"{key} in {where}") for key, value in table.items()}
    return _construct(cls, values)


def read(value: Any, kind: Any, key: str) -> Any:
    """A TOML value as a field's type. Raises OptionError naming the key and what it takes."""
    is_read, result = read_as(value, kind)
    if is_read:
        return result
    raise OptionError(f"{key} must be {describe(kind)}, not {value!r}")


def read_as(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a TOML value is of a type, and the value as that type."""
    tried = (_read_one(value, option) for option in _alternatives(kind))
    return next((found for found in tried if found[0]), (False, None))


def describe(kind: Any) -> str:
    """A type in words: "an integer", "one of minmax, mse", "a list, each a number"."""
    options = _alternatives(kind)
    return " or ".join(_describe_one(option) for option in options)


def _read_one(value: Any, kind: Any) -> tuple[bool, Any]:
    if kind is NoneType:
        return value is None or value == "none", None
    if get_origin(kind) is Literal:
        return any(value == v and type(value) is type(v) for v in get_args(kind)), value
    if get_origin(kind) is tuple:
        return _read_tuple(value, get_args(kind))
    if kind is float and type(value) is int:
        return True, float(value)
    return type(value) is kind, value


def _read_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, None
    each = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
    if len(each) != len(value):
        return False, None
    items = [read_as(v, k) for v, k in zip(value, each, strict=True)]
    return all(is_read for is_read, _ in items), tuple(result for _, result in items)


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    NoneType: '"none"',
}


def _describe_one(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(v) for v in get_args(kind))
    if get_origin(kind) is not tuple:
        return _WORDS.get(kind, str(kind))
    inner = get_args(kind)
    count = "" if inner[-1] is Ellipsis else f" of {len(inner)}"
    return f"a list{count}, each {describe(inner[0])}"


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, str first: where a string is accepted, "none" is that string."""
    if get_origin(kind) not in (Union, UnionType):
        return (kind,)
    return tuple(sorted(get_args(kind), key=lambda option: option is not str))


def _construct(cls: type[T], values: Table) -> T:
    arguments = {}
    for name, kind in hints(cls).items():
        if is_dataclass(kind):
            arguments[name] = _construct(cast(type[Any], kind), values)
        elif name in values:
            arguments[name] = values[name]
    return cls(**arguments)


def hints(cls: type[Any]) -> dict[str, Any]:
    """Resolved type of each field that the constructor takes."""
    found = get_type_hints(cls)
    return {spec.name: found[spec.name] for spec in fields(cls) if spec.init}


def _pass(table: Table) -> Pass:
    name = table.get("name")
    if name not in PASSES:
        known = ", ".join(sorted(PASSES))
        what = "has no name" if name is None else f"has an unknown name {name!r}"
        raise OptionError(
            f"a [[pass]] {what}{_suggest(str(name), PASSES)}; the passes are: {known}"
        )
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


def _refuse_unknown(table: Table, known: Mapping[str, Any] | tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            names = ", ".join(known) or "none"
            hint = _suggest(key, known)
            raise OptionError(f"unknown key {key!r} in {where}{hint}; the known keys are: {names}")


def _suggest(word: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


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
