"""`m4oe worker`: segments volumes for another program, which talks to it in frames on its standard input and output.

It keeps models in memory from run to run, writes no files, and ends when its input ends, whatever it is doing: so it
never outlives the program that started it, here or at the other end of an ssh connection.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from . import __version__
from .jobs import GREETING, PROTOCOL, Cancelled, Device, Info, receive, send
from .spec import find_model, installed_models, read_spec
from .terminal import one_line

if TYPE_CHECKING:
    from .predictor import Predictor

Load = Callable[[Path, str, str], "Predictor"]
_WARM = 2  # models kept in memory
_OUT_OF_MEMORY = 137  # exit code, as of a process that the system killed
_EXPECTED = (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError)
_Answer = tuple[dict[str, Any], bytes | memoryview]
_Key = tuple[Path, int, int, str, str]


def serve(load: Load | None = None) -> NoReturn:
    """Answers requests until the input ends.

    Args:
        load: Makes a predictor of a model file, a device and a precision; None takes `Predictor`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # at once: there is nothing to save
        signal.signal(number, signal.SIG_DFL)
    requests, answers = _take_streams()
    faulthandler.enable()
    _be_the_first_to_go()
    inbox = _Inbox(requests)
    worker = _Worker(inbox, answers, load or _load)
    worker.say({GREETING: __version__, "protocol": PROTOCOL, "python": sys.executable})
    threading.Thread(target=inbox.listen, daemon=True).start()
    while True:
        worker.answer(*inbox.requests.get())


class _Inbox:
    """Reads what the other program sends, also while a volume is being segmented."""

    def __init__(self, stream: BinaryIO) -> None:
        self.requests: SimpleQueue[tuple[dict[str, Any], bytearray]] = SimpleQueue()
        self.cancelled: int | None = None
        self._stream = stream

    def listen(self) -> None:
        """Fills the inbox, and ends the process when the stream ends."""
        try:
            while True:
                self._take(*receive(self._stream))
        except EOFError:
            _leave(0)
        except MemoryError:
            _leave(_OUT_OF_MEMORY)
        except (ValueError, LookupError, OSError) as error:
            _say(f"{error}; m4oe worker is started by programs, such as Slicer or m4oe.client")
            _leave(2)

    def _take(self, message: dict[str, Any], data: bytearray) -> None:
        if message["request"] == "cancel":
            self.cancelled = message["id"]
        else:
            self.requests.put((message, data))


