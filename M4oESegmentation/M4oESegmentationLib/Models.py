"""The installed models: listed and described by their headers alone, imported, shown in their folder."""

from __future__ import annotations

import logging
import os
import shutil
from html import escape
from pathlib import Path
from typing import Any

from slicer.i18n import tr as _


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
    if spec is None:
        return _("No model is installed.")
    parts = [
        escape(spec.description),
        _("<b>Limits:</b> {text}").format(text=escape(spec.limits or _("research only, not a medical device"))),
        _("<b>Licence:</b> {text}").format(text=escape(spec.licence or _("not given"))),
        _("<b>Structures:</b> {count}").format(count=len(spec.structures)),
    ]
    for expert, scores in spec.scores.items():
        known = [value for value in scores.values() if value is not None]
        if known:
            mean = sum(known) / len(known)
            parts.append(
                _("<b>Expected Dice, {expert}:</b> {mean:.2f} in the mean ({low:.2f} to {high:.2f})").format(
                    expert=escape(expert), mean=mean, low=min(known), high=max(known)
                )
            )
    return "<br>".join(part for part in parts if part)


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
