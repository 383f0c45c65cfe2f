"""The worker in real processes. Most of them have a stand-in for the predictor, which behaves as its device says."""

from __future__ import annotations

import gc
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from m4oe import connection, jobs
from m4oe.client import Client, worker_command
from m4oe.geometry import Grid, Volume, pack_volume, unpack_volume
from m4oe.jobs import Cancelled, Event, receive, send
from m4oe.predictor import Predictor
from scipy.ndimage import gaussian_filter
from tiny import SPEC, a_model

STAND_IN = """
import os, subprocess, sys, time
from pathlib import Path
from m4oe.jobs import Report
from m4oe.worker import serve

class StandIn:
    left_gpu = False

    def __init__(self, path, device, precision):
        self.work = getattr(self, device)

    def __call__(self, volume, expert, structures, progress, cancelled, quality, uncertainty):
        if uncertainty is not None:
            uncertainty[:] = 7
        progress("prepare", 0.0)
        told = self.work(progress) or ""
        return volume, Report(str(os.getpid()), told, "", {}, {}, "", {}, {}, {}, volume.warnings)

    def echo(self, progress):
        pass

    def peak(self, progress):
        (line,) = [line for line in open("/proc/self/status", encoding="utf-8") if line.startswith("VmHWM")]
        return str(1024 * int(line.split()[1]))

    def obey(self, progress):
        while True:
            progress("segment", 0.5)
            time.sleep(0.01)

    def ignore(self, progress):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        progress(f"{os.getpid()} {child.pid}", 0.0)
        time.sleep(600)

    def print(self, progress):
        print("a stray word")
        sys.__stdout__.write("another one")
        sys.__stdout__.flush()
        os.write(1, b"a third")
        subprocess.run([sys.executable, "-c", "print('and a child of it'); input()"], check=False)

    def flood(self, progress):
        for number in range(300):
            sys.stderr.write("x" * 65536)

    def drown(self, progress):
        self.flood(progress)
        for number in range(100):
            sys.stderr.write(f"\\nlast word {number}")
        os._exit(3)

    def kill(self, progress):
        os.kill(os.getpid(), 9)

    def crash(self, progress):
        os.kill(os.getpid(), 11)

    def memory(self, progress):
        raise MemoryError("Unable to allocate 8 TiB")

    def fault(self, progress):
        return {}["nothing"]

    def break_gpu(self, progress):
        raise RuntimeError("CUDA error: unspecified launch failure\\nCompile with TORCH_USE_CUDA_DSA")

    def oom_score(self, progress):
        return Path("/proc/self/oom_score_adj").read_text()

serve(StandIn)
"""
REFUSED = "is (unknown|not installed|not available)"
LISTEN = "import sys; sys.stdin.read()"


def a_volume(array: Any = None, name: str = "Bäuche") -> Volume:
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5) if array is None else array
    affine = np.array([[-1.5, 0.1, 0.0, 80.0], [0.1, -1.5, 0.0, 1 / 3], [0.0, 0.0, 2.0, -30.0], [0.0, 0.0, 0.0, 1.0]])
    return Volume(array, Grid(array.shape, affine), name, "CT", ("shaky",))


def a_ct() -> Volume:
    noise = np.random.default_rng(0).standard_normal((10, 22, 26))
    return a_volume((4000 * gaussian_filter(noise, 1.5)).astype(np.int16))


def a_worker(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


@pytest.fixture(scope="module")
def other_python() -> Iterator[Client]:
    """A worker of the package in the Python that this one's environment was made from, with few variables."""
    core = Path(connection.__file__).parents[1]
    packages = os.pathsep.join(path for path in sys.path if path and Path(path) != core)
    python = getattr(sys, "_base_executable", sys.executable)
    with Client(worker_command(python), {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}) as client:
        yield client


@pytest.fixture(scope="module")
def stand_in() -> Iterator[Client]:
    with Client(a_worker(STAND_IN)) as client:
        yield client


def process_of(client: Client) -> str:
    return client.segment(a_volume(), device="echo")[1].model


def test_uncertainty_comes_with_the_labels(stand_in: Client) -> None:
    volume = a_volume()
    uncertainty = np.zeros(volume.array.shape, np.uint8)
    labels, _ = stand_in.segment(volume, device="echo", uncertainty=uncertainty)
    assert np.array_equal(labels.array, volume.array)
    assert (uncertainty == 7).all()


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 3, 2), np.uint8), np.zeros((2, 3, 4)), np.broadcast_to(np.uint8(0), (2, 3, 4))]
)
def test_uncertainty_that_cannot_be_filled_is_refused_at_once(stand_in: Client, wrong: Any) -> None:
    volume = Volume(np.zeros((2, 3, 4), np.int16), Grid((2, 3, 4), np.eye(4)))
    with pytest.raises(ValueError, match=r"expected one of uint8 and the volume's \(2, 3, 4\), to be filled"):
        stand_in.begin_segment(volume, device="echo", uncertainty=wrong)


