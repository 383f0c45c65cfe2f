"""One run: a volume node, or each frame of its sequence, goes to the worker; at the end the scene gets the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import slicer
import slicer.util
from slicer.i18n import tr as _

from . import Worker
from .Errors import errorsShown, showError
from .Reports import setReport

if TYPE_CHECKING:
    from m4oe.client import Client
    from m4oe.geometry import Volume
    from m4oe.jobs import Report
    from m4oe.spec import ModelSpec


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
        client: Of the worker.
        error: Why it failed or was stopped; None while all is well.
        segmentationNode: The result, when done.
        uncertaintyNode: The uncertainty, if it was asked for, when done.
        report: Of the last frame, when done.
    """

    def __init__(
        self, client: Client, spec: ModelSpec, volumeNode: Any, segmentationNode: Any, choices: Choices
    ) -> None:
        """Sends the volume, or its first frame.

        Args:
            client: Of the worker.
            spec: Of the model.
            volumeNode: CT or MR.
            segmentationNode: Takes the result; None makes a new one.
            choices: What to do.

        Raises:
            ValueError: Something that was given cannot be used.
            RuntimeError: The worker is busy.
        """
        from m4oe.nodes import check_segmentation_node, volume_from_node

        self._spec = spec
        self._keys = {label: key for label, key in spec.label_keys.items() if key in choices.structures}
        if segmentationNode is not None:
            check_segmentation_node(segmentationNode, volumeNode, self._keys.values())
        self.client, self._choices = client, choices
        self._volumeNode, self._segmentationNode = volumeNode, segmentationNode
        self._added: list[Any] = []
        self._cancelled = False
        self._sequence = framesOf(volumeNode) if choices.allFrames else None
        frames = range(self._sequence.GetNumberOfDataNodes()) if self._sequence else ()
        nodes = [self._sequence.GetNthDataNode(number) for number in frames] if self._sequence else [volumeNode]
        self._volumes = [volume_from_node(node) for node in nodes]
        self._results: list[tuple[Volume, Report]] = []
        self._uncertainty: Any = None
        self._events = ("send", 0.0)
        self._started = time.monotonic()
        self.error: Exception | None = None
        self.report: Report | None = None
        self.segmentationNode = self.uncertaintyNode = None
        self._begin()

    def poll(self) -> bool:
        """Goes on, without waiting; whether all is done."""
        from m4oe.jobs import Cancelled

        for event in self._job.events():
            if event.phase != self._events[0]:
                self._started = time.monotonic()
            self._events = event
        if not self._job.done():
            return False
        try:
            labels, self.report = self._job.result()
            self._checkModel()
            self._results.append((labels, self.report))
            if self._cancelled:  # too late for the worker, not for the scene
                raise Cancelled(_("cancelled"))
            if len(self._results) < len(self._volumes):
                self._begin()
                return False
            self._import()
        except Exception as error:  # whatever it is, the run has ended
            self.error = error
        self._volumes.clear()
        return True

    def cancel(self) -> None:
        """Stops the run; `poll` says within a second or two that it is done."""
        self._cancelled = True
        self._job.cancel()

    def progress(self) -> tuple[float, str]:
        """The fraction done of the phase, and a sentence with the phase and, where it can be told, the time left."""
        phase, fraction = self._events
        if self._cancelled:
            return fraction, _("Cancelling")
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
                number=len(self._results) + 1, count=len(self._volumes), phase=text
            )
        spent = time.monotonic() - self._started
        if phase == "segment" and fraction > 0 and spent > 1:
            text = _("{phase}, {seconds} left").format(phase=text, seconds=duration(spent / fraction - spent))
        return fraction, text

    def _begin(self) -> None:
        import numpy as np

        volume, choices = self._volumes[len(self._results)], self._choices
        if choices.uncertainty:
            self._uncertainty = np.zeros(volume.array.shape, np.uint8)
        self._job = self.client.begin_segment(
            volume,
            model=Worker.modelThere(choices.model),
            expert=choices.expert,
            structures=choices.structures,
            device=choices.device,
            quality=choices.quality,
            uncertainty=self._uncertainty,
        )

    def _checkModel(self) -> None:
        """Refuses a result whose labels mean something else.

        Raises:
            ValueError: The worker has another model of this name.
        """
        mine = f"{self._spec.name} {self._spec.version}"
        if self.report.model != mine:
            raise ValueError(
                _("The worker used the model {theirs}, here it is {mine}: install the same one there.").format(
                    theirs=self.report.model, mine=mine
                )
            )

    def _import(self) -> None:
        """Puts the results into the scene, in one go.

        Raises:
            ValueError: The volume is gone.
        """
        if not isInScene(self._volumeNode):  # its ID may be another volume's by now
            raise ValueError(_("The volume was removed while it was being segmented; nothing was changed."))
        given = self._segmentationNode
        before = slicer.vtkMRMLSegmentationNode()
        if given is not None:
            before.Copy(given)
        try:
            self._show()
        except Exception:
            for node in self._added:
                slicer.mrmlScene.RemoveNode(node)
            if given is not None:
                given.Copy(before)
            raise

    def _show(self) -> None:
        from m4oe.nodes import segmentation_to_node

        volumeNode, segmentationNode = self._volumeNode, self._segmentationNode
        if segmentationNode is None or not isInScene(segmentationNode):
            name = _("{volume} M4oE segmentation").format(volume=volumeNode.GetName())
            segmentationNode = self._add("vtkMRMLSegmentationNode", slicer.mrmlScene.GenerateUniqueName(name))
        frames = self._frames(segmentationNode) if self._sequence else None
        for number, (labels, report) in enumerate(self._results):
            segmentation_to_node(labels, self._keys, segmentationNode, volumeNode, report.model)
            setReport(segmentationNode, report, self._spec)
            if frames is not None:
                frames.SetDataNodeAtValue(segmentationNode, self._sequence.GetNthIndexValue(number))
        if frames is not None:
            _play(volumeNode, frames, segmentationNode)
        if self._uncertainty is not None and frames is None:
            self._showUncertainty(volumeNode)
        self.segmentationNode = segmentationNode

    def _add(self, kind: str, name: str) -> Any:
        self._added.append(slicer.mrmlScene.AddNewNodeByClass(kind, name))
        return self._added[-1]

    def _showUncertainty(self, volumeNode: Any) -> None:
        from dataclasses import replace

        from m4oe.nodes import percent_to_node

        name = _("{volume} M4oE uncertainty").format(volume=volumeNode.GetName())
        volume = replace(self._results[-1][0], array=self._uncertainty, name=name)
        self.uncertaintyNode = percent_to_node(volume, volumeNode)

    def _frames(self, segmentationNode: Any) -> Any:
        frames = self._add("vtkMRMLSequenceNode", segmentationNode.GetName())
        for name in ("IndexName", "IndexUnit", "IndexType"):
            getattr(frames, f"Set{name}")(getattr(self._sequence, f"Get{name}")())
        return frames


