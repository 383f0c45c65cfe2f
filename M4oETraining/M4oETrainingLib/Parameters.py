"""What the panel remembers in the scene; known runs and which Python works belong to the machine and are settings."""

from __future__ import annotations

import enum

from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import parameterNodeWrapper


class Preset(enum.Enum):
    """How large the network is and how long it learns."""

    QUICK = "quick"
    SMALL = "small"
    PAPER = "paper"
    FULL = "full"

    def label(self) -> str:
        return {
            "quick": _("Quick look: in miniature, to see that it works"),
            "small": _("Small: a small network, hours on a GPU"),
            "paper": _("Paper: as published, gates in all blocks, days on a GPU"),
            "full": _("Full: as large, one gate for a volume, days on a GPU"),
        }[self.value]


@parameterNodeWrapper
class Parameters:
    """The choices of a training; folders are the data sets, labels what their values mean ("1=liver,2=spleen")."""

    folders: list[str]
    labels: str = ""
    modality: str = ""
    expert: str = ""
    runFolder: str = ""
    preset: Preset = Preset.SMALL
    length: float = 1.0
    pretrain: int = 0
    synthesise: bool = False
    name: str = "m4oe"
    baseModel: str = ""
