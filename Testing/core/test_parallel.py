"""Jobs in this process, in processes, and on a Dask cluster of which a worker is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from m4oe.evaluation_files import evaluate_files, pair_files
from m4oe.files import write_segmentation
from m4oe.geometry import Grid, Volume
from m4oe.parallel import WorkerLost, run_jobs
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from m4oe.training.cache import CaseSource, build_cache

pytest.importorskip("distributed")
SPEC = ModelSpec(
    name="tiny",
    version="1",
    network=NetworkSpec(embed_dim=8, depths=(1, 1), heads=(1, 2)),
    structures=("liver",),
    experts=(ExpertSpec("ct", "CT"),),
    intensity={"CT": IntensityRule("window", -160, 240)},
    pixel_mm=2.0,
    slice_mm=3.0,
)
CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of two workers in processes of their own."""
    script = tmp_path_factory.mktemp("cluster") / "cluster.py"
    script.write_text(CLUSTER, encoding="utf-8")
    with subprocess.Popen([sys.executable, script], stdin=-1, stdout=-1, encoding="utf-8") as cluster:
        assert cluster.stdin is not None and cluster.stdout is not None
        yield cluster.stdout.readline().strip()
        cluster.stdin.close()


def double(number: int) -> int:
    return 2 * number


def die(number: int) -> int:
    os._exit(9)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_job_is_done_once(processes: int) -> None:
    results = list(run_jobs(double, {f"job {n}": n for n in range(5)}, processes))
    assert sorted(results) == [(f"job {n}", 2 * n) for n in range(5)]


def test_a_process_that_ends_loses_its_job_and_says_so() -> None:
    results = dict(run_jobs(die, {"a": 1, "b": 2}, 2))
    assert set(results) == {"a", "b"} and all(isinstance(result, WorkerLost) for result in results.values())


def test_every_case_is_done_once_though_a_worker_is_killed_amid_one(scheduler: str, tmp_path: Path) -> None:
    folder = str(tmp_path)

    def work(number: int) -> int:  # nested, so that it travels by value: workers cannot import a test
        import os
        from pathlib import Path

        log = Path(folder) / f"{number}"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        if number == 3 and len(log.read_text(encoding="utf-8").splitlines()) == 1:
            os.kill(os.getpid(), 9)
        return number

    results = list(run_jobs(work, {n: n for n in range(8)}, scheduler=scheduler))
    assert sorted(results) == [(n, n) for n in range(8)]
    first, second = (tmp_path / "3").read_text(encoding="utf-8").splitlines()[:2]
    assert first != second


def test_a_case_that_kills_every_worker_stops_no_other(scheduler: str) -> None:
    def work(number: int) -> int:
        import os

        if number == 1:
            os.kill(os.getpid(), 9)
        return number

    results = dict(run_jobs(work, {n: n for n in range(3)}, scheduler=scheduler))
    assert results[0] == 0 and results[2] == 2
    assert isinstance(results[1], WorkerLost) and "several workers of the cluster ended over it" in str(results[1])


def test_a_cluster_scores_files_as_this_process_does(scheduler: str, tmp_path: Path) -> None:
    for number in range(3):
        labels = np.zeros((3, 8, 8), np.uint8)
        labels[1, 2:6, 2 : 4 + number] = 1
        for folder in ("pred", "truth"):
            labels[0, 0, 0] = folder == "pred"
            grid = Grid(labels.shape, np.diag([-2.0, -2.0, 3.0, 1.0]))
            write_segmentation(tmp_path / folder / f"{number}.nii.gz", Volume(labels, grid), {1: "liver"}, "test")
    pairs = pair_files(tmp_path / "pred", tmp_path / "truth")
    here, there = evaluate_files(pairs, "a"), evaluate_files(pairs, "a", scheduler=scheduler)
    assert here == there and len(here.scores) == 3


def test_a_cluster_prepares_the_cases_that_this_process_would(scheduler: str, tmp_path: Path) -> None:
    def load(seed: int) -> tuple[Volume, None]:
        from m4oe.geometry import Grid, Volume

        array = np.random.default_rng(seed).normal(0, 50, (3, 8, 8)).astype(np.int16)
        return Volume(array, Grid(array.shape, np.diag([-2.0, -2.0, 3.0, 1.0]))), None

    sources = [CaseSource(f"case {n}", 0, (), (f"{n}",), partial(load, n)) for n in range(3)]
    there, failures = build_cache(sources, SPEC, tmp_path / "there", scheduler=scheduler)
    here, _ = build_cache(sources, SPEC, tmp_path / "here", 1)
    assert not failures
    assert all(np.array_equal(a.image_ZHW, b.image_ZHW) for a, b in zip(here, there, strict=True))


def test_an_error_of_a_job_is_raised_here(scheduler: str) -> None:
    def work(number: int) -> float:
        return 1 / number

    with pytest.raises(ZeroDivisionError):
        list(run_jobs(work, {"a": 0}, scheduler=scheduler))


def test_a_scheduler_that_is_not_there_is_told() -> None:
    for place in ("tcp://127.0.0.1:1", "nowhere"):
        with pytest.raises(ValueError, match=f"no Dask scheduler answers at {place} .* expected an address such as"):
            list(run_jobs(double, {"a": 1}, scheduler=place))


def test_without_dask_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match="--scheduler needs a package .* pip install distributed"):
        list(run_jobs(double, {"a": 1}, scheduler="tcp://127.0.0.1:1"))
