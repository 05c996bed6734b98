"""ONNX's own test models under every pass: valid, and equal within what it promises, or skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from backend import MODULES, PACKAGED, Case, every_pass, one_operator, packaged, with_weights
from outcomes import Outcome, faults

STRIDE = 15  # of the modules in the quick suite
LAYERS = ("conv", "convtranspose", "gemm", "lstm", "matmul")  # modules whose models are all taken
EVERY = 4  # models of these in the quick suite

Record = Callable[[str, object], None]
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda name: name.split(".")[-1])
few_modules = pytest.mark.parametrize(
    "module", MODULES[::STRIDE], ids=lambda name: name.split(".")[-1]
)


def check(outcomes: Iterable[Outcome], record: Record) -> None:
    """No faults; the summary of the tests counts the endings."""
    found = list(outcomes)
    record("outcomes", [tuple(outcome) for outcome in found])
    assert not faults(found)


def both(case: Case) -> Iterable[Outcome]:
    """A model as it is, and with constants in place of inputs."""
    yield from every_pass("one-operator models", case)
    weighted = with_weights(case)
    if weighted is not None:
        yield from every_pass("one-operator models with weights", weighted)


@few_modules
def test_a_sample(module: str, record_property: Record) -> None:
    for case in one_operator(module)[:1]:
        check(both(case), record_property)


@pytest.mark.parametrize("name", LAYERS)
def test_a_sample_of_layers(name: str, record_property: Record) -> None:
    (module,) = [m for m in MODULES if m.endswith(f".{name}")]
    weighted = [found for case in one_operator(module)[::EVERY] if (found := with_weights(case))]
    assert weighted
    found = [o for w in weighted for o in every_pass("one-operator models with weights", w)]
    assert {"changed"} <= {o.ending for o in found}
    check(found, record_property)


@pytest.mark.slow
@every_module
def test_all(module: str, record_property: Record) -> None:
    found = [outcome for case in one_operator(module) for outcome in both(case)]
    check(found, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("folder", PACKAGED)
def test_packaged(folder: str, record_property: Record) -> None:
    found = [o for case in packaged(folder) for o in every_pass("packaged models", case)]
    check(found, record_property)
