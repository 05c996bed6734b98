"""The commands of `onnxc`: each gathers its options, calls one function, shows the report."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType

from calib.data import Preprocess
from onnxc import api, console, options, recipe, report
from onnxc.analysis_view import render_analysis
from onnxc.html import page
from onnxc.paths import check_output
from onnxc.report import Report
from onnxc.tasks import CLUSTER, COMPRESS, FACTORIZE, PRUNE, QUANTIZE, SPARSIFY, Task

ModelArgument = click.Path(path_type=Path)
Render = Callable[[Any], RenderableType]

EXIT_MISSED = 1


class Example(click.Command):
    """A command whose help ends with an example."""

    def __init__(self, *arguments: Any, example: str = "", **settings: Any) -> None:
        settings.setdefault("epilog", f"\b\nExample:\n  {example}")
        super().__init__(*arguments, **settings)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole."""
        return (self.help or "").split(".\n")[0].strip().rstrip(".")


FIRST_STEPS = """\b
First steps:
  onnxc inspect model.onnx
  onnxc quantize model.onnx --data calib/ --preset imagenet -o model.int8.onnx
  onnxc compress model.onnx --data calib/ --max-drop 0.5 -o model.best.onnx

Completion of commands, options and files, for bash (zsh and fish likewise):

\b
  eval "$(_ONNXC_COMPLETE=bash_source onnxc)"
"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=FIRST_STEPS,
)
@click.version_option(package_name="onnxc", message="%(prog)s %(version)s")
def onnxc() -> None:
    """Make trained ONNX models smaller and faster, and prove every file that is written."""


@onnxc.command(cls=Example, example="onnxc inspect model.onnx")
@click.argument("model", type=ModelArgument)
@options.shown
def inspect(model: Path, as_json: bool, quiet: bool) -> None:
    """Parameters, MACs, bytes by type, and what can be compressed."""
    found = api.inspect(model)
    show(found, lambda r: console.render_inspection(r, str(model)), as_json, quiet)


@onnxc.command(
    cls=Example, example="onnxc validate model.onnx model.int8.onnx --data val/ --preset imagenet"
)
@click.argument("reference", type=ModelArgument)
@click.argument("candidate", type=ModelArgument)
@options.data()
@options.max_memory
@options.runtime
@click.option("--max-drop", type=float, help="Points of top-1 (or agreement) that may be lost.")
@click.option(
    "--save-vectors",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write ONNX test_data_set_* folders with the reference's outputs beside CANDIDATE as "
    "model.onnx, to check a target's own runtime.",
)
@options.seed
@options.html
@options.shown
@click.pass_context
def validate(context: click.Context, /, **settings: Any) -> int:
    """Compare CANDIDATE with REFERENCE: accuracy, agreement, SQNR, kernels, latency."""
    _check_page(settings, "reference", "candidate", "data")
    with progress(settings) as say:
        found = api.validate(
            settings["reference"],
            settings["candidate"],
            preprocess=options.preprocess_of(context),
            runtime=options.runtime_of(context),
            progress=say,
            **_some(settings, "data", "samples", "max_memory", "max_drop", "save_vectors", "seed"),
        )
    _present(found, console.render_validation, settings)
    return EXIT_MISSED if found.missed else 0


@onnxc.command(
    cls=Example,
    example="onnxc analyze model.onnx --data calib/ --preset imagenet\n"
    "  onnxc analyze model.onnx --data calib/ --quantized theirs.onnx",
)
@click.argument("model", type=ModelArgument)
@options.data()
@options.analysis
@options.target
@options.nodes
@options.max_memory
@options.runtime
@options.seed
@options.shown
@click.pass_context
def analyze(context: click.Context, /, **settings: Any) -> None:
    """Which layers of MODEL suffer most when compressed, or where a quantized file goes wrong."""
    if settings["quantized"] is not None:
        other = ("what", "passes", "bits", "seconds", "val", "include", "exclude")
        _refuse_beside(context, "--quantized", other, "which is explained as it is")
    names = ("data", "val", "quantized", "samples", "seed", "max_memory", "target")
    with progress(settings) as say:
        found = api.analyze(
            settings["model"],
            preprocess=options.preprocess_of(context),
            runtime=options.runtime_of(context),
            progress=say,
            **_some(settings, *names, "what", "passes", "bits", "seconds", "include", "exclude"),
        )
    top = settings["top"]
    show(found, lambda r: render_analysis(r, top), settings["as_json"], settings["quiet"])


@onnxc.command(cls=Example, example="onnxc bench model.onnx model.int8.onnx --threads 4")
@click.argument("models", type=ModelArgument, nargs=-1, required=True)
@options.data()
@options.runtime
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Samples a run."
)
@click.option(
    "--repeats", type=click.IntRange(1), default=40, show_default=True, help="Least rounds."
)
@click.option("--min-time", type=float, default=1.0, show_default=True, help="Least seconds.")
@options.seed
@options.html
@options.shown
@click.pass_context
def bench(context: click.Context, /, **settings: Any) -> None:
    """Latency of MODELS, taken in turn; speeds are against the first."""
    _check_page(settings, "models", "data")
    with progress(settings) as say:
        found = api.benchmark(
            settings["models"],
            preprocess=options.preprocess_of(context),
            runtime=options.runtime_of(context),
            progress=say,
            **_some(settings, "data", "batch", "repeats", "min_time", "seed"),
        )
    _present(found, console.render_benchmark, settings)


VAL = click.option(
    "--val", metavar="SOURCE", help="Samples that the result is judged by [default: --data]."
)


def writing(task: Task) -> options.Decorator[Any]:
    """The arguments and options of a writing command."""
    bound = click.option(
        "--max-drop", type=float, help="Points of top-1 (or agreement) that may be lost."
    )
    return options.group_of(
        *(click.argument("model", type=ModelArgument), options.output(), options.data(), VAL),
        *(options.stats, options.target, options.from_fields(task.settings), options.nodes),
        *(options.max_memory, options.cluster, options.runtime, options.seed, bound),
        click.option("--strict", is_flag=True, help="Write nothing when a bound is missed."),
        click.option("--dry-run", is_flag=True, help="List the effect, write nothing."),
        *(options.recipes, options.html, options.shown, click.pass_context),
    )


searching = options.group_of(
    *(click.argument("model", type=ModelArgument), options.output(), options.data(), VAL),
    *(options.search, options.from_fields(COMPRESS.settings), options.target, options.nodes),
    *(options.max_memory, options.cluster, options.runtime, options.seed),
    *(options.recipes, options.html, options.shown, click.pass_context),
)


@onnxc.command(
    cls=Example,
    example="onnxc quantize model.onnx --data calib/ --preset imagenet -o model.int8.onnx",
)
@writing(QUANTIZE)
def quantize(context: click.Context, /, **settings: Any) -> int:
    """Make MODEL smaller and faster in few-bit integers, and prove it."""
    return _write(QUANTIZE, api.quantize, context, settings)


@onnxc.command(
    cls=Example, example="onnxc sparsify model.onnx --data calib/ --sparsity 0.7 -o sparse.onnx"
)
@writing(SPARSIFY)
def sparsify(context: click.Context, /, **settings: Any) -> int:
    """Make weights of MODEL zero where its outputs feel it least, and prove it."""
    return _write(SPARSIFY, api.sparsify, context, settings)


@onnxc.command(
    cls=Example, example="onnxc prune model.onnx --data calib/ --macs 0.7 -o model.pruned.onnx"
)
@writing(PRUNE)
def prune(context: click.Context, /, **settings: Any) -> int:
    """Take out the filters that the outputs of MODEL miss least, and prove it."""
    return _write(PRUNE, api.prune, context, settings)


@onnxc.command(
    cls=Example,
    example="onnxc factorize model.onnx --data calib/ --latency 0.7 -o model.factorized.onnx",
)
@writing(FACTORIZE)
def factorize(context: click.Context, /, **settings: Any) -> int:
    """Replace layers of MODEL by thinner ones of low rank, and prove it."""
    return _write(FACTORIZE, api.factorize, context, settings)


@onnxc.command(
    cls=Example, example="onnxc cluster model.onnx --data calib/ --bits 4 -o model.clustered.onnx"
)
@writing(CLUSTER)
def cluster(context: click.Context, /, **settings: Any) -> int:
    """Let the weights of each layer of MODEL share few values, and prove it."""
    return _write(CLUSTER, api.cluster, context, settings)


@onnxc.command(
    cls=Example,
    example="onnxc compress model.onnx --data calib/ --max-drop 0.5 --minimize latency\n"
    "  onnxc compress model.onnx --data calib/ --minimize size --max-time 1h -o model.onnxz\n"
    "  onnxc compress model.onnx --data calib/ --recipe deep-compression -o model.onnxz",
)
@searching
def compress(context: click.Context, /, **settings: Any) -> int:
    """Search for the best of all methods under a bound on accuracy, and prove it.

    The output holds the best model so far at any time.
    """
    _check_page(settings, "model", "output", "data", "val", "recipe")
    request = _request(COMPRESS, context, settings)
    bounds = _some(settings, "max_drop", "max_time", "resume")
    with progress(settings) as say, options.cluster_of(context, settings["model"]) as client:
        found = api.compress(settings["model"], **request, **bounds, progress=say, client=client)
    _present(found, console.render, settings)
    if settings["print_recipe"] and not settings["as_json"]:
        with reader():
            click.echo(found.recipe)
    return EXIT_MISSED if found.missed else 0


def _write(
    task: Task, write: Callable[..., Report], context: click.Context, settings: dict[str, Any]
) -> int:
    """What every writing command does with its options; the exit code."""
    request = _request(task, context, settings)
    _check_page(settings, "model", "output", "data", "val", "stats", "recipe")
    if settings["dry_run"]:
        with progress(settings) as say:
            effect = api.preview(settings["model"], task=task, **request, progress=say)
        show(effect, console.render_preview, settings["as_json"], settings["quiet"])
        return 0
    bounds = _some(settings, "max_drop", "strict")
    with progress(settings) as say, options.cluster_of(context, settings["model"]) as client:
        found = write(settings["model"], **request, **bounds, progress=say, client=client)
    _present(found, console.render, settings)
    if settings["print_recipe"] and not settings["as_json"]:
        with reader():
            click.echo(found.recipe)
    return EXIT_MISSED if found.missed else 0


def _request(task: Task, context: click.Context, settings: dict[str, Any]) -> dict[str, Any]:
    """What to do and how: the recipe, and whatever was written beside it."""
    chosen = options.given(context, options.names(task.settings))
    replayed = recipe.load(settings["recipe"]) if settings["recipe"] else None
    if replayed is not None and settings["output"] is not None:
        check_output(settings["output"], settings["recipe"])
    if replayed is not None and replayed.passes:
        replayed = replace(replayed, passes=recipe.adjust(replayed.passes, chosen))
    override = options.given(context, ("target", "seed", "include", "exclude", "samples"))
    return {
        "recipe": replayed,
        "settings": options.build(context, task.settings),
        "runtime": options.runtime_of(context),
        "blame": settings["html"] is not None,
        "preprocess": options.preprocess_of(context),
        **_some(settings, "data", "val", "output", "max_memory"),
        "stats": settings.get("stats"),
        **override,
    }


@onnxc.command(
    cls=Example,
    example="onnxc calibrate model.onnx --data calib/ -o model.stats\n"
    "  onnxc calibrate --merge first.stats second.stats -o model.stats",
)
@click.argument("model", type=ModelArgument, nargs=-1, required=True)
@options.output(required=True)
@click.option("--merge", is_flag=True, help="MODEL are statistics files to make one of.")
@options.data()
@options.what
@options.max_memory
@options.cluster
@options.seed
@options.shown
@click.pass_context
def calibrate(context: click.Context, /, **settings: Any) -> None:
    """Gather the statistics of MODEL alone, or merge those of parts of the data."""
    if settings["merge"]:
        without = ("data", "samples", "what", "max_memory", "seed", "workers", "scheduler")
        images = tuple(options.names(Preprocess))
        _refuse_beside(context, "--merge", (*without, *images), "which reads no data")
        with progress(settings):
            found = api.merge_statistics(settings["model"], output=settings["output"])
    else:
        _check_one_model(settings)
        model = settings["model"][0]
        with progress(settings) as say, options.cluster_of(context, model) as client:
            found = api.calibrate(
                model,
                preprocess=options.preprocess_of(context),
                progress=say,
                client=client,
                **_some(settings, "data", "output", "what", "samples", "seed", "max_memory"),
            )
    show(found, console.render_calibrated, settings["as_json"], settings["quiet"])


@onnxc.command(cls=Example, example="onnxc pack model.onnx -o model.onnxz")
@click.argument("model", type=ModelArgument)
@options.output()
@click.option("--thorough", is_flag=True, help="Try every coder in full on every tensor; slow.")
@options.shown
def pack(model: Path, output: Path | None, thorough: bool, as_json: bool, quiet: bool) -> None:
    """Store MODEL in fewer bytes, its tensors entropy-coded; every command reads the result."""
    with progress({"as_json": as_json, "quiet": quiet}) as say:
        found = api.pack(model, output, thorough=thorough, progress=say)
    show(found, console.render_packed, as_json, quiet)


@onnxc.command(cls=Example, example="onnxc unpack model.onnxz -o model.onnx")
@click.argument("package", type=ModelArgument)
@options.output(required=True)
@options.shown
def unpack(package: Path, output: Path, as_json: bool, quiet: bool) -> None:
    """Write the model that PACKAGE holds: the bytes that were packed."""
    with progress({"as_json": as_json, "quiet": quiet}) as say:
        found = api.unpack(package, output, progress=say)
    show(found, console.render_packed, as_json, quiet)


def _refuse_beside(context: click.Context, option: str, names: tuple[str, ...], why: str) -> None:
    """Refuse options that mean nothing beside another one."""
    given = options.given(context, names)
    if given:
        other = "--" + min(given).replace("_", "-")
        raise click.UsageError(f"{other} does not go with {option}, {why}", context)


def _check_one_model(settings: dict[str, Any]) -> None:
    if len(settings["model"]) > 1:
        raise click.UsageError("give one MODEL, or --merge to make one of statistics files")
    if settings["data"] is None:
        raise click.UsageError("Missing option '--data': where do samples come from?")


def _check_page(settings: dict[str, Any], *names: str) -> None:
    """Refuse a page that cannot be written, or would replace what is read or written."""
    if settings["html"] is None:
        return
    if settings.get("dry_run"):
        raise click.UsageError("--html does not go with --dry-run, which measures nothing")
    others = [settings[name] for name in names]
    others = [x for other in others for x in (other if isinstance(other, tuple) else (other,))]
    output = settings.get("output")
    if output is not None and output.resolve() == settings["html"].resolve():
        raise click.UsageError("--html and --output name one file: give two")
    page.check_page(settings["html"], *others)


def _present(found: Any, render: Render, settings: dict[str, Any]) -> None:
    """Write the page of a report, where one is wanted, and show the report."""
    if settings["html"] is not None:
        api.write_html(found, settings["html"])
    show(found, render, settings["as_json"], settings["quiet"])


def show(found: Any, render: Render, as_json: bool, quiet: bool) -> None:
    """Write a report to standard output, as JSON or for a reader."""
    with reader():
        if as_json:
            click.echo(report.to_json(found))
        elif not quiet:
            Console(highlight=False, soft_wrap=False).print(render(found))


@contextmanager
def reader() -> Iterator[None]:
    """Somebody reads standard output; one who has left is no error, and changes no exit code."""
    try:
        yield
    except (BrokenPipeError, SystemExit):  # the latter from rich
        sys.stdout = StringIO()  # for what follows
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


@contextmanager
def progress(settings: dict[str, Any]) -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is being done, where somebody watches."""
    screen = Console(stderr=True, quiet=settings["quiet"] or settings["as_json"])
    with screen.status("starting") as status:
        yield Watch(status.update)


@dataclass
class Watch:
    """Progress that ends in "i/n" gets an estimate of the time that is left."""

    show: Callable[[str], None]
    task: str = ""
    start: float = 0.0

    def __call__(self, text: str) -> None:
        self.show(text + self._estimate(text, time.monotonic()))

    def _estimate(self, text: str, now: float) -> str:
        counted = re.fullmatch(r"(.*?)(\d+)/(\d+)", text)
        if counted is None or counted[1] != self.task:
            self.task, self.start = counted[1] if counted else text, now
            return ""
        done, total = int(counted[2]), int(counted[3])
        left = (now - self.start) * (total - done) / max(done, 1)
        return f", about {left:.0f} s left" if left >= 1 else ""


def _some(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names}
