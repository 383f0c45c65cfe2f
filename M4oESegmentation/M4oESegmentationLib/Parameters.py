"""What the panel remembers in the scene; what belongs to the machine is in the settings (Worker.py)."""

from __future__ import annotations

import enum

from slicer import vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode
from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import parameterNodeWrapper


class Quality(enum.Enum):
    """How many slices the network looks at."""

    STANDARD = "standard"
    FAST = "fast"

    def label(self) -> str:
        return {"standard": _("Standard"), "fast": _("Fast: half of the slices")}[self.value]


@parameterNodeWrapper
class Parameters:
    """The choices of a run.

    model and expert are names ("" is the first model, "auto" the gate's choice), as a scene is opened on other machines
    too; excludedStructures are keys that are not wanted; result is the segmentation that the results are shown of.
    """

    inputVolume: vtkMRMLScalarVolumeNode
    allFrames: bool = False
    model: str = ""
    expert: str = "auto"
    excludedStructures: list[str]
    outputSegmentation: vtkMRMLSegmentationNode
    uncertainty: bool = False
    quality: Quality = Quality.STANDARD
    result: vtkMRMLSegmentationNode