def isInScene(node: Any) -> bool:
    """Whether a node is still where the user sees it."""
    return node.GetScene() is slicer.mrmlScene


def volumeNodes() -> list[Any]:
    """The volumes of the scene that can be segmented; label maps and colour volumes are of classes derived from it."""
    kind = "vtkMRMLScalarVolumeNode"
    return [node for node in slicer.util.getNodesByClass(kind) if node.GetClassName() == kind]


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
    return (
        _("{minutes} min {seconds} s").format(minutes=minutes, seconds=rest)
        if minutes
        else _("{seconds} s").format(seconds=rest)
    )


class RunSection:
    """The panel's part that segments one volume.

    Attributes:
        run: Under way, or None.
    """

    def __init__(
        self,
        ui: Any,
        parameters: Callable[[], Any],
        start: Callable[[], Run],
        changed: Callable[[], None],
        worker: Worker.WorkerSection,
    ) -> None:
        """Connects the widgets.

        Args:
            ui: The panel's widgets.
            parameters: Gives the panel's parameters, which keep the result.
            start: Begins a run with what is chosen in the panel.
            changed: Called when a run has begun or ended.
            worker: Lists the worker's devices after its first run, before that counts as ended.
        """
        self._ui, self._parameters, self._start, self._changed = ui, parameters, start, changed
        self._worker, self._over = worker, False
        self.run: Run | None = None
        ui.applyButton.connect("clicked()", self._apply)
        ui.cancelButton.connect("clicked()", self.cancel)

    def poll(self) -> bool:
        """Shows how far it is; whether a run is under way."""
        if self.run is None:
            return False
        fraction, sentence = self.run.progress()
        self._ui.progressBar.value = round(100 * fraction)
        self._ui.statusLabel.text = sentence
        self._over = self._over or self.run.poll()
        if self._over and (self.run.error is not None or self._worker.askOnce(self.run.client)):
            self._end()
        return self.run is not None

    def cancel(self) -> None:
        if self.run is not None:
            self.run.cancel()
            self._worker.cancel()

    def _apply(self) -> None:
        with errorsShown(_("The segmentation could not be started.")):
            self._ui.progressBar.value = 0
            self.run = self._start()
            self._changed()

    def _end(self) -> None:
        from m4oe.jobs import Cancelled

        run, self.run, self._over = self.run, None, False
        self._ui.progressBar.value = 100 if run.error is None else 0
        if run.error is None:
            self._ui.statusLabel.text = _("Done in {seconds:.0f} s on {device}.").format(
                seconds=sum(run.report.seconds.values()), device=run.report.device
            )
            self._parameters().result = run.segmentationNode if isInScene(run.segmentationNode) else None
        elif isinstance(run.error, Cancelled):
            self._ui.statusLabel.text = _("Cancelled; nothing was changed.")
        else:
            logging.error("M4oE: %s", run.error, exc_info=run.error)
            self._ui.statusLabel.text = _("Failed; nothing was changed.")
            showError(_("The segmentation failed."), run.error)
        self._changed()
