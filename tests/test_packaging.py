"""What is installed, how it starts, and what hides it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from oldest import constraints

import onnxc
from onnxc.recipe import shipped

ROOT = Path(onnxc.__file__).resolve().parents[1]
PACKAGES = ("onnxc", "passes", "calib")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(*arguments: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process that finds our packages, after those in the folder `first`."""
    places = [str(p) for p in (first, ROOT) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, cwd=first, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as an sdist holds them, and `dist` with a wheel built from these."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building the wheel offline needs setuptools 77 or newer")
    copy = tmp_path_factory.mktemp("source")
    for folder in (*PACKAGES, "tests", "models"):
        ignored = shutil.ignore_patterns("__pycache__", "*.npz")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in (p for p in ROOT.iterdir() if p.suffix in (".toml", ".md") or p.name == "LICENSE"):
        shutil.copy(file, copy)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = python("-c", code, first=copy)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(copy.glob("dist/*.tar.gz"))) as archive:
        archive.extractall(copy / "sdist", filter="data")
    (source,) = (copy / "sdist").iterdir()
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    done = python("-m", "pip", "wheel", str(source), *options, "-w", str(source / "dist"))
    assert done.returncode == 0, done.stderr
    return source


@pytest.fixture(scope="module")
def wheel(built: Path) -> list[str]:
    """Names of the files in the wheel."""
    (path,) = built.glob("dist/onnxc-*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_sdist_holds_what_the_repository_does(built: Path) -> None:
    for name in PACKAGES:
        mine, theirs = (
            {p.relative_to(top) for p in (top / name).rglob("*") if "__pycache__" not in p.parts}
            for top in (ROOT, built)
        )
        assert theirs == mine
    assert (built / "LICENSE").is_file()


def test_an_installed_wheel_works_far_from_the_repository(built: Path, tmp_path: Path) -> None:
    target, model = tmp_path / "installed", ROOT / "models" / "digits_cnn.onnx"
    with zipfile.ZipFile(next(built.glob("dist/onnxc-*.whl"))) as archive:
        archive.extractall(target)
    settings = {"env": {**os.environ, "PYTHONPATH": str(target)}, "cwd": tmp_path}
    code = (
        "import sys; from onnxc import cli, schema; from onnxc.recipe import shipped\n"
        "names = sorted(shipped())\n"
        "recipe = ['--recipe', names[0]] if len(sys.argv) == 2 else []\n"
        "codes = [cli.run(['quantize', sys.argv[1], '--format', 'weight-only', '--quiet', "
        "'-o', 'out.onnx', '--html', 'page.html'])]\n"
        "codes.append(cli.run(['quantize', sys.argv[1], *recipe, '--dry-run', '--quiet']))\n"
        "print(cli.__file__, len(names), *codes)"
    )
    command = [sys.executable, "-c", code, str(model)]
    done = subprocess.run(command, **settings, capture_output=True, text=True, check=False)  # type: ignore[call-overload]
    assert done.stderr == ""
    count = len(shipped())
    assert done.stdout.split() == [str(target / "onnxc" / "cli.py"), str(count), "0", "0"]
    assert (tmp_path / "out.onnx").stat().st_size > 1000
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_wheel_holds_our_packages_and_nothing_else(wheel: list[str]) -> None:
    modules = {p.relative_to(ROOT).as_posix() for name in PACKAGES for p in sources(ROOT / name)}
    recipes = {f"onnxc/recipes/{path.name}" for path in shipped().values()}
    templates = {f"onnxc/html/templates/{name}" for name in ("page.html", "style.css")}
    files = {name for name in wheel if ".dist-info/" not in name}
    others = recipes | templates | {f"{name}/py.typed" for name in PACKAGES}
    assert recipes and files == modules | others


def test_the_wheel_holds_the_license_and_the_command(wheel: list[str]) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert any(name.endswith("entry_points.txt") for name in wheel)


def sources(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*.py") if "__pycache__" not in p.parts]


def test_every_package_is_listed() -> None:
    found = {p.parent for name in PACKAGES for p in sources(ROOT / name)}
    names = {".".join(p.relative_to(ROOT).parts) for p in found}
    assert names == set(SETTINGS["tool"]["setuptools"]["packages"])


def test_the_version_is_that_of_the_project() -> None:
    assert onnxc.__version__ == SETTINGS["project"]["version"]


def test_the_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_python_m_onnxc() -> None:
    done = python("-m", "onnxc", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"onnxc {onnxc.__version__}")


def test_import_alone_is_quick_and_lazy() -> None:
    code = (
        "import sys, time; a = time.process_time(); import onnxc; b = time.process_time();"
        "heavy = {'onnxruntime', 'onnx', 'numpy', 'rich', 'click'} & set(sys.modules);"
        "print(b - a, sorted(heavy))"
    )
    runs = [python("-c", code).stdout.split(maxsplit=1) for _ in range(5)]
    assert {heavy.strip() for _, heavy in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.1


def test_the_facade_offers_the_functions_of_the_api() -> None:
    from onnxc import api, errors

    for name in set(onnxc.__all__) - {"__version__"}:
        assert getattr(onnxc, name) is getattr(errors if name.endswith("Error") else api, name)
    assert set(api.__all__) <= set(dir(onnxc))
    with pytest.raises(AttributeError, match="quantise"):
        _ = onnxc.quantise


def test_the_facade_is_the_same_for_readers_of_types() -> None:
    tree = ast.parse((ROOT / "onnxc" / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    names = {a.name for n in ast.walk(guarded) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert names == set(onnxc.__all__) - {"__version__"}


@pytest.mark.parametrize("name", ["passes", "calib"])
@pytest.mark.parametrize("kind", ["package", "module", "folder"])
def test_a_package_that_hides_ours_is_named(tmp_path: Path, name: str, kind: str) -> None:
    place = tmp_path / (f"{name}.py" if kind == "module" else name)
    if kind != "module":
        place.mkdir()
        place = place / ("__init__.py" if kind == "package" else "notes.txt")
    place.write_text("")
    done = python("-m", "onnxc", "inspect", "model.onnx", first=tmp_path)
    if kind == "folder":  # a folder without __init__.py hides nothing
        assert "needs its own package" not in done.stderr
        return
    assert done.returncode == 2
    assert f"onnxc needs its own package {name!r}" in done.stderr
    assert str(tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1
    done = python("-c", "import onnxc; onnxc.load", first=tmp_path)
    assert f"ImportError: onnxc needs its own package {name!r}" in done.stderr


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test", "check", "nightly", "bench"])
def test_every_target_sets_up_its_environment(target: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = ["make", "--dry-run", target]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "-m venv .venv" in done.stdout
    assert "pip install" in done.stdout
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for stamp in ("bin/python", ".installed-all", ".installed-dev"):
        (tmp_path / ".venv" / stamp).touch()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "pip install" not in again.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_matrix_is_of_both_ends() -> None:
    command = ["make", "--dry-run", "--always-make", "test-matrix"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for end in ("oldest", "newest"):
        assert f"tests/oldest.py {end} > .venv-{end}/constraints.txt" in done.stdout
        assert f".venv-{end}/bin/python -m pip install" in done.stdout
    assert "tests/fresh.py" in done.stdout


def test_the_oldest_of_everything_is_what_the_project_says() -> None:
    pinned = dict(line.split("==") for line in constraints("oldest"))
    lines = [*SETTINGS["project"]["dependencies"]]
    for group in SETTINGS["project"]["optional-dependencies"].values():
        lines += [line for line in group if not line.startswith("onnxc[")]
    assert len(lines) > 20
    for line in lines:
        name, bound = line.split(">=")
        assert pinned[name] == bound.split(",")[0]
    assert constraints("newest") == []
