from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m4oe.files import read_volume
from m4oe.labels import catalogue
from m4oe.names import keys_of, named_values
from m4oe.training import exchange
from m4oe.training.cases import CaseFiles, DataSet, load_case
from m4oe.training.datasets import find_datasets
from m4oe.training.exchange import FORMATS, _nnunet_values, _Part, export

Saved = Callable[..., Path]
KEYS = ("liver_tumor", "spleen", "liver")
GREY = {63: "liver", 64: "liver", 126: "spleen", 200: "liver_tumor"}


@pytest.fixture
def a_set(saved: Saved, tmp_path: Path) -> DataSet:
    """Five labelled cases of four patients and one without label, of the formats that are about."""
    rng = np.random.default_rng(0)
    cases = []
    for number, suffix in enumerate((".nii.gz", ".nii", ".mha", ".nii.gz", ".nrrd", ".nii.gz")):
        image = saved(tmp_path / f"in/i{number}{suffix}", rng.integers(-9, 9, (4, 4, 4)), np.int16)
        values = rng.choice([0, *GREY], (4, 4, 4))
        label = saved(tmp_path / f"in/l{number}.nii.gz", values, np.float64) if number < 5 else None
        patient = f"p{min(number, 3)}"
        cases.append(CaseFiles(f"c{number}", patient, image, label, "MR", "mr_t2", GREY if label else {}, KEYS))
    return DataSet("own", "pairs", tmp_path / "in", tuple(cases), "CC-BY-4.0")


def exported(dataset: DataSet, folder: Path, layout: str, **splits: str) -> list[DataSet]:
    assert list(export([dataset], {dataset.name: splits}, folder, layout))
    return find_datasets(folder)


@pytest.mark.parametrize("layout", FORMATS)
def test_what_is_written_comes_back(layout: str, a_set: DataSet, tmp_path: Path) -> None:
    (back,) = exported(a_set, tmp_path / "out", layout, c1="val", c2="test")
    assert (back.name, back.licence, back.findings) == ("own", "CC-BY-4.0", ())
    cases = {case.case: case for case in back.cases}
    for case in a_set.cases:
        found = cases[case.case]
        assert (found.patient, found.modality, found.expert) == (case.patient, "MR", "mr_t2")
        if case.label is None:
            assert found.label is None
            continue
        assert set(found.annotated) == set(KEYS)
        for before, after in zip(load_case(case, KEYS), load_case(found, KEYS), strict=True):
            assert np.array_equal(before.array, after.array) and before.array.dtype == after.array.dtype
            assert before.grid.is_close(after.grid)
    assert {name: case.split for name, case in cases.items()} == {
        "c0": None,
        "c1": "val",
        "c2": "test",
        "c3": None,
        "c4": None,
        "c5": "test",
    }


