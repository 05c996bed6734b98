"""Reports as a page: what is on it, that it needs nothing else, and what a browser makes of it."""

from __future__ import annotations

import html
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from calls import call
from click import Group

import onnxc
from onnxc import api, commands
from onnxc.anatomy import Anatomy, Layer
from onnxc.bench import Latency, Ratio, speedup
from onnxc.check import Comparison, Coverage, Fidelity, Kernel
from onnxc.core import Change, Skip
from onnxc.errors import OptionError
from onnxc.html import page
from onnxc.html.page import sections, to_html
from onnxc.report import Aim, Benchmark, Blame, Measure, Point, Report, Validation
from onnxc.runtime import Runtime
from onnxc.spans import Span
from onnxc.surroundings import surroundings

MODELS = Path(__file__).resolve().parents[1] / "models"
VOID = {"meta", "link", "br", "hr", "img", "path", "use", "rect", "input"}
PHONE = 390  # pixels across
LARGEST = 500_000  # bytes of a page
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

SLOW, FAST = (Latency.of([t / 1e3 + i / 1e5 for i in range(40)]) for t in (2.0, 1.0))
COMPARISON = Comparison(
    samples=200,
    outputs={"y": Fidelity(31.25, 0.9995, 0.125, 0.985), "z": Fidelity(40.0, 1.0, 0.5)},
    agreement=0.985,
    top1=(0.71, 0.705),
    top5=(0.9, 0.9),
    decisions=200,
    flips=(3, 2),
)
KERNELS = (Kernel("/a", "QLinearConv", True), Kernel("/b<i>", "MatMul", False, "two activations"))
ANATOMY = Anatomy(
    (Layer("/a", "Conv", 3_000_000, 750_000), Layer("/b<i>", "MatMul", 900_000, 225_000)),
    {"float32": (3_900_000, 10_000), "int8": (0, 965_000)},
    (100_000, 25_000),
)
COUNTS = tuple(range(64))
SPANS = (
    Span("x", "uint8", 1.0, 0, 0.0, 255.0, 0.0, 300.0, 0.02, COUNTS),
    Span("$t_0$", "int8", 0.5, 3, -65.5, 62.0, -60.0, 60.0, 0.0, COUNTS),
)
BLAMED = (Blame("/a", "Conv", "a", 31.0, 35.0), Blame("/b<i>", "MatMul", "b", 22.0, 23.0))
POINTS = (
    Point("static", 1_000_000, 0.5, -1.0, 2.0, 2.0, True, True, True),
    Point("dynamic", 1_100_000, 0.4, -1.0, 2.0, None, True, False, True),
    Point("4 bits", 600_000, 30.0, 25.0, 35.0, 1.1, False, False, True),
)
FULL = Report(
    model="m<script>alert(1)</script>.onnx",
    output="m.int8.onnx",
    before=Measure(4_000_000, SLOW),
    after=Measure(1_000_000, FAST),
    target="x86-vnni",
    way="static",
    headline="made without data",
    speedup=speedup(SLOW, FAST),
    comparison=COMPARISON,
    coverage=Coverage(KERNELS, 2, 1),
    changes=(
        Change("/a", "int8 weights, 64 scales", 400, 100),
        Change("/a", "BatchNormalization /bn folded in"),
        Change("/c", "BatchNormalization /bn2 folded in"),
    ),
    skips=(Skip("/b<i>", "excluded"), Skip("/gelu", "left float")),
    notes=("3 images were skipped",),
    recipe='seed = 0\n[target]\nname = "x86-vnni"\n',
    points=POINTS,
    blame=BLAMED,
    anatomy=ANATOMY,
    spans=SPANS,
    surroundings=surroundings(),
    memory_peak=380_000_000,
    seconds=4.21,
)
PRUNED = replace(
    FULL,
    aim=Aim("prune", "pruned"),
    coverage=None,
    done=(
        Change("/a", "16 of 64 channels out by output; read by /b"),
        Change("/c", "svd of rank 12, 53% of its MACs, error 1.20%"),
    ),
)
CHECKED = Validation("a.onnx", "b.onnx", FULL.before, FULL.after, COMPARISON, blame=BLAMED)
TIMED = Benchmark(Runtime(), {"a": SLOW, "b": FAST}, {"b": Ratio(2.0, 1.9, 2.1)})


class Reader(HTMLParser):
    """The text of a page by section, and whether each element that opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.key = ""
        self.texts: dict[str, str] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("header", "section"):
            self.key = dict(attrs).get("id") or tag
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Closed at once."""

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.texts[self.key] = " ".join((self.texts.get(self.key, "") + " " + data).split())


@pytest.fixture(scope="module")
def full() -> str:
    return to_html(FULL)


@pytest.fixture(scope="module")
def texts(full: str) -> dict[str, str]:
    return Reader(full).texts


