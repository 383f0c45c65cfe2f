"""Installs what the worker needs, when the user asks for it, and without replacing what is Slicer's."""

from __future__ import annotations

import inspect
import io
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import qt
import slicer
import slicer.util
from slicer.i18n import tr as _

from . import Worker
from .Errors import errorsShown
from .Process import Process, lastLines

_PYTORCH = "PyTorch"  # Slicer's extension that brings torch


def doctor() -> Process:
    """Starts the examination of the Python that the worker runs in.

    Raises:
        ValueError: That Python cannot be started.
    """
    return Process(Worker.command("doctor"), Worker.environment())


def importBundle(path: str) -> Process:
    """Starts the installation from a bundle.

    Raises:
        ValueError: The worker's Python is on another machine, or cannot be started.
    """
    return Process(Worker.localCommand("bundle", "import", path), Worker.environment())


def install() -> str:
    """Installs PyTorch by Slicer's extension and the rest by pip under constraints; returns what to tell the user.

    Raises:
        RuntimeError: Something could not be installed.
    """
    if not _hasPyTorch():
        return _installExtension()
    _installTorch()
    from m4oe.install import missing

    wanted = [str(requirement) for requirement in missing() if not requirement.core]
    if not wanted:
        return _("All packages are there.")
    from slicer import packaging

    with _pip(", ".join(wanted)) as path:
        packaging.pip_install(wanted, constraints=path, requester="M4oE")
    return _("Installed: {packages}").format(packages=", ".join(wanted))


@contextmanager
def _constraints() -> Iterator[Path]:
    """A file with which pip replaces nothing that is installed now; PIP_CONSTRAINT names it to every pip meanwhile."""
    from m4oe.install import constraints

    before = os.environ.get("PIP_CONSTRAINT")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "constraints.txt")
        path.write_text(constraints(), encoding="utf-8")
        os.environ["PIP_CONSTRAINT"] = f"{before or ''} {path.as_uri()}".strip()  # pip splits it at spaces
        try:
            yield path
        finally:
            del os.environ["PIP_CONSTRAINT"]
            if before is not None:
                os.environ["PIP_CONSTRAINT"] = before


class _Heard(io.StringIO):
    """Keeps what is printed, and passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self._console = sys.stdout

    def write(self, text: str) -> int:
        self._console.write(text)
        return super().write(text)


@contextmanager
def _pip(packages: str) -> Iterator[Path]:
    """Gives the constraints under which pip is run meanwhile; where it fails, its last words come with what to do.

    Raises:
        RuntimeError: pip failed.
    """
    said = _Heard()  # Slicer prints pip's lines, and puts none into its error
    try:
        with _constraints() as path, redirect_stdout(said):
            yield path
    except subprocess.CalledProcessError as error:
        todo = _("Press Examine, which says what is wrong here. Without a network, import a bundle instead.")
        failed = _("Pip could not install {packages}.").format(packages=packages)
        raise RuntimeError("\n".join([f"{failed} {todo}", *lastLines(said.getvalue().splitlines())])) from error


def checkPlace() -> None:
    """Looks whether packages can be installed into Slicer's Python.

    Raises:
        RuntimeError: There is too little room, or their folder cannot be written.
    """
    from m4oe.doctor import disk_space, write_access

    site = Path(sysconfig.get_path("purelib"))
    findings = (disk_space({"packages": site, "temporary files": Path(tempfile.gettempdir())}), write_access(site))
    problems = [f"{finding.found}: {finding.cure}." for finding in findings if finding.state == "problem"]
    if problems:
        raise RuntimeError("\n".join(problems))


def _hasPyTorch() -> bool:
    import importlib.util

    return importlib.util.find_spec("PyTorchUtils") is not None


def _installExtension() -> str:
    manager = slicer.app.extensionsManagerModel()
    if not manager.installExtensionFromServer(_PYTORCH, False):  # else Slicer restarts at once, and the scene is lost
        raise RuntimeError(
            _("The extension PyTorch could not be installed. Without a network, import a bundle instead.")
        )
    return _("The extension PyTorch is installed. Restart Slicer, then press Install again.")


def _installTorch() -> None:
    import PyTorchUtils

    logic = PyTorchUtils.PyTorchUtilsLogic()
    if logic.torchInstalled():
        return
    wanted = {"askConfirmation": False, "torchVersionRequirement": ">=2.7"}
    known = inspect.signature(logic.installTorch).parameters  # they have changed between versions
    with _pip("PyTorch"):
        done = logic.installTorch(**{name: value for name, value in wanted.items() if name in known})
    if done is None:
        raise RuntimeError(_("PyTorch was not installed. Press Install again, or import a bundle instead."))


class SetupSection:
    """The panel's part for installation and doctor."""

    def __init__(self, ui: Any, changed: Callable[[], None]) -> None:
        """Connects the widgets; `changed` is called when something has begun or ended."""
        self._ui, self._changed = ui, changed
        self.process: Process | None = None
        ui.doctorButton.connect("clicked()", lambda: self._begin(doctor))
        ui.installButton.connect("clicked()", self._install)
        ui.bundleButton.connect("clicked()", self._importBundle)
        ui.copyButton.connect("clicked()", self._copy)

    def showState(self) -> None:
        for button in (self._ui.doctorButton, self._ui.installButton, self._ui.bundleButton):
            button.enabled = self.process is None

    def poll(self) -> bool:
        """Shows what it said when it has ended; whether something is under way."""
        if self.process is None or not self.process.done():
            return self.process is not None
        process, self.process = self.process, None
        self._ui.doctorText.setPlainText("\n".join([*process.lines(), *process.tail]))
        self._changed()
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()

    def _begin(self, start: Callable[[], Process]) -> None:
        with errorsShown(_("That could not be started.")):
            self.process = start()
            self._ui.doctorText.setPlainText(_("Working; this may take a minute."))
            self._changed()

    def _importBundle(self) -> None:
        path = qt.QFileDialog.getOpenFileName(None, _("Import a bundle"), "", _("Bundles (*.zip)"))
        if path:
            self._begin(lambda: importBundle(path))

    def _install(self) -> None:
        question = _("PyTorch and a few small packages are downloaded (up to 4 GB) and installed into Slicer's Python.")
        with errorsShown(_("The installation failed.")):
            checkPlace()
            if slicer.util.confirmOkCancelDisplay(question + "\n\n" + _("What Slicer brings is not replaced. Go on?")):
                self._ui.doctorText.setPlainText(install())

    def _copy(self) -> None:
        slicer.app.clipboard().setText(self._ui.doctorText.plainText)