def wait_until_gone(*processes: int) -> None:
    """Waits for the end of processes, though nobody may take notice of it."""
    wait_for(lambda: not any(is_alive(pid) for pid in processes), f"{processes} live on")


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail(otherwise)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids_of(job: jobs.Job[Any]) -> list[int]:
    """The worker and its child, once the job has begun to ignore everybody."""
    while not job.done():
        for phase, _ in job.events(1):
            if phase[0].isdigit():
                return [int(pid) for pid in phase.split()]
    return job.result()


# ---- frames


def test_frames_come_out_as_they_went_in() -> None:
    stream, sent, received = io.BytesIO(), [], []
    big = os.urandom(3_000_000)
    send(stream, {"name": "Ü"}, big, sent.append)
    send(stream, {"last": True})
    stream.seek(0)
    assert receive(stream, received.append) == ({"name": "Ü"}, big)
    assert receive(stream) == ({"last": True}, b"")
    assert sent == received
    assert sent == sorted(sent) and len(sent) > 1 and sent[-1] == 1.0


@pytest.mark.parametrize("text", [b"", b'{"bytes": 0', b'{"bytes": 5}\nabc'])
def test_a_cut_frame_is_the_end(text: bytes) -> None:
    with pytest.raises(EOFError):
        receive(io.BytesIO(text))


@pytest.mark.parametrize("text", [b"Welcome!\n", b"[]\n", b"{}\n", b'{"bytes": -1}\n', b'{"bytes": "5"}\n'])
def test_what_is_no_frame_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="expected a message in JSON, got"):
        receive(io.BytesIO(text))


def test_voxels_in_order_are_not_copied() -> None:
    volume = a_volume()
    assert np.shares_memory(np.frombuffer(pack_volume(volume)[1], np.uint8), volume.array)


def test_voxels_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="Bäuche has voxels of type object, expected whole or floating-point"):
        pack_volume(a_volume(np.full((2, 2, 2), None)))


def test_voxels_that_do_not_fit_their_header_are_refused() -> None:
    header, data = pack_volume(a_volume())
    with pytest.raises(ValueError, match="reshape"):
        unpack_volume(header, bytes(data[:-2]))


# ---- volumes there and back


@pytest.mark.parametrize("kind", ["<i2", ">i2", "u1", "<f4", "<f8", "?", "<u4"])
def test_voxels_of_any_type_arrive(stand_in: Client, kind: str) -> None:
    volume = a_volume((np.arange(24).reshape(2, 3, 4) % 7).astype(kind))
    found, report = stand_in.segment(volume, device="echo")
    assert found.array.dtype == volume.array.dtype
    assert np.array_equal(found.array, volume.array)
    assert np.array_equal(found.grid.affine, volume.grid.affine)
    assert (found.name, found.modality, found.warnings) == ("Bäuche", "CT", ("shaky",))
    assert report.warnings == ("shaky",)


@pytest.mark.parametrize(
    "view", [np.asfortranarray, lambda a: a[::-1, :, ::2], lambda a: np.broadcast_to(a[0], a.shape)]
)
def test_views_arrive(stand_in: Client, view: Callable[[Any], Any]) -> None:
    volume = a_volume(view(np.arange(60, dtype=np.int16).reshape(3, 4, 5)))
    assert np.array_equal(stand_in.segment(volume, device="echo")[0].array, volume.array)


