"""Any number of workers, killed at any moment: the same data set, bit for bit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from threadpoolctl import threadpool_info

import fisherprint as fp
from fisherprint import _threads, cli, experiment, files, simulate
from fisherprint.parameters import paper_prior
from fisherprint.reconstruct import encoding, lowrank, solve, toeplitz
from fisherprint.simulate import SHARD, SPLITS, Simulation, dataset

# Three shards to train with, one of them not full, and one of each other split.
SIZES = {"training": 2 * SHARD + 100, "validation": 70, "test": 64}
ARRAYS = ("theta", "coefficients", "crb_signal", "crb_coefficients", "information")

pytestmark = [
    # What Dask leaves to the garbage collector while a cluster closes.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def model(short_train: fp.PulseTrain) -> fp.TwoPool:
    return fp.TwoPool(short_train)


@pytest.fixture(scope="module")
def prior(model: fp.TwoPool) -> fp.Prior:
    return paper_prior(model.names, repetition_time=3.5e-3)


@pytest.fixture(scope="module")
def reference(model: fp.TwoPool, prior: fp.Prior) -> simulate.DataSet:
    """By one worker."""
    with ThreadPoolExecutor(1) as executor:
        return dataset(model, prior, SIZES, basis=9, seed=3, executor=executor)


def assert_identical(got: simulate.DataSet, expected: simulate.DataSet) -> None:
    assert got.names == expected.names
    assert got.energy == expected.energy
    np.testing.assert_array_equal(got.basis.vectors, expected.basis.vectors)
    for split in SPLITS:
        for name in ARRAYS:
            np.testing.assert_array_equal(
                getattr(got.samples[split], name), getattr(expected.samples[split], name)
            )


class Backwards(Executor):
    """One worker that takes the latest task first: completion in another order."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Future, object, tuple]] = []

    def submit(self, function, /, *args, **options):
        future = LazyFuture(self)
        self.tasks.append((future, function, args))
        return future

    def work(self) -> None:
        while self.tasks:
            future, function, args = self.tasks.pop()
            future.set_result(function(*args))


class LazyFuture(Future):
    def __init__(self, executor: Backwards) -> None:
        super().__init__()
        self._executor = executor

    def result(self, timeout=None):
        self._executor.work()
        return super().result(timeout)


@pytest.mark.parametrize("n_workers", [2, 3])
def test_local_threads(model, prior, reference, n_workers) -> None:
    with ThreadPoolExecutor(n_workers) as executor:
        assert_identical(
            dataset(model, prior, SIZES, basis=9, seed=3, executor=executor), reference
        )


def blas_threads() -> set[int]:
    return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}


def test_linear_algebra_in_a_worker_has_one_thread() -> None:
    before = blas_threads()
    barrier = threading.Barrier(2)

    def worker(first: bool) -> list[set[int]]:
        seen = []
        with _threads.one_thread():
            assert _threads.usable() == 1
            seen.append(blas_threads())
            barrier.wait()
            if first:
                return seen  # the other one is still inside
            time.sleep(0.1)
            seen.append(blas_threads())
        return seen

    for _ in range(2):  # in threads that are others each time
        with ThreadPoolExecutor(2) as executor:
            results = list(executor.map(worker, [True, False]))
        assert all(number == {1} for seen in results for number in seen)
        assert blas_threads() == before


def test_all_cores_by_default(model, prior, reference) -> None:
    assert_identical(dataset(model, prior, SIZES, basis=9, seed=3), reference)


def test_another_order_of_completion(model, prior, reference, monkeypatch) -> None:
    def finish(pending, return_when):
        next(iter(pending)).result()
        return type("Done", (), {"done": list(pending)[::-1]})

    monkeypatch.setattr(simulate, "wait", finish)
    orders = []
    got = dataset(
        model,
        prior,
        SIZES,
        basis=reference.basis,
        seed=3,
        executor=Backwards(),
        progress=lambda what, done, total: orders.append(what),
    )
    assert orders[0] == "fingerprints for test"
    assert_identical(got, reference)


def test_processes(model, prior, reference) -> None:
    # A fresh interpreter each, as on another machine: model and prior travel as pickles.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        assert_identical(
            dataset(model, prior, SIZES, basis=9, seed=3, executor=executor), reference
        )


def test_an_error_of_a_worker_is_the_callers_and_nothing_runs_on(model, prior) -> None:
    class Failing(fp.TwoPool):
        calls = 0

        def simulate(self, theta):
            Failing.calls += 1
            raise ZeroDivisionError("of a user's model")

    sizes = SIZES | {"training": 40 * SHARD}
    broken = Failing(model.train)
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(ZeroDivisionError, match="of a user's model"),
    ):
        dataset(broken, prior, sizes, basis=fp.Basis(np.eye(40, 4)), seed=0, executor=executor)
    # The others were cancelled before they began, but for one that may have begun meanwhile.
    assert Failing.calls <= 2


