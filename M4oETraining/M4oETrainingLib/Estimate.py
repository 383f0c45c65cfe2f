"""What a training would take and draw: `m4oe train --estimate` in the worker's Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from m4oe.training_run import SYNTHESIS
from M4oESegmentationLib import Worker
from M4oESegmentationLib.Errors import errorsShown
from M4oESegmentationLib.Process import Process
from slicer.i18n import tr as _

from . import Runs
from .RunView import showPicture


class EstimateSection:
    """The panel's part for estimates: a button that begins one, or cancels the one under way."""

    def __init__(self, ui: Any, command: Callable[[], list[str]], choices: Callable[[], list[str]]) -> None:
        """Connects the widgets.

        Args:
            ui: The panel's widgets.
            command: Gives that of an estimate with the panel's choices.
            choices: Gives those that an estimate depends on.
        """
        self._ui, self._command, self._choices = ui, command, choices
        self._chosen: list[str] = []
        self.process: Process | None = None
        ui.estimateButton.connect("clicked()", self._toggle)

    @property
    def busy(self) -> bool:
        return self.process is not None

    def poll(self) -> None:
        """Shows the result when it is there, and takes it away when it is for other choices."""
        if self._ui.estimateLabel.text and self._chosen != self._choices():
            self.stop()
        if self.process is None or not self.process.done():
            return
        process = self.process
        self.stop()
        with errorsShown(_("There is no estimate.")):
            self._ui.estimateLabel.text = Runs.estimate(process)
            picture = Path(self._chosen[self._chosen.index("-o") + 1], SYNTHESIS)
            if picture.exists():
                showPicture(self._ui.synthesisLabel, picture)

    def stop(self) -> None:
        """Ends the one under way, and shows none."""
        if self.process is not None:
            self.process.stop()
        self._show(None, "")

    def _toggle(self) -> None:
        if self.busy:
            self.stop()
            return
        with errorsShown(_("There is no estimate.")):
            process, self._chosen = Process(self._command(), Worker.environment()), self._choices()
            self._show(process, _("Prepares the cases and measures a few steps ..."))

    def _show(self, process: Process | None, text: str) -> None:
        self.process, self._ui.estimateLabel.text = process, text
        self._ui.synthesisLabel.clear()
        self._ui.estimateButton.text = _("Estimate") if process is None else _("Cancel")