def test_a_volume_that_cannot_be_written_to_arrives_and_one_of_many_frames_too(stand_in: Client) -> None:
    array = np.random.default_rng(0).integers(0, 99, (20, 300, 400)).astype(np.int16)
    array.setflags(write=False)
    events: list[Event] = []
    assert np.array_equal(stand_in.segment(a_volume(array), device="echo", on_event=events.append)[0].array, array)
    assert [phase for phase, fraction in events if fraction == 1.0] == ["send", "receive"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_volume_of_a_whole_body_goes_and_comes_in_its_own_type_without_a_copy(stand_in: Client) -> None:
    array = np.empty((400, 512, 512), np.int16)
    array[...] = np.arange(-1024, 3072, dtype=np.int16).reshape(8, 512).repeat(64, axis=0)
    array += np.arange(400, dtype=np.int16)[:, None, None]
    array.setflags(write=False)
    before = int(stand_in.segment(a_volume(), device="peak")[1].device)
    tracemalloc.start()
    found, report = stand_in.segment(a_volume(array), device="peak")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.array.dtype == np.int16 and np.array_equal(found.array, array)
    assert peak < 1.1 * array.nbytes  # the answer alone
    assert int(report.device) - before < 1.1 * array.nbytes


def test_a_request_may_follow_at_once(stand_in: Client) -> None:
    for number in range(100):
        volume = a_volume(np.full((1, 1, 1), number))
        assert stand_in.segment(volume, device="echo")[0].array == number


def test_a_result_is_held_by_its_owner_alone(stand_in: Client) -> None:
    volume = a_volume()
    voxels, result = weakref.ref(volume.array), weakref.ref(stand_in.segment(volume, device="echo")[0])
    del volume
    gc.collect()
    wait_for(lambda: voxels() is None and result() is None, "the client holds on to them")


def test_an_answer_to_a_job_that_has_failed_is_of_no_account() -> None:
    job = jobs.Job(lambda message, data: 1)
    job.fail(Cancelled("too late"))
    job.finish({}, bytearray())
    with pytest.raises(Cancelled, match="too late"):
        job.result()


def test_a_volume_that_was_never_sent_is_let_go() -> None:
    client, volume = Client([sys.executable, "-c", "import sys; sys.exit(3)"]), a_volume(np.zeros((3, 4, 5), np.int16))
    voxels, job = weakref.ref(volume.array), client.begin_segment(volume)
    with pytest.raises(RuntimeError, match="ended with exit code 3 before it started"):
        job.result()
    del volume, job
    gc.collect()
    wait_for(lambda: voxels() is None, "the client holds on to it")


# ---- the predictor in another Python


def test_labels_are_those_of_the_predictor_and_the_model_stays(model: Path, other_python: Client) -> None:
    volume, options = a_ct(), {"expert": "ct", "structures": ["spleen"]}
    before = volume.array.copy()
    expected, said = Predictor(model, "cpu", "float32")(volume, **options)
    runs: list[list[Event]] = [[], []]
    for events in runs:
        labels, report = other_python.segment(
            volume, model=model, device="cpu", precision="float32", on_event=events.append, **options
        )
        assert np.array_equal(labels.array, expected.array) and labels.array.dtype == expected.array.dtype
        assert replace(report, seconds={}, peak_memory_mib={}) == replace(said, seconds={}, peak_memory_mib={})
    assert set(np.unique(labels.array)) == {0, 2}
    assert np.array_equal(volume.array, before)
    phases = [list(dict.fromkeys(phase for phase, _ in events)) for events in runs]
    assert phases == [["send", "load", "prepare", "segment", "receive"], ["send", "prepare", "segment", "receive"]]


def test_a_run_makes_no_temporary_file(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    os.utime(folder, (1, 1))
    names = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with Client(environment={**os.environ, **names}) as client:
        client.segment(a_ct(), model=model, device="cpu", precision="float32")
    assert not list(folder.iterdir())
    assert folder.stat().st_mtime == 1  # nor one that was removed again


def test_a_model_that_the_gpu_could_not_hold_is_tried_there_again(tmp_path: Path) -> None:
    from m4oe import worker

    loads, model = [], tmp_path / "a.safetensors"
    model.touch()

    def load(*given: Any) -> Any:
        loads.append(given)
        return SimpleNamespace(left_gpu=len(loads) == 1)

    busy = worker._Worker(worker._Inbox(io.BytesIO()), io.BytesIO(), load)
    for _ in range(3):
        busy._predictor(model, "auto", "auto", lambda phase, fraction: None)
    assert len(loads) == 2


def test_a_model_that_was_replaced_is_loaded_again(other_python: Client, tmp_path: Path) -> None:
    path, found = tmp_path / "run.safetensors", []
    for seed in (1, 2):
        a_model(path, seed=seed)
        os.utime(path, (seed, seed))
        expected = Predictor(path, "cpu", "float32")(a_ct(), "ct")[0].array
        found.append(other_python.segment(a_ct(), model=path, expert="ct", device="cpu", precision="float32")[0].array)
        assert np.array_equal(found[-1], expected)
    assert not np.array_equal(*found)


@pytest.mark.parametrize(
    "wrong", [{"model": "xyz"}, {"expert": "pet"}, {"structures": ["tail"]}, {"device": "tpu"}, {"precision": "int3"}]
)
def test_what_the_predictor_refuses_is_refused_in_its_words(
    model: Path, other_python: Client, wrong: dict[str, Any]
) -> None:
    options = {"model": model, "device": "cpu", "precision": "float32", "expert": "ct", "structures": None, **wrong}
    with pytest.raises(ValueError, match=REFUSED) as here:
        Predictor(options["model"], options["device"], options["precision"])(
            a_ct(), options["expert"], options["structures"]
        )
    with pytest.raises(ValueError, match=REFUSED) as there:
        other_python.segment(a_ct(), **options)
    assert str(there.value) == str(here.value)


def test_a_worker_tells_its_devices_and_models(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "mine.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"?")
    with Client(environment={**os.environ, "M4OE_MODELS": str(tmp_path)}) as client:
        info = client.info()
    cpu = info.devices[-1]
    assert (cpu.name, info.problem, info.python) == ("cpu", "", sys.executable)
    assert 0 < cpu.free_mib <= psutil.virtual_memory().total / 2**20
    assert next(iter(info.models)) == str(tmp_path / "mine.safetensors")
    assert [spec.name for spec in info.models.values()] == ["tiny", "m4oe-demo"]
    assert info.models[str(tmp_path / "mine.safetensors")] == SPEC
    assert list(info.damaged) == [str(tmp_path / "torn.safetensors")]


def test_gpus_are_told_with_name_and_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from m4oe import worker

    def free(name: str) -> tuple[int, int]:
        if name == "cuda:1":
            raise RuntimeError("CUDA error: out of memory")
        return 3 * 2**30, 8 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: f"Model {name[-1]}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    devices = worker._devices()
    assert devices[:2] == [jobs.Device("cuda:0", "Model 0", 3072.0), jobs.Device("cuda:1", "Model 1", 0.0)]
    assert devices[2].name == "cpu"


def test_a_python_without_torch_says_so() -> None:
    python, *rest = worker_command()
    with Client([python, "-I", "-S", *rest]) as client:
        assert "No module named" in client.info().problem and sys.executable in client.info().problem
        with pytest.raises(RuntimeError, match=r"a Python package is missing or broken \(No module named 'numpy'\)"):
            client.segment(a_volume())


# ---- noise


def test_stray_prints_do_not_disturb(stand_in: Client) -> None:
    volume = a_volume()
    assert np.array_equal(stand_in.segment(volume, device="print")[0].array, volume.array)


def test_noise_before_the_greeting_does_not_disturb() -> None:
    noise = "import sys; sys.stdout.write('Welcome to SERVER\\nno newline:'); sys.stdout.flush()\n"
    with Client(a_worker(noise + STAND_IN)) as client:
        assert process_of(client)


def test_a_flood_on_stderr_does_not_disturb(stand_in: Client) -> None:
    assert stand_in.segment(a_volume(), device="flood")


def test_of_a_flood_the_last_lines_are_kept_and_no_more(stand_in: Client) -> None:
    tracemalloc.start()
    with pytest.raises(RuntimeError, match="exit code 3") as caught:
        stand_in.segment(a_volume(), device="drown")  # 20 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    assert str(caught.value).splitlines()[1:] == [f"last word {number}" for number in range(88, 100)]


# ---- what can go wrong


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("kill", "the worker was killed, most likely by the system as the memory ran out; close other programs"),
        ("crash", "the worker ended with SIGSEGV in the middle of its work; try again"),
        ("break_gpu", r"failed \(CUDA error: unspecified launch failure\); try again.*choose the CPU as device"),
    ],
)
def test_after_a_crash_the_next_request_gets_another_worker(stand_in: Client, device: str, sentence: str) -> None:
    first = process_of(stand_in)
    with pytest.raises(RuntimeError, match=sentence):
        stand_in.segment(a_volume(), device=device)
    assert process_of(stand_in) != first


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("memory", r"the memory ran out \(Unable to allocate 8 TiB\); close other programs, crop the volume"),
        ("fault", "M4oE has a fault, please report it: KeyError: 'nothing'"),
    ],
)
def test_after_an_error_the_worker_goes_on(stand_in: Client, device: str, sentence: str) -> None:
    first = process_of(stand_in)
    with pytest.raises(RuntimeError, match=sentence):
        stand_in.segment(a_volume(), device=device)
    assert process_of(stand_in) == first


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import sys; sys.exit('no such host')", "ended with exit code 1 before it started.*\nno such host$"),
        ("import sys; sys.exit(255)", "ended with exit code 255, which ssh says when there is no connection"),
        ("import sys; sys.exit('unknown option -P')", "its Python is too old; choose one of 3.11 or newer"),
        ('print(\'{"m4oe": "9.9", "protocol": 99}\', flush=True);' + LISTEN, r"speaks protocol 99 \(M4oE 9.9\)"),
        ('print(\'{"m4oe": "9.9"}\', flush=True);' + LISTEN, "cannot be understood.*protocol"),
        ("[print('noise', flush=True) for _ in range(2000)];" + LISTEN, "cannot be understood.*no greeting"),
    ],
)
def test_what_is_no_worker_of_ours_is_told_apart(code: str, sentence: str) -> None:
    with Client(a_worker(code)) as client, pytest.raises(RuntimeError, match=f"(?s){sentence}"):
        client.info()


