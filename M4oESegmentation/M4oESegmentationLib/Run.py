"""One run: a volume node, or each frame of its sequence, goes to the worker; at the end the scene gets the result."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import slicer
from slicer.i18n import tr as _

if TYPE_CHECKING:
    from m4oe.client import Client
    from m4oe.geometry import Volume
    from m4oe.jobs import Report

_REPORT = "M4oE.report"  # attribute of a segmentation node with its report: JSON in base64, as MRML ends values at ":"


@dataclass(frozen=True)
class Choices:
    """What to do with a volume; the names are those of `m4oe.client.Client.begin_segment`."""

    model: str
    expert: str = "auto"
    structures: tuple[str, ...] = ()
    device: str = "auto"
    quality: str = "standard"
    uncertainty: bool = False
    allFrames: bool = False


class Run:
    """A segmentation under way. Ask `poll` from a timer until it says that all is done.

    Attributes:
        error: Why it failed or was stopped; None while all is well.
        segmentationNode: The result, when done.
        uncertaintyNode: The uncertainty, if it was asked for, when done.
        report: Of the last frame, when done.
    """

    def __init__(
        self, client: Client, keys: Sequence[str], volumeNode: Any, segmentationNode: Any, choices: Choices
    ) -> None:
        """Sends the volume, or its first frame.

        Args:
            client: Of the worker.
            keys: Structures of the model, in the order of their labels.
            volumeNode: CT or MR.
            segmentationNode: Takes the result; None makes a new one.
            choices: What to do.

        Raises:
            ValueError: Something that was given cannot be used.
            RuntimeError: The worker is busy.
        """
        from m4oe.nodes import check_segmentation_node, volume_from_node

        self._keys = {label: key for label, key in enumerate(keys, 1) if key in choices.structures}
        if segmentationNode is not None:
            check_segmentation_node(segmentationNode, volumeNode, self._keys.values())
        self._client, self._choices = client, choices
        self._ids = (volumeNode.GetID(), segmentationNode.GetID() if segmentationNode is not None else "")
        self._sequence = framesOf(volumeNode) if choices.allFrames else None
        frames = range(self._sequence.GetNumberOfDataNodes()) if self._sequence else ()
        nodes = [self._sequence.GetNthDataNode(number) for number in frames] if self._sequence else [volumeNode]
        self._volumes = [volume_from_node(node) for node in nodes]
        self._labels: list[Volume] = []
        self._uncertainty: Any = None
        self._events = ("send", 0.0)
        self._started = time.monotonic()
        self.error: Exception | None = None
        self.report: Report | None = None
        self.segmentationNode = self.uncertaintyNode = None
        self._begin()

    def poll(self) -> bool:
        """Goes on, without waiting; whether all is done."""
        for event in self._job.events():
            if event.phase != self._events[0]:
                self._started = time.monotonic()
            self._events = event
        if not self._job.done():
            return False
        try:
            labels, self.report = self._job.result()
            self._labels.append(labels)
            if len(self._labels) < len(self._volumes):
                self._begin()
                return False
            self._import()
        except (ValueError, RuntimeError, MemoryError) as error:
            self.error = error
        self._volumes.clear()
        return True

    def cancel(self) -> None:
        """Stops the run; `poll` says within a second or two that it is done."""
        self._job.cancel()

    def progress(self) -> tuple[float, str]:
        """The fraction done of the phase, and a sentence with the phase and, where it can be told, the time left."""
        phase, fraction = self._events
        names = {
            "send": _("Sending the volume"),
            "load": _("Loading the model"),
            "prepare": _("Preparing"),
            "segment": _("Segmenting"),
            "receive": _("Receiving the result"),
        }
        text = names.get(phase, phase)
        if len(self._volumes) > 1:
            text = _("Frame {number} of {count}: {phase}").format(
                number=len(self._labels) + 1, count=len(self._volumes), phase=text
            )
        spent = time.monotonic() - self._started
        if phase == "segment" and fraction > 0 and spent > 1:
            text = _("{phase}, {seconds} left").format(phase=text, seconds=duration(spent / fraction - spent))
        return fraction, text

    def _begin(self) -> None:
        import numpy as np

        volume, choices = self._volumes[len(self._labels)], self._choices
        if choices.uncertainty:
            self._uncertainty = np.zeros(volume.array.shape, np.uint8)
        self._job = self._client.begin_segment(
            volume,
            model=choices.model,
            expert=choices.expert,
            structures=choices.structures,
            device=choices.device,
            quality=choices.quality,
            uncertainty=self._uncertainty,
        )

    def _import(self) -> None:
        """Puts the results into the scene, in one go.

        Raises:
            ValueError: The volume is gone.
        """
        volumeNode, segmentationNode = (slicer.mrmlScene.GetNodeByID(node) if node else None for node in self._ids)
        if volumeNode is None:
            raise ValueError(_("The volume was removed while it was being segmented; nothing was changed."))
        if segmentationNode is None:
            name = _("{volume} M4oE segmentation").format(volume=volumeNode.GetName())
            name = slicer.mrmlScene.GenerateUniqueName(name)
            segmentationNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", name)
        frames = self._frames(volumeNode, segmentationNode) if self._sequence else None
        for number, labels in enumerate(self._labels):
            self._fill(segmentationNode, labels, volumeNode)
            if frames is not None:
                value = self._sequence.GetNthIndexValue(number)
                frames.SetDataNodeAtValue(segmentationNode, value)
        if frames is not None:
            _play(volumeNode, frames, segmentationNode)
        if self._uncertainty is not None and frames is None:
            self._showUncertainty(volumeNode)
        self.segmentationNode = segmentationNode

    def _fill(self, segmentationNode: Any, labels: Volume, volumeNode: Any) -> None:
        from m4oe.nodes import segmentation_to_node

        segmentation_to_node(labels, self._keys, segmentationNode, volumeNode, self.report.model)
        setReport(segmentationNode, self.report)

    def _showUncertainty(self, volumeNode: Any) -> None:
        from dataclasses import replace

        from m4oe.nodes import percent_to_node

        name = _("{volume} M4oE uncertainty").format(volume=volumeNode.GetName())
        volume = replace(self._labels[-1], array=self._uncertainty, name=name)
        self.uncertaintyNode = percent_to_node(volume, volumeNode)

    def _frames(self, volumeNode: Any, segmentationNode: Any) -> Any:
        frames = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", segmentationNode.GetName())
        for name in ("IndexName", "IndexUnit", "IndexType"):
            getattr(frames, f"Set{name}")(getattr(self._sequence, f"Get{name}")())
        return frames


def setReport(segmentationNode: Any, report: Report) -> None:
    """Keeps the report with the segmentation, also in saved scenes."""
    segmentationNode.SetAttribute(_REPORT, base64.b64encode(report.to_json().encode()).decode())


def reportOf(segmentationNode: Any) -> Report | None:
    """The report of the run that made a segmentation; None where it is none of ours."""
    from m4oe.jobs import Report

    text = segmentationNode.GetAttribute(_REPORT) if segmentationNode is not None else None
    return Report.from_json(base64.b64decode(text).decode()) if text else None


def framesOf(volumeNode: Any) -> Any:
    """The sequence node whose frames this volume node shows, or None."""
    sequences = getattr(slicer.modules, "sequences", None)
    browser = sequences.logic().GetFirstBrowserNodeForProxyNode(volumeNode) if sequences and volumeNode else None
    return browser.GetSequenceNode(volumeNode) if browser is not None else None


def _play(volumeNode: Any, frames: Any, segmentationNode: Any) -> None:
    """Lets the segmentation follow the frames of the volume."""
    browser = slicer.modules.sequences.logic().GetFirstBrowserNodeForProxyNode(volumeNode)
    browser.AddSynchronizedSequenceNode(frames)
    browser.AddProxyNode(segmentationNode, frames, False)
    slicer.modules.sequences.logic().UpdateProxyNodesFromSequences(browser)


def duration(seconds: float) -> str:
    """A time for people, such as "1 min 20 s"."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return _("{minutes} min {seconds} s").format(minutes=minutes, seconds=rest) if minutes else f"{rest} s"
