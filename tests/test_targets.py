"""Targets: which one fits this machine, and which it cannot judge."""

from __future__ import annotations

import pytest

from onnxc import targets
from onnxc.errors import OptionError
from onnxc.targets import TARGETS, choose, misjudged


def on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "detect", lambda: name)


@pytest.mark.parametrize("name", TARGETS)
def test_a_processor_that_does_not_saturate_judges_all(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("x86-vnni", monkeypatch)
    assert misjudged(choose(name)) == ""


def test_a_processor_that_saturates_does_not_judge_8_bit_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on("x86", monkeypatch)
    assert misjudged(choose("auto")) == misjudged(choose("portable")) == ""
    assert "no x86-vnni" in misjudged(choose("x86-vnni"))
    assert "--level none" in misjudged(choose("tensorrt"))


def test_an_unknown_target_is_told_with_those_that_are_known() -> None:
    with pytest.raises(OptionError, match="'abacus' is not known; choose auto, x86-vnni, x86"):
        choose("abacus")
