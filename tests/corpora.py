"""Commands over corpora of models: how each one ended, and whether what it wrote holds.

    model x command -> Outcome(ending, reason)

Each command runs in a process of its own with a limit of time, as a user would call it, so that a
crash or a hang of one says nothing of the others. What it takes is not judged here, so candidates
are timed for two rounds only. An ending is one of

    done        exit 0 or 1; the file is valid, runs, and has the interface of the original
    refused     exit 2, one sentence on standard error, nothing written
    late        no end within the limit
    FAULTS      what must never be: a traceback, a signal, half a sentence, a bad or a stray file
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx
from outcomes import Outcome

from onnxc.cli import run as run_command
from onnxc.cost import inspect
from onnxc.errors import OnnxcError
from onnxc.runtime import run, session
from onnxc.storage.package import plain

FAULTS = ("traceback", "signal", "exit code", "no sentence", "stray file", "invalid", "interface")
FAULTS += ("heavy node", "report")
ROUNDS = 2
LIMIT = 240.0  # seconds of a command
FORKS = get_context("forkserver" if sys.platform == "linux" else "spawn")
FORKS.set_forkserver_preload(["onnxc.commands", "onnxc.api", "corpora"])


@dataclass(frozen=True)
class Subject:
    """A model of a corpus. data: what --data takes, None for samples that onnxc makes up.

    feed: one run of it, by input name, None where it is not to be run.
    """

    corpus: str
    name: str
    model: Path
    data: Path | None = None
    feed: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Command:
    """What is called. output: the file that it writes, in the folder of the subject, or "".

    reads: the output of another command that it takes as well; of the model, where there is none.
    """

    name: str
    arguments: str
    output: str = ""
    reads: str = ""


BUDGET = "--macs 0.8"
COMMANDS = {
    row.name: row
    for row in (
        Command("inspect", "inspect {model}"),
        Command("quantize", "quantize {model} {data}", "quantize.onnx"),
        Command("sparsify", "sparsify {model} {data}", "sparsify.onnx"),
        Command("cluster", "cluster {model} {data}", "cluster.onnx"),
        Command("prune", "prune {model} {data} " + BUDGET, "prune.onnx"),
        Command("factorize", "factorize {model} {data} " + BUDGET, "factorize.onnx"),
        Command("compress", "compress {model} {data} --max-time 5s", "compress.onnx"),
        Command("calibrate", "calibrate {model} {data}", "model.stats"),
        Command("analyze", "analyze {model} {data} --seconds 5"),
        Command("pack", "pack {model}", "model.onnxz"),
        Command("unpack", "unpack {read}", "unpacked.onnx", reads="model.onnxz"),
        Command("validate", "validate {model} {read} {data}", reads="quantize.onnx"),
        Command("bench", "bench {model} {read} {data}", reads="quantize.onnx"),
    )
}

BUDGETS = ("--macs", "--ratio", "--params", "--latency", "--sqnr", "--rank")
OPTIONS = {  # what the commands above leave out, a run each
    "quantize": (
        *("--format qdq", "--format qoperator", "--format dynamic", "--format weight-only"),
        *("--bits 4", "--bits 2 --no-keep-ends", "--bits 3.5", "--bits 4 --format weight-only"),
        *("--scheme fixed", "--scheme fixed --bits 16", "--scheme pow2", "--scheme ternary"),
        *("--scheme binary", "--scheme admm", "--scheme levels"),
        *("--rounding gptq", "--rounding descent", "--rounding admm", "--rounding stochastic"),
        *("--activations 16", "--activations float", "--activation-levels 4"),
        *("--ranges minmax", "--ranges percentile", "--ranges entropy", "--ranges mse"),
        *("--ranges aciq", "--ranges hwgq", "--ranges output"),
        *("--keep-float 2", "--split-outliers 0.05", "--max-drop 1"),
        *("--target x86-vnni", "--target x86", "--target arm64", "--target portable"),
        *("--target openvino", "--target tensorrt", "--target qnn"),
        *("--level none", "--level basic --threads 0", "--max-memory 1MB", "--workers 2"),
        *("--exclude op:Conv", "--include re:.*[02468]$", "--samples 1 --seed 7"),
    ),
    "sparsify": (
        *("--sparsity 0.9", "--nm 2:4", "--allocation uniform", "--no-reconstruct"),
        *("--criterion magnitude", "--criterion wanda", "--criterion obd"),
    ),
    "cluster": (
        *("--method kmeans --init kmeans++", "--method hessian", "--method ecsq", "--method gmm"),
        *("--method pq", "--method rq", "--method kernels", "--method filters"),
        *("--format int8-codebook", "--bits 1", "--bits 8", "--grid int8", "--gains always"),
        *("--method ecsq --loss 0.01", "--no-refine --no-reconstruct"),
    ),
    "prune": (
        *("--ratio 0.3", "--latency 0.8", "--macs 0.6 --allocation uniform", "--nonlinear"),
        *("--criterion l1", "--criterion fpgm", "--criterion bn", "--criterion apoz"),
        *("--criterion activation", "--criterion thinet", "--criterion lasso"),
        *("--criterion l2 --no-reconstruct", "--criterion random"),
    ),
    "factorize": (
        *("--method svd", "--method channel", "--method spatial", "--method tucker"),
        *("--method cp", "--method depthwise", "--method grouped", "--method tt"),
        *("--params 0.7", "--latency 0.8", "--sqnr 30", "--nonlinear", "--no-faster"),
        *("--rank energy:0.95", "--rank sqnr:30", "--rank vbmf", "--allocation uniform"),
    ),
    "compress": (
        *("--metric sqnr", "--metric agreement", "--minimize size", "--minimize energy-proxy"),
        *("--max-drop 5 --target portable", "--recipe deep-compression"),
        *("--recipe smallest-file", "--recipe transformer-4bit"),
    ),
    "analyze": ("--bits 4", "--level none --what weights --target arm64"),
    "calibrate": ("--what range,mean,moments", "--max-memory 1MB", "--workers 2"),
    "validate": ("--threads 2 --level basic --max-drop 1",),
    "bench": ("--threads 2 --level basic", "--batch 2"),
}


def _with(options: str, command: Command) -> Command:
    """The command with more words, one budget among them, and a name that tells them."""
    usual = command.arguments
    if options.startswith(BUDGETS):
        usual = usual.replace(BUDGET, "")
    return replace(command, name=f"{command.name} {options}", arguments=f"{usual} {options}")


VARIANTS = tuple(_with(words, COMMANDS[name]) for name in OPTIONS for words in OPTIONS[name])


@dataclass(frozen=True)
class Ended:
    """A process: its exit code, negative for a signal, None for the limit, and what it said."""

    code: int | None
    out: str
    err: str


def called(arguments: Sequence[str], folder: Path, limit: float) -> Ended:
    """Run `onnxc` in a process of its own. folder: for what it says."""
    out, err = folder / ".out", folder / ".err"
    out.touch()
    err.touch()
    process = FORKS.Process(target=_child, args=(list(arguments), str(out), str(err)))
    process.start()
    process.join(limit)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    out.unlink()
    err.unlink()
    return Ended(code, *texts)


def _child(arguments: list[str], out: str, err: str) -> None:
    """In the process: what it says goes to files, and it leaves with the exit code."""
    from onnxc import bench, opening

    opening.ROUNDS = 1
    bench.Length.is_over = lambda self, calm, rounds, seconds: rounds >= ROUNDS  # type: ignore[method-assign]
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    sys.exit(run_command(arguments))


def judged(
    subject: Subject, folder: Path, commands: Iterable[str] = tuple(COMMANDS), limit: float = LIMIT
) -> Iterator[Outcome]:
    """All commands on one model, each with what those before it left in the folder."""
    for name in commands:
        yield judge(subject, COMMANDS[name], folder, limit)


def judge(subject: Subject, command: Command, folder: Path, limit: float = LIMIT) -> Outcome:
    """Call a command on a model, and look at all that it left. folder: of the subject."""
    before = set(folder.iterdir())
    other = folder / command.reads
    read = other if command.reads and other.exists() else subject.model
    output = folder / command.output if command.output else None
    ended = called(_arguments(subject, command, read, output), folder, limit)
    stray = {p for p in folder.iterdir() if p not in before}
    stray -= {p for p in stray if output and p.name.startswith(output.name)}
    ending, reason, report = _ending(ended, output)
    if ending == "done" and output is not None:
        ending, reason = _of_file(subject, output, read) or (ending, reason)
    if ending == "done" and command.arguments.startswith("quantize"):
        ending, reason = _of_heavy(subject, report)
    if stray and ending not in ("late", *FAULTS):
        ending, reason = "stray file", min(stray).name
    is_fault = ending in FAULTS
    return Outcome(subject.corpus, subject.name, command.name, ending, reason, is_fault)


def _arguments(subject: Subject, command: Command, read: Path, output: Path | None) -> list[str]:
    data = [] if subject.data is None else ["--data", str(subject.data)]
    places = {"{model}": [str(subject.model)], "{read}": [str(read)], "{data}": data}
    words = [w for word in command.arguments.split() for w in places.get(word, [word])]
    return [*words, *(["-o", str(output)] if output else []), "--json"]


def _ending(ended: Ended, output: Path | None) -> tuple[str, str, dict[str, Any]]:
    """The ending by what the process said."""
    last = ended.err.strip().splitlines()[-1] if ended.err.strip() else ""
    if ended.code is None:
        return "late", "", {}
    if "Traceback (most recent call last)" in ended.err:
        return "traceback", _where(ended.err), {}
    if ended.code < 0:
        return "signal", signal.Signals(-ended.code).name, {}
    if ended.code == 2:
        is_told = len(ended.err.strip().splitlines()) == 1 and last.startswith("Error: ")
        if output is not None and output.exists():
            return "stray file", f"{output.name}, of a command that was refused", {}
        return ("refused" if is_told else "no sentence"), last.removeprefix("Error: "), {}
    if ended.code not in (0, 1):
        return "exit code", f"{ended.code}: {last}", {}
    try:
        report = json.loads(ended.out)
    except ValueError as error:
        return "report", f"not JSON: {error}", {}
    return "done", "", report


def _where(text: str) -> str:
    """The last line of a traceback and the place that it names."""
    lines = text.strip().splitlines()
    places = [line.strip() for line in lines if line.strip().startswith("File ")]
    return f"{lines[-1]} ({places[-1]})" if places else lines[-1]


def _of_file(subject: Subject, output: Path, read: Path) -> tuple[str, str] | None:
    """What is wrong with a file that was written, or None."""
    if not output.exists():
        return "invalid", "the report is good, but there is no file"
    if output.suffix == ".stats":
        return None
    if output.name == "unpacked.onnx" and read.suffix == ".onnxz":
        same = output.read_bytes() == subject.model.read_bytes()
        return None if same else ("invalid", "unpacked to other bytes than were packed")
    if output.suffix == ".onnxz" and plain(output).read_bytes() != subject.model.read_bytes():
        return "invalid", "the package holds other bytes than were packed"
    if not _runs(subject):
        return None  # a broken file may be stored, and comes back as it is
    try:
        before, after = onnx.load(subject.model), onnx.load(plain(output))
        onnx.checker.check_model(str(plain(output)))
        opened = session(output)
        if subject.feed is not None:
            run(opened, dict(subject.feed))
    except (OnnxcError, onnx.checker.ValidationError, ValueError) as error:
        return "invalid", str(error).splitlines()[0]
    changed = [line for line in interface(before) if line not in interface(after)]
    if interface(before) != interface(after):
        return "interface", changed[0] if changed else "gained an input or output"
    return None


def _runs(subject: Subject) -> bool:
    try:
        opened = session(subject.model)
        if subject.feed is not None:
            run(opened, dict(subject.feed))
    except OnnxcError:
        return False
    return True


def interface(proto: onnx.ModelProto) -> list[str]:
    """Inputs without defaults, and outputs, as declared."""
    defaults = {tensor.name for tensor in proto.graph.initializer}
    ports = [p for p in proto.graph.input if p.name not in defaults]
    return [f"{port.name} {port.type}" for port in (*ports, *proto.graph.output)]


def _of_heavy(subject: Subject, report: Mapping[str, Any]) -> tuple[str, str]:
    """Whether each heavy node is quantized or left alone for a reason, and how many there are."""
    heavy = [node.name for node in inspect(subject.model).heavy]
    missing = set(heavy) - accounted(report)
    if missing:
        return "heavy node", f"{min(missing)} is neither quantized nor left alone for a reason"
    verb = "quantized" if report["count"] else "left as it is"
    return "done", f"{verb}, {len(heavy)} heavy nodes accounted for" if heavy else "no heavy nodes"


def accounted(report: Mapping[str, Any]) -> set[str]:
    """Nodes of which a report of `quantize` tells what was done to them, or why nothing was."""
    changed = {change["node"] for change in report["changes"]}
    kernels = report["coverage"]["kernels"] if report["coverage"] else ()
    told = (*report["skips"], *(k for k in kernels if not k["integer"]))
    integer = {kernel["node"] for kernel in kernels if kernel["integer"]}
    return changed | integer | {each["node"] for each in told if each["reason"]}
