"""The JSON Schema of all reports, made of their dataclasses as `onnxc.report.to_dict` writes them.

Each dataclass is a definition: its fields are required keys and there are no others, properties
join them, fields hidden from repr stay out. A number that is not finite is written as null, so
every float may be null.
"""

from __future__ import annotations

import json
import re
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from onnxc.cost import Inspection
from onnxc.report import Analysis, Benchmark, Calibrated, Packed, Preview, Report, Validation

REPORTS: tuple[type[Any], ...] = (
    *(Report, Preview, Validation, Analysis, Benchmark, Inspection, Calibrated, Packed),
)
DIALECT = "2020-12"  # the draft of JSON Schema that the definitions are written in
SIMPLE: dict[Any, Any] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": ["number", "null"]},
    str: {"type": "string"},
    Path: {"type": "string"},
    type(None): {"type": "null"},
    Any: {},
}

Definitions = dict[str, Any]


def schema() -> dict[str, Any]:
    """One schema that every report fits; "$defs" has one for each."""
    found: Definitions = {}
    choices = [_of(report, found) for report in REPORTS]
    return {
        "$schema": f"https://json-schema.org/draft/{DIALECT}/schema",
        "title": "Reports of onnxc, as --json prints them",
        "anyOf": choices,
        "$defs": dict(sorted(found.items())),
    }


def to_text() -> str:
    """The schema as the text of a file."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def _of(kind: Any, found: Definitions) -> Any:
    """The schema of a type; dataclasses are entered into `found`."""
    if kind in SIMPLE:
        return SIMPLE[kind]
    if is_dataclass(kind) and isinstance(kind, type):
        return _reference(kind, found)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return _union([_of(one, found) for one in inner])
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(inner[1], found)}
    if origin is tuple:
        return _array(inner, found)
    raise TypeError(f"reports hold no {kind}")


def _reference(cls: type[Any], found: Definitions) -> Any:
    name = cls.__name__
    if name not in found:
        found[name] = {}  # a class may hold itself
        found[name] = _object(cls, found)
    return {"$ref": f"#/$defs/{name}"}


def _object(cls: type[Any], found: Definitions) -> Any:
    hints = get_type_hints(cls)
    keys = {spec.name: hints[spec.name] for spec in fields(cls) if spec.repr}
    for name, member in vars(cls).items():
        if isinstance(member, property):
            keys[name] = get_type_hints(member.fget)["return"]
    told = _entries(cls, list(keys))
    entries = {name: _of(kind, found) for name, kind in keys.items()}
    return {
        "description": (cls.__doc__ or "").splitlines()[0],
        "type": "object",
        "properties": {n: {**told.get(n, {}), **entry} for n, entry in entries.items()},
        "required": list(keys),
        "additionalProperties": False,
    }


def _entries(cls: type[Any], names: list[str]) -> dict[str, Any]:
    """What the docstring says of keys, "bytes: of the file. macs, ops: …", and of properties."""
    text = " ".join((cls.__doc__ or "").split())
    word = "|".join(map(re.escape, names))
    mark = re.compile(rf"(?:(?<=[.;] )|^)((?:{word})(?:, (?:{word}))*): ")
    _, *parts = mark.split(text)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    told = {name: part for keys, part in pairs for name in keys.split(", ")}
    for name in names:
        member = vars(cls).get(name)
        if isinstance(member, property) and member.__doc__:
            told[name] = member.__doc__
    return {name: {"description": " ".join(part.split())} for name, part in told.items()}


def _array(inner: tuple[Any, ...], found: Definitions) -> Any:
    if len(inner) == 2 and inner[1] is Ellipsis:
        return {"type": "array", "items": _of(inner[0], found)}
    items = [_of(one, found) for one in inner]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _union(choices: list[Any]) -> Any:
    """Types of plain values in one list, others beside each other."""
    plain: list[str] = []
    for choice in choices:
        if set(choice) == {"type"}:
            kinds = choice["type"]
            plain += [kinds] if isinstance(kinds, str) else kinds
    rest = [choice for choice in choices if set(choice) != {"type"}]
    unique = list(dict.fromkeys(plain))
    both = [*rest, *([{"type": unique[0] if len(unique) == 1 else unique}] if unique else [])]
    return both[0] if len(both) == 1 else {"anyOf": both}
