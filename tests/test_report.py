"""Reports: the verdict, JSON, and what a reader sees."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from onnxc.bench import Latency, Ratio
from onnxc.check import Comparison, Coverage, Fidelity, Kernel
from onnxc.console import count_text, render, render_preview, render_validation, size_text
from onnxc.core import Change, Skip
from onnxc.report import (
    Effect,
    Measure,
    Point,
    Preview,
    Report,
    Validation,
    to_dict,
    to_json,
    verdict,
)

BEFORE = Measure(4_000_000, Latency(1.9, 2.0, 2.1, 0.05, (2.0, 2.0)))
AFTER = Measure(1_000_000, Latency(0.9, 1.0, 1.1, 0.05, (1.0, 1.0)))
COMPARISON = Comparison(
    samples=200,
    outputs={"y": Fidelity(sqnr=31.25, cosine=0.9995, max_abs_error=0.125, agreement=0.985)},
    agreement=0.985,
    top1=(0.71, 0.705),
    top5=(0.9, 0.9),
)
KERNELS = (Kernel("/a", "QLinearConv", True), Kernel("/b", "MatMul", False, "two activations"))
GOOD = Report(
    model="m.onnx",
    output="m.int8.onnx",
    before=BEFORE,
    after=AFTER,
    speedup=Ratio(2.0, 1.9, 2.1),
    comparison=COMPARISON,
    coverage=Coverage(KERNELS, 2, 0),
    changes=(Change("/a", "int8", 400, 100),),
    skips=(
        *(Skip(f"/gelu{i}", "left float: faster so") for i in range(9)),
        Skip("/odd", "its weight is computed by the graph"),
    ),
    notes=("3 images were skipped",),
    recipe="seed = 0\n",
    memory_peak=380_000_000,
    seconds=4.21,
)


def shown(renderable: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(renderable)
    return console.export_text()


def test_a_good_result() -> None:
    good, sentence = verdict(GOOD)
    assert good
    assert "4.00x smaller, 2.00x faster, top-1 -0.50 points" in sentence
    assert "agreement 98.5 % over 200 samples" in sentence


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"speedup": Ratio(0.8, 0.75, 0.85)}, "slower than the original"),
        (
            {"comparison": replace(COMPARISON, top1=(0.71, 0.69))},
            "top-1 drops by more than 1 point",
        ),
        ({"comparison": replace(COMPARISON, agreement=0.89)}, "agreement below 90 %"),
        (
            {"comparison": replace(COMPARISON, outputs={"y": Fidelity(14.9, 0.98, 1.0)})},
            "SQNR 14.9 dB, below 15",
        ),
        ({"count": 0}, "nothing was quantized"),
        ({"missed": ("top-1 drops by 0.50 points, more than 0.1",)}, "more than 0.1"),
    ],
)
def test_a_result_that_is_not_good(changed: dict[str, Any], reason: str) -> None:
    report = replace(GOOD, **changed)
    good, sentence = verdict(report)
    assert not good
    assert reason in sentence
    assert "not good:" in shown(render(report))


def test_a_speed_inside_its_spread_is_no_gain_and_no_loss() -> None:
    good, sentence = verdict(replace(GOOD, speedup=Ratio(0.99, 0.95, 1.02)))
    assert good
    assert "as fast within the spread" in sentence


def test_a_search_ends_with_the_candidates_that_nothing_beats() -> None:
    def point(name: str, size: int, drop: float, **only: bool) -> Point:
        return Point(name, size, drop, drop - 0.1, drop + 0.1, 1.5, **only)

    points = (
        point("original", 4000, 0.0, is_met=True, on_front=True),
        point("cluster --loss 0.03", 900, 0.4, is_met=True, is_best=True, on_front=True),
        point("cluster --loss 0.1", 500, 2.0, on_front=True),
        point("prune --macs 0.9", 3900, 3.0),
    )
    text = shown(render(replace(GOOD, points=points)), 120)
    rows = [line.strip() for line in text.splitlines() if " to " in line and line[:1] in "co"]
    assert "best of 4 candidates" in text and "prune --macs 0.9" not in text
    assert [row.split("  ")[0] for row in rows] == [
        *("cluster --loss 0.1", "cluster --loss 0.03", "original")
    ]
    assert "2.00   1.90 to 2.10  misses the bound" in rows[0]
    assert rows[1].endswith("the result") and rows[2].endswith("-0.10 to 0.10")


def test_the_table_has_before_after_and_ratio() -> None:
    lines = {line.split("  ")[0]: line.split() for line in shown(render(GOOD)).splitlines()}
    assert lines["file"][1:] == ["4.0", "MB", "1.0", "MB", "4.00x"]
    assert lines["latency p50"][2:6] == ["2.000", "ms", "1.000", "ms"]
    assert lines["latency p50"][6:] == ["2.00x", "(1.90", "to", "2.10)"]
    assert lines["top-1"][1:] == ["71.00", "%", "70.50", "%", "-0.50", "points"]
    assert lines["integer kernels"][2:] == ["1", "of", "2"]


def test_skipped_nodes_are_grouped_by_reason_the_most_frequent_first() -> None:
    words = " ".join(shown(render(replace(GOOD, coverage=None)), width=200).split())
    assert "left alone: 10 nodes" in words
    names = ", ".join(f"/gelu{i}" for i in range(7))
    grouped = f"9 left float: faster so: {names} and 2 more"
    assert grouped in words
    assert words.index(grouped) < words.index("1 its weight is computed by the graph: /odd")


def test_only_heavy_nodes_are_named_with_the_reason_of_the_pass() -> None:
    skips = (Skip("/b", "excluded"), Skip("/gelu", "left float"), Skip("/a", "not equalized"))
    words = " ".join(shown(render(replace(GOOD, skips=skips)), width=200).split())
    assert "run in float: 1 node 1 excluded: /b" in words
    assert "/gelu" not in words
    assert "left alone besides: 1 node" in words  # /a was changed after all


def test_many_reasons_are_counted() -> None:
    skips = tuple(Skip(f"/n{i}", f"reason {i}") for i in range(9))
    words = " ".join(shown(render(replace(GOOD, coverage=None, skips=skips))).split())
    assert "3 for 3 other reasons" in words


def test_a_long_name_is_shown_in_full_but_alone() -> None:
    skips = (Skip("/a/" * 40, "why"), Skip("/b", "why"))
    words = "".join(shown(render(replace(GOOD, coverage=None, skips=skips))).split())
    assert "/a/" * 40 + "and1more" in words


def test_a_preview_counts_changes_of_a_kind() -> None:
    changes = tuple(Change(f"/fc{i}", f"w{i} int8 per channel, {i}.5 dB") for i in range(3))
    static = Effect(changes, (), (Skip("/act", "excluded"), Skip("/act", "and more")))
    ways = {"static": static, "none": Effect((), (), ()), "minmax": static}
    words = " ".join(shown(render_preview(Preview("m", "o", "x86", (), ways))).split())
    assert "way: static; minmax quantized: 3 nodes 3 int8 per channel: /fc0, /fc1, /fc2" in words
    assert "left alone: 1 node 1 excluded: /act" in words
    assert "way: none no node is quantized" in words


def test_what_is_not_compared_is_told() -> None:
    assert GOOD.comparison is not None
    partly = replace(GOOD.comparison, notes=("50.0% of output 'y' are NaN",))
    told = shown(render(replace(GOOD, comparison=partly)))
    assert "· 50.0% of output 'y' are NaN" in told and "· 3 images" in told


def test_effort_notes_and_headline() -> None:
    text = shown(render(replace(GOOD, headline="made without data")))
    assert text.startswith("made without data")
    assert "3 images were skipped" in text
    assert "4.2 s, peak memory 380.0 MB" in text


@pytest.mark.parametrize("width", [40, 80])
def test_no_line_is_wider_than_the_console(width: int) -> None:
    report = replace(GOOD, notes=("a long note " * 40,), output="folder/" * 20 + "m.onnx")
    assert max(map(len, shown(render(report), width).splitlines())) <= width


def test_names_are_not_markup() -> None:
    skips = (Skip("[bold]n", "why"),)
    report = replace(GOOD, model="[red]m[/red].onnx", skips=skips, coverage=None)
    text = shown(render(report))
    assert "[red]m[/red].onnx" in text
    assert "[bold]n" in text


def test_rendering_is_stable() -> None:
    assert shown(render(GOOD)) == shown(render(replace(GOOD, skips=GOOD.skips)))


def test_validation_lists_each_output_where_there_are_several() -> None:
    report = Validation("a.onnx", "b.onnx", BEFORE, AFTER, COMPARISON)
    text = shown(render_validation(report))
    assert "cosine 0.99950" in " ".join(text.split())
    assert not any(line.startswith("y ") for line in text.splitlines())
    two = {**COMPARISON.outputs, "z": Fidelity(sqnr=40.0, cosine=1.0, max_abs_error=0.5)}
    text = shown(render_validation(replace(report, comparison=replace(COMPARISON, outputs=two))))
    line = next(x for x in text.splitlines() if x.startswith("y "))
    assert line.split() == ["y", "31.2", "dB", "0.99950", "0.125", "98.50", "%"]


def test_of_many_outputs_the_worst_are_shown() -> None:
    many = {f"y{i}": Fidelity(sqnr=20.0 + i, cosine=1.0, max_abs_error=0.5) for i in range(20)}
    report = Validation("a.onnx", "b.onnx", BEFORE, AFTER, replace(COMPARISON, outputs=many))
    text = shown(render_validation(report))
    assert "y0 " in text and "y19 " not in text
    assert "and 8 better ones" in text


def test_json_holds_fields_and_properties_but_no_samples() -> None:
    found = json.loads(to_json(GOOD))
    assert found["recipe"] == "seed = 0\n"
    assert found["is_good"] is True
    assert found["verdict"].startswith("4.00x smaller")
    assert found["coverage"]["integer"] == 1
    assert found["comparison"]["sqnr"] == pytest.approx(31.25, abs=1e-9)
    assert found["speedup"]["is_slower"] is False
    assert "samples" not in found["before"]["latency"]
    assert found["skips"][9] == {"node": "/odd", "reason": "its weight is computed by the graph"}


def test_json_is_valid_for_odd_values() -> None:
    odd = {"inf": math.inf, "array": np.float32(0.5), "path": Path("a"), "set": {"b", "a"}}
    assert to_dict(odd) == {"inf": None, "array": 0.5, "path": "a", "set": ["a", "b"]}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (13_960_000, "14.0 MB"), (2 * 10**9, "2.0 GB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


def test_counts() -> None:
    assert (count_text(7), count_text(3_500_000)) == ("7", "3.5 M")
