"""One Slicer-like application for all GUI tests, an empty scene for each, and an eye on VTK's warnings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from harness import application, ctk_widgets, pythonqt, qmrml_widgets  # noqa: E402

SCENE, LOGIC = application.boot()
pythonqt.install()
ctk_widgets.install()
qmrml_widgets.install()
DIALOGS = application.install(LOGIC)

import qt  # noqa: E402
import slicer  # noqa: E402
import vtk  # noqa: E402


@pytest.fixture(autouse=True)
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty scene, settings and model folder of the test's own; it fails if VTK, MRML or a slot complained."""
    SCENE.Clear(False)
    DIALOGS.__init__()
    qt.QSettings.setDefaultFormat(qt.QSettings.IniFormat)
    qt.QSettings.setPath(qt.QSettings.IniFormat, qt.QSettings.UserScope, str(tmp_path / "settings"))
    qt.QSettings().clear()
    monkeypatch.setenv("M4OE_MODELS", str(tmp_path / "models"))
    complaints = vtk.vtkStringOutputWindow()
    vtk.vtkOutputWindow.SetInstance(complaints)
    faults: list[str] = []
    show = sys.excepthook
    monkeypatch.setattr(sys, "excepthook", lambda *error: (faults.append(repr(error[1])), show(*error)))
    yield SCENE
    SCENE.Clear(False)
    assert faults == []  # raised in a slot or an observer, where nobody else would see them
    assert complaints.GetOutput() == ""


@pytest.fixture
def dialogs() -> application.Dialogs:
    """What the user was told and asked."""
    return DIALOGS


@pytest.fixture
def open_panel() -> Iterator[Callable[[str], Any]]:
    """Opens a module's panel by the module's name; closes it after the test."""
    opened = []

    def open_(name: str) -> Any:
        opened.append(application.open_module(ROOT / name / f"{name}.py"))
        return opened[-1]

    yield open_
    for widget in opened:
        widget.cleanup()
        widget.parent.delete()
    slicer.app.processEvents()
