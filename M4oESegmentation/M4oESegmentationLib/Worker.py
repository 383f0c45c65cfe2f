"""Which Python works for Slicer: its own, another one, or one on another machine. A setting of the machine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qt
import slicer.util
from slicer.i18n import tr as _

from .Errors import errorsShown

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


def modelThere(path: str) -> str:
    """What the worker calls a model file of this machine: on another machine its own model of that name."""
    return Path(path).stem if place() == SSH else path


def localCommand(*words: str) -> list[str]:
    """A command of m4oe that works with files of this machine.

    Raises:
        ValueError: The worker is on another machine, or no Python is named.
    """
    if place() == SSH:
        raise ValueError(
            _("This runs on this machine, where the files are. ")
            + _("Choose another place in M4oE Segmentation, Advanced, Runs in.")
        )
    return command(*words)


def newClient() -> Client:
    """A client of the worker that the settings name; nothing is started yet.

    Raises:
        ValueError: No Python or no host is named.
    """
    from m4oe.client import Client

    return Client(command("worker"), environment())


def showDevices(selector: Any, devices: Sequence[Any], chosen: str) -> None:
    """Fills a box with the devices and their free memory; the chosen one is there in any case."""
    selector.clear()
    selector.addItem(_("Automatic"), "auto")
    for device in devices:
        text = _("{name}, {free:.1f} GB free").format(name=device.description, free=device.free_mib / 1024)
        selector.addItem(text, device.name)
        why = _("{text}; it is the CPU, as {why}").format(text=text, why=device.why) if device.why else text
        selector.setItemData(selector.count - 1, why, qt.Qt.ToolTipRole)
    if selector.findData(chosen) < 0:
        selector.addItem(chosen, chosen)
    selector.currentIndex = selector.findData(chosen)


class WorkerSection:
    """The panel's part for the worker: where it runs, and on which device."""

    def __init__(self, ui: Any, client: Callable[[], Client], changed: Callable[[], None]) -> None:
        """Connects the widgets and shows the settings.

        Args:
            ui: The panel's widgets.
            client: Gives the client of the worker.
            changed: Called when something has changed.
        """
        self._ui, self._client, self._changed = ui, client, changed
        self.job: Any = None
        self._asked: Client | None = None
        for where, label in labels().items():
            ui.workerSelector.addItem(label, where)
        ui.workerSelector.currentIndex = ui.workerSelector.findData(place())
        ui.pythonPathEdit.currentPath = setting("python", "")
        ui.hostEdit.text = setting("host", "")
        self._showDevices(())
        ui.refreshDevicesButton.connect("clicked()", self._ask)
        ui.deviceSelector.connect("activated(int)", self.save)
        ui.workerSelector.connect("activated(int)", self.save)
        ui.pythonPathEdit.connect("currentPathChanged(QString)", self.save)
        ui.hostEdit.connect("editingFinished()", self.save)

    def save(self, *what: Any) -> None:
        """Keeps what is chosen in the settings of this machine."""
        ui = self._ui
        setSetting("device", ui.deviceSelector.currentData or "auto")
        setSetting("worker", ui.workerSelector.currentData)
        setSetting("python", ui.pythonPathEdit.currentPath)
        setSetting("host", ui.hostEdit.text.strip())
        self._changed()

    def showState(self, running: bool) -> None:
        """Enables what can be used; `running` says whether the worker segments a volume."""
        self._ui.refreshDevicesButton.enabled = self.job is None and not running
        where = self._ui.workerSelector.currentData
        self._ui.pythonPathEdit.enabled, self._ui.hostEdit.enabled = where == PYTHON, where == SSH

    def askOnce(self, client: Client) -> bool:
        """Asks a worker that has just done its first run, and so answers at once; whether there is nothing to ask.

        One that the settings do not name any more is not asked.
        """
        with errorsShown(_("The worker cannot be asked for its devices.")):
            if self._asked is not client and self._client() is client:
                self._ask()
        return self.job is None

    def cancel(self) -> None:
        """Waits no longer for the answer."""
        if self.job is not None:
            self.job.cancel()

    def poll(self) -> bool:
        """Shows the devices when the worker has answered; whether it is still asked."""
        from m4oe.jobs import Cancelled

        if self.job is None or not self.job.done():
            return self.job is not None
        job, self.job = self.job, None
        with errorsShown(_("The worker cannot be asked for its devices.")), suppress(Cancelled):
            info = job.result()
            self._showDevices(info.devices)
            self._ui.statusLabel.text = info.problem
        self._changed()
        return False

    def _ask(self) -> None:
        with errorsShown(_("The worker cannot be asked for its devices.")):
            self._asked = self._client()
            self.job = self._asked.begin_info()
            self._changed()

    def _showDevices(self, devices: Sequence[Any]) -> None:
        showDevices(self._ui.deviceSelector, devices, setting("device", "auto"))
