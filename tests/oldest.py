"""Prints constraints for pip: the oldest release that pyproject.toml allows of each package.

python tests/oldest.py oldest    numpy==1.26 and so on
python tests/oldest.py newest    nothing: pip takes the newest that is allowed
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
BOUND = re.compile(r"([\w.-]+)>=([\w.]+)")


def constraints(end: str, project: Path = PROJECT) -> list[str]:
    """Lines of a constraints file. end: "oldest" or "newest"."""
    if end == "newest":
        return []
    found = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    groups = [found["dependencies"], *found["optional-dependencies"].values()]
    bounds = (BOUND.match(line) for group in groups for line in group)
    return sorted({f"{bound[1]}=={bound[2]}" for bound in bounds if bound})


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in constraints(sys.argv[1]))
