"""Selectors: every kind of pattern, exclusion, unknown names, and validity after rewrites."""

from __future__ import annotations

import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from onnxc.errors import OptionError
from onnxc.graph import load
from onnxc.selectors import Selector

#   x -> a/Relu -> a/Neg -> b/Add -> c/Relu -> y
#           \-> side/Abs -----/        d/Exp reads x alone
DIAMOND = """
<ir_version: 8, opset_import: ["" : 17]>
diamond (float[4] x) => (float[4] y, float[4] z) {
  [_a_Relu] r = Relu(x)
  [_a_Neg] n = Neg(r)
  [_side_Abs] s = Abs(r)
  [_b_Add] t = Add(n, s)
  [_c_Relu] y = Relu(t)
  [_d_Exp] z = Exp(x)
}
"""
BRANCH = """
<ir_version: 8, opset_import: ["" : 17]>
branch (float[4] x, bool flag) => (float[4] y) {
  [first] r = Relu(x)
  [choice] t = If (flag) <
    then_branch = yes () => (float[4] u) { [inside] u = Neg(r) },
    else_branch = no () => (float[4] v) { [other] v = Abs(r) }
  >
  [last] y = Relu(t)
}
"""
ALL = {"/a/Relu", "/a/Neg", "/side/Abs", "/b/Add", "/c/Relu", "/d/Exp"}


@pytest.fixture
def diamond() -> gs.Graph:
    model = onnx.parser.parse_model(DIAMOND)
    for node in model.graph.node:  # the text format takes no slashes in names
        node.name = node.name.replace("_", "/")
    return load(model).graph


@pytest.fixture
def branch() -> gs.Graph:
    return load(onnx.parser.parse_model(BRANCH)).graph


def test_nothing_included_means_everything(diamond: gs.Graph) -> None:
    assert Selector().names(diamond) == ALL


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("/a/Neg", {"/a/Neg"}),
        ("/a/*", {"/a/Relu", "/a/Neg"}),
        ("*/Relu", {"/a/Relu", "/c/Relu"}),
        ("re:^/[ab]/", {"/a/Relu", "/a/Neg", "/b/Add"}),
        ("re:Relu$", {"/a/Relu", "/c/Relu"}),
        ("op:Abs", {"/side/Abs"}),
        ("/a/Relu../b/Add", {"/a/Relu", "/a/Neg", "/side/Abs", "/b/Add"}),
        ("/a/Neg../c/Relu", {"/a/Neg", "/b/Add", "/c/Relu"}),
        ("/a/Neg../a/Neg", {"/a/Neg"}),
    ],
)
def test_patterns(diamond: gs.Graph, pattern: str, expected: set[str]) -> None:
    assert Selector.parse([pattern]).names(diamond) == expected
    assert Selector.parse([], [pattern]).names(diamond) == ALL - expected


def test_patterns_add_up_and_exclusion_wins(diamond: gs.Graph) -> None:
    selector = Selector.parse(["/a/*", "op:Add"], ["/a/Neg"])
    assert selector.names(diamond) == {"/a/Relu", "/b/Add"}


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("/a/Nge", ["'/a/Nge'", "matches no node", "/a/Neg"]),
        ("op:Abz", ["op:Abz", "Abs"]),
        ("re:^/nowhere", ["re:^/nowhere", "matches no node"]),
        ("/a/Rel../b/Add", ["'/a/Rel'", "/a/Relu"]),
        ("/b/Add../a/Relu", ["no path", "did you mean '/a/Relu../b/Add'"]),
        ("/d/Exp../b/Add", ["no path"]),
        ("re:(", ["not a regular expression"]),
        ("op:", ["empty"]),
        (" ", ["empty"]),
    ],
)
def test_a_pattern_that_selects_nothing_is_an_error(
    diamond: gs.Graph, pattern: str, words: list[str]
) -> None:
    with pytest.raises(OptionError) as caught:
        Selector.parse([], [pattern]).names(diamond)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_nested_bodies_are_selected_too(branch: gs.Graph) -> None:
    assert Selector().names(branch) == {"first", "choice", "inside", "other", "last"}
    assert Selector.parse(["op:Neg"]).names(branch) == {"inside"}


def test_a_region_holds_the_bodies_on_its_paths(branch: gs.Graph) -> None:
    region = Selector.parse(["first..last"]).names(branch)
    assert region == {"first", "choice", "inside", "other", "last"}


def test_a_resolved_selector_survives_rewrites(diamond: gs.Graph) -> None:
    resolved = Selector.parse([], ["/a/*"]).resolve(diamond)
    diamond.nodes[:] = [node for node in diamond.nodes if node.name != "/a/Neg"]
    diamond.nodes.append(gs.Node("Relu", name="new"))
    assert resolved.names(diamond) == {"/side/Abs", "/b/Add", "/c/Relu", "/d/Exp", "new"}


def test_an_exact_name_wins_over_its_meaning_as_a_pattern(diamond: gs.Graph) -> None:
    diamond.nodes[0].name = "block..[0]"
    assert Selector.parse(["block..[0]"]).names(diamond) == {"block..[0]"}
