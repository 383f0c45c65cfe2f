"""What a program and its worker tell each other, and the frames that carry it. Standard library only.

A frame is one line of JSON, then as many bytes as its "bytes" says. The worker greets; then each request (segment,
info, cancel) carries an id, and so do the events that answer it (progress, then result or failed).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from queue import Empty, SimpleQueue
from typing import IO, Any, Generic, NamedTuple, TypeVar

from .spec import ModelSpec

T = TypeVar("T")
PROTOCOL = 3
GREETING = "m4oe"  # first key of the worker's first line
_LONGEST_LINE = 64 * 1024 * 1024
_CHUNK = 1024 * 1024


class Cancelled(RuntimeError):
    """The user asked to stop; nothing was changed."""


class Event(NamedTuple):
    """How far a job is.

    Attributes:
        phase: "send", "load" (only where the model is not in memory yet), those of the predictor, "receive".
        fraction: Of the phase, in [0, 1].
    """

    phase: str
    fraction: float


@dataclass(frozen=True)
class Report:
    """What a prediction did and what to watch for.

    Attributes:
        expert_weights: Weights that were used, by expert; equal where the gate decides per token or channel.
        gate: What the image gate said by itself, by expert: a probability of each; empty where it was not asked.
        chosen_by: "user" who named the expert, "modality" as the header or HU left no choice or overruled the gate,
            "gate", or "model" where a model has nothing to choose for the whole volume.
        seconds: Wall time by phase; a GPU works on while the next phase begins.
        peak_memory_mib: Highest memory of the process (on a GPU: of its allocations) seen in each phase.
        volumes_ml: Of each structure that was asked for and that the experts in use know; 0 where it was not found.
        warnings: Sentences for the user.
        confidence: Mean probability, in [0, 1], that the network gave each structure where its own grid shows it.
        intensities: Mean and standard deviation of the volume's values (of CT: HU) in each structure that was found.
        flags: What to check, by structure: "implausible" volume, "cut" by the field of view, "low confidence".
    """

    model: str
    device: str
    precision: str
    expert_weights: dict[str, float]
    gate: dict[str, float]
    chosen_by: str
    seconds: dict[str, float]
    peak_memory_mib: dict[str, float]
    volumes_ml: dict[str, float]
    warnings: tuple[str, ...]
    confidence: dict[str, float] = field(default_factory=dict)
    intensities: dict[str, tuple[float, float]] = field(default_factory=dict)
    flags: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote."""
        values = json.loads(text)
        for name in ("intensities", "flags"):
            values[name] = {key: tuple(items) for key, items in values.get(name, {}).items()}
        return cls(**{**values, "warnings": tuple(values["warnings"])})


@dataclass(frozen=True)
class Device:
    """Where a model can run.

    Attributes:
        name: As the predictor takes it: "cuda:0", "mps", "cpu".
        description: For people.
        free_mib: Memory that is free now.
        why: Why it is the CPU; empty of others.
    """

    name: str
    description: str
    free_mib: float
    why: str = ""


@dataclass(frozen=True)
class Info:
    """What a worker is and has.

    Attributes:
        version: Of its m4oe.
        python: Its interpreter.
        problem: Why it cannot segment, or "".
        devices: Best first; "auto" takes the first.
        models: By path, the user's own first.
        damaged: Sentence by path of models that cannot be used.
    """

    version: str
    python: str
    problem: str
    devices: tuple[Device, ...]
    models: Mapping[str, ModelSpec]
    damaged: Mapping[str, str]

    def to_json(self) -> str:
        """The information as one line of JSON."""
        devices = [asdict(device) for device in self.devices]
        models = {path: spec.to_json() for path, spec in self.models.items()}
        return json.dumps({**vars(self), "devices": devices, "models": models})

    @classmethod
    def from_json(cls, text: str) -> Info:
        """The information that `to_json` wrote."""
        values = json.loads(text)
        devices = tuple(Device(**device) for device in values["devices"])
        models = {path: ModelSpec.from_json(spec) for path, spec in values["models"].items()}
        return cls(**{**values, "devices": devices, "models": models})


