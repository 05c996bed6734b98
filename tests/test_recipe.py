"""Recipes: exact round trip, and errors that name the key and the known ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.data import Preprocess
from onnxc.core import PASSES
from onnxc.errors import OptionError
from onnxc.recipe import Calibration, Recipe, adjust, dump, load, loads, override
from onnxc.selectors import Selector


@dataclass(frozen=True)
class Grid:
    """Settings nested in a pass."""

    step: float = 0.5


@dataclass(frozen=True)
class Sample:
    """A pass with a field of every type."""

    name: ClassVar[str] = "sample"
    lossless: ClassVar[bool] = True

    on: bool = True
    count: int = 3
    share: float = 0.25
    word: str = "none"
    kind: Literal["fast", "small"] = "fast"
    bits: Literal[4, 8] = 8
    limit: int | None = None
    floor: float | None = 1.0
    skip: tuple[str, ...] = ()
    pair: tuple[int, int] = (1, 2)
    grid: Grid = field(default_factory=Grid)

    def wants(self, graph: Any, context: Any) -> list[Any]:
        return []

    def apply(self, graph: Any, context: Any) -> list[Any]:
        return []


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    PASSES["sample"] = Sample
    yield
    del PASSES["sample"]


FULL = Recipe(
    passes=(
        Sample(on=False, share=1e-07, word='a "quoted"\n\tword \x7f é', kind="small", bits=4),
        Sample(limit=7, floor=None, skip=("/a/*", "re:^b"), pair=(3, 4), grid=Grid(1e20)),
    ),
    seed=-5,
    target="portable",
    calibration=Calibration(
        data="calib",
        samples=100,
        max_memory=400_000_000,
        preprocess=Preprocess(preset="imagenet", resize="none", size=(240, 320), mean=(0.1, 1 / 3)),
    ),
    only=Selector(("/a/*", "op:Conv"), ("/b..c",)),
)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe((Sample(),)), FULL])
def test_round_trip_is_exact(recipe: Recipe) -> None:
    assert loads(dump(recipe)) == recipe
    assert dump(loads(dump(recipe))) == dump(recipe)


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    share=st.floats(allow_nan=False),
    word=texts,
    skip=st.lists(texts).map(tuple),
    count=st.integers(-(2**63), 2**63 - 1),
)
def test_round_trip_of_any_value(
    share: float, word: str, skip: tuple[str, ...], count: int
) -> None:
    recipe = Recipe((Sample(share=share, word=word, skip=skip, count=count),))
    assert loads(dump(recipe)) == recipe


def test_every_setting_is_written_out() -> None:
    text = dump(Recipe((Sample(),)))
    assert "count = 3" in text
    assert "step = 0.5" in text
    assert "seed = 0" in text


def test_text_for_a_reader() -> None:
    text = dump(Recipe((Sample(),), seed=1, only=Selector(exclude=("/head/*",))))
    assert text.startswith('seed = 1\nexclude = ["/head/*"]\n\n[target]\nname = "auto"\n')
    assert '\n[[pass]]\nname = "sample"\non = true\n' in text


def test_passes_keep_their_order() -> None:
    text = '[[pass]]\nname = "sample"\ncount = 2\n[[pass]]\nname = "sample"\ncount = 1\n'
    assert loads(text).passes == (Sample(count=2), Sample(count=1))


def test_a_whole_number_is_a_number() -> None:
    (sample,) = loads('[[pass]]\nname = "sample"\nshare = 1').passes
    assert sample == Sample(share=1.0)
    assert isinstance(sample, Sample) and isinstance(sample.share, float)


def test_the_word_none_is_a_string_only_where_one_is_accepted() -> None:
    text = '[calibration]\nresize = "none"\n[[pass]]\nname = "sample"\nfloor = "none"'
    recipe = loads(text)
    assert recipe.calibration.preprocess.resize == "none"
    assert recipe.passes == (Sample(floor=None),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sede = 1", ["'sede'", "did you mean 'seed'", "calibration"]),
        ("seed = 1.5", ["seed", "an integer", "1.5"]),
        ("seed = true", ["seed", "an integer"]),
        ('include = "a"', ["include", "a list"]),
        ("[target]\nnmae = 'auto'", ["'nmae'", "[target]", "name"]),
        ("target = 'auto'", ["target must be a table"]),
        ("[calibration]\nsample = 3", ["'sample'", "did you mean 'samples'", "preset"]),
        ("[calibration]\nsize = [1, 2, 3]", ["size", "a list of 2"]),
        ("[pass]\nname = 'sample'", ["[[pass]]"]),
        ("[[pass]]\ncount = 1", ["has no name", "sample"]),
        ("[[pass]]\nname = 'sampel'", ["'sampel'", "did you mean 'sample'"]),
        ("[[pass]]\nname = 'sample'\nshape = 1", ["'shape'", "[[pass]] sample", "share"]),
        ("[[pass]]\nname = 'sample'\non = 1", ["on", "true or false"]),
        ("[[pass]]\nname = 'sample'\nkind = 'slow'", ["kind", "one of fast, small", "'slow'"]),
        ("[[pass]]\nname = 'sample'\nbits = 5", ["bits", "one of 4, 8", "5"]),
        ("[[pass]]\nname = 'sample'\nskip = [1]", ["skip", "a list", "a string"]),
        ("[[pass]]\nname = 'sample'\nstep = 'x'", ["step", "a number"]),
        ("seed = ", ["TOML"]),
    ],
)
def test_errors_name_the_key(text: str, words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        loads(text)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("sede = 1")
    with pytest.raises(OptionError, match=r"r\.toml.*'sede'"):
        load(path)
    with pytest.raises(OptionError, match=r"cannot read the recipe .*missing\.toml"):
        load(tmp_path / "missing.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="UTF-8"):
        load(path)


def test_given_keys_go_before_those_of_the_recipe() -> None:
    images = Preprocess(resize="256", mean=(0.5,))
    merged = override(FULL, seed=1, include=["/x"], preprocess=images, samples=3, data=None)
    assert (merged.seed, merged.target) == (1, "portable")
    assert merged.only == Selector(("/x",), ("/b..c",))
    assert merged.calibration.data == "calib"
    assert merged.calibration.samples == 3
    expected = Preprocess(preset="imagenet", resize="256", size=(240, 320), mean=(0.5,))
    assert merged.calibration.preprocess == expected
    assert merged.passes == FULL.passes
    assert override(FULL) == FULL


def test_given_keys_change_the_passes_that_take_them() -> None:
    planned = (Sample(bits=4), Sample(count=1))
    assert adjust(planned, {"count": 7}) == (Sample(bits=4, count=7), Sample(count=7))
    assert adjust(planned, {"step": 2.0}) == (
        Sample(bits=4, grid=Grid(2.0)),
        Sample(count=1, grid=Grid(2.0)),
    )
    with pytest.raises(OptionError, match="no pass of the recipe takes bits = 5"):
        adjust(planned, {"bits": 5})
    with pytest.raises(OptionError, match="no pass of the recipe has the key 'format'"):
        adjust(planned, {"format": "qdq"})


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_with_defaults_goes_round(name: str) -> None:
    recipe = Recipe((PASSES[name](),))
    assert loads(dump(recipe)) == recipe
