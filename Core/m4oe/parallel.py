"""Runs one function on many jobs: here, in processes of this machine, or on the workers of a Dask cluster."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from . import __version__

_Key = TypeVar("_Key", bound=Hashable)
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_CONNECT, _WAIT = "5s", 30  # until a scheduler answers, and seconds until it has a worker


class WorkerLost(RuntimeError):
    """The process that worked on a job ended, and so did those that tried after it."""


def run_jobs(
    function: Callable[[_Job], _Result],
    jobs: Mapping[_Key, _Job],
    processes: int = 1,
    scheduler: str | None = None,
    start: Callable[[], None] | None = None,
) -> Generator[tuple[_Key, _Result | WorkerLost], None, None]:
    """Gives the result of every job once, in the order in which they come.

    On a cluster a job whose worker died is done by another one, which must see the same files at the same places. A
    job of which several workers died, or the first in a process here, has `WorkerLost` as its result.

    Args:
        function: Can be pickled, as its jobs and results can.
        jobs: By any key.
        processes: On this machine; one works in this process.
        scheduler: Address of a Dask scheduler, or its file, which takes the place of the processes here.
        start: What each process here does first.

    Raises:
        ValueError: `scheduler` is not there, or Dask is not installed.
        RuntimeError: The cluster has no worker, or one with another m4oe.
    """
    if scheduler is not None and jobs:
        yield from _on_cluster(function, jobs, scheduler)
    elif min(processes, len(jobs)) < 2:
        yield from ((key, function(job)) for key, job in jobs.items())
    else:
        yield from _in_processes(function, jobs, min(processes, len(jobs)), start or ignore_interrupts)


def ignore_interrupts() -> None:
    """Leaves it to the parent to say what an interruption means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_processes(
    function: Callable[[_Job], _Result], jobs: Mapping[_Key, _Job], processes: int, start: Callable[[], None]
) -> Generator[tuple[_Key, _Result | WorkerLost], None, None]:
    pool = ProcessPoolExecutor(processes, get_context("spawn"), start)
    try:
        futures = {pool.submit(function, job): key for key, job in jobs.items()}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], WorkerLost("its process ended, maybe for lack of memory; try again with fewer")
    finally:
        pool.shutdown(cancel_futures=True)


def _on_cluster(
    function: Callable[[_Job], _Result], jobs: Mapping[_Key, _Job], scheduler: str
) -> Generator[tuple[_Key, _Result | WorkerLost], None, None]:
    with _client(scheduler) as client:
        from distributed import KilledWorker, as_completed

        futures = {client.submit(function, job, pure=False): key for key, job in jobs.items()}
        suspects = []
        for future in as_completed(futures):
            key = futures.pop(future)
            try:
                yield key, future.result()
            except KilledWorker:
                suspects.append(key)
        for key in suspects:  # each alone, as one that was beside a deadly job is blamed too
            try:
                yield key, client.submit(function, jobs[key], pure=False).result()
            except KilledWorker:
                yield key, WorkerLost("several workers of the cluster ended over it, maybe for lack of memory")


@contextmanager
def _client(scheduler: str) -> Generator[Any, None, None]:
    """A client of the cluster, once that has a worker and all of them have this m4oe."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError(f"--scheduler needs a package ({error}): pip install distributed") from error
    place: dict[str, Any] = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        client = Client(**place, timeout=_CONNECT)
    except (OSError, ValueError, TimeoutError) as error:
        raise ValueError(
            f"no Dask scheduler answers at {scheduler} ({error}); expected an address such as tcp://host:8786"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_WAIT)
        except TimeoutError as error:
            raise RuntimeError(
                f"the cluster at {scheduler} has no worker; start some: dask worker {scheduler}"
            ) from error
        others = {version for version in client.run(_version).values() if version != __version__}
        if others:
            raise RuntimeError(f"workers have m4oe {', '.join(map(str, others))}, expected {__version__} as here")
        yield client


def _version() -> str:
    return __version__
