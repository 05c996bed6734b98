"""Settings as frozen dataclasses: values of any kind read as the types of their fields.

bool, int, float, str, a `Literal`, a tuple of these, or any of them `| None`, for which the word
"none" stands unless a string is accepted too. A field that is itself a dataclass lends its fields
to the same table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from onnxc.errors import OptionError

T = TypeVar("T")
Table = Mapping[str, Any]


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
    refuse_unknown(table, known, where)
    values = {key: read(value, known[key], f"{key} in {where}") for key, value in table.items()}
    return construct(cls, values)


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


def construct(cls: type[T], values: Table) -> T:
    """A dataclass from values by key, defaults for the others.

    Of fields that are dataclasses, each gets the values that its own keys take.
    """
    arguments = {}
    for name, kind in hints(cls).items():
        if is_dataclass(kind):
            known = keys(cast(type[Any], kind))
            taken = {k: v for k, v in values.items() if k in known and read_as(v, known[k])[0]}
            arguments[name] = construct(cast(type[Any], kind), taken)
        elif name in values:
            arguments[name] = values[name]
    return cls(**arguments)


def hints(cls: type[Any]) -> dict[str, Any]:
    """Resolved type of each field that the constructor takes."""
    found = get_type_hints(cls)
    return {spec.name: found[spec.name] for spec in fields(cls) if spec.init}


def refuse_unknown(table: Table, known: Mapping[str, Any] | tuple[str, ...], where: str) -> None:
    """Raise OptionError for a key that there is not, with the nearest one."""
    for key in table:
        if key not in known:
            names = ", ".join(known) or "none"
            hint = suggest(key, known)
            raise OptionError(f"unknown key {key!r} in {where}{hint}; the known keys are: {names}")


def suggest(word: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    """What was meant, for an error message."""
    close = get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
