"""The pages say what is so: every block of README.md and docs/ is run, in order, page by page.

A page starts in a temporary folder that holds only models/. A block fenced as `sh` or `python`
must end well, one fenced as `toml` must be a recipe. A block fenced as `text` shows what the last
one printed: figures may differ, but each line's label must be there. Blocks that set a machine up
(make, pip, git) are not run here. Blocks of plain commands and of Python are run in this process,
which saves importing everything anew for each line; blocks that ask a shell for more, processes or
memory of their own are run apart.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from click import Group

from onnxc import recipe
from onnxc.cli import run
from onnxc.commands import onnxc
from onnxc.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
SLOW = {  # minutes: a dozen quantizations, searches, layers taken one by one
    f"docs/{name}.md"
    for name in (
        *("accuracy-fell", "analyze", "compress", "few-bits", "low-rank", "package"),
        *("pruning", "sparsity", "weight-sharing"),
    )
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"  +|:|(?:^|(?<=\s))[+-]?\d")  # where the label of a line ends
SET_UP = ("make ", "pip ", "git ", "cd ", "python -m pip ", "python -m venv ")
APART = re.compile(r"distributed|--workers|--max-memory|loader:")  # of processes, memory, modules
FEW = 64  # samples, for pages that do not cut the data up themselves
WHOLE = {"docs/data.md", "docs/statistics.md"}
SHELL = shutil.which("sh")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page where it starts."""

    language: str
    text: str
    line: int

    @property
    def is_set_up(self) -> bool:
        return all(line.startswith(SET_UP) for line in self.text.splitlines())

    @property
    def is_plain(self) -> bool:
        """Whether it is Python or commands alone, of which nothing is seen from outside."""
        commands = all(line.startswith("onnxc ") for line in self.lines)
        plain = self.language == "python" or (commands and not re.search(r"[|<>;&$`]", self.text))
        return plain and not APART.search(self.text)

    @property
    def lines(self) -> list[str]:
        return self.text.replace("\\\n", " ").strip().splitlines()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in BLOCK.finditer(text)]


def pages() -> Iterator[object]:
    for name in NAMES:
        yield pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with models/, as in a fresh clone."""
    ignored = shutil.ignore_patterns("*.py", "*.md")
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=ignored)
    return tmp_path


def shorten(folder: Path) -> None:
    """Leave FEW samples of the calibration data: figures may differ, and fits are fast."""
    for path in (folder / "models").glob("*_calib.npz"):
        with np.load(path) as found:
            few = {name: found[name][:FEW] for name in found.files}
        np.savez(path, **few)  # type: ignore[arg-type]


def hastened(block: Block) -> Block:
    """The same with less time for a search: figures may differ, as with fewer samples."""
    text = re.sub(r"(?<=--max-time )\d+s", "3s", block.text)
    return replace(block, text=re.sub(r"(?<=--seconds )\d+", "3", text))


def execute(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """The exit code and the output of a block, as `sh -e` or Python would have them."""
    return within(block) if block.is_plain else apart(block, folder)


def within(block: Block) -> subprocess.CompletedProcess[str]:
    """In this process; an error of Python code is raised."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        if block.language == "python":
            code = 0
            program = compile(block.text, f"<line {block.line}>", "exec", dont_inherit=True)
            exec(program, {"__name__": "__main__"})
        else:
            code = next(filter(None, (run(shlex.split(line)[1:]) for line in block.lines)), 0)
    return subprocess.CompletedProcess(block.text, code, out.getvalue(), err.getvalue())


def apart(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    program = [str(SHELL), "-eu"] if block.language == "sh" else [sys.executable]
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": places, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [*program, "-c", block.text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def labels(text: str) -> Iterator[str]:
    """What the lines of an output start with: the words before the first figure, gap or colon."""
    for line in text.splitlines():
        label = FIGURE.split(line.strip())[0].strip()
        if label:
            yield label


@pytest.mark.skipif(SHELL is None, reason="the blocks are written for sh, which is not installed")
@pytest.mark.parametrize("name", list(pages()))
def test_every_block_runs(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    if name not in WHOLE:
        shorten(folder)
    printed = ""
    for block in blocks(ROOT / name):
        where = f"{name}, line {block.line}"
        if block.language in ("sh", "python") and not block.is_set_up:
            done = execute(hastened(block), folder)
            assert done.returncode == 0, f"{where} fails:\n{done.stderr}{done.stdout}"
            printed = done.stdout + done.stderr
        elif block.language == "toml":
            recipe.loads(block.text)
        elif block.language == "text":
            missing = [label for label in labels(block.text) if label not in printed]
            assert not missing, f"{where} shows what is not printed: {missing}\n{printed}"


def test_the_reader_of_blocks_sees_failures(folder: Path) -> None:
    page = folder / "page.md"
    page.write_text("text\n\n```sh\nfalse\ntrue\n```\n\n```text\ntop-1  99.6 %  0.0\n```\n")
    failing, shown = blocks(page)
    assert (failing.language, failing.line, shown.language) == ("sh", 3, "text")
    assert execute(failing, folder).returncode == 1
    wrong = Block("sh", "onnxc inspect none", 1)
    told, plain = execute(wrong, folder), apart(wrong, folder)
    assert wrong.is_plain and not failing.is_plain
    assert (told.returncode, told.stderr) == (plain.returncode, plain.stderr) == (2, plain.stderr)
    with pytest.raises(ModuleNotFoundError):
        execute(Block("python", "import nothing_of_that_name", 1), folder)
    assert list(labels(shown.text)) == ["top-1"]
    assert list(labels("· calibrated on 160 samples\ngood: faster\n4.3 s")) == [
        "· calibrated on",
        "good",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)
    lost = [target for target in targets if not (ROOT / name).parent.joinpath(target).exists()]
    assert not lost


@pytest.mark.parametrize("name", NAMES)
def test_every_option_and_command_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    code = "\n".join((*inline, *(b.text for b in blocks(ROOT / name) if not b.is_set_up)))
    assert isinstance(onnxc, Group)
    options = [p for command in onnxc.commands.values() for p in command.params]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    asked = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code))
    assert asked <= known | {"--help", "--version"}
    assert set(re.findall(r"^onnxc ([a-z]+)", code, re.MULTILINE)) <= set(onnxc.commands)


def test_set_up_blocks_name_targets_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = {t for p in PAGES for b in blocks(p) for t in re.findall(r"^make (\w+)", b.text, re.M)}
    assert {"demo", "test"} <= asked <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


def test_the_table_of_targets_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    row = re.compile(r"^\| `([\w-]+)` \| (\w+) \| (\d) bits \|.*\| (yes|no) \|$", re.MULTILINE)
    expected = [
        (t.name, t.activations, "7" if t.reduce_range else "8", "yes" if t.measured else "no")
        for t in TARGETS.values()
    ]
    assert row.findall(text) == expected