def test_few_results_pile_up(model, prior) -> None:
    largest = 0

    class Counting(ThreadPoolExecutor):
        def submit(self, *args, **options):
            nonlocal largest
            largest = max(largest, self._work_queue.qsize())
            return super().submit(*args, **options)

    simulation = Simulation(model, prior, SIZES | {"training": 100 * SHARD}, 0)
    basis = fp.Basis(np.eye(40, 4))
    with Counting(1) as executor:
        results = simulate.reduce(simulation, basis, simulation.shards("training"), executor)
        next(results)
        results.close()
    assert largest < simulate._AHEAD


def test_shards_of_a_split_have_draws_of_their_own(model, prior) -> None:
    simulation = Simulation(model, prior, SIZES, 3)
    shards = [shard for split in SPLITS for shard in simulation.shards(split)]
    assert [shard.size for shard in shards] == [SHARD, SHARD, 100, 70, 64]
    drawn = np.concatenate([simulation.theta(shard)[:, 0] for shard in shards])
    assert len(np.unique(drawn)) == sum(SIZES.values())
    # Twice as many fingerprints begin with the same ones.
    longer = Simulation(model, prior, SIZES | {"training": 4 * SHARD}, 3)
    for shard in simulation.shards("training")[:2]:
        np.testing.assert_array_equal(longer.theta(shard), simulation.theta(shard))


def test_the_basis_takes_no_more_signals_than_it_needs(model, prior, monkeypatch) -> None:
    monkeypatch.setattr(simulate, "MOST_FOR_BASIS", SHARD)
    simulation = Simulation(model, prior, SIZES, 3)
    with ThreadPoolExecutor(1) as executor:
        got = simulate.fit_basis(simulation, 9, executor=executor)
    first = model.signal(simulation.theta(simulation.shards("training")[0]))
    expected = fp.subspace.fit(first, rank=9)
    # Groups of lanes are the same; batches are not, and sums round differently.
    np.testing.assert_allclose(
        got.vectors @ got.vectors.conj().T, expected.vectors @ expected.vectors.conj().T, atol=1e-6
    )


# The command line: kill and repeat.

EXPERIMENT = f"""\
[sequence]
path = "train.toml"

[simulation]
training = {12 * SHARD}
validation = 70
test = 64
rank = 9
seed = 3
"""


@pytest.fixture(scope="module")
def asked(short_train: fp.PulseTrain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    # 40 pulses thirty times over: some seconds of simulation.
    fp.PulseTrain(
        np.r_[np.pi, np.tile(short_train.flip_angle[0, 1:], 10)],
        np.r_[500e-6, np.tile(short_train.pulse_duration[0, 1:], 10)],
        3.5e-3,
    ).write(folder / "train.toml")
    (folder / "experiment.toml").write_text(EXPERIMENT)
    return folder / "experiment.toml"


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "fisherprint.cli", *map(str, words)]


