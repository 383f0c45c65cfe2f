"""Slicer's command-line module: its description and its script agree, and the script segments one volume or many."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import m4oe
import numpy as np
import pytest
from m4oe.files import read_volume, write_volume
from m4oe.training.phantom import make_phantom
from tiny import reports, saved

FOLDER = Path(__file__).resolve().parents[2] / "M4oESegmentCLI"
SCRIPT = FOLDER / "M4oESegmentCLI.py"


def parameters() -> list[ElementTree.Element]:
    root = ElementTree.parse(FOLDER / "M4oESegmentCLI.xml").getroot()
    assert root.tag == "executable"
    return [entry for group in root.iter("parameters") for entry in group if entry.find("name") is not None]


def actions() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("M4oESegmentCLI", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        action.dest: action for action in module.parser()._actions if action.dest != "help" and action.option_strings
    }


def test_the_description_has_what_slicer_requires() -> None:
    root = ElementTree.parse(FOLDER / "M4oESegmentCLI.xml").getroot()
    assert all(root.findtext(tag) for tag in ("category", "title", "description", "version", "contributor", "license"))
    assert root.findtext("version") == m4oe.__version__
    panel = (FOLDER.parent / "M4oESegmentation" / "M4oESegmentation.py").read_text(encoding="utf-8")
    assert f'"{root.findtext("documentation-url")}"' in panel
    for entry in parameters():
        assert entry.findtext("label") and entry.findtext("description")
        assert entry.tag not in ("image", "file", "directory") or entry.findtext("channel") in ("input", "output")


def test_the_script_takes_the_parameters_of_the_description() -> None:
    known, described = actions(), {entry.findtext("name"): entry for entry in parameters()}
    assert known.keys() == described.keys()
    for name, entry in described.items():
        assert known[name].option_strings == [entry.findtext("longflag")]
        default = "false" if known[name].default is False else known[name].default
        assert default == (entry.findtext("default") or "")
        assert entry.find("index") is None  # Slicer would not run without it


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(m4oe.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def fractions(printed: str) -> list[float]:
    return [float(text) for text in re.findall("<filter-progress>(.*)</filter-progress>", printed)]


def test_the_script_segments_a_phantom(tmp_path: Path) -> None:
    phantom = make_phantom(2026, "ct")
    write_volume(tmp_path / "in.nrrd", phantom.image)
    out, table = tmp_path / "out.nrrd", tmp_path / "colors.csv"
    wanted = ["--structures", "liver,spleen", "--device", "cpu", "--color-table", table]
    done = run("--input-volume", tmp_path / "in.nrrd", "--output-label-map", out, *wanted)
    assert done.returncode == 0, done.stderr
    labels = read_volume(out)
    assert labels.grid.is_close(phantom.image.grid) and np.count_nonzero(np.unique(labels.array)) == 2
    names = [line.split(",")[1] for line in table.read_text(encoding="utf-8").splitlines()]
    assert names[0] == "Name" and sorted(names[1:]) == ["Liver", "Spleen"]
    shown = fractions(done.stdout)
    assert shown == sorted(shown) and shown[-1] == pytest.approx(1)
    assert "<filter-start>" in done.stdout and "<filter-end>" in done.stdout


def test_the_script_segments_a_folder_where_one_bad_case_stops_nothing(model: Path, tmp_path: Path) -> None:
    saved(tmp_path / "in" / "a.nrrd")
    saved(tmp_path / "in" / "c.nrrd")
    bad = tmp_path / "in" / "b.nrrd"
    bad.write_bytes(b"?")
    out = tmp_path / "out"
    wanted = ["--output-folder", out, "--model", model, "--device", "cpu", "--structures", "liver,spleen"]
    done = run("--batch", "--input-folder", tmp_path / "in", *wanted)
    assert done.returncode == 1 and "b.nrrd" in done.stderr and "2 done, 0 skipped, 1 failed" in done.stdout
    shown = fractions(done.stdout)
    assert shown == sorted(shown) and shown[0] == 0 and shown[-1] == 1 and len(set(shown)) > 3
    assert {"a.seg.nrrd", "a.png", "volumes.csv", "volumes.json", "log.txt"} <= {path.name for path in out.iterdir()}
    assert "<filter-end>" not in done.stdout and "\na: done\n" in done.stdout
    assert list(reports(out)["a"]["volumes_ml"]) == ["liver", "spleen"]
    bad.unlink()
    again = run("--batch", "--input-folder", tmp_path / "in", *wanted)
    assert (
        again.returncode == 0
        and "a: skipped\nc: skipped\n" in again.stdout
        and "0 done, 2 skipped" in again.stdout
        and "<filter-end>" in again.stdout
    )


def test_what_a_library_prints_during_a_batch_is_passed_on() -> None:
    spec = importlib.util.spec_from_file_location("M4oESegmentCLI", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    printed = io.StringIO()
    progress = module.BatchProgress(printed)
    for line in ("hello", "12", '{"event": "case", "number": 2, "of": 4}'):
        print(line, file=progress)
    assert printed.getvalue() == "hello\n12\n<filter-progress>0.250</filter-progress>\n"


def test_a_table_goes_before_the_folder_that_slicer_names_anyway(model: Path, tmp_path: Path) -> None:
    saved(tmp_path / "a.nrrd")
    (tmp_path / "cases.csv").write_text("input,case\na.nrrd,first\n", encoding="utf-8")
    places = ["--input-folder", tmp_path, "--input-table", tmp_path / "cases.csv", "--output-folder", tmp_path / "out"]
    assert run("--batch", *places, "--model", model, "--device", "cpu").returncode == 0
    assert list(reports(tmp_path / "out")) == ["first"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--batch", "--output-folder", "out"], "a batch needs an input folder"),
        (["--batch", "--input-folder", "in"], "a batch needs an input folder"),
        (["--input-folder", "in", "--output-folder", "out"], "choose an input volume and an output label map"),
        (["--input-volume", "in.nrrd", "--output-folder", "out"], "choose an input volume and an output label map"),
    ],
)
def test_the_script_says_what_is_missing(given: list[str], said: str) -> None:
    failed = run(*given)
    assert failed.returncode == 1 and said in failed.stderr


def test_the_script_says_what_is_wrong(tmp_path: Path) -> None:
    failed = run(tmp_path / "none.nrrd", tmp_path / "out.nrrd", "--device", "cpu")
    assert failed.returncode == 1 and "There is no file or folder" in failed.stderr
    assert "Traceback" not in failed.stderr and "<filter-end>" not in failed.stdout
