"""Command-line options made from dataclass fields, and the groups of options that commands share.

A field `per_channel: bool = True` becomes `--per-channel/--no-per-channel`, a `Literal` becomes a
choice, a tuple a comma-separated list. Its help is the field's metadata "help", or its entry in the
docstring of the class ("per_channel: one scale for each output channel.").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource

from calib.cluster import connected
from calib.data import PRESETS, Preprocess
from onnxc import typed
from onnxc.calibration import KINDS, WHAT
from onnxc.paths import existing
from onnxc.recipe import shipped
from onnxc.runtime import LEVELS, Runtime
from onnxc.sensitivity import OTHERS, WHATS
from onnxc.targets import TARGETS

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
Decorator = Callable[[F], F]

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "k": 10**3, "m": 10**6, "g": 10**9}


def amount(text: str) -> int:
    """Bytes from 400MB, 2GB, 1.5GiB, or a plain number. Raises click.BadParameter."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in UNITS:
        raise click.BadParameter(f"{text!r} is not an amount of memory; write 400MB or 2GB")
    count = int(float(found[1]) * UNITS[found[2].lower()])
    if not count:
        raise click.BadParameter(f"{text!r} is no memory at all; write 400MB or 2GB")
    return count


def duration(text: str) -> float:
    """Seconds from 90s, 10m, 1.5h, or a plain number. Raises click.BadParameter."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text.lower())
    if not found or not float(found[1]):
        raise click.BadParameter(f"{text!r} is no time; write 90s, 10m or 1.5h")
    return float(found[1]) * SECONDS[found[2]]


def reader(kind: Any) -> Callable[[str], Any]:
    """A reader of text as the type of a dataclass field; it raises click.BadParameter."""

    def convert(text: str) -> Any:
        for candidate in _readings(text):
            is_read, result = typed.read_as(candidate, kind)
            if is_read:
                return result
        raise click.BadParameter(f"{text!r} is not {typed.describe(kind)}")

    return convert


def _readings(text: str) -> Iterator[Any]:
    """What a piece of text could mean, the most specific first."""
    for reading in (int, _fraction, {"true": True, "false": False}.__getitem__):
        try:
            yield reading(text)
        except (ValueError, KeyError, ZeroDivisionError):
            continue
    parts = [part.strip() for part in text.split(",") if part.strip()]
    yield text
    yield [next(_readings(part)) for part in parts] if "," in text else [next(_readings(text))]
    yield parts


def _fraction(text: str) -> float:
    """0.5, 1e-3 or 1/255."""
    return float(Fraction(text)) if "/" in text else float(text)


def _metavar(kind: Any) -> str:
    return "|".join(_word(k) for k in _members(kind) if k is not NoneType).upper()


def _word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    words = {int: "int", float: "number", str: "text"}
    return "list" if get_origin(kind) is tuple else words.get(kind, "value")


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def from_fields(cls: type[Any], but: Collection[str] = ()) -> Decorator[Any]:
    """Decorator: one option for each field of a dataclass but the named ones, unset by default."""

    def decorate(command: F) -> F:
        for name, kind in reversed(typed.keys(cls).items()):
            if name not in but:
                command = _option(cls, name, kind)(command)
        return command

    return decorate


def _option(cls: type[Any], name: str, kind: Any) -> Decorator[Any]:
    dashed = name.replace("_", "-")
    members = [k for k in _members(kind) if k is not NoneType]
    settings: dict[str, Any] = {"help": _help(cls, name), "default": None}
    if members == [bool]:
        return click.option(f"--{dashed}/--no-{dashed}", name, **settings)
    if all(get_origin(k) is Literal and _are_words(get_args(k)) for k in members):
        settings["type"] = click.Choice([str(v) for k in members for v in get_args(k)])
    else:
        settings |= {"type": reader(kind), "metavar": _metavar(kind)}
    return click.option(f"--{dashed}", name, **settings)


def _are_words(choices: Iterable[Any]) -> bool:
    return all(isinstance(choice, str) for choice in choices)


def _help(cls: type[Any], name: str) -> str:
    owner = _owner(cls, name)
    spec = next(f for f in fields(owner) if f.name == name)
    text = spec.metadata.get("help") or _documented(owner, name)
    text = text[:1].upper() + text[1:]
    if spec.default is MISSING or spec.default in (None, "", ()):
        return text
    return f"{text}  [default: {_shown(spec.default)}]"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _owner(cls: type[Any], name: str) -> type[Any]:
    """The class, itself or nested, that declares a field."""
    if any(f.name == name for f in fields(cls)):
        return cls
    nested = (k for k in typed.hints(cls).values() if is_dataclass(k) and isinstance(k, type))
    return next(_owner(k, name) for k in nested if name in typed.keys(k))


def _documented(cls: type[Any], name: str) -> str:
    """The entry of a field in its class's docstring; several fields may share one."""
    entry = re.compile(
        rf"^\s*(?:\w+, )*{name}(?:, \w+)*: (.*?)(?=^\s*[\w, ]+: |^\s*$|\Z)",
        re.MULTILINE | re.DOTALL,
    )
    found = entry.search(cls.__doc__ or "")
    return " ".join(found[1].split()) if found else ""


def names(cls: type[Any]) -> Collection[str]:
    """The parameters that `from_fields` made of a dataclass."""
    return typed.keys(cls)


