"""A command of m4oe that runs beside Slicer; its lines are read when somebody asks, so nothing freezes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import IO

from slicer.i18n import tr as _

_TAIL, _LAST = 30, 8  # lines kept of its standard error, and shown of them when it has failed


class Process:
    """A running command.

    Attributes:
        tail: Last lines that it wrote to its standard error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Starts it.

        Raises:
            ValueError: The command does not exist.
        """
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**(os.environ if environment is None else environment), "PYTHONIOENCODING": "utf-8"},
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise ValueError(
                _("{program} cannot be started: {error}. Choose another Python.").format(
                    program=command[0], error=error.strerror
                )
            ) from error
        self._lines: SimpleQueue[str] = SimpleQueue()
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self._lines.put), daemon=True),
            threading.Thread(target=self._read, args=(self._process.stderr, self.tail.append), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], take: Callable[[str], object]) -> None:
        with stream:
            for line in stream:
                take(line.rstrip("\r\n"))
        self._process.wait()  # also where nobody asks any more, so that none is left behind

    def lines(self) -> list[str]:
        """What it wrote to its standard output since the last call."""
        found = []
        with suppress(Empty):
            while True:
                found.append(self._lines.get_nowait())
        return found

    def done(self) -> bool:
        """Whether it has ended and all of its lines are there."""
        return self._process.poll() is not None and not any(reader.is_alive() for reader in self._readers)

    @property
    def code(self) -> int | None:
        """Its exit code."""
        return self._process.returncode

    def lastWords(self) -> str:
        """Why it failed: the end of what it wrote to its standard error."""
        return "\n".join(lastLines(self.tail)) or _("It ended with code {code}.").format(code=self.code)

    def stop(self) -> None:
        """Asks it to end; what it wrote stays whole."""
        with suppress(OSError):
            if sys.platform == "win32":
                subprocess.run(
                    ["taskkill", "/T", "/F", "/PID", str(self._process.pid)],
                    capture_output=True,
                    check=False,
                    creationflags=subprocess.CREATE_NO_WINDOW,
                )
            elif self._process.poll() is None:  # its number may be another's by now
                os.killpg(self._process.pid, signal.SIGTERM)


def lastLines(lines: Iterable[str]) -> list[str]:
    """The last of them that say something."""
    return [line for line in lines if line.strip()][-_LAST:]