@pytest.mark.parametrize(
    "answer", ["Hello", '{"bytes": 0}', '{"event": "party", "bytes": 0}', '{"event": "result", "bytes": 0}']
)
def test_an_answer_that_cannot_be_understood_ends_the_worker(answer: str) -> None:
    greeting = json.dumps({jobs.GREETING: "9", "protocol": jobs.PROTOCOL, "bytes": 0})
    code = f"print({greeting!r}); print({answer!r}, flush=True); {LISTEN}; {LISTEN}"
    with Client(a_worker(code)) as client, pytest.raises(RuntimeError, match="answer cannot be understood"):
        client.info()


def test_a_worker_that_never_answers_is_given_up() -> None:
    silent = a_worker("import sys, time; print('hm', file=sys.stderr, flush=True); time.sleep(600)")
    with Client(silent, timeout=1) as client, pytest.raises(RuntimeError, match="did not answer within 1 s; try again"):
        client.info()


def test_a_command_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with Client([str(tmp_path / "python")]) as client, pytest.raises(ValueError, match="No such file or directory"):
        client.info()


def test_one_request_at_a_time(stand_in: Client) -> None:
    job = stand_in.begin_segment(a_volume(), device="obey")
    with pytest.raises(RuntimeError, match="the worker is busy"):
        stand_in.begin_info()
    job.cancel()
    with pytest.raises(Cancelled):
        job.result()