def given(context: click.Context, names: Iterable[str]) -> dict[str, Any]:
    """Those of the parameters that the user wrote on the command line."""
    return {
        name: context.params[name]
        for name in names
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def build(context: click.Context, cls: type[T]) -> T:
    """A dataclass from the options that `from_fields` made of it."""
    return typed.build(cls, given(context, typed.keys(cls)), "the options")


def preprocess_of(context: click.Context) -> Preprocess:
    """The image preparation that the options ask for."""
    return build(context, Preprocess)


def runtime_of(context: click.Context) -> Runtime:
    """The session options that the options ask for."""
    return Runtime(**given(context, ("threads", "level", "provider")))


@contextmanager
def cluster_of(context: click.Context, model: Path) -> Iterator[Any]:
    """The client that the options ask for, None for none; processes started here end with it."""
    workers, scheduler = context.params["workers"], context.params["scheduler"]
    if workers and scheduler:
        raise click.UsageError("--workers starts processes here, --scheduler uses others: give one")
    if workers or scheduler:
        existing(model)  # before anything is started
    with connected(scheduler, workers) as client:
        yield client


def group_of(*options: Decorator[Any]) -> Decorator[Any]:
    """Several options as one decorator, shown in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


DATA = "images (a folder), .npy, .npz, a folder of .npz or test_data_set_*, or module:function"

samples = click.option("--samples", type=click.IntRange(1), help="A seeded subset of this many.")
images = group_of(
    click.option(
        "--preset",
        type=click.Choice(list(PRESETS)),
        help="How images are prepared; each option below overrides it.",
    ),
    from_fields(Preprocess, but=("preset",)),
)


def data(required: bool = False) -> Decorator[Any]:
    """--data, and how to prepare it."""
    source = click.option(
        "--data", required=required, metavar="SOURCE", help=f"Where samples come from: {DATA}."
    )
    return group_of(source, samples, images)


def output(required: bool = False) -> Decorator[Any]:
    """-o, --output."""
    kind = click.Path(path_type=Path)
    return click.option(
        "-o", "--output", required=required, type=kind, metavar="FILE", help="File to write."
    )


nodes = group_of(
    click.option(
        "--include",
        multiple=True,
        metavar="PATTERN",
        help="Only these nodes: a glob, re:EXPRESSION, op:TYPE, or FIRST..LAST. Repeatable.",
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="All but these nodes."),
)
runtime = group_of(
    click.option(
        "--threads", type=click.IntRange(0), help="Threads, 0 for all cores. [default: 1]"
    ),
    click.option("--provider", help="Execution provider of ONNX Runtime. [default: CPU]"),
    click.option("--level", type=click.Choice(list(LEVELS)), help="Optimization. [default: all]"),
)
target = click.option(
    "--target",
    type=click.Choice(["auto", *TARGETS]),
    default="auto",
    show_default=True,
    help="The runtime and processor that the result is for.",
)
seed = click.option(
    "--seed", type=int, default=0, show_default=True, help="Of every random choice."
)
max_memory = click.option(
    "--max-memory",
    type=amount,
    metavar="SIZE",
    help="Bound on the memory of the process, such as 2GB; a model that needs more runs in stages. "
    "[default: 400MB, more for large models, a quarter of those above 1 GiB]",
)
stats = click.option(
    "--stats",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Statistics that onnxc calibrate wrote: they are not gathered again.",
)
what = click.option(
    "--what",
    type=reader(tuple[str, ...]),
    default=",".join(WHAT),
    show_default=True,
    metavar="LIST",
    help=f"Which statistics: of {', '.join(KINDS)}.",
)
cluster = group_of(
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Gather statistics in this many processes of this machine.",
    ),
    click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Gather them on the workers of a Dask scheduler, such as tcp://10.0.0.1:8786.",
    ),
)
search = group_of(
    click.option(
        "--max-drop",
        type=float,
        help="Points of the metric that may be lost.  [default: 0.5]",
    ),
    click.option(
        "--max-time",
        type=duration,
        default="10m",
        show_default=True,
        metavar="TIME",
        help="When to stop, such as 90s, 10m or 1.5h; what was found until then is kept, and the "
        "first thing that is tried is always finished.",
    ),
    click.option("--resume", is_flag=True, help="Go on where a search of the same was stopped."),
)
analysis = group_of(
    click.option(
        "--val", metavar="SOURCE", help="Samples to judge by [default: a third of --data]."
    ),
    click.option(
        "--quantized",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A quantized file of MODEL, by any tool: where does its error start?",
    ),
    click.option(
        "--what",
        type=reader(tuple[str, ...]),
        default=",".join(WHATS),
        show_default=True,
        metavar="LIST",
        help="What of a layer is quantized.",
    ),
    click.option(
        "--passes",
        type=reader(tuple[str, ...]),
        default=",".join(("quantize", *OTHERS)),
        show_default=True,
        metavar="LIST",
        help="What is done to each layer alone.",
    ),
    click.option(
        "--bits", type=click.IntRange(2, 8), default=8, show_default=True, help="Of the weights."
    ),
    click.option(
        "--seconds",
        type=float,
        default=300.0,
        show_default=True,
        help="About how long it may take; few seconds leave few samples to judge by.",
    ),
    click.option(
        "--top", type=click.IntRange(1), default=10, show_default=True, help="Rows of a table."
    ),
)
recipes = group_of(
    click.option(
        "--recipe",
        type=click.Path(path_type=Path),
        metavar="FILE|NAME",
        help=f"Replay a recipe, a TOML file or one of onnxc's own: {', '.join(shipped())}. Options "
        "given beside it override it.",
    ),
    click.option("--print-recipe", is_flag=True, help="Print the recipe that replays the result."),
)
shown = group_of(
    click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output."),
    click.option("--quiet", is_flag=True, help="No progress and no report."),
)
html = click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the report as one page that works offline, with pictures.",
)