def test_the_verdict_comes_first(texts: dict[str, str]) -> None:
    assert texts["header"].startswith("m<script>alert(1)</script>.onnx → m.int8.onnx")
    assert "static, target x86-vnni made without data good: 4.00x smaller" in texts["header"]
    bad = Reader(to_html(replace(FULL, missed=("top-1 drops by 2.00 points",)))).texts
    assert "not good: top-1 drops by 2.00 points" in bad["header"]


def test_sections_are_in_order_and_empty_ones_are_left_out() -> None:
    keys = [section.key for section in sections(PRUNED)]
    assert keys == [k for k, *_ in page.SECTIONS if k not in ("benchmark", "kernels")]
    bare = Report("m", "o", Measure(2), Measure(1))
    assert [section.key for section in sections(bare)] == ["measured"]
    assert [section.key for section in sections(TIMED)] == ["benchmark", "made"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("measured", "file 4.0 MB 1.0 MB 4.00x"),
        ("accuracy", "Of 200 decisions 3 were lost and 2 were won: top-1 changes by -0.50 points"),
        ("accuracy", "top-1 after 70.50 % 63.84 to 76.39 %"),
        ("accuracy", "cosine"),
        ("latency", "40 rounds"),
        ("size", "4.0 MB became 1.0 MB"),
        ("size", "/b<i> MatMul 900.0 kB 225.0 kB"),
        ("changes", "2 BatchNormalization folded in /a: BatchNormalization /bn folded in"),
        ("changes", "Left alone: 2 nodes"),
        ("blame", "the largest own error: /b<i>, /a"),
        ("ranges", "clip at most 2.00 % of a tensor's values"),
        ("ranges", "$t_0$ int8 0.5 3 -65.5 to 62 -60 to 60 0.00 %"),
        ("kernels", "1 of 2 heavy nodes run in integer kernels"),
        ("kernels", "1 excluded /b<i>"),
        ("kernels", "1 of the 2 Q/DQ nodes left quantize nothing"),
        ("front", "3 candidates were measured, of which 2 keep the bound"),
        ("front", "4 bits 600.0 kB 1.10x +30.00 (+25.00 to +35.00) misses the bound"),
        ("notes", "3 images were skipped"),
        ("recipe", 'name = "x86-vnni"'),
        ("made", f"onnxc {onnxc.__version__}"),
        ("made", "took 4.2 s peak memory 380.0 MB"),
    ],
)
def test_what_a_section_says(texts: dict[str, str], key: str, words: str) -> None:
    assert words in texts[key]


def test_groups_and_ranks_show_what_is_left() -> None:
    text = Reader(to_html(PRUNED)).texts["cuts"]
    assert "/a 16 of 64 channels out by output; read by /b 75 % of channels" in text
    assert "error 1.20% 53 % of MACs" in text


def test_other_reports() -> None:
    checked, timed = (Reader(to_html(report)).texts for report in (CHECKED, TIMED))
    assert checked["header"].startswith("b.onnx against a.onnx good: 4.00x smaller")
    assert "largest error 0.5" in checked["measured"]
    assert "a 2.0" in timed["benchmark"] and "2.00x (1.90 to 2.10)" in timed["benchmark"]


def test_odd_figures_are_drawn_too() -> None:
    still = Latency(1.0, 1.0, 1.0, 0.0, (1.0,) * 9)
    lost = Comparison(3, {"y": Fidelity(-math.inf, 0.0, math.inf)}, notes=("odd",))
    odd = replace(
        FULL,
        before=Measure(10, still),
        after=Measure(20, still),
        speedup=speedup(still, still),
        comparison=lost,
        blame=tuple(Blame(str(n), "Conv", "t", n) for n in (-math.inf, math.nan, 200.0, 30.0)),
        anatomy=Anatomy((), {}, (10, 20)),
        spans=(replace(SPANS[0], least=1.0, most=1.0, counts=(5,)),),
        points=(replace(POINTS[0], on_front=False),),
    )
    with warnings.catch_warnings(action="error"):
        text = Reader(to_html(odd)).texts
    assert "SQNR -inf dB; the outputs name no classes" in text["accuracy"]
    assert "odd" in text["notes"]
    assert "no value" not in text["ranges"] and "2.00x larger" in text["header"]


def test_a_page_needs_nothing_else(full: str) -> None:
    assert "://" not in full
    assert "<script" not in full and "@import" not in full and "@font-face" not in full
    links = re.findall(r"""(?:href|src)\s*=\s*["']?([^"'\s>]+)""", full)
    assert links and all(link.startswith(("#", "data:,")) for link in links)
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", full))
    assert len(full.encode()) < LARGEST


def test_the_same_report_gives_the_same_bytes(full: str) -> None:
    assert to_html(FULL) == full


def test_figures_take_the_colours_of_the_page(full: str) -> None:
    assert "var(--after)" in full and not re.search(r"#0[1-8]0[1-8]0[1-8]|#1\d1\d1\d", full)
    ids = set(re.findall(r'id="([^"]+)"', full))
    assert set(re.findall(r"url\(#([^)]+)\)", full)) <= ids


