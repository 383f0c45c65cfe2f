"""Where the network learns: a box of devices, with names and free memory once the worker's Python was asked."""

from __future__ import annotations

from typing import Any

from M4oESegmentationLib import Worker
from M4oESegmentationLib.Errors import errorsShown
from slicer.i18n import tr as _

_KINDS = ("cuda", "mps", "cpu")


class DeviceSection:
    """The panel's part for the device, a setting of the machine."""

    def __init__(self, ui: Any) -> None:
        """Connects the widgets and offers the kinds of devices, as nobody knows yet which there are."""
        self._ui = ui
        self._client: Any = None
        self._job: Any = None
        self._show(())
        for kind in _KINDS:
            if ui.deviceSelector.findData(kind) < 0:
                ui.deviceSelector.addItem(kind, kind)
        ui.deviceSelector.connect("activated(int)", self._keep)
        ui.refreshDevicesButton.connect("clicked()", self._ask)

    @property
    def busy(self) -> bool:
        return self._job is not None

    def poll(self) -> None:
        """Shows the devices when the worker has answered."""
        self._ui.refreshDevicesButton.enabled = not self.busy
        if self._job is None or not self._job.done():
            return
        job = self._job
        self.stop()
        with errorsShown(_("The devices are not known.")):
            info = job.result()
            if info.problem:
                raise RuntimeError(info.problem)
            self._show(info.devices)

    def stop(self) -> None:
        """Ends the worker that was asked."""
        if self._client is not None:
            self._client.close()
        self._client = self._job = None

    def _ask(self) -> None:
        from m4oe.client import Client

        if self.busy:
            return
        with errorsShown(_("The devices are not known.")):
            self._client = Client(Worker.localCommand("worker"), Worker.environment())
            self._job = self._client.begin_info()
        self._ui.refreshDevicesButton.enabled = not self.busy

    def _show(self, devices: Any) -> None:
        box = self._ui.deviceSelector
        Worker.showDevices(box, devices, Worker.setting("trainingDevice", "auto"))
        box.view().setMinimumWidth(box.view().sizeHintForColumn(0))  # whole names and memory, also in a narrow panel

    def _keep(self, index: int) -> None:
        Worker.setSetting("trainingDevice", self._ui.deviceSelector.currentData)