class Job(Generic[T]):
    """A request under way; its methods, but for `result`, do not wait."""

    def __init__(self, read: Callable[[dict[str, Any], bytearray], T]) -> None:
        """Makes a job of which `read` will read the answer."""
        self._read = read
        self._future: Future[T] = Future()
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._stop: Callable[[], None] | None = None

    def events(self, seconds: float = 0.0) -> list[Event]:
        """What happened since the last call; waits up to `seconds` for anything to happen."""
        found: list[Event | None] = []
        with suppress(Empty):
            found.append(self._events.get(seconds > 0, seconds))
            while True:
                found.append(self._events.get_nowait())
        return [event for event in found if event is not None]

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._future.done()

    def result(self) -> T:
        """The result; waits for it.

        Raises:
            Cancelled: The job was cancelled.
            ValueError: The worker says that something it was given cannot be used.
            RuntimeError: Something else went wrong there, or it ended; lines after the first are its last words.
        """
        return self._future.result()

    def cancel(self) -> None:
        """Stops the job: within a second it is done, with `Cancelled`, or else the worker is ended by force."""
        stop, self._stop = self._stop, None
        if stop is not None and not self.done():
            stop()

    def start(self, stop: Callable[[], None]) -> None:
        """For the connection: the job is on its way and can be stopped like this."""
        self._stop = stop

    def tell(self, phase: str, fraction: float) -> None:
        """For the connection: an event."""
        self._events.put(Event(phase, fraction))

    def finish(self, message: dict[str, Any], data: bytearray) -> None:
        """For the connection: the answer, of no account where the job is done."""
        with suppress(InvalidStateError):
            self._future.set_result(self._read(message, data))
        self._events.put(None)

    def fail(self, error: Exception) -> None:
        """For the connection: an error, of no account where the job is done."""
        with suppress(InvalidStateError):
            self._future.set_exception(error)
        self._events.put(None)


def send(
    stream: IO[bytes],
    message: Mapping[str, Any],
    data: bytes | memoryview = b"",
    sent: Callable[[float], None] | None = None,
) -> None:
    """Writes a frame to an unbuffered stream; `sent` hears the fraction of `data` [bytes] that is written.

    Raises:
        OSError: Nobody reads any more.
    """
    line = json.dumps({**message, "bytes": len(data)}) + "\n"
    _write(stream, memoryview(line.encode("ascii")))
    size, step = len(data), _step(len(data))
    for start in range(0, size, step):
        _write(stream, memoryview(data)[start : start + step])
        if sent is not None:
            sent(min(1.0, (start + step) / size))


def receive(stream: IO[bytes], received: Callable[[float], None] | None = None) -> tuple[dict[str, Any], bytearray]:
    """Reads a frame from a buffered stream; `received` hears the fraction of its data that is read.

    Raises:
        EOFError: The stream ended, maybe within a frame.
        ValueError: This is no frame.
    """
    line = stream.readline(_LONGEST_LINE)
    if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
        raise EOFError("the other side has ended")
    try:
        message: dict[str, Any] = json.loads(line)
        data = bytearray(message.pop("bytes"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a message in JSON, got {line[:80]!r}") from error
    size, step = len(data), _step(len(data))
    for start in range(0, size, step):
        part = memoryview(data)[start : start + step]
        if stream.readinto(part) < len(part):  # type: ignore[attr-defined]
            raise EOFError("the other side has ended")
        if received is not None:
            received(min(1.0, (start + step) / size))
    return message, data


def _write(stream: IO[bytes], data: memoryview) -> None:
    while data:
        data = data[stream.write(data) :]


def _step(size: int) -> int:
    """Bytes between two calls that tell how far it is: at most a hundred calls."""
    return max(_CHUNK, -(-size // 100))