class _Worker:
    """Carries out one request after the other."""

    def __init__(self, inbox: _Inbox, answers: BinaryIO, load: Load) -> None:
        self._inbox = inbox
        self._answers = answers
        self._load = load
        self._predictors: dict[_Key, Predictor] = {}

    def say(self, message: Mapping[str, Any], data: bytes | memoryview = b"") -> None:
        """Sends a message; where nobody listens any more, nothing is left to do."""
        try:
            send(self._answers, message, data)
        except OSError:
            _leave(1)

    def answer(self, request: Mapping[str, Any], data: bytearray) -> None:
        """Carries out a request; whatever goes wrong, the other program hears of it and the worker goes on."""
        kinds = {"segment": self._segment, "info": self._info}
        number = request["id"]
        try:
            if request["request"] not in kinds:
                raise ValueError(f"the worker knows no request {request['request']!r}; update M4oE there")
            message, result = kinds[request["request"]](request, data)
        except Exception as error:
            broken = "CUDA error" in str(error)  # for this process for ever; it takes another one
            if not isinstance(error, _EXPECTED):
                traceback.print_exc()
            self.say({"event": "failed", "id": number, "last": broken, **_failure(error)})
            if broken:
                _leave(1)
        else:
            self.say({"event": "result", "id": number, **message}, result)
        _free_unused_memory()

    def _segment(self, request: Mapping[str, Any], data: bytearray) -> _Answer:
        import numpy as np

        from .geometry import pack_volume, unpack_volume

        def progress(phase: str, fraction: float) -> None:
            if cancelled():
                raise Cancelled("segmentation was cancelled; nothing was changed")
            self.say({"event": "progress", "id": request["id"], "phase": phase, "fraction": fraction})

        def cancelled() -> bool:
            return self._inbox.cancelled == request["id"]

        path, expert, structures = find_model(request["model"]), request["expert"], request["structures"]
        spec = read_spec(path)
        if expert != "auto":
            spec.expert_index(expert)
        spec.labels_of(structures or ())
        predictor = self._predictor(path, request["device"], request["precision"], progress)
        volume = unpack_volume(request["volume"], data)
        uncertainty = np.zeros(volume.array.shape, np.uint8) if request["uncertainty"] else None
        labels, report = predictor(
            volume, expert, structures, progress, cancelled, quality=request["quality"], uncertainty=uncertainty
        )
        header, voxels = pack_volume(labels)
        if uncertainty is not None:
            voxels = np.concatenate((voxels, uncertainty.reshape(-1))).data
        return {"volume": header, "report": report.to_json()}, voxels

    def _predictor(self, path: Path, device: str, precision: str, progress: Callable[[str, float], None]) -> Predictor:
        """The model from memory, else from the file, as it is now; one that left its GPU is not kept."""
        status = path.stat()
        key = (path.resolve(), status.st_mtime_ns, status.st_size, device, precision)
        if key not in self._predictors:
            progress("load", 0.0)
            while len(self._predictors) >= _WARM:
                del self._predictors[next(iter(self._predictors))]
            predictor = self._load(path, device, precision)
            if predictor.left_gpu:  # whose memory may be free again at the next request
                return predictor
            self._predictors[key] = predictor
        self._predictors[key] = self._predictors.pop(key)  # the last to go
        return self._predictors[key]

    def _info(self, request: Mapping[str, Any], data: bytearray) -> _Answer:
        models, damaged, devices, problem = {}, {}, [], ""
        for path in installed_models():
            try:
                models[str(path)] = read_spec(path)
            except ValueError as error:
                damaged[str(path)] = str(error)
        try:
            devices = _devices()
        except ImportError as error:
            problem = _failure(error)["message"]
        return {"info": Info(__version__, sys.executable, problem, tuple(devices), models, damaged).to_json()}, b""


def _load(path: Path, device: str, precision: str) -> Predictor:
    from .predictor import Predictor

    return Predictor(path, device, precision)


def _failure(error: Exception) -> dict[str, str]:
    """The error for the other program: its kind and one sentence."""
    text = one_line(error)
    if isinstance(error, ImportError):
        text = f"a Python package is missing or broken ({text}) in {sys.executable}; install it there: "
        text += "for Slicer's own Python press Install in M4oE Segmentation, Installation and doctor"
    elif not isinstance(error, _EXPECTED):
        text = f"M4oE has a fault, please report it: {type(error).__name__}: {text}"
    kinds = (Cancelled, ValueError)
    return {"kind": next((kind.__name__ for kind in kinds if isinstance(error, kind)), "RuntimeError"), "message": text}


def _devices() -> list[Device]:
    import psutil
    import torch

    from .predictor import available_devices, why_cpu

    devices = []
    for name in available_devices():
        free, description = psutil.virtual_memory().available, "Apple GPU"
        if name == "cpu":
            description = f"CPU, {os.cpu_count()} cores"
        elif name.startswith("cuda"):
            free, description = 0, torch.cuda.get_device_name(name)
            with suppress(RuntimeError):  # so full that it cannot even be asked
                free = torch.cuda.mem_get_info(name)[0]
        devices.append(Device(name, description, free / 2**20, why_cpu() if name == "cpu" else ""))
    return devices


def _free_unused_memory() -> None:
    """Gives unused memory of the GPU back to others, such as the renderer, as the worker may idle for hours."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output, for frames alone: whoever prints or reads after this gets stderr and nothing."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, answers


def _be_the_first_to_go() -> None:
    """Asks Linux to kill the worker, not the program with the user's unsaved work, when memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def _leave(code: int) -> NoReturn:
    """Ends the process now, from any thread, and what it started."""
    try:
        import psutil

        for child in psutil.Process().children(recursive=True):
            child.kill()
    finally:
        os._exit(code)


def _say(text: str) -> None:
    sys.stderr.write(f"m4oe: {text}\n")
    sys.stderr.flush()
