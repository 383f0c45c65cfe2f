"""A run in the panel: its state, progress, scores and pictures, brought up to date by a timer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import qt
from m4oe.labels import structure
from m4oe.training_run import SYNTHESIS, Progress, Run
from slicer.i18n import tr as _

from . import Runs
from .Curves import Curves

_PICTURE_WIDTH = 380  # pixels, so that the panel needs not be wider for it
_MOST_LINES = 6


class _Best(NamedTuple):
    """The validation with the best mean of its stage; its weights go on to the next stage, or are the model."""

    stage: int
    score: float
    dice: dict[str, float]


class RunView:
    """Shows a run in the panel's widgets.

    Attributes:
        run: The run.
        state: As `Run.state` said at the last look; "" where it could not be read.
        curves: Loss, and Dice per structure.
    """

    def __init__(self, folder: str, ui: Any) -> None:
        self.run = Run(folder)
        self._ui = ui
        self._offset, self._progress = 0, Progress()
        self._words = self._offered = ""
        self._left: dict[str, str] = {}
        self._picture = Path()
        self._best = _Best(-1, 0.0, {})
        self.state = ""
        name = Path(folder).name
        self.curves = {
            "loss": Curves(_("Loss of {name}").format(name=name), _("Loss")),
            "dice": Curves(_("Dice of {name}").format(name=name), _("Dice"), marked=True),
        }
        clear(ui)
        ui.shownRunLabel.text = _("Training {name}, chosen under Runs:").format(name=name)
        ui.diceTable.setColumnCount(3)
        ui.diceTable.setHorizontalHeaderLabels([_("Structure"), _("Dice"), _("Best of the stage")])
        ui.diceTable.horizontalHeader().setStretchLastSection(True)
        ui.diceTable.verticalHeader().setVisible(False)

    @property
    def model(self) -> Path:
        """Where its model is when it is finished."""
        return self.run.folder / "model.safetensors"

    def modelEntries(self) -> list[tuple[str, str]]:
        """What to call its model, and where that is; nothing before there is one."""
        name = _("{name} (run)").format(name=self.run.folder.name)
        return [(name, str(self.model))] if self.model.exists() else []

    def poll(self) -> bool:
        """Shows what is new; whether it has just finished."""
        before = self.state
        try:
            self.run.enforce()
            self.state = self.run.state()
            events, self._offset = self.run.events_since(self._offset)
        except (ValueError, OSError) as error:  # its folder was deleted, or is on a drive that is away
            self.state = ""
            self._ui.statusLabel.text = _("The run cannot be read: {error}").format(error=error)
            return False
        for event in events:
            self._take(event)
        if self.state == "finished" and before not in ("", "finished"):  # "": it had finished before it was looked at
            self._offered = self._offer()
        for curves in self.curves.values():
            curves.update()
        if events or self.state != before:
            self._showProgress()
        if events:
            self._showPicture()
        return self.state == "finished" != before

    def close(self) -> None:
        """Takes its curves out of the scene, and what is said of it out of the panel."""
        for curves in self.curves.values():
            curves.remove()
        clear(self._ui)

    def _offer(self) -> str:
        try:
            return Runs.offer(self.model)
        except (ValueError, OSError) as error:
            return _("M4oE Segmentation did not get the model: {error}").format(error=error)

    def _take(self, event: dict[str, Any]) -> None:
        self._progress.take(event)
        match event["event"]:
            case "step":
                self.curves["loss"].take(event["overall"], event["loss"])
                ended = event["overall"] == event["overall_steps"]
                self._words = _("scores the model") if ended else ""
            case "early stop":
                self._words = _("stage {stage} has nothing more to gain").format(stage=event["stage"])
            case "validated":
                dice = {structure(key).name: value for key, value in event["dice"].items()}
                self.curves["dice"].take(event["overall"], dice)
                if event["number"] != self._best.stage or event["score"] > self._best.score:
                    self._best = _Best(event["number"], event["score"], dice)
                self._showDice(dice)
            case "training":  # a process starts, and looks at all cases anew
                self._left = {}
            case "left out":
                self._left[event["case"]] = event["reason"]
            case "prepared":
                self._words = _("prepares the cases: {made} of {of}").format(made=event["made"], of=event["of"])
            case "scored":
                self._words = _("scores the model: {case}").format(case=event["case"])
            case "finished" | "scores" | "synthesis":
                self._words = ""

    def _showDice(self, dice: dict[str, float]) -> None:
        table = self._ui.diceTable
        table.setRowCount(len(dice))
        for row, (name, value) in enumerate(dice.items()):
            for column, text in enumerate((name, f"{value:.3f}", f"{self._best.dice.get(name, 0.0):.3f}")):
                table.setItem(row, column, qt.QTableWidgetItem(text))
        table.resizeColumnToContents(0)

    def _showProgress(self) -> None:
        ui, progress = self._ui, self._progress
        ui.progressBar.value = round(100 * progress.fraction)
        parts = [Runs.stateLabel(self.run, self.state)]
        if self.state == "running":
            parts.append(self._words or (progress.stage and _("stage {stage}").format(stage=progress.stage)))
            if progress.seconds_left and not self._words:
                parts.append(_("{time} left").format(time=Runs.duration(progress.seconds_left)))
            if not progress.stage and not self._words:
                parts.append(_("prepares the cases"))
        lines = ["; ".join(part for part in parts if part)]
        if self.state == "finished" and self._best.dice and not any(self._best.dice.values()):
            lines.append(
                _(
                    "The model finds nothing in the validation cases, so it is of no use yet. It may need more steps "
                    "or more cases, or the label values mean something else."
                )
            )
        lines += [self._offered] if self._offered else []
        lines += [_("Left out: {case}: {reason}").format(case=case, reason=why) for case, why in self._left.items()]
        ui.statusLabel.text = "\n".join(lines[:_MOST_LINES] + ["..."] * (len(lines) > _MOST_LINES))

    def _showPicture(self) -> None:
        """The newest picture of validation cases; before the first, what synthetic images look like."""
        pictures = list(self.run.folder.glob(SYNTHESIS))
        pictures += sorted(self.run.folder.glob("previews/step_*.png"), key=lambda path: int(path.stem[5:]))
        if pictures and pictures[-1] != self._picture:
            self._picture = pictures[-1]
            showPicture(self._ui.previewLabel, self._picture)
            self._ui.previewCaptionLabel.text = (
                _("Label maps drawn in made-up contrasts, which are mixed with your images:")
                if self._picture.name == SYNTHESIS
                else _("Validation cases: slice, truth, prediction")
            )


def showPicture(label: Any, path: Path) -> None:
    """The picture in the width of the panel."""
    label.setPixmap(qt.QPixmap(str(path)).scaledToWidth(_PICTURE_WIDTH, qt.Qt.SmoothTransformation))


def clear(ui: Any) -> None:
    """Shows no run."""
    ui.progressBar.value = 0
    ui.statusLabel.text = ui.shownRunLabel.text = ui.previewCaptionLabel.text = ""
    ui.diceTable.setRowCount(0)
    ui.previewLabel.clear()
