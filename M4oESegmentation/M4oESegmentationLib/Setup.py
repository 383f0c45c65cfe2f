"""Installs what the worker needs, when the user asks for it, and without replacing what is Slicer's."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path

import slicer
import slicer.util
from slicer.i18n import tr as _

from . import Worker
from .Process import Process

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
        ValueError: The worker's Python cannot be started.
    """
    return Process(Worker.command("bundle", "import", path), Worker.environment())


def install() -> str:
    """Installs PyTorch by Slicer's extension and the rest by pip under constraints; returns what to tell the user.

    Raises:
        RuntimeError: Something could not be installed.
    """
    if not _hasPyTorch():
        return _installExtension()
    _installTorch()
    from m4oe.install import constraints, missing

    wanted = [str(requirement) for requirement in missing()]
    if not wanted:
        return _("All packages are there.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "constraints.txt")
        path.write_text(constraints(), encoding="utf-8")
        _pipInstall(wanted, path)
    return _("Installed: {packages}").format(packages=", ".join(wanted))


def _hasPyTorch() -> bool:
    import importlib.util

    return importlib.util.find_spec("PyTorchUtils") is not None


def _installExtension() -> str:
    manager = slicer.app.extensionsManagerModel()
    if not manager.installExtensionFromServer(_PYTORCH):
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
    if logic.installTorch(**{name: value for name, value in wanted.items() if name in known}) is None:
        raise RuntimeError(_("PyTorch was not installed."))


def _pipInstall(packages: list[str], constraints: Path) -> None:
    try:
        from slicer import packaging
    except ImportError:  # before Slicer 5.12
        slicer.util.pip_install([*packages, "--constraint", str(constraints)])
        return
    packaging.pip_install(packages, constraints=constraints, requester="M4oE")
