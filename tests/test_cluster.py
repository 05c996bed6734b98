"""Work on other processes: the same numbers whoever dies, one copy of the model, plain errors."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from texts import bind, normal

from calib import callables, cluster, collect, worker
from calib.cluster import AHEAD, Crew, connected
from calib.data import Dataset, InputSpec, Preprocess, open_data, synthesize
from calib.observers import is_equal
from onnxc import api
from onnxc.cli import run
from onnxc.contest import Contest, compared
from onnxc.core import Key
from onnxc.edit import constants
from onnxc.errors import ClusterError, DataError, OptionError
from onnxc.graph import Model, load, to_bytes
from onnxc.moments import moments_keys
from onnxc.request import input_specs
from onnxc.runtime import Runtime

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "digits_cnn.onnx"
DATA = ROOT / "models" / "digits_cnn_calib.npz"
SAMPLES, BATCH = 128, 4  # in four parts
SPEC = InputSpec("x", np.dtype(np.float32), ("N", 3, 8, 8))
FAILURES = {"distributed.scheduler.allowed-failures": 1}  # deaths that one task may survive


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    """Worker processes on this machine; `scale` them, and wait."""
    with dask.config.set(FAILURES), connected(workers=1) as client:
        yield client


def with_workers(client: Any, count: int) -> Any:
    client.cluster.scale(count)
    client.wait_for_workers(count, timeout=60)
    while len(client.nthreads()) > count:
        time.sleep(0.05)
    return client


def digits(samples: int = SAMPLES) -> Dataset:
    return open_data(DATA, input_specs(MODEL), samples=samples)


def changed(model: Model) -> Model:
    """The model with other weights under the same names."""
    for constant in constants(model.graph):
        if constant.values.ndim > 1 and constant.values.dtype == np.float32:
            constant.values = constant.values * np.float32(1.25)
    return model


def gathered(client: Any = None, **options: Any) -> collect.Collected:
    """Every kind of statistic of the digits network."""
    model = load(MODEL)
    moments = list(moments_keys(model.graph).values())[:4]
    names = [t.name for node in model.graph.nodes for t in node.outputs]
    others = [Key(n, what) for n in names for what in ("range", "histogram", "mean", "peak")]
    settings = {"batch": BATCH, "client": client, **options}
    data = settings.pop("data", None) or digits()
    return collect.collect(model, [*moments, *others], data, **settings)


def assert_same(a: collect.Collected, b: collect.Collected) -> None:
    assert a.stats.keys() == b.stats.keys()
    assert len(a.stats) > 20
    assert [k for k in a.stats if not is_equal(a.stats[k], b.stats[k])] == []


@pytest.fixture(scope="module")
def alone() -> collect.Collected:
    """The statistics of one process."""
    return gathered()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bits(
    workers: Any, alone: collect.Collected, count: int
) -> None:
    seen: list[tuple[int, int]] = []
    found = gathered(with_workers(workers, count), progress=lambda *both: seen.append(both))
    assert_same(found, alone)
    assert seen == sorted(seen)
    assert seen[-1] == (SAMPLES, SAMPLES)
    assert any(re.match(rf"[1-{count}] Dask workers? gathered", note) for note in found.notes)


def test_several_threads_give_the_same_bits(workers: Any) -> None:
    options = {"threads": 2, "data": digits(64)}
    assert_same(gathered(with_workers(workers, 2), **options), gathered(**options))


def loaded() -> dict[str, int]:
    from calib.worker import LOADED

    return dict(LOADED)


def jobs_left(dask_worker: Any) -> list[str]:
    return [name for name in dask_worker.plugins if name.startswith("onnxc-")]


def test_the_model_is_unpacked_once_by_each_worker(workers: Any) -> None:
    client = with_workers(workers, 2)
    before = client.run(loaded)
    found = gathered(client, max_memory=1 << 20, data=digits(64))
    assert found.segments > 1
    after = client.run(loaded)
    new = [count for w in after for name, count in after[w].items() if name not in before[w]]
    assert new == [1] * len(new)
    assert 1 <= len(new) <= 2
    assert client.run(jobs_left) == {place: [] for place in after}


def test_a_model_that_only_declares_a_free_batch_is_run_one_by_one(workers: Any) -> None:
    proto = bind(
        """g (float[N,3,8,8] x, int64[2] shape, float[192,4] W) => (float[N,4] y) {
            f = Reshape (x, shape)
            y = MatMul (f, W) }""",
        shape=np.array([1, 192]),
        W=normal(192, 4),
    )
    data = open_data({"x": normal(10, 3, 8, 8)}, [SPEC])
    client = with_workers(workers, 2)
    found = collect.collect(load(proto), [Key("f", "range")], data, batch=5, client=client)
    assert found.batch == 1
    assert any("does not run on 5 samples at once" in note for note in found.notes)


def relu(data: Any, client: Any) -> collect.Collected:
    proto = bind("g (float[N,3,8,8] x) => (float[N,3,8,8] y) { h = Abs (x) y = Relu (h) }")
    opened = data if isinstance(data, Dataset) else open_data(data, [SPEC])
    return collect.collect(load(proto), [Key("h", "mean")], opened, client=client)


def test_an_error_of_the_data_is_told_as_in_one_process(workers: Any, tmp_path: Path) -> None:
    images = normal(80, 3, 8, 8)
    images[70] = np.nan
    for client in (None, with_workers(workers, 2)):
        with pytest.raises(DataError, match=r"sample 70 of .*NaN"):
            relu({"x": images}, client)


def test_data_that_a_worker_cannot_read_names_worker_and_path(workers: Any, tmp_path: Path) -> None:
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, normal(40, 3, 8, 8))
    opened = open_data(tmp_path, [SPEC])
    (tmp_path / "b.npy").rename(tmp_path / "elsewhere")
    text = rf"worker tcp://127.0.0.1:\d+ cannot read {tmp_path}/b.npy: data has to be at"
    with pytest.raises(DataError, match=text):
        relu(opened, with_workers(workers, 2))


def test_an_image_that_turns_out_damaged_is_left_out_by_all(workers: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3))):
        image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number:02d}.png")
    broken = tmp_path / "20.png"
    content = bytearray(broken.read_bytes())
    content[60] ^= 255  # inside the pixels: neither header nor end tells
    broken.write_bytes(content)
    found = []
    for client in (None, with_workers(workers, 2)):
        data = open_data(tmp_path, [SPEC])
        found.append(relu(data, client).stats[Key("h", "mean")])
        assert any("20.png" in note for note in data.notes)
    assert is_equal(*found)
    assert found[0].count == 69 * 3 * 8 * 8


# --- the mechanism


def twice(job: int, item: int) -> int:
    return 2 * job * item


def die(job: int, item: int) -> None:
    os._exit(1)


def test_results_come_in_order_and_few_tasks_are_under_way(workers: Any) -> None:
    client = with_workers(workers, 2)
    taken: list[int] = []
    items = (taken.append(i) or i for i in range(40))  # type: ignore[func-returns-value]
    for done, result in enumerate(Crew(client).each(twice, 3, items)):
        assert result == 6 * done
        assert len(taken) <= done + 1 + AHEAD * 2


def test_a_worker_with_another_onnxc_is_refused(
    workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = with_workers(workers, 2)
    monkeypatch.setattr(worker, "versions", lambda: {"onnxc": "9.9"})
    with pytest.raises(ClusterError, match=r"worker tcp\S+ has onnxc .*: install onnxc 9\.9 on it"):
        list(Crew(client).each(twice, 0, [0]))


def test_quantize_writes_the_same_file(workers: Any, tmp_path: Path) -> None:
    files = []
    settings = api.QuantizeSettings(format="qdq", ranges="minmax")
    for client in (None, with_workers(workers, 2)):
        output = tmp_path / f"{client is None}.onnx"
        found = api.quantize(
            MODEL, data=DATA, output=output, settings=settings, samples=40, client=client
        )
        assert any("Dask worker" in note for note in found.notes) == (client is not None)
        files.append(output.read_bytes())
    assert files[0] == files[1]


def test_candidates_are_compared_by_workers_as_they_are_here(workers: Any) -> None:
    contest = Contest(
        to_bytes(load(MODEL)),
        {name: to_bytes(changed(load(MODEL))) for name in ("a", "b")},
        digits(20),
        Runtime(),
        batch=4,
    )
    here = list(compared(contest, None))
    assert list(compared(contest, with_workers(workers, 2))) == here
    assert here[0].sqnr < 60


# --- workers that die: last, for each has to be started anew


def test_a_worker_killed_half_way_takes_nothing_with_it(
    workers: Any, alone: collect.Collected
) -> None:
    client = with_workers(workers, 2)
    victims = list(client.run(os.getpid).values())[:1]

    def kill(done: int, total: int) -> None:
        if done >= total // 3 and victims:
            os.kill(victims.pop(), signal.SIGKILL)

    found = gathered(client, progress=kill)
    assert not victims
    assert_same(found, alone)
    assert any("1 worker was lost (tcp://127.0.0.1:" in note for note in found.notes), found.notes


class Unreadable:
    """A job that a worker cannot unpack."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return fail, (self.error,)