@pytest.mark.parametrize(
    ("name", "told"),
    [("page.txt", "end in .html"), ("none/page.html", "create it first"), ("in.html", "itself")],
)
def test_a_place_that_is_no_good(tmp_path: Path, name: str, told: str) -> None:
    taken = tmp_path / "in.html"
    taken.write_text("kept")
    with pytest.raises(OptionError, match=told):
        page.check_page(tmp_path / name, taken)
    assert taken.read_text() == "kept"


def test_without_the_extra_one_sentence_names_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from onnxc.cli import run\n"
        f"sys.exit(run(['bench', 'no.onnx', '--html', {str(tmp_path / 'page.html')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "onnxc[report]" in done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small network, by the command."""
    folder = tmp_path_factory.mktemp("page")
    given = (MODELS / "digits_cnn.onnx", "--data", MODELS / "digits_cnn_calib.npz")
    few = ("--samples", 40, "--format", "qdq", "--ranges", "mse")
    paths = ("-o", folder / "small.onnx", "--html", folder / "page.html")
    assert call("quantize", *given, *few, *paths, "--quiet") in (0, 1)
    return folder / "page.html"


def test_the_command_writes_a_page(made: Path) -> None:
    found = Reader(made.read_text(encoding="utf-8")).texts
    assert {"accuracy", "latency", "size", "changes", "ranges", "kernels", "recipe"} <= set(found)
    assert "10 of 10 heavy nodes run in integer kernels" in found["kernels"]
    assert "/2/2.2/Gemm Gemm 2.6 kB" in found["size"] or "the rest" in found["size"]
    assert os.uname().nodename not in made.read_text() or len(os.uname().nodename) < 4


def test_bench_and_validate_write_pages(made: Path, tmp_path: Path) -> None:
    pair = (MODELS / "digits_cnn.onnx", made.with_name("small.onnx"))
    short = ("--repeats", 3, "--min-time", 0, "--quiet")
    assert call("bench", *pair, *short, "--html", tmp_path / "bench.html") == 0
    assert "small.onnx" in Reader((tmp_path / "bench.html").read_text()).texts["benchmark"]
    data = ("--data", MODELS / "digits_cnn_val.npz", "--samples", 20, "--quiet")
    assert call("validate", *pair, *data, "--html", tmp_path / "check.html") in (0, 1)
    assert "became" in Reader((tmp_path / "check.html").read_text()).texts["size"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--dry-run",), "does not go with --dry-run"),
        (("-o", "{page}"), "name one file"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], told: str
) -> None:
    place = tmp_path / "page.html"
    given = [part.format(page=place) for part in more]
    assert call("quantize", MODELS / "digits_cnn.onnx", "--html", place, *given) == 2
    assert told in capsys.readouterr().err
    assert not place.exists()


def test_every_command_that_measures_offers_a_page() -> None:
    assert isinstance(commands.onnxc, Group)
    having = {
        name
        for name, command in commands.onnxc.commands.items()
        if any("--html" in option.opts for option in command.params)
    }
    writing = {"quantize", "sparsify", "prune", "factorize", "cluster", "compress"}
    assert having >= {*writing, "validate", "bench"}


def test_the_facade_writes_a_page(tmp_path: Path) -> None:
    onnxc.write_html(TIMED, tmp_path / "page.html")
    assert api.write_html is page.write_html
    assert (tmp_path / "page.html").read_bytes().startswith(b"<!DOCTYPE html>")


def browse(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    """The document that Chromium makes of a page, and what it logs."""
    command = [
        *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"),
        *("--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}"),
        (folder / name).as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


MEASURE = """<script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument.documentElement;
    page.querySelectorAll("details").forEach(part => part.open = true);
    return page.scrollWidth + "/" + page.clientWidth + "/" + page.querySelectorAll("svg").length;
  });
  document.body.dataset.found = found.join(" ");
  console.log("measured");
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_it_without_errors_and_a_phone_in_full(
    full: str, made: Path, tmp_path: Path
) -> None:
    """Pages in frames as wide as a phone, in a page that measures them and logs one line."""
    pages = (full, made.read_text(encoding="utf-8"), to_html(PRUNED), to_html(TIMED))
    frame = '<iframe width="{}" height="900" srcdoc="{}"></iframe>'
    frames = [frame.format(PHONE, html.escape(text)) for text in pages]
    (tmp_path / "frames.html").write_text("\n".join(("<body>", *frames, MEASURE)), "utf-8")
    done = browse(tmp_path, "frames.html")
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    for width, client, drawn in (map(int, part.split("/")) for part in found[1].split()):
        assert PHONE - 20 <= client <= PHONE and width <= client
        assert drawn >= 2
    logged = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(logged) == 1 and '"measured"' in logged[0], logged


def test_parts_of_a_page_are_known_to_the_template() -> None:
    from onnxc.html import parts

    text = (Path(page.__file__).with_name("templates") / "page.html").read_text(encoding="utf-8")
    kinds: set[Any] = {getattr(value, "kind", None) for value in vars(parts).values()} - {None}
    assert kinds == set(re.findall(r'part\.kind == "(\w+)"', text))
