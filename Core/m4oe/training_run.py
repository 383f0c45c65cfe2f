"""A training run as a folder and a process of its own, which goes on when the program that started it has ended.

The folder holds run.json (the command, the process, what the user wishes), run.log (all that it says), events.jsonl
(what happens, one JSON object per line), and `pause` while the run is asked to pause. Standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

PAUSE = "pause"  # the file that a run looks for between two steps
EVENTS = "events.jsonl"
ERROR = "m4oe: error: "  # begins the line in which a command says why it fails
ACTIVE = ("running", "pausing", "stopping")  # states of a run that has a process
PATIENCE = 60.0  # seconds in which a run has to obey
SYNTHESIS = "synthesis.png"
_FACTS, _LOG = "run.json", "run.log"
_FIRST = ("plan.json", "cache", "config.json", "data.sha256", "tensorboard", SYNTHESIS, PAUSE, _LOG)
_TAIL_BYTES, _TAIL_LINES = 8192, 8
_STILL_ACTIVE = 259
_children: list[subprocess.Popen[bytes]] = []  # asked now and then, so that no dead one is taken for alive


@dataclass(frozen=True)
class _Facts:
    """What run.json holds.

    Attributes:
        command: What was started.
        pid: Its process.
        birth: When that process started, in the system's words: a number that is given anew has another birth.
        wish: "", "pause" or "stop": what the user asked for.
        asked: When that was, in seconds since 1970.
        logged: Bytes of the log that are of earlier attempts.
        told: Bytes of the events that are.
    """

    command: tuple[str, ...]
    pid: int
    birth: str
    wish: str = ""
    asked: float = 0.0
    logged: int = 0
    told: int = 0


class Run:
    """A run that was started here or by another program.

    Attributes:
        folder: Its folder.
    """

    def __init__(self, folder: Path | str) -> None:
        """Finds it.

        Raises:
            ValueError: The folder holds no run that `start_run` has started.
        """
        self.folder = Path(folder)
        self._facts()

    @property
    def command(self) -> list[str]:
        """The command that started it, and goes on with it."""
        return list(self._facts().command)

    def state(self) -> str:
        """One of "running", "pausing", "paused", "stopping", "stopped", "finished", "failed"."""
        facts = self._facts()
        if process_birth(facts.pid) == facts.birth != "":
            return {"": "running", "pause": "pausing", "stop": "stopping"}[facts.wish]
        last = self._last_event()
        if last == "finished":
            return "finished"
        if facts.wish:
            return {"pause": "paused", "stop": "stopped"}[facts.wish]
        return "paused" if last == "paused" else "failed"

    def pause(self, wish: str = "pause") -> None:
        """Asks it to write a checkpoint and end; `start_run` with its command goes on from there.

        Raises:
            RuntimeError: It does not run.
            OSError: The folder cannot be written; it goes on as before.
        """
        if self.state() not in ("running", "pausing", "stopping"):
            raise RuntimeError(
                f"the run in {self.folder} is {self.state()}; only a running one can be paused or stopped"
            )
        facts = self._facts()
        _write(self.folder, replace(facts, wish=wish, asked=time.time()))
        try:
            (self.folder / PAUSE).touch()
        except OSError as error:
            _write(self.folder, facts)  # a wish that the run never hears of would have it killed
            raise _cannot_write(self.folder, error) from error

    def stop(self) -> None:
        """Asks it to end, as `pause` does; what it has learned stays.

        Raises:
            RuntimeError: It does not run.
            OSError: The folder cannot be written.
        """
        self.pause("stop")

    def enforce(self, patience: float = PATIENCE) -> None:
        """Ends it with all that it started, where it was asked to end and did not within `patience` seconds.

        Its last checkpoint stays.
        """
        facts = self._facts()
        if facts.wish and time.time() - facts.asked >= patience and process_birth(facts.pid) == facts.birth != "":
            _kill_tree(facts.pid)
            with suppress(OSError):
                (self.folder / PAUSE).unlink(missing_ok=True)

    def events_since(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The events behind a place in the file, and the place for the next call.

        A line that is not whole yet waits for the next call; one that never was, as after a power cut, is left out.
        """
        try:
            with (self.folder / EVENTS).open("rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return [], offset
        whole = data[: data.rfind(b"\n") + 1]
        return [event for event in map(_event, whole.splitlines()) if event], offset + len(whole)

    def last_words(self) -> str:
        """The end of what it said since it was last started, without its events; an error begins with `ERROR`."""
        try:
            with (self.folder / _LOG).open("rb") as file:
                file.seek(max(self._facts().logged, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        said = [line for line in lines if line.strip() and not line.startswith("{")]
        return "\n".join(said[-_TAIL_LINES:])

    def _facts(self) -> _Facts:
        path = self.folder / _FACTS
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return _Facts(**{**values, "command": tuple(values["command"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.folder} holds no training run ({_FACTS}: {error}); choose another folder"
            ) from error

    def _last_event(self) -> str:
        try:
            with (self.folder / EVENTS).open("rb") as file:
                file.seek(max(self._facts().told, file.seek(0, os.SEEK_END) - 8 * _TAIL_BYTES))
                events = [event for event in map(_event, file.read().splitlines()) if event]
        except OSError:
            return ""
        return str(events[-1].get("event")) if events else ""


class Progress:
    """How far a run is, by its events.

    Attributes:
        fraction: Steps done of all; 0 before the first.
        seconds_left: Estimate for the steps that are left; None before there is a pace.
        stage: Name of the stage; empty before the first.
    """

    def __init__(self) -> None:
        self.fraction, self.stage = 0.0, ""
        self.seconds_left: float | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Hears of an event."""
        match event.get("event"):
            case "step":
                self.stage = event["stage"]
                self.fraction = event["overall"] / event["overall_steps"]
                pace = event["seconds"] / event["step"]  # of the stage
                self.seconds_left = pace * (event["overall_steps"] - event["overall"])
            case "finished":
                self.fraction, self.seconds_left = 1.0, 0.0


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds something else than a run, such as a data set, which a run would bury in its files.

    Raises:
        ValueError: It does.
    """
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    if strange := sorted(names.difference(_FIRST)) if names.isdisjoint((_FACTS, EVENTS)) else []:
        raise ValueError(f"{folder} holds something else than a training, such as {strange[0]}; choose an empty folder")


def start_run(folder: Path | str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Starts a training, or goes on with one, in a process that outlives this one.

    Args:
        folder: Of the run.
        command: Words such as python, -m, m4oe, train, ..., -o, FOLDER.
        environment: Variables of the process; None for those of this one.

    Raises:
        RuntimeError: The folder's run is running.
        ValueError: There is no such command, or the folder holds something else.
        OSError: The folder cannot be written; nothing runs.
    """
    folder = Path(folder)
    if (folder / _FACTS).exists() and Run(folder).state() in ACTIVE:
        raise RuntimeError(f"the run in {folder} is still running; wait for it, or choose another folder")
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAUSE).unlink(missing_ok=True)
        log = (folder / _LOG).open("ab")
        logged = log.tell()
        told = (folder / EVENTS).stat().st_size if (folder / EVENTS).exists() else 0
    except OSError as error:
        raise _cannot_write(folder, error) from error
    with log:
        process = _detached(command, {**(os.environ if environment is None else environment)}, log)
    _children.append(process)
    try:
        _write(folder, _Facts(tuple(command), process.pid, process_birth(process.pid), logged=logged, told=told))
    except OSError:
        _kill_tree(process.pid)  # a run without its record would go on where nobody finds it
        process.wait()
        raise
    return Run(folder)


def process_birth(pid: int) -> str:
    """When a process started, in the system's own words; empty where there is none or it has ended."""
    for child in [child for child in _children if child.poll() is not None]:
        _children.remove(child)
    if sys.platform == "win32":
        return _windows_birth(pid)
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"
    found = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, encoding="utf-8", check=False
    )
    state, _, started = found.stdout.strip().partition(" ")
    return "" if state.startswith("Z") else started.strip()


def _windows_birth(pid: int) -> str:
    import ctypes
    from ctypes import wintypes

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    kernel.OpenProcess.restype = wintypes.HANDLE
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return ""
    handle = wintypes.HANDLE(handle)
    times = [wintypes.FILETIME() for _ in range(4)]
    code = wintypes.DWORD()
    found = kernel.GetProcessTimes(handle, *map(ctypes.byref, times))
    found = found and kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    alive = found and code.value == _STILL_ACTIVE
    return f"{times[0].dwHighDateTime} {times[0].dwLowDateTime}" if alive else ""


def _detached(command: Sequence[str], environment: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
    flags = getattr(subprocess, "CREATE_NO_WINDOW", 0) | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, "PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
            creationflags=flags,
        )
    except OSError as error:
        raise ValueError(f"{command[0]!r} cannot be started ({error.strerror}); expected a Python") from error


def _kill_tree(pid: int) -> None:
    if sys.platform == "win32":
        subprocess.run(
            ["taskkill", "/T", "/F", "/PID", str(pid)],
            capture_output=True,
            check=False,
            creationflags=subprocess.CREATE_NO_WINDOW,
        )
    else:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _write(folder: Path, facts: _Facts) -> None:
    """Replaces run.json as a whole.

    Raises:
        OSError: It cannot be written; the old one is as it was.
    """
    new = folder / f".{_FACTS}"
    try:
        new.write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
        new.replace(folder / _FACTS)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> OSError:
    return OSError(f"cannot write into {folder} ({error.strerror}); make room, or choose a folder that can be written")


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