def test_an_unknown_request_is_refused(stand_in: Client) -> None:
    with pytest.raises(ValueError, match="the worker knows no request 'dance'"):
        stand_in._begin(jobs.Job(lambda message, data: None), {"request": "dance"}).result()


@pytest.mark.parametrize(("said", "code"), [(b"", 0), (b"hello\n", 2), (b'{"bytes": 0}\n', 2)])
def test_a_worker_ends_with_its_input(said: bytes, code: int) -> None:
    ended = subprocess.run(worker_command(), input=said, capture_output=True, check=False)
    assert ended.returncode == code
    assert ended.stdout.startswith(b'{"m4oe": ') and ended.stdout.count(b"\n") == 1
    assert (b"m4oe worker is started by programs" in ended.stderr) == (code == 2)


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="not Linux")
def test_where_memory_runs_out_the_system_ends_the_worker_first(stand_in: Client) -> None:
    own = Path("/proc/self/oom_score_adj").read_text(encoding="ascii")
    assert int(stand_in.segment(a_volume(), device="oom_score")[1].device) > int(own)


# ---- the end


def test_a_cancelled_worker_obeys_and_goes_on(stand_in: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 600.0)
    first, events = process_of(stand_in), []

    def started() -> bool:
        return Event("segment", 0.5) in events

    with pytest.raises(Cancelled, match="nothing was changed"):
        stand_in.segment(a_volume(), device="obey", on_event=events.append, cancelled=started)
    assert {("send", 1.0), ("segment", 0.5)} <= set(events)
    assert process_of(stand_in) == first


