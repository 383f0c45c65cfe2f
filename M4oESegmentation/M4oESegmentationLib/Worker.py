"""Which Python works for Slicer: its own, another one, or one on another machine. A setting of the machine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import qt
import slicer.util
from slicer.i18n import tr as _

if TYPE_CHECKING:
    from m4oe.client import Client

SLICER, PYTHON, SSH = "slicer", "python", "ssh"


def labels() -> dict[str, str]:
    """The places where a worker can run, for people."""
    return {SLICER: _("Slicer's Python"), PYTHON: _("Another Python"), SSH: _("Another machine (ssh)")}


def setting(name: str, default: str) -> str:
    """A setting of M4oE: "worker" (a place), "python", "host", "device"."""
    return slicer.util.settingsValue(f"M4oE/{name}", default)


def setSetting(name: str, value: str) -> None:
    qt.QSettings().setValue(f"M4oE/{name}", value)


def place() -> str:
    found = setting("worker", SLICER)
    return found if found in labels() else SLICER


def python() -> str:
    """The interpreter on this machine that runs m4oe; Slicer's own comes through its launcher.

    Raises:
        ValueError: None is named.
    """
    if place() != PYTHON:
        return shutil.which("PythonSlicer") or sys.executable
    if not setting("python", ""):
        raise ValueError(_("No Python is named. Choose its file under Advanced, Python."))
    return setting("python", "")


def environment() -> Mapping[str, str] | None:
    """Variables of the process; Slicer's own would mislead another Python."""
    return None if place() == SLICER else slicer.util.startupEnvironment()


def command(*words: str) -> list[str]:
    """A command of m4oe, such as "doctor", in the worker's Python on this machine or on the other one.

    Raises:
        ValueError: No Python or no host is named.
    """
    from m4oe.client import worker_command

    if place() != SSH:
        return [*worker_command(python())[:-1], *words]
    if not setting("host", ""):
        raise ValueError(_("No host is named. Type its name under Advanced, Host, such as user@host."))
    return ["ssh", "-o", "BatchMode=yes", setting("host", ""), "m4oe", *words]


def newClient() -> Client:
    """A client of the worker that the settings name; nothing is started yet.

    Raises:
        ValueError: No Python or no host is named.
    """
    from m4oe.client import Client

    return Client(command("worker"), environment())
