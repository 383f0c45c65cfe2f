"""A worker's process seen from the program that started it: what it is asked, what it answers, how it ends.

One thread writes, one reads and one empties stderr, so that no full pipe can block either side. Standard library only,
as it runs inside Slicer.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import IO, Any, NamedTuple, cast

from . import __version__
from .jobs import GREETING, PROTOCOL, Cancelled, Job, receive, send

PATIENCE = 1.0  # seconds that a worker has to obey
_TAIL_BYTES, _TAIL_LINES, _TAIL_WIDTH = 8192, 12, 300
_MOST_NOISE = 1000  # lines before the greeting, such as a login shell's
_KILLED, _SSH_FAILED = (-9, 137), 255
_OLD_PYTHON = re.compile(rb"(?i)unknown option:? -P\b")  # which 3.11 brought


class Frame(NamedTuple):
    """A message for the worker, the bytes that go with it, and the job that it belongs to."""

    job: Job[Any]
    message: dict[str, Any]
    data: bytes | memoryview = b""


_NO_JOB: Job[None] = Job(lambda message, data: None)
_NO_JOB.finish({}, bytearray())


class Connection:
    """A running worker and the job that it has."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None, timeout: float, frame: Frame
    ) -> None:
        """Starts a worker with its first request.

        Raises:
            ValueError: There is no such command.
        """
        self._process = process = _start_process(command, environment)
        self._stdin, self._stdout, self._stderr = cast(Any, (process.stdin, process.stdout, process.stderr))
        self._first: Frame | None = frame
        self._job = frame.job
        self._lock = threading.Lock()
        self._ended = self._greeted = False
        self._tail = b""
        self._outbox: SimpleQueue[Frame | None] = SimpleQueue()
        late = (
            f"the worker did not answer within {timeout:g} s; try again, as a first start is slow, "
            "or try its command in a terminal: it may wait for a password"
        )
        self._alarm = _timer(timeout, self._end, late)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._hear, self._write, self._read)]
        self._prepare_to_cancel(frame)
        for thread in (self._alarm, *self._threads):
            thread.start()

    def take(self, frame: Frame) -> bool:
        """Sends another request, unless the worker has ended.

        Raises:
            RuntimeError: The worker is busy.
        """
        with self._lock:
            if self._ended:
                return False
            if not self._job.done():
                raise RuntimeError("the worker is busy; wait until its job is done, or cancel that")
            self._job = frame.job
            self._prepare_to_cancel(frame)
            self._outbox.put(frame)
        return True

    def close(self) -> None:
        """Ends the worker, kindly at first."""
        self._end(Cancelled("the worker was closed before the job was done"), PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)

    def _prepare_to_cancel(self, frame: Frame) -> None:
        job, request = frame.job, Frame(frame.job, {"request": "cancel", "id": frame.message["id"]})

        def cancel() -> None:
            self._outbox.put(request)
            error = Cancelled("cancelled; the worker did not obey and was ended, so the next job takes longer to start")
            _timer(PATIENCE, self._end, error, 0.0, job).start()

        job.start(cancel)

    # ---- the three threads

    def _write(self) -> None:
        with self._stdin, suppress(OSError):  # nobody reads: `_read` finds out why
            while self._write_next():
                pass

    def _write_next(self) -> bool:
        frame = self._outbox.get()
        if frame is not None:
            send(self._stdin, frame.message, frame.data, partial(frame.job.tell, "send"))
        return frame is not None

    def _read(self) -> None:
        try:
            with io.BufferedReader(self._stdout) as stream:
                self._greet(stream)
                while True:
                    self._handle(*receive(stream, self._received))
        except EOFError:
            self._end(None, PATIENCE)
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            self._end(f"the worker's answer cannot be understood ({error}); install the same M4oE at both ends")
        except MemoryError:
            self._end("there is too little memory here for the worker's answer; close other programs")

    def _hear(self) -> None:
        with self._stderr as stream:
            while chunk := stream.read(_TAIL_BYTES):
                self._remember(chunk)

    # ---- what the worker says

    def _greet(self, stream: IO[bytes]) -> None:
        """Waits for the greeting, behind whatever shells and launchers print, and sends the first request."""
        for _ in range(_MOST_NOISE):
            line = stream.readline(_TAIL_BYTES)
            if not line:
                raise EOFError
            noise, mark, rest = line.partition(b'{"%s"' % GREETING.encode())
            if mark:
                break
            self._remember(noise)
        else:
            raise ValueError("no greeting")
        greeting = json.loads(mark + rest)
        if greeting["protocol"] != PROTOCOL:
            there = f"protocol {greeting['protocol']} (M4oE {greeting[GREETING]})"
            raise ValueError(f"it speaks {there}, this program protocol {PROTOCOL} (M4oE {__version__})")
        self._greeted = True
        self._alarm.cancel()
        with self._lock:
            self._outbox.put(self._first)
            self._first = None  # a volume is large

    def _handle(self, message: dict[str, Any], data: bytearray) -> None:
        match message["event"]:
            case "progress":
                self._job.tell(message["phase"], message["fraction"])
            case "result":
                job = self._job  # from its finish on it may be another one
                job.finish(message, data)
                self._forget(job)
            case "failed":
                kinds = {"Cancelled": Cancelled, "ValueError": ValueError}
                error = kinds.get(message["kind"], RuntimeError)(message["message"])
                if message["last"]:
                    self._end(error, PATIENCE)
                self._job.fail(error)
            case other:
                raise ValueError(f"the event {other!r} is unknown")

    def _forget(self, job: Job[Any]) -> None:
        """Lets go of a job that is done: its result is large."""
        with self._lock:
            if self._job is job:
                self._job = _NO_JOB

    def _received(self, fraction: float) -> None:
        self._job.tell("receive", fraction)

    def _remember(self, said: bytes) -> None:
        with self._lock:
            self._tail = (self._tail + said)[-_TAIL_BYTES:]

    # ---- the end

    def _end(self, why: Exception | str | None, patience: float = 0.0, job: Job[Any] | None = None) -> None:
        """Ends the worker, once, with all that it started, and its job with an error.

        Args:
            why: The error, or a sentence for one, or None where the exit code tells.
            patience: Seconds that it has to end by itself, its input being closed.
            job: Nothing happens where this one is done.
        """
        with self._lock:
            if self._ended or (job is not None and job.done()):
                return
            self._ended = True
            self._first = None
            with suppress(Empty):  # a volume that nobody will send
                while True:
                    self._outbox.get_nowait()
        self._alarm.cancel()
        self._outbox.put(None)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        code = self._process.poll()
        _kill_tree(self._process)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        self._job.fail(why if isinstance(why, Exception) else RuntimeError(self._last_words(why, code)))

    def _verdict(self, code: int | None) -> str:
        """What the exit code tells, and what to do."""
        how = "closed its output" if code is None else f"ended with {_exit_name(code)}"
        if not self._greeted and _OLD_PYTHON.search(self._tail):
            return f"the worker {how} before it started: its Python is too old; choose one of 3.11 or newer"
        if not self._greeted and code == _SSH_FAILED:
            return f"the worker {how}, which ssh says when there is no connection; try its command in a terminal"
        if not self._greeted:
            return f"the worker {how} before it started; try its command in a terminal, expected one that runs m4oe"
        if code in _KILLED:
            return (
                "the worker was killed, most likely by the system as the memory ran out; "
                "close other programs, crop the volume, or choose a machine with more memory"
            )
        if code == _SSH_FAILED:
            return f"the worker {how}, which ssh says when the connection is lost or the worker was killed; try again"
        return f"the worker {how} in the middle of its work; try again, and report it if that does not help"

    def _last_words(self, why: str | None, code: int | None) -> str:
        self._threads[0].join(PATIENCE)
        lines = self._tail.decode("utf-8", "replace").replace("\r", "\n").splitlines()
        tail = [line.rstrip()[:_TAIL_WIDTH] for line in lines if line.strip()][-_TAIL_LINES:]
        return "\n".join([why or self._verdict(code), *tail])


def _start_process(command: Sequence[str], environment: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    """Starts it as the head of a process group, which can be ended as a whole, and without a window."""
    try:
        return subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError as error:
        raise ValueError(
            f"the worker's command {command[0]!r} cannot be started ({error.strerror}); expected a Python or ssh"
        ) from error


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started, at once."""
    if sys.platform != "win32":
        with suppress(ProcessLookupError, PermissionError):  # none of them is left
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        subprocess.run(
            ["taskkill", "/T", "/F", "/PID", str(process.pid)],
            capture_output=True,
            check=False,
            creationflags=subprocess.CREATE_NO_WINDOW,
        )


def _timer(seconds: float, run: Callable[..., object], *arguments: object) -> threading.Timer:
    timer = threading.Timer(seconds, run, arguments)
    timer.daemon = True
    return timer


def _exit_name(code: int) -> str:
    """The signal or exit code for people; Windows' large ones in the form that they are known by."""
    if code < 0 and -code in set(signal.Signals):
        return signal.Signals(-code).name
    return f"exit code {code}" if abs(code) < 1000 else f"exit code {code:#x}"
