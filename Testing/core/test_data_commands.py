from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from m4oe.__main__ import main
from m4oe.training.plan import read_plan

Saved = Callable[..., Path]
Command = Callable[..., int]


@pytest.fixture
def pairs(saved: Saved, tmp_path: Path) -> Path:
    """A folder with 30 sound pairs of liver (2), spleen (5) and nothing else."""
    values = np.zeros((4, 4, 4), np.uint8)
    values[:, :, 3], values[1, 1, 1] = 2, 5
    for number in range(30):
        for name, array in ((f"c{number:02}", 0), (f"c{number:02}_label", values)):
            saved(tmp_path / f"own/{name}.nii.gz", array, spacing=(40.0, 40.0, 50.0))
    (tmp_path / "own/labels.csv").write_text("label,name\n2,Liver\n5,Spleen\n", encoding="utf-8")
    return tmp_path / "own"


def data(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_scan_says_what_is_there(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data("scan", pairs, "--modality", "CT", "--expert", "ct") == 0
    assert lines(capsys) == [
        f"own pairs {pairs}",
        "30 cases, 30 with label, 30 CT; 30 patients; licence: not given",
        "experts: 30 ct",
        "structures (in cases): liver 30, spleen 30",
        "spacing i (mm) 40, all alike",
        "spacing j (mm) 40, all alike",
        "spacing k (mm) 50, all alike",
        *(f"size {letter} (voxels) 4, all alike" for letter in "ijk"),
    ]


def test_a_case_alone_is_one_case(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.full((4, 4, 4), 2, np.uint8)
    saved(tmp_path / "own/a.nii.gz", values), saved(tmp_path / "own/a_label.nii.gz", values)
    data("scan", tmp_path / "own", "--modality", "CT", "--labels", "2=liver")
    assert "1 case, 1 with label, 1 CT; 1 patient; licence: not given" in lines(capsys)


def test_scan_says_what_is_wrong_and_groups_it(
    pairs: Path, saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(pairs / "c03_label.nii.gz", 7, spacing=(40.0, 40.0, 50.0))
    (pairs / "c05_label.nii.gz").unlink()
    assert data("scan", pairs, "--json", tmp_path / "scan.json") == 1
    text = "\n".join(lines(capsys))
    assert "error 30 cases (c00, c01, c02, ...): Its modality is not known" in text
    assert "error c03: Its label holds 7, which nothing gives a meaning: name them" in text
    assert "warning c05: " in text and "c05.nii.gz has no label" in text
    (dataset,) = json.loads((tmp_path / "scan.json").read_text(encoding="utf-8"))["datasets"]
    assert {"case": "c03", "severity": "error"}.items() <= dataset["findings"][-2].items() or len(
        dataset["findings"]
    ) > 30
    assert dataset["cases"][0]["size"] == [4, 4, 4] and dataset["cases"][0]["volumes_ml"]["spleen"] == 80
    assert len(dataset["cases"]) == 30 and dataset["cases"][5]["label"] is None


def test_labels_can_be_given(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.json").write_text('{"2": "spleen", "5": "LK"}', encoding="utf-8")
    assert data("scan", pairs, "--modality", "MR", "--labels", tmp_path / "mine.json") == 0
    assert "structures (in cases): spleen 30, kidney_left 30" in lines(capsys)


def test_a_plan_is_made_extended_and_kept(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert data("plan", pairs, "--modality", "CT", "-o", path) == 0
    first = read_plan(path)
    counts = [len(first.cases(split)) for split in ("train", "val", "test")]
    assert sum(counts) == 30 and min(counts) > 0
    said = lines(capsys)
    assert said[0] == "own: {} train, {} val, {} test, 0 unlabelled; licence: not given".format(*counts)
    assert said[-2:] == ["2 structures: liver, spleen", f"plan: {path}"]
    (pairs / "c00.nii.gz").write_bytes(b"damaged")
    assert data("plan", pairs, "--modality", "CT", "-o", path, "--seed", 8) == 1
    assert read_plan(path).splits == first.splits and list(read_plan(path).left_out) == ["own/c00"]
    assert "left out own/c00: " in "\n".join(lines(capsys))


@pytest.mark.parametrize("form", ["nnunet", "decathlon"])
def test_a_plan_and_a_folder_are_exported(
    form: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    data("plan", pairs, "--modality", "CT", "-o", path)
    assert data("export", path, "-o", tmp_path / "a", "--format", form) == 0
    assert data("export", pairs, "--modality", "CT", "-o", tmp_path / "b", "--format", form) == 0
    name = "Dataset500_own" if form == "nnunet" else "own"
    assert lines(capsys)[-1] == f"30 cases: {tmp_path / 'b' / name}"
    assert data("plan", tmp_path / "a", "-o", tmp_path / "again.json") == 0
    assert read_plan(tmp_path / "again.json").splits == read_plan(path).splits
    assert len(list((tmp_path / "b").rglob("labelsTr/*.nii.gz"))) == 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scan", "none"], "none is no folder"),
        (["scan", ".", "--labels", "none.csv"], "none.csv cannot be read"),
        (["plan", ".", "-o", "plan.json"], "plan.json is no training plan"),
        (["export", "plan.json", "-o", "x", "--format", "nnunet"], "plan.json is no training plan"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text("{}", encoding="utf-8")
    assert data(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_real_mr_pairs_are_scanned(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"1": "liver", "2": "right kidney", "3": "left kidney", "4": "spleen"}
    (tmp_path / "chaos.json").write_text(json.dumps(names), encoding="utf-8")
    for name in ("chaos_t2_01", "chaos_t2_32"):
        for end in ("", "_label"):
            (tmp_path / f"mr/{name}{end}.nii.gz").parent.mkdir(exist_ok=True)
            (tmp_path / f"mr/{name}{end}.nii.gz").symlink_to(shared_data / f"mr_nc/{name}{end}.nii.gz")
    assert data("scan", tmp_path / "mr", "--modality", "MR", "--labels", tmp_path / "chaos.json") == 0
    text = "\n".join(lines(capsys))
    assert "liver 2, kidney_right 2, kidney_left 2, spleen 2" in text and "swapped" not in text
    assert "warning chaos_t2_32: Liver has 3432 mL; patients had 653 to 2781." in text
