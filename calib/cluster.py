"""Independent tasks on the workers of a Dask cluster; their results come in the order of the tasks.

    Crew(client).each(function, job, items)    ==    (function(job, item) for item in items)

* The **job** (a model with its data) travels once to each worker. The scheduler keeps it, as a
  plugin, until all is done: a worker that joins later or is started again gets it too, even when
  all that had it are gone.
* **Items** are small. At most AHEAD of them are under way for each thread of the workers; a result
  is fetched when its turn has come, and then its worker forgets it.
* What is folded over the results is therefore the same, to the last bit, however many workers there
  are and whichever is faster.
* When a worker dies, what it was doing and what it still held is done again by the others. A task
  that takes down several workers ends in a ClusterError.
* An OnnxcError of a task is a result too, and is raised here as it is.

`distributed` is an optional dependency, so it is imported when a cluster is asked for.
"""

from __future__ import annotations

import logging
import pickle
import re
import signal
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, TypeVar

from onnxc.errors import ClusterError, ModelError, OptionError
from onnxc.files import TemporaryFolder

if TYPE_CHECKING:
    from distributed import Client, Future

J = TypeVar("J")
I = TypeVar("I")  # noqa: E741
R = TypeVar("R")

ADDRESS = re.compile(r"((tcp|tls|ws|wss|ucx)://)?(\[[\da-fA-F:]+\]|[\w.-]+):\d{1,5}")
AHEAD = 3  # tasks under way for each thread: a slow one does not keep the others waiting
CONNECT = 5.0  # seconds for a scheduler to answer
PATIENCE = 30.0  # seconds without any worker before the work is given up
POLL = 1.0  # seconds between two looks at the workers


def library() -> Any:
    """The package `distributed`; OptionError names the extra to install."""
    try:
        import distributed
    except ImportError as error:
        raise OptionError('working on a cluster needs Dask: pip install "onnxc[dask]"') from error
    return distributed


@contextmanager
def connected(scheduler: str | None = None, workers: int | None = None) -> Iterator[Client | None]:
    """A client of the scheduler at that address, or of so many worker processes on this machine.

    None where neither is asked for. Workers that were started here end with the block. Raises
    ClusterError where nothing answers, or nothing works, at the address.
    """
    if scheduler is None and workers is None:
        yield None
        return
    if scheduler is not None and not ADDRESS.fullmatch(scheduler):
        raise OptionError(f"--scheduler {scheduler} is not an address like tcp://10.0.0.1:8786")
    distributed = library()
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        address: Any = scheduler
        if workers is not None:
            folder = stack.enter_context(TemporaryFolder())
            address = stack.enter_context(_closing(_local(distributed, workers, folder)))
        yield stack.enter_context(_closing(_client(distributed, address)))


def _local(distributed: Any, workers: int, folder: str) -> Any:
    """Processes of one thread, reachable from this machine alone.

    Memory is bounded by the plan of the work, so Dask neither spills nor stops anything.
    """
    import dask

    with _deaf(), dask.config.set({"temporary-directory": folder}):
        return distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            memory_limit=0,
            dashboard_address=None,
            local_directory=folder,
            silence_logs=logging.CRITICAL,
        )


