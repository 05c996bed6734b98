"""What a Dask worker keeps and does for `calib.cluster`: the job of a plugin, and a task on it."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from threading import Lock
from typing import Any

from distributed import WorkerPlugin, get_worker

from onnxc.errors import ClusterError, OnnxcError

LIBRARIES = ("onnxc", "onnxruntime", "numpy")  # of other versions they may round differently
LOADED: Counter[str] = Counter()  # how often this process unpacked each job


@dataclass(frozen=True)
class Outcome:
    """The value of a task or what it raised, and where; odd: versions that are not the client's."""

    worker: str
    odd: str
    value: Any = None
    error: OnnxcError | None = None


class Job(WorkerPlugin):  # type: ignore[misc]
    """A job as it travels, unpacked by the first task that needs it."""

    def __init__(self, content: bytes) -> None:
        self.content, self.versions = content, versions()

    def setup(self, worker: Any) -> None:
        self._turn = Lock()
        self._job: Any = None
        self.address = str(worker.address)

    def teardown(self, worker: Any) -> None:
        close = getattr(self._job, "close", None)
        if close is not None:
            close()
        self.content, self._job = b"", None

    def unpacked(self, name: str) -> Any:
        """The job; the threads of a worker share one."""
        with self._turn:
            if self._job is None:
                LOADED[name] += 1
                self._job, self.content = pickle.loads(self.content), b""
            return self._job


def perform(name: str, function: Callable[[Any, Any], Any], item: Any) -> Outcome:
    """A task: function(job, item) with the job of that name.

    Whatever goes wrong is told to the client, which would wait for ever for a task that ends
    with SystemExit, and knows no place in our code to look at for the rest.
    """
    plugin = get_worker().plugins[name]
    mine = versions()
    odd = ", ".join(f"{n} {v}" for n, v in mine.items() if plugin.versions[n] != v)
    try:
        return Outcome(plugin.address, odd, function(plugin.unpacked(name), item))
    except OnnxcError as error:
        return Outcome(plugin.address, odd, error=error)
    except BaseException as error:  # noqa: BLE001
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome(plugin.address, odd, error=ClusterError(f"worker {plugin.address}: {told}"))


def versions() -> dict[str, str]:
    """Versions of the libraries that numbers depend on."""
    return {name: version(name) for name in LIBRARIES}