def fail(error: BaseException, item: int = 0) -> None:
    raise error


@pytest.mark.parametrize("error", [AttributeError("gone"), SystemExit(3), MemoryError()])
@pytest.mark.parametrize("where", ["job", "task"])
def test_what_goes_wrong_in_a_worker_is_one_sentence(
    workers: Any, error: BaseException, where: str
) -> None:
    function, job = (twice, Unreadable(error)) if where == "job" else (fail, error)
    with pytest.raises(ClusterError, match=rf"worker tcp\S+: {type(error).__name__}: "):
        list(Crew(workers).each(function, job, [0, 1]))  # type: ignore[arg-type]


def test_a_task_that_kills_every_worker_ends_in_a_sentence(workers: Any) -> None:
    client = with_workers(workers, 2)
    with pytest.raises(ClusterError, match="took down 2 workers, the last at tcp"):
        list(Crew(client).each(die, 0, [0]))
    assert list(Crew(with_workers(workers, 2)).each(twice, 1, [1])) == [2]


def test_without_any_worker_the_work_is_given_up(
    workers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    workers.cluster.scale(0)
    while workers.nthreads():
        time.sleep(0.05)
    with pytest.raises(ClusterError, match="has no workers any more"):
        list(Crew(workers).each(twice, 0, [0]))


# --- what travels


def yields() -> Iterator[np.ndarray[Any, Any]]:
    yield from normal(6, 3, 8, 8)


def opened(kind: str, folder: Path) -> Dataset:
    """Data of each kind, given by relative paths."""
    images = normal(6, 3, 8, 8)
    if kind == "images":
        image = pytest.importorskip("PIL.Image")
        image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "a.png")
        return open_data(".", [SPEC], Preprocess())
    if kind in ("npy", "npz"):
        np.savez("a.npz", x=images) if kind == "npz" else np.save("a.npy", images)
        return open_data(f"a.{kind}", [SPEC])
    if kind == "callable":
        return open_data(yields, [SPEC])
    if kind == "made up":
        return synthesize([SPEC], 3)
    return open_data({"x": images, "labels": np.arange(6)}, [SPEC])


