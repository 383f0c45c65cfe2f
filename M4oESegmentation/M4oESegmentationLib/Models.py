"""The installed models, listed and described by their headers alone, and the panel's part that offers them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from html import escape
from pathlib import Path, PureWindowsPath
from typing import Any

import qt
from slicer.i18n import tr as _

from .Errors import errorsShown
from .Structures import StructureList


def installedModels() -> dict[str, Any]:
    """Specs by path; of two models with one name the user's own counts. A damaged one is logged and left out."""
    from m4oe.spec import installed_models, read_spec

    specs: dict[str, Any] = {}
    names = set()
    for path in installed_models():
        try:
            spec = read_spec(path)
        except ValueError as error:
            logging.warning("M4oE: %s", error)
            continue
        if path.stem not in names:
            names.add(path.stem)
            specs[str(path)] = spec
    return specs


def describe(spec: Any) -> str:
    """What a user should know before trusting the model, as rich text."""
    parts = [
        escape(spec.description),
        _("<b>Limits:</b> {text}").format(text=escape(spec.limits or _("research only, not a medical device"))),
        _("<b>Licence:</b> {text}").format(text=escape(spec.licence or _("not given"))),
        _("<b>Structures:</b> {count}").format(count=len(spec.structures)),
    ]
    for title, key in ((_("Learned from"), "data"), (_("On real volumes"), "real volumes")):
        if spec.training.get(key):
            parts.append(f"<b>{title}:</b> {escape(str(spec.training[key]))}")
    for cases, scores in _scores(spec).items():
        parts.append(
            _("<b>Dice on {cases}, mean (lowest to highest):</b> {scores}").format(
                cases=cases, scores=", ".join(scores)
            )
        )
    return "<br>".join(part for part in parts if part)


def _scores(spec: Any) -> dict[str, list[str]]:
    """The scores of the experts, by what they were scored on: these say little of patients where it was phantoms."""
    phantoms, validated = "phantom" in str(spec.training.get("data")), spec.training.get("scored_on_validation", ())
    unseen = _("computer-made phantoms") if phantoms else _("cases that training did not see")
    found: dict[str, list[str]] = {}
    for expert, scores in spec.scores.items():
        known = [value for value in scores.values() if value is not None]
        if known:
            cases = _("validation cases, which chose the weights") if expert in validated else unseen
            mean = sum(known) / len(known)
            found.setdefault(cases, []).append(f"{escape(expert)} {mean:.2f} ({min(known):.2f} to {max(known):.2f})")
    return found


def modelFolder() -> str:
    """The user's own folder of models; it is made where it is missing.

    Raises:
        OSError: It cannot be made.
    """
    from m4oe.spec import model_folders

    folder = model_folders()[0]
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def importModel(path: str, name: str = "") -> str:
    """Copies a model file to the user's folder, whole or not at all, and returns its new path.

    Args:
        path: The file.
        name: Of the copy, without suffix; "" for the file's own.

    Raises:
        ValueError: It is no model, or a model of that name is there already.
        OSError: It cannot be copied.
    """
    from m4oe.spec import read_spec

    read_spec(path)
    target = Path(modelFolder(), f"{name}.safetensors" if name else Path(path).name)
    if target.exists():
        raise ValueError(
            _("{target} is there already. Rename the file, or remove the old one first.").format(target=target)
        )
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(path, new)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
    return str(target)


class ModelSection:
    """The panel's part for the model, its expert and its structures.

    Attributes:
        specs: Of the installed models, by path.
        structures: The list of structures.
    """

    def __init__(self, ui: Any, parameters: Callable[[], Any], changed: Callable[[], None]) -> None:
        """Connects the widgets.

        Args:
            ui: The panel's widgets.
            parameters: Gives the panel's parameters, which keep what is chosen.
            changed: Called when something else is shown.
        """
        self._ui, self._parameters, self._changed = ui, parameters, changed
        self.specs: dict[str, Any] = {}
        self.structures = StructureList(
            ui.structureList, ui.structureSearchBox, ui.presetSelector, self._keepStructures
        )
        ui.modelSelector.connect("activated(int)", self._keepModel)
        ui.expertSelector.connect("activated(int)", self._keepExpert)
        ui.importModelButton.connect("clicked()", self._import)
        ui.showModelsButton.connect("clicked()", self._showFolder)

    @property
    def model(self) -> str:
        """Path of the chosen model, its name where it is missing, or ""."""
        return self._ui.modelSelector.currentData or ""

    @property
    def expert(self) -> str:
        """Name of the chosen expert, or "auto"."""
        return self._ui.expertSelector.currentData or "auto"

    @property
    def problem(self) -> str:
        """Why nothing can be segmented with what is chosen, and what to do, or ""."""
        spec = self.specs.get(self.model)
        if not self.model:
            return _("No model is installed. Import a model file.")
        if spec is None:
            return _("The model {name} is not installed here. Import its file, or choose another model.").format(
                name=self.model
            )
        if self.expert not in ("auto", *spec.expert_names):
            return _("The model {model} has no expert {expert}. Choose another expert or model.").format(
                model=spec.name, expert=self.expert
            )
        return ""

    def show(self) -> None:
        """Lists the installed models, and chooses the one of the parameters or the first."""
        if self._parameters() is None:  # the scene is being closed
            return
        self.specs, wanted = installedModels(), _nameOf(self._parameters().model)
        entries = {path: f"{spec.name} {spec.version}" for path, spec in self.specs.items()}
        paths = {_nameOf(path): path for path in self.specs}
        _fill(self._ui.modelSelector, entries, paths.get(wanted, wanted) or next(iter(entries), ""))
        self._showModel()

    def _showModel(self) -> None:
        spec, parameters = self.specs.get(self.model), self._parameters()
        names = spec.expert_names if spec else ()
        _fill(
            self._ui.expertSelector,
            {"auto": _("Automatic"), **dict(zip(names, names, strict=True))},
            parameters.expert,
        )
        self._ui.modelInfoLabel.text = describe(spec) if spec else escape(self.problem)
        self.structures.show(spec.structures if spec else (), parameters.excludedStructures)
        self._changed()

    def _keepModel(self, index: int) -> None:
        self._parameters().model = _nameOf(self.model)
        self._parameters().expert = "auto"
        self._showModel()

    def _keepExpert(self, index: int) -> None:
        self._parameters().expert = self.expert
        self._changed()

    def _keepStructures(self) -> None:
        self._parameters().excludedStructures = self.structures.excluded()
        self._changed()

    def _import(self) -> None:
        path = qt.QFileDialog.getOpenFileName(None, _("Import a model"), "", _("Models (*.safetensors)"))
        if path:
            with errorsShown(_("The model was not imported.")):
                self._parameters().model = _nameOf(importModel(path))
                self.show()

    def _showFolder(self) -> None:
        with errorsShown(_("The folder of models cannot be shown.")):
            qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(modelFolder()))


def _nameOf(model: str) -> str:
    """Name of a model or of its file, whose path may be another machine's: earlier scenes hold paths."""
    return PureWindowsPath(model).name.removesuffix(".safetensors")


def _fill(selector: Any, entries: dict[str, str], chosen: str) -> None:
    """Fills a box with data and their texts, and chooses one, which is shown as missing where it is not there."""
    selector.clear()
    for data, text in entries.items():
        selector.addItem(text, data)
    if chosen and chosen not in entries:
        selector.addItem(_("{name} (missing)").format(name=chosen), chosen)
    selector.currentIndex = selector.findData(chosen)