def test_an_export_that_fails_is_not_in_the_way_of_the_next(
    a_set: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(exchange, "_nnunet_values", refuse)
        with pytest.raises(OSError, match="the disk is full"):
            exported(a_set, tmp_path / "out", "nnunet")
    assert list((tmp_path / "out").iterdir()) == []
    assert exported(a_set, tmp_path / "out", "nnunet")


def test_nnunet_gets_what_its_documentation_asks_for(a_set: DataSet, tmp_path: Path) -> None:
    exported(a_set, tmp_path, "nnunet", c1="val", c2="test")
    folder = tmp_path / "Dataset500_own"
    facts = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert (facts["channel_names"], facts["file_ending"], facts["numTraining"]) == ({"0": "MR"}, ".nii.gz", 4)
    assert facts["labels"] == {"background": 0, "spleen": 1, "liver": [2, 3], "liver_tumor": 3}
    assert facts["regions_class_order"] == [1, 2, 3]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.nii.gz")}
    assert names == {
        *(f"imagesTr/c{n}_0000.nii.gz" for n in (0, 1, 3, 4)),
        *(f"labelsTr/c{n}.nii.gz" for n in (0, 1, 3, 4)),
        *(f"imagesTs/c{n}_0000.nii.gz" for n in (2, 5)),
        "labelsTs/c2.nii.gz",
    }
    folds = json.loads((folder / "splits_final.json").read_text(encoding="utf-8"))
    assert folds == [{"train": ["c0", "c3", "c4"], "val": ["c1"]}]
    labels = read_volume(folder / "labelsTr/c0.nii.gz").array
    expected = np.vectorize({0: 0, 126: 1, 63: 2, 64: 2, 200: 3}.get)(read_volume(a_set.cases[0].label).array)
    assert labels.dtype == np.uint8 and np.array_equal(labels, expected)


def test_decathlon_lists_name_every_file(a_set: DataSet, tmp_path: Path) -> None:
    exported(a_set, tmp_path, "decathlon", c1="val", c2="test")
    facts = json.loads((tmp_path / "own/dataset.json").read_text(encoding="utf-8"))
    assert facts["labels"] == {"0": "background", "1": "spleen", "2": "liver", "3": "liver_tumor"}
    assert [len(facts[part]) for part in ("training", "validation", "test")] == [3, 1, 2]
    listed = {item[kind] for part in ("training", "validation", "test") for item in facts[part] for kind in item}
    files = {path.relative_to(tmp_path / "own").as_posix() for path in (tmp_path / "own").rglob("*.nii.gz")}
    assert files <= listed and facts["training"][0]["label"] == "labelsTr/c0.nii.gz"


def test_images_that_fit_are_linked_and_others_rewritten(a_set: DataSet, tmp_path: Path) -> None:
    exported(a_set, tmp_path, "nnunet")
    for case in a_set.cases:
        image = tmp_path / "Dataset500_own/imagesTr" / f"{case.case}_0000.nii.gz"
        if case.label and case.image.name.endswith(".nii.gz"):
            assert image.samefile(case.image) or image.read_bytes() == case.image.read_bytes()
        elif case.label:
            assert image.read_bytes()[:2] == b"\x1f\x8b"


def test_a_copy_is_made_where_links_are_not_possible(
    a_set: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    exported(a_set, tmp_path, "nnunet")
    image = tmp_path / "Dataset500_own/imagesTr/c0_0000.nii.gz"
    assert image.read_bytes() == a_set.cases[0].image.read_bytes() and not image.samefile(a_set.cases[0].image)


def test_cases_with_other_annotations_or_modality_go_apart(saved: Saved, tmp_path: Path) -> None:
    def case(name: str, modality: str, *keys: str) -> CaseFiles:
        files = saved(tmp_path / f"in/{name}.nii.gz"), saved(tmp_path / f"in/{name}_label.nii.gz")
        return CaseFiles(name, name, *files, modality, None, {1: "liver", 2: "spleen"}, keys)

    cases = (case("a", "CT", "liver", "spleen"), case("b", "CT", "liver"), case("c", "MR", "liver"))
    found = exported(DataSet("own", "pairs", tmp_path / "in", cases), tmp_path / "out", "nnunet")
    assert {dataset.name: (dataset.cases[0].modality, dataset.cases[0].annotated) for dataset in found} == {
        "own_CT_0": ("CT", ("liver", "spleen")),
        "own_CT_1": ("CT", ("liver",)),
        "own_MR": ("MR", ("liver",)),
    }


def test_nothing_is_overwritten_and_wrong_wishes_are_refused(a_set: DataSet, tmp_path: Path) -> None:
    (tmp_path / "out/own").mkdir(parents=True)
    with pytest.raises(ValueError, match="own exists already"):
        list(export([a_set], {}, tmp_path / "out", "decathlon"))
    with pytest.raises(ValueError, match="'nifti' is unknown; expected one of nnunet, decathlon"):
        list(export([a_set], {}, tmp_path / "out", "nifti"))


@given(st.sets(st.sampled_from(sorted(catalogue())), min_size=1))
def test_every_key_survives_nnunets_labels(keys: set[str]) -> None:
    ordered = tuple(sorted(keys, key=lambda key: catalogue()[key].kind == "lesion"))
    values: dict[str, Any] = _nnunet_values(_Part("x", "CT", ordered, (), {}, ""))
    assert keys_of(named_values(values["labels"])) == (dict(enumerate(ordered, start=1)), {})