def test_a_worker_that_ignores_it_is_ended_with_its_children(stand_in: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.1)
    pids = pids_of(job := stand_in.begin_segment(a_volume(), device="ignore"))
    job.cancel()
    job.cancel()
    with pytest.raises(Cancelled, match="the worker did not obey and was ended"):
        job.result()
    wait_until_gone(*pids)
    assert process_of(stand_in) not in map(str, pids)


def test_closing_cancels_the_job_and_ends_the_worker_with_its_children() -> None:
    with Client(a_worker(STAND_IN)) as client:
        pids = pids_of(job := client.begin_segment(a_volume(), device="ignore"))
    with pytest.raises(Cancelled, match="closed"):
        job.result()
    wait_until_gone(*pids)


def test_an_error_of_the_listener_cancels_the_job(stand_in: Client) -> None:
    def listen(event: Event) -> None:
        if event.phase == "segment":
            raise LookupError("the panel is gone")

    with pytest.raises(LookupError, match="the panel is gone"):
        stand_in.segment(a_volume(), device="obey", on_event=listen)
    assert process_of(stand_in)


def test_a_worker_does_not_outlive_the_program_that_started_it() -> None:
    code = (
        "import sys, numpy as np; from m4oe.client import Client; from m4oe.geometry import Grid, Volume\n"
        "volume = Volume(np.zeros((2, 2, 2), np.int16), Grid((2, 2, 2), np.eye(4)))\n"
        "show = lambda event: print(event.phase, flush=True)\n"
        "Client([sys.executable, '-c', sys.argv[1]]).segment(volume, device='ignore', on_event=show)"
    )
    program = subprocess.Popen(a_worker(code, STAND_IN), stdout=subprocess.PIPE, text=True)
    assert program.stdout
    with program, program.stdout:
        pids = next(line.split() for line in program.stdout if line[0].isdigit())
        program.send_signal(signal.SIGKILL)
    wait_until_gone(*map(int, pids))


# ---- another machine


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Words that run a command on this machine through an ssh server of our own."""
    server = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin")
    if server is None:
        pytest.skip("no ssh server (openssh-server) is installed")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "user.pub",
        "StrictModes": "no",
        "PasswordAuthentication": "no",
        "PidFile": "none",
    }
    (folder / "config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()), encoding="utf-8")
    command = [server, "-D", "-e", "-f", str(folder / "config")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        if not any("listening" in line for line in process.stderr):
            pytest.skip("the ssh server of this machine does not start")
        options = [
            "StrictHostKeyChecking=no",
            f"UserKnownHostsFile={folder / 'known'}",
            "BatchMode=yes",
            "LogLevel=ERROR",
        ]
        words = [word for option in options for word in ("-o", option)]
        yield ["ssh", "-F", os.devnull, "-i", str(folder / "user"), "-p", str(port), *words, "127.0.0.1"]
        process.terminate()


def test_a_worker_on_the_other_end_of_ssh(ssh: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.1)
    core = Path(connection.__file__).parents[1]
    volume = a_volume(np.random.default_rng(0).integers(0, 9, (40, 200, 200)))
    with Client([*ssh, shlex.join(["env", f"PYTHONPATH={core}", *a_worker(STAND_IN)])]) as client:
        assert np.array_equal(client.segment(volume, device="echo")[0].array, volume.array)
        pids = pids_of(job := client.begin_segment(volume, device="ignore"))
        job.cancel()
        with pytest.raises(Cancelled, match="the worker did not obey"):
            job.result()
        wait_until_gone(*pids)
        with pytest.raises(RuntimeError, match="which ssh says when the connection is lost or the worker was killed"):
            client.segment(volume, device="kill")


def test_ssh_to_a_machine_without_m4oe_says_what_is_wrong(ssh: list[str]) -> None:
    said = r"exit code 127 before it started[^\n]*\n.*no-m4oe-here.*not found"
    with Client([*ssh, "no-m4oe-here", "worker"]) as client, pytest.raises(RuntimeError, match=said):
        client.info()
