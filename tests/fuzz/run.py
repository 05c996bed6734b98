"""Feed every reader of files with random bytes for a while: `make fuzz`, FUZZ_SECONDS for longer.

    python tests/fuzz/run.py [TARGET…]      all targets, in turn, in processes of their own
    python tests/fuzz/run.py --only TARGET FOLDER OPTIONS…      one, with options of libFuzzer

A finding stops its target and leaves the input in FUZZ_FOLDER (.fuzz), which `make fuzz` names; it
belongs into tests/test_fuzz.py, with the mend. Memory is bounded to 1 GB, an input to 10 s.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
MEMORY, TIMEOUT, LARGEST = 1024, 10, 1 << 20  # MB · seconds · bytes of an input
READ = ("onnxc", "calib", "passes", "tomllib", "zipfile", "PIL")  # what coverage guides


def main(names: list[str]) -> int:
    from targets import TARGETS

    chosen = names or list(TARGETS)
    seconds = float(os.environ.get("FUZZ_SECONDS", SECONDS)) / len(chosen)
    home = Path(os.environ.get("FUZZ_FOLDER", ROOT / ".fuzz"))
    failed = [name for name in chosen if not _apart(name, home / name, seconds)]
    print(f"findings: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _apart(name: str, folder: Path, seconds: float) -> bool:
    """Fuzz one target in a process of its own; whether nothing was found."""
    from targets import TARGETS

    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        for number, seed in enumerate(TARGETS[name].seeds(Path(made))):
            (corpus / f"seed_{number}").write_bytes(seed)
    options = [
        *(f"-max_total_time={max(1, round(seconds))}", f"-rss_limit_mb={MEMORY}"),
        *(f"-timeout={TIMEOUT}", f"-max_len={LARGEST}", f"-artifact_prefix={folder}/"),
        *("-print_final_stats=1", "-report_slow_units=5"),
    ]
    start = time.monotonic()
    command = [sys.executable, __file__, "--only", name, str(corpus), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    told = done.stdout + done.stderr
    (folder / "log.txt").write_text(told)
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", told))
    print(
        f"{name:11} {stats.get('number_of_executed_units', '?'):>8} inputs in "
        f"{time.monotonic() - start:.0f} s, peak {stats.get('peak_rss_mb', '?')} MB, "
        f"{'good' if done.returncode == 0 else f'FOUND: see {folder}'}",
        flush=True,
    )
    return done.returncode == 0


def only(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process."""
    import atheris

    with atheris.instrument_imports(include=list(READ), enable_loader_override=False):
        from targets import TARGETS, outcome

    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix="onnxc-fuzz-"))
    for _ in target.seeds(folder):
        pass

    def once(data: bytes) -> None:
        outcome(target, data, folder)

    def changed(data: bytes, most: int, seed: int) -> bytes:
        assert target.change is not None
        if seed % 4 == 0:
            return bytes(atheris.Mutate(data, most))
        return target.change(data, most, seed)

    how = {} if target.change is None else {"custom_mutator": changed}
    atheris.Setup([sys.argv[0], *arguments], once, **how)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    if sys.argv[1:2] == ["--only"]:
        only(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main(sys.argv[1:]))