@pytest.mark.parametrize("kind", ["images", "npy", "npz", "callable", "made up", "dict"])
def test_data_travel_to_a_process_in_another_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = opened(kind, tmp_path)
    list(data.batches(2))  # what was read does not travel
    expected, sent = data.fingerprint(), pickle.dumps(data)
    assert kind in ("callable", "dict") or len(sent) < 4000
    monkeypatch.chdir("/")
    assert pickle.loads(sent).fingerprint() == expected


def test_a_function_that_yields_too_much_to_send_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(callables, "MOST", 1000)
    with pytest.raises(DataError, match=r"save them as \.npz"):
        pickle.dumps(open_data(yields, [SPEC]))


# --- the command line


def start(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("env", {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def calibrate(output: Path, *options: str) -> tuple[str, ...]:
    return ("calibrate", str(MODEL), "--data", str(DATA), "-o", str(output), *options)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def address_of(scheduler: subprocess.Popen[str]) -> str:
    assert scheduler.stderr is not None
    for line in scheduler.stderr:
        found = re.search(r"Scheduler at:\s+(tcp://\S+)", line)
        if found:
            return found[1]
    raise AssertionError("the scheduler does not start")


@pytest.fixture
def scheduler() -> Iterator[str]:
    """A scheduler and two workers, each an operating-system process of its own."""
    quiet = ("--no-dashboard", "--host", "127.0.0.1")
    first = start("-m", "dask", "scheduler", *quiet, "--port", "0")
    address = address_of(first)
    silent = {"DASK_LOGGING__DISTRIBUTED": "critical"}
    options = (*quiet, "--nthreads", "1", "--no-nanny")
    others = [start("-m", "dask", "worker", address, *options, env=silent) for _ in range(2)]
    yield address
    for process in (*others, first):
        process.terminate()
        process.communicate(timeout=30)


def test_a_scheduler_elsewhere_gives_the_same_file(scheduler: str, tmp_path: Path) -> None:
    both = (tmp_path / "a.stats", tmp_path / "b.stats")
    code, output, errors = finished(
        start("-m", "onnxc", *calibrate(both[0], "--scheduler", scheduler))
    )
    assert (code, errors) == (0, "")
    assert re.search(r"[12] Dask workers? gathered", output)
    assert run(calibrate(both[1])) == 0
    assert both[0].read_bytes() == both[1].read_bytes()


def test_a_scheduler_that_does_not_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "CONNECT", 0.5)
    begin = time.monotonic()
    assert run(calibrate(tmp_path / "a", "--scheduler", "tcp://127.0.0.1:9")) == 2
    assert re.fullmatch(r"Error: no Dask scheduler answers at tcp.*\n", capsys.readouterr().err)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("address", ["nowhere", "gopher://here:1", "tcp://here"])
def test_what_is_no_address_is_one_sentence(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(calibrate(tmp_path / "a", "--scheduler", address)) == 2
    assert re.fullmatch(rf"Error: --scheduler {address} is not.*\n", capsys.readouterr().err)


def test_without_dask_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    text = r'needs Dask: pip install "onnxc\[dask\]"'
    with pytest.raises(OptionError, match=text), connected(workers=2):
        pass


def test_workers_and_a_scheduler_are_too_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ("--workers", "2", "--scheduler", "tcp://127.0.0.1:9")
    assert run(calibrate(tmp_path / "a", *both)) == 2
    assert "give one" in capsys.readouterr().err


READY = """
import signal
import sys
import time
from calib.cluster import Crew
from onnxc.cli import main

submit = Crew._submit

def ready(self, *rest):
    submit(self, *rest)
    pids = self.client.run(__import__("os").getpid).values()
    print(*pids, flush=True)
    time.sleep(60)  # until the signal comes, however fast the workers are

Crew._submit = ready
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups to signal")
def test_ctrl_c_ends_the_workers_and_leaves_nothing(tmp_path: Path) -> None:
    program, temporary = tmp_path / "program.py", tmp_path / "temporary"
    program.write_text(READY)
    temporary.mkdir()
    options = calibrate(tmp_path / "a.stats", "--workers", "2")
    process = start(
        *(str(program), *options), env={"TMPDIR": str(temporary)}, start_new_session=True
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    code, _, errors = finished(process)
    assert (code, errors) == (130, "Interrupted; no partial file was left.\n")
    left = [p.name for p in tmp_path.rglob("*") if p.is_file() and p.name != ".ses"]
    assert left == ["program.py"]
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
