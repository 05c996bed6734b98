"""Builds the wheel and the sdist, and installs each into an environment that holds nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import onnx

ROOT = Path(__file__).resolve().parents[1]
MODEL, DATA = (ROOT / "models" / name for name in ("digits_cnn.onnx", "digits_cnn_calib.npz"))
BUILD = "from setuptools import build_meta as b; print(b.build_sdist({0!r}), b.build_wheel({0!r}))"
SOURCES = ("onnxc", "passes", "calib", "pyproject.toml", "README.md", "LICENSE")


def build(source: Path, dist: Path) -> list[Path]:
    """The sdist and the wheel, built from a copy of the sources."""
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-c", BUILD.format(str(dist))]
    subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL)
    return sorted(dist.iterdir())


def check(built: Path, folder: Path) -> None:
    """Install what was built, and quantize the demo model from elsewhere."""
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", str(built)]
    subprocess.run(install, check=True)
    onnxc, output = folder / "bin" / "onnxc", folder / "out.onnx"
    options = ("--samples", "32", "-o", str(output), "--quiet")
    for arguments in (["--help"], ["quantize", str(MODEL), "--data", str(DATA), *options]):
        subprocess.run([onnxc, *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    recipe = ("quantize", str(MODEL), "--recipe", "fastest-cpu", "--dry-run", "--quiet")
    subprocess.run([onnxc, *recipe], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    onnx.checker.check_model(output)
    sys.stdout.write(f"{built.name}: installed, and quantized the demo model\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for number, built in enumerate(build(Path(place) / "source", Path(place) / "dist")):
            check(built, Path(place) / f"fresh{number}")
