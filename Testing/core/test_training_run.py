"""A run of a training in a process of its own: started, paused, gone on with, killed, found again."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from m4oe.training_run import EVENTS, PAUSE, Progress, Run, process_birth, start_run

# In the place of a training: counts, and looks for the file `pause`.
LOOP = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
log = (folder / "events.jsonl").open("a", buffering=1)
print("begins", flush=True)
for step in range(1, int(sys.argv[2]) + 1):
    log.write(json.dumps({"event": "step", "step": step}) + chr(10))
    time.sleep(0.02)
    if (folder / "pause").exists() and "deaf" not in sys.argv:
        (folder / "pause").unlink()
        log.write(json.dumps({"event": "paused"}) + chr(10))
        sys.exit(0)
if "fails" in sys.argv:
    sys.exit("m4oe: error: the disk is full")
log.write(json.dumps({"event": "finished"}) + chr(10))
"""


def start(folder: Path, steps: int = 10_000, *words: str) -> Run:
    return start_run(folder, [sys.executable, "-c", LOOP, str(folder), str(steps), *words])


def wait(until: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def has_begun(run: Run) -> bool:
    return bool(run.events_since()[0])


@pytest.fixture
def running(tmp_path: Path) -> Run:
    run = start(tmp_path / "a run")
    wait(lambda: has_begun(run))
    return run


def ended(run: Run) -> str:
    wait(lambda: run.state() not in ("running", "pausing", "stopping"))
    return run.state()


def test_a_run_is_started_and_finishes(tmp_path: Path) -> None:
    run = start(tmp_path, 3)
    assert ended(run) == "finished"
    assert [event["event"] for event in run.events_since()[0]] == ["step", "step", "step", "finished"]


def test_a_run_pauses_and_goes_on(running: Run) -> None:
    assert running.state() == "running"
    running.pause()
    assert ended(running) == "paused"
    again = start_run(running.folder, running.command)
    assert again.state() == "running"
    again.stop()
    assert ended(again) == "stopped"


def test_a_run_that_does_not_obey_is_killed(tmp_path: Path) -> None:
    run = start(tmp_path, 10_000, "deaf")
    wait(lambda: has_begun(run))
    run.stop()
    run.enforce(60)
    assert run.state() == "stopping"
    run.enforce(0)
    assert ended(run) == "stopped" and not (tmp_path / PAUSE).exists()


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    run = start(tmp_path, 1, "fails")
    assert ended(run) == "failed"
    assert run.last_words() == "begins\nm4oe: error: the disk is full"
    start_run(run.folder, run.command)
    ended(run)
    assert run.last_words() == "begins\nm4oe: error: the disk is full"  # once, although it failed twice


def test_a_paused_run_that_cannot_go_on_has_failed(running: Run) -> None:
    running.pause()
    assert ended(running) == "paused"
    again = start_run(running.folder, [sys.executable, "-c", "raise SystemExit('m4oe: error: other data')"])
    assert ended(again) == "failed" and again.last_words() == "m4oe: error: other data"


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").touch()
    (tmp_path / "case.nii.gz").touch()
    with pytest.raises(ValueError, match=r"such as case.nii.gz; choose an empty folder"):
        start_run(tmp_path, [sys.executable])
    (tmp_path / "case.nii.gz").rename(tmp_path / "cache")
    assert ended(start(tmp_path, 1)) == "finished"
    (tmp_path / "notes.txt").touch()
    assert ended(start(tmp_path, 1)) == "finished"


def test_a_run_is_found_again_by_its_folder(running: Run) -> None:
    found = Run(running.folder)
    assert found.state() == "running" and found.command == running.command
    found.stop()
    assert ended(running) == "stopped"


def test_a_recycled_number_is_not_taken_for_the_run(tmp_path: Path) -> None:
    run = start(tmp_path, 1)
    ended(run)
    facts = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    facts.update(pid=os.getpid(), wish="stop", asked=0.0)
    (tmp_path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    assert run.state() == "finished"
    run.enforce(0)  # would end this very test
    facts.update(birth=process_birth(os.getpid()))
    (tmp_path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    assert run.state() == "stopping"


def test_a_running_run_is_not_started_twice(running: Run) -> None:
    with pytest.raises(RuntimeError, match="still running"):
        start_run(running.folder, running.command)
    running.stop()
    ended(running)
    with pytest.raises(RuntimeError, match="only a running one"):
        running.pause()


def test_half_a_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    run = start(tmp_path, 0)
    ended(run)
    events = tmp_path / EVENTS
    events.write_bytes(b'{"event": "first"}\n{"event": "sec')
    found, offset = run.events_since()
    assert [event["event"] for event in found] == ["first"]
    with events.open("ab") as file:
        file.write(b'ond"}\n{"broken\n[]\n{"event": "third"}\n')
    found, offset = run.events_since(offset)
    assert [event["event"] for event in found] == ["second", "third"]
    assert run.events_since(offset) == ([], offset)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training run"):
        Run(tmp_path)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="choose another folder"):
        Run(tmp_path)


def test_what_cannot_be_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a Python"):
        start_run(tmp_path, [str(tmp_path / "no python")])
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can be written"):
        start_run(tmp_path / "file" / "run", [sys.executable])


def test_without_room_for_its_record_nothing_runs(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)", str(tmp_path), "a" * 1000]
    with full_disk(), pytest.raises(OSError, match="cannot write into .*; make room"):
        start_run(tmp_path, command)
    assert [child for child in psutil.Process().children() if str(tmp_path) in child.cmdline()] == []
    assert [path.name for path in tmp_path.iterdir()] == ["run.log"]
    start_run(tmp_path, command).stop()
    Run(tmp_path).enforce(0)


def test_a_wish_without_room_for_it_changes_nothing(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    run = start(tmp_path, 10_000, "a" * 1000)
    before = (tmp_path / "run.json").read_bytes()
    with full_disk(), pytest.raises(OSError, match="cannot write into .*; make room"):
        run.pause()
    assert run.state() == "running" and (tmp_path / "run.json").read_bytes() == before
    assert not (tmp_path / PAUSE).exists() and not (tmp_path / ".run.json").exists()
    run.stop()
    run.enforce(0)


def test_a_wish_that_the_run_cannot_hear_of_changes_nothing(running: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise OSError(errno.EDQUOT, "quota exceeded")

    before = (running.folder / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refused)
        with pytest.raises(OSError, match=r"cannot write into .*quota exceeded.*make room"):
            running.pause()
    running.enforce(0)
    assert running.state() == "running" and (running.folder / "run.json").read_bytes() == before
    running.stop()
    assert ended(running) == "stopped"


def test_time_left_is_that_of_the_steps_left_at_the_pace_of_the_stage() -> None:
    progress = Progress()
    step = {"event": "step", "stage": "dense", "overall_steps": 200}
    progress.take({**step, "step": 80, "overall": 80, "seconds": 40.0})
    assert (progress.fraction, progress.seconds_left) == (0.4, 60.0)
    progress.take({**step, "stage": "gate", "step": 20, "overall": 120, "seconds": 5.0})
    assert (progress.stage, progress.seconds_left) == ("gate", 20.0)
    progress.take({"event": "finished"})
    assert (progress.fraction, progress.seconds_left) == (1.0, 0.0)
