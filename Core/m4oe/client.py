"""Has volumes segmented by a worker: another process, another Python, or another machine through ssh.

It runs inside Slicer, with the standard library and numpy alone. What begins a job does not wait, so that a timer of a
user interface can ask the job for its events; the other calls wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from .connection import Connection, Frame
from .geometry import Volume, pack_volume, unpack_volume
from .jobs import Event, Info, Job, Report
from .spec import DEFAULT_MODEL

T = TypeVar("T")
OnEvent = Callable[[Event], object]
_LOOK = 0.05  # seconds between two looks at a job
_START = (
    "import importlib.util as u, sys; s = u.spec_from_file_location('m4oe', sys.argv.pop(1)); "
    "m = sys.modules['m4oe'] = u.module_from_spec(s); s.loader.exec_module(m); "
    "from m4oe.__main__ import main; sys.exit(main())"
)


def worker_command(python: Path | str = sys.executable) -> list[str]:
    """Runs this very package as a worker in any Python that has what it needs, such as a conda environment's."""
    return [str(python), "-P", "-c", _START, str(Path(__file__).with_name("__init__.py")), "worker"]


class Client:
    """A worker, started by the first request and kept for the next ones; another one is started when it has ended.

    One request at a time. Leaving the `with` block ends the worker::

        with Client() as client:
            labels, report = client.segment(read_volume("CT.nii.gz"))
    """

    def __init__(
        self,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        """Prepares a worker.

        Args:
            command: Words of the command; None for `worker_command()`; ["ssh", HOST, "m4oe", "worker"] for another
                machine, to which ssh must come without a question.
            environment: Variables of its process; None for those of this one.
            timeout: Seconds that it has to start.
        """
        self._command = list(worker_command() if command is None else command)
        self._environment = environment
        self._timeout = timeout
        self._connection: Connection | None = None
        self._requests = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin_segment(
        self,
        volume: Volume,
        *,
        model: Path | str = DEFAULT_MODEL,
        expert: str = "auto",
        structures: Sequence[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        quality: str = "standard",
        uncertainty: NDArray[np.uint8] | None = None,
    ) -> Job[tuple[Volume, Report]]:
        """Has a volume segmented, as `Predictor` would; model and device are the worker's.

        An array whose voxels lie in order is sent without a copy: it must stay as it is until the phase "send" ends.
        `uncertainty` is filled when the job is done.

        Raises:
            ValueError: The voxels are no numbers, `uncertainty` cannot be filled, or the worker's command does not
                exist.
            RuntimeError: The worker is busy.
        """
        if uncertainty is not None:
            _check_uncertainty(uncertainty, volume.array.shape)
        header, voxels = pack_volume(volume)
        request = {
            "request": "segment",
            "volume": header,
            "model": str(model),
            "expert": expert,
            "structures": None if structures is None else list(structures),
            "device": device,
            "precision": precision,
            "quality": quality,
            "uncertainty": uncertainty is not None,
        }
        return self._begin(Job(partial(_read_segmentation, uncertainty)), request, voxels)

    def begin_info(self) -> Job[Info]:
        """Asks the worker what it is and has.

        Raises:
            ValueError: The worker's command does not exist.
            RuntimeError: The worker is busy.
        """
        return self._begin(Job(lambda message, data: Info.from_json(message["info"])), {"request": "info"})

    def segment(
        self,
        volume: Volume,
        *,
        model: Path | str = DEFAULT_MODEL,
        expert: str = "auto",
        structures: Sequence[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        quality: str = "standard",
        uncertainty: NDArray[np.uint8] | None = None,
        on_event: OnEvent | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> tuple[Volume, Report]:
        """Segments a volume as `begin_segment` does, and waits for the result.

        Args:
            volume: As for `begin_segment`, like all that is not named here.
            on_event: Hears of progress.
            cancelled: Asked twenty times a second; True stops.

        Raises:
            Cancelled: `cancelled` said so.
            ValueError: Something that was given cannot be used.
            RuntimeError: Anything else went wrong.
        """
        job = self.begin_segment(
            volume,
            model=model,
            expert=expert,
            structures=structures,
            device=device,
            precision=precision,
            quality=quality,
            uncertainty=uncertainty,
        )
        return _wait(job, on_event, cancelled)

    def info(self) -> Info:
        """What the worker is and has.

        Raises:
            ValueError: The worker's command does not exist.
            RuntimeError: The worker is busy, or cannot answer.
        """
        return _wait(self.begin_info())

    def close(self) -> None:
        """Ends the worker; a job under way is cancelled. The next request starts another worker."""
        if self._connection is not None:
            self._connection.close()

    def _begin(self, job: Job[T], request: Mapping[str, Any], data: bytes | memoryview = b"") -> Job[T]:
        self._requests += 1
        frame = Frame(job, {**request, "id": self._requests}, data)
        if self._connection is None or not self._connection.take(frame):
            self._connection = Connection(self._command, self._environment, self._timeout, frame)
        return job


def _check_uncertainty(uncertainty: NDArray[Any], shape: tuple[int, ...]) -> None:
    if uncertainty.shape != shape or uncertainty.dtype != np.uint8 or not uncertainty.flags.writeable:
        kind = "" if uncertainty.flags.writeable else "read-only "
        given = f"a {kind}{uncertainty.dtype} array of {uncertainty.shape}"
        raise ValueError(f"uncertainty is {given}; expected one of uint8 and the volume's {shape}, to be filled")


def _read_segmentation(
    uncertainty: NDArray[np.uint8] | None, message: dict[str, Any], data: bytearray
) -> tuple[Volume, Report]:
    size = len(data) - (0 if uncertainty is None else uncertainty.size)
    labels = unpack_volume(message["volume"], memoryview(data)[:size])
    if uncertainty is not None:
        uncertainty[...] = np.frombuffer(data, np.uint8, offset=size).reshape(uncertainty.shape)
    return labels, Report.from_json(message["report"])


def _wait(job: Job[T], on_event: OnEvent | None = None, cancelled: Callable[[], bool] | None = None) -> T:
    """The job's result; no job stays under way when the wait is interrupted."""
    try:
        done = False
        while not done:
            done = job.done()
            for event in job.events(0.0 if done else _LOOK):
                if on_event is not None:
                    on_event(event)
            if cancelled is not None and not done and cancelled():
                job.cancel()
        return job.result()
    finally:
        job.cancel()
        while not job.done():
            job.events(_LOOK)