@pytest.fixture(scope="module")
def undisturbed(asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(
        command("simulate", asked, "-o", run, "--workers", 1), check=True, capture_output=True
    )
    return run / "dataset.h5"


def shards_in(run: Path) -> list[Path]:
    # What a kill left half-written has a name that begins with a dot.
    return sorted(run.glob("shards/*/[!.]*-*.h5"))


def wait_for_shards(run: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while len(shards_in(run)) < number:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_and_repeated_it_is_the_same(
    asked: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for number in (2, 6):
        process = subprocess.Popen(
            command("simulate", asked, "-o", run), stdout=subprocess.DEVNULL
        )
        wait_for_shards(run, number, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "dataset.h5").exists()
        # Complete or absent, never half.
        for path in shards_in(run):
            assert files.read_shard(path).reduced.theta.shape == (SHARD, 7)
    kept = {path.name: path.stat().st_mtime_ns for path in shards_in(run)}
    # One of them is damaged since.
    damaged = shards_in(run)[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    watched = {}
    for line in subprocess.run(
        command("simulate", asked, "-o", run), check=True, capture_output=True, text=True
    ).stdout.splitlines():
        watched[line.split(":")[0].strip()] = line
    # What was kept was not simulated again.
    left = 12 * SHARD - SHARD * (len(kept) - 1)
    assert f"{left} of {left}" in watched["fingerprints for training"]
    assert "signals for the basis" not in watched
    assert files.file_digest(run / "dataset.h5") == files.file_digest(undisturbed)
    assert not (run / "shards").exists()


@contextlib.contextmanager
def cluster(n_workers: int) -> Iterator[object]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=n_workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address=":0",
        silence_logs=50,
    ) as running:
        yield running


def test_dask_and_the_death_of_a_worker(asked: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with cluster(2) as running:
        address = running.scheduler_address
        process = subprocess.Popen(
            command("simulate", asked, "-o", run, "--scheduler", address),
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_for_shards(run, 2, process)
        os.kill(next(iter(running.workers.values())).pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert files.file_digest(run / "dataset.h5") == files.file_digest(undisturbed)


@pytest.mark.filterwarnings("ignore::fisherprint.reconstruct.encoding.UndersampledWarning")
def test_reconstruction_on_two_dask_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def gaussian(*shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, 2)).astype(np.float32).view(np.complex64)[..., 0]

    matrix, coils = (8, 9, 6), gaussian(9, 8, 9, 6)
    points = rng.uniform(-0.5, 0.5, (12, 20, 11, 3)) * np.array(matrix)
    sampling = encoding.Sampling(points, np.linalg.qr(gaussian(12, 2))[0], matrix)
    kernel = toeplitz.kernel(sampling, path=tmp_path / "kernel.h5")
    right, prior = gaussian(2, *matrix), lowrank.LocallyLowRank(0.1, 4)

    def images(executor: Executor) -> np.ndarray:
        """Of three iterations, 8 pieces by 3 groups of coils each."""

        def normal(x: np.ndarray) -> np.ndarray:
            return toeplitz.normal(kernel, coils, x, executor=executor)

        step = solve.STEP / solve.largest_eigenvalue(normal, right)
        states = solve.fista(normal, right, prior, step=step)
        return next(state.images for state in states if state.iteration == 3)

    with (
        cluster(2) as running,
        experiment.workers(scheduler=running.scheduler_address) as found,
    ):
        assert found.number == 2
        result = images(found.executor)
    # The same tasks, and their sum in the same order.
    with ThreadPoolExecutor(2) as pool:
        np.testing.assert_array_equal(result, images(pool))


def test_a_full_disk_loses_nothing(
    asked: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = experiment.start(experiment.read(asked), tmp_path / "run")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"expected 9 MB of room for .*dataset.h5; .* 0 MB left"):
            experiment.simulate_run(run, progress=lambda *call: None)
    assert len(shards_in(run.folder)) == 14
    done = []
    experiment.simulate_run(run, progress=lambda *call: done.append(call))
    assert done == []
    assert files.file_digest(run.dataset) == files.file_digest(undisturbed)


def test_shards_of_another_experiment_are_not_used(asked: Path, tmp_path: Path) -> None:
    for number, change in enumerate(({"seed": 4}, {"validation": 71}, {"rank": 8})):
        wanted = experiment.read(asked)
        section = wanted.simulation.model_copy(update={"training": 100, **change})
        run = experiment.start(
            wanted.model_copy(update={"simulation": section}), tmp_path / str(number)
        )
        stale = run.shards / "0123456789abcdef" / "training-000000.h5"
        stale.parent.mkdir(parents=True)
        stale.write_bytes(b"of another experiment")
        experiment.simulate_run(run, progress=lambda *call: None)
        assert not run.shards.exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    asked: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = ["fisherprint", "simulate", str(asked), "-o", str(tmp_path / "run"), "--dry-run"]
    monkeypatch.setattr(sys, "argv", [*words, "--workers", "2"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code in (0, None)
    assert not (tmp_path / "run").exists()
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert lines["fingerprints"] == str(12 * SHARD + 134)
    assert lines["shards"] == "14, of which 0 are done"
    size = undisturbed.stat().st_size / 1e6
    later = float(lines["disk"].split(", ")[1].split()[0])
    # Printed in whole megabytes.
    assert abs(later - size) < 0.05 * size + 0.5
    assert "with 2 workers" in lines["expected time"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], r"expected at least 1 worker; got 0"),
        (["--workers", "2", "--scheduler", "tcp://localhost:1"], "local workers or a scheduler"),
        (["--scheduler", "tcp://localhost:1"], "a Dask scheduler at tcp://localhost:1; got no"),
        (["--scheduler", "nonsense://x"], "a Dask scheduler at nonsense://x; got no answer"),
    ],
)
def test_wrong_workers_are_explained(
    asked: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, options, message
) -> None:
    monkeypatch.setattr("fisherprint.experiment.cluster._PATIENCE", 1)
    words = ["fisherprint", "simulate", str(asked), "-o", str(tmp_path / "run"), *options]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_without_dask_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(ImportError, match=r'pip install "fisherprint\[cluster\]"'),
        experiment.workers(scheduler="tcp://localhost:8786"),
    ):
        pass


def test_the_file_is_what_the_readers_know(undisturbed: Path) -> None:
    data, train = files.read_dataset(undisturbed)
    assert {split: len(data.samples[split].theta) for split in SPLITS} == {
        "training": 12 * SHARD,
        "validation": 70,
        "test": 64,
    }
    again = dataset(
        fp.TwoPool(train),
        paper_prior(data.names, repetition_time=3.5e-3),
        {"training": 12 * SHARD, "validation": 70, "test": 64},
        basis=9,
        seed=3,
    )
    assert_identical(data, again)
    with h5py.File(undisturbed) as file:
        assert file.attrs["basis_sha256"] == data.basis.digest