@contextmanager
def _deaf() -> Iterator[None]:
    """Threads and processes that come from the block do not hear Ctrl-C: this one ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # where it has to start, it unblocks the signal
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextmanager
def _closing(opened: Any) -> Iterator[Any]:
    """Close at the end; Dask stumbles over workers that died, when all has been ended already."""
    try:
        yield opened
    finally:
        with suppress(KeyError, OSError, RuntimeError):
            opened.close()


def _client(distributed: Any, address: Any) -> Client:
    try:
        client: Client = distributed.Client(
            address, timeout=CONNECT, set_as_default=False, direct_to_workers=True
        )
    except (OSError, ValueError, RuntimeError) as error:  # TimeoutError is an OSError
        raise ClusterError(
            f"no Dask scheduler answers at {address}: start one there with dask scheduler"
        ) from error
    try:
        client.wait_for_workers(1, timeout=CONNECT)
    except TimeoutError as error:
        client.close()
        raise ClusterError(f"{_nobody(client)}: start some with dask worker") from error
    return client


def _nobody(client: Client) -> str:
    return f"the Dask scheduler at {client.scheduler.address} has no workers"


@contextmanager
def _quiet() -> Iterator[None]:
    """Dask logs every lost connection; what a user has to know is in errors and notes."""
    former = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="distributed")
            yield
    finally:
        logging.disable(former)


@dataclass
class Crew:
    """The workers behind a client, and what the report should say of them.

    took_part, seen: addresses. odd: versions of libraries by address, where they are not ours.
    """

    client: Client
    took_part: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    odd: dict[str, str] = field(default_factory=dict)

    def each(self, function: Callable[[J, I], R], job: J, items: Iterable[I]) -> Iterator[R]:
        """function(job, item) for each item, in order; `function` is one of a module.

        Raises what a task raises, and ClusterError where no worker is left to do it.
        """
        waiting: deque[Future[Any]] = deque()
        numbered = enumerate(items)
        with self._sent(job) as name:
            try:
                self._submit(name, function, numbered, waiting)
                while waiting:
                    outcome = self._result(waiting[0])
                    waiting.popleft()
                    self._submit(name, function, numbered, waiting)
                    yield outcome
            finally:
                with suppress(OSError, RuntimeError):  # the scheduler may be gone
                    self.client.cancel(list(waiting), force=True)

    @property
    def count(self) -> int:
        """Threads of the workers, one at least."""
        return max(1, sum(self._threads().values()))

    @property
    def notes(self) -> tuple[str, ...]:
        """Who took part, who was lost, and who may round differently."""
        count = len(self.took_part)
        notes = [f"{count} Dask worker{'s' * (count > 1)} gathered the statistics"]
        lost = self.seen - set(self._threads())
        if lost:
            names = f"{len(lost)} worker{'s were' if len(lost) > 1 else ' was'} lost"
            notes.append(f"{names} ({', '.join(sorted(lost))}); the others did its work again")
        for worker, versions in sorted(self.odd.items()):
            notes.append(f"worker {worker} has {versions}: its last digits may differ from ours")
        return tuple(notes)

    @contextmanager
    def _sent(self, job: Any) -> Iterator[str]:
        """The job is on all workers, and on those to come, as a plugin of that name."""
        from calib.worker import Job

        name = f"onnxc-{uuid.uuid4().hex}"
        try:
            content = pickle.dumps(job, protocol=5)
        except ValueError as error:  # protobuf ends at 2 GiB
            raise ModelError("the model is too large to send to workers") from error
        with self._told():
            self._check_versions()
            self.client.register_plugin(Job(content), name=name)
        del content
        try:
            yield name
        finally:
            with suppress(OSError, RuntimeError, ValueError):  # the scheduler may be gone
                self.client.unregister_worker_plugin(name)

    def _check_versions(self) -> None:
        """Raise ClusterError where a worker has no onnxc, or another one than this."""
        from calib.worker import versions

        mine = versions()["onnxc"]
        for worker, found in self.client.run(version, "onnxc", on_error="return").items():
            if found != mine:
                has = f"onnxc {found}" if isinstance(found, str) else "no onnxc"
                raise ClusterError(f"worker {worker} has {has}: install onnxc {mine} on it")

    def _submit(
        self,
        name: str,
        function: Callable[..., Any],
        numbered: Iterator[tuple[int, Any]],
        waiting: deque[Future[Any]],
    ) -> None:
        from calib.worker import perform

        threads = max(sum(self._threads().values()), 1)
        for number, item in islice(numbered, max(AHEAD * threads - len(waiting), 0)):
            future = self.client.submit(
                *(perform, name, function, item),
                key=f"{name}-{number}",
                priority=-number,
                pure=False,
            )
            waiting.append(future)

    def _result(self, future: Future[Any]) -> Any:
        with self._told():
            self._wait(future)
            outcome = future.result()
        self.took_part.add(outcome.worker)
        if outcome.odd:
            self.odd[outcome.worker] = outcome.odd
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def _wait(self, future: Future[Any]) -> None:
        """Until it is done; not for ever where there is nobody to do it."""
        end = time.monotonic() + PATIENCE
        while True:
            with suppress(TimeoutError), self.client.as_current():
                library().wait(future, timeout=POLL)
                return
            if self._threads():
                end = time.monotonic() + PATIENCE
            elif time.monotonic() > end:
                raise ClusterError(f"{_nobody(self.client)} any more: the work was given up")

    def _threads(self) -> dict[str, int]:
        """Threads of the workers that are there, by address."""
        with self._told():
            threads: dict[str, int] = self.client.nthreads()
        self.seen |= threads.keys()
        return threads

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Dask's own errors in a user's words."""
        distributed = library()
        try:
            yield
        except distributed.KilledWorker as error:
            raise ClusterError(
                f"a part of the work took down {error.allowed_failures + 1} workers, the last at "
                f"{error.last_worker.address}: they may lack memory; try a smaller --max-memory"
            ) from error
        except ImportError as error:
            raise ClusterError(
                f"a worker or the scheduler cannot import {error.name}: "
                "install the same onnxc on every machine of the cluster"
            ) from error
        except RuntimeError as error:
            if "deserialization of the task graph" not in str(error):
                raise
            raise ClusterError(
                "the Dask scheduler has no onnxc, or another one: install the same on every machine"
            ) from error
        except (distributed.CancelledError, distributed.core.CommClosedError) as error:
            place = self.client.scheduler.address if self.client.scheduler else "its address"
            raise ClusterError(f"the Dask scheduler at {place} is gone") from error
