from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from m4oe.labels import catalogue
from m4oe.names import key_of, keys_of, named_values, read_label_table
from m4oe.training.cases import CaseFiles, DataSet, read_labels
from m4oe.training.datasets import _facts, find_datasets, overlaps
from m4oe.training.layouts import Hints

Saved = Callable[..., Path]


def touched(path: Path) -> Path:
    """An empty file: finding reads no volume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def the_set(folder: Path, **hints: Any) -> DataSet:
    (dataset,) = find_datasets(folder, Hints(**hints))
    return dataset


def by_name(dataset: DataSet) -> dict[str, CaseFiles]:
    return {case.case: case for case in dataset.cases}


def sentences(dataset: DataSet) -> str:
    return "\n".join(f"{finding.severity}: {finding.sentence}" for finding in dataset.findings)


# ---- public data sets: files as they are published, and what must come out: case, modality, expert, label file,
# ---- split, some meanings of values

PUBLIC: dict[
    str, tuple[list[str], dict[str, tuple[str | None, str | None, str | None, str | None]], dict[int, str]]
] = {
    "flare22": (
        [
            "FLARE22Train/images/FLARE22_Tr_0001_0000.nii.gz",
            "FLARE22Train/images/FLARE22_Tr_0050_0000.nii.gz",
            "FLARE22Train/labels/FLARE22_Tr_0001.nii.gz",
            "FLARE22Train/labels/FLARE22_Tr_0050.nii.gz",
            "Training/FLARE22_UnlabeledCase1-1000/Case_00001_0000.nii.gz",
            "Tuning/images/FLARETs_0001_0000.nii.gz",
            "Tuning/labels/FLARETs_0001.nii.gz",
            "Testing/FLARETs_0051_0000.nii.gz",
        ],
        {
            "FLARE22_Tr_0001": ("CT", "ct", "FLARE22Train/labels/FLARE22_Tr_0001.nii.gz", None),
            "FLARE22_Tr_0050": ("CT", "ct", "FLARE22Train/labels/FLARE22_Tr_0050.nii.gz", None),
            "Case_00001": ("CT", "ct", None, None),
            "FLARETs_0001": ("CT", "ct", "Tuning/labels/FLARETs_0001.nii.gz", "val"),
            "FLARETs_0051": ("CT", "ct", None, "val"),
        },
        {1: "liver", 2: "kidney_right", 6: "inferior_vena_cava", 13: "kidney_left"},
    ),
    "amos22": (
        [
            "amos22/imagesTr/amos_0001.nii.gz",
            "amos22/labelsTr/amos_0001.nii.gz",
            "amos22/imagesVa/amos_0544.nii.gz",
            "amos22/labelsVa/amos_0544.nii.gz",
            "amos22/imagesTs/amos_0500.nii.gz",
            "amos22_unlabeled_ct_5000_5399/amos_5001.nii.gz",
        ],
        {
            "amos_0001": ("CT", "ct", "amos22/labelsTr/amos_0001.nii.gz", None),
            "amos_0544": ("MR", None, "amos22/labelsVa/amos_0544.nii.gz", "val"),
            "amos_0500": ("CT", "ct", None, "test"),
            "amos_5001": ("CT", "ct", None, None),
        },
        {1: "spleen", 3: "kidney_left", 9: "inferior_vena_cava", 15: "prostate_or_uterus"},
    ),
    "atlas23": (
        [
            f"atlas-train-dataset-1.0.1/train/{part}{n}.nii.gz"
            for part in ("imagesTr/im", "labelsTr/lb")
            for n in (0, 59)
        ],
        {n: ("MR", "mr_t1ce", f"atlas-train-dataset-1.0.1/train/labelsTr/lb{n}.nii.gz", None) for n in ("0", "59")},
        {1: "liver", 2: "liver_tumor"},
    ),
    "btcv": (
        [
            "RawData/Training/img/img0001.nii.gz",
            "RawData/Training/label/label0001.nii.gz",
            "RawData/Testing/img/img0061.nii.gz",
        ],
        {
            "0001": ("CT", "ct", "RawData/Training/label/label0001.nii.gz", None),
            "0061": ("CT", "ct", None, None),
        },
        {10: "portal_vein_and_splenic_vein", 11: "pancreas", 13: "adrenal_gland_left"},
    ),
    "word": (
        [f"WORD-V0.1.0/{part}{split}/word_0002.nii.gz" for part, split in (("images", "Tr"), ("labels", "Tr"))]
        + [f"WORD-V0.1.0/{part}{split}/word_0001.nii.gz" for part, split in (("images", "Val"), ("labels", "Val"))],
        {
            "word_0002": ("CT", "ct", "WORD-V0.1.0/labelsTr/word_0002.nii.gz", None),
            "word_0001": ("CT", "ct", "WORD-V0.1.0/labelsVal/word_0001.nii.gz", "val"),
        },
        {3: "kidney_left", 4: "kidney_right", 11: "small_bowel", 12: "adrenal_gland"},
    ),
    "chaos": (
        [
            "Train_Sets/CT/1/DICOM_anon/i0000,0000b.dcm",
            "Train_Sets/CT/1/Ground/liver_GT_000.png",
            "Train_Sets/MR/1/T1DUAL/DICOM_anon/InPhase/IMG-0004-00002.dcm",
            "Train_Sets/MR/1/T1DUAL/DICOM_anon/OutPhase/IMG-0004-00001.dcm",
            "Train_Sets/MR/1/T1DUAL/Ground/IMG-0004-00002.png",
            "Train_Sets/MR/1/T2SPIR/DICOM_anon/IMG-0002-00001.dcm",
            "Train_Sets/MR/1/T2SPIR/Ground/IMG-0002-00001.png",
            "Test_Sets/MR/4/T2SPIR/DICOM_anon/IMG-0002-00001.dcm",
        ],
        {
            "CT_1": ("CT", "ct", "Train_Sets/CT/1/Ground", None),
            "MR_1_T1DUAL_InPhase": ("MR", "mr_t1", "Train_Sets/MR/1/T1DUAL/Ground", None),
            "MR_1_T1DUAL_OutPhase": ("MR", "mr_t1", "Train_Sets/MR/1/T1DUAL/Ground", None),
            "MR_1_T2SPIR": ("MR", "mr_t2", "Train_Sets/MR/1/T2SPIR/Ground", None),
            "MR_4_T2SPIR": ("MR", "mr_t2", None, None),
        },
        {},
    ),
    "kits23": (
        [f"dataset/case_00{n}/{name}.nii.gz" for n in ("000", "588") for name in ("imaging", "segmentation")],
        {f"case_00{n}": ("CT", "ct", f"dataset/case_00{n}/segmentation.nii.gz", None) for n in ("000", "588")},
        {1: "kidney", 2: "kidney_tumor", 3: "kidney_cyst"},
    ),
    "totalsegmentator_ct_v1": (
        ["s0011/ct.nii.gz", "s0011/segmentations/face.nii.gz", "s0011/segmentations/liver.nii.gz"],
        {"s0011": ("CT", "ct", "s0011/segmentations", None)},
        {1: "face", 2: "liver"},
    ),
    "totalsegmentator_ct_v2": (
        [
            "s0000/ct.nii.gz",
            "s0000/segmentations/vertebrae_L5.nii.gz",
            "s0000/segmentations/atrial_appendage_left.nii.gz",
        ],
        {"s0000": ("CT", "ct", "s0000/segmentations", "test")},
        {1: "atrial_appendage_left", 2: "vertebrae_l5"},
    ),
    "totalsegmentator_mr_v1": (
        ["s0001/mri.nii.gz", "s0001/segmentations/fibula.nii.gz"],
        {"s0001": ("MR", None, "s0001/segmentations", None)},
        {1: "fibula"},
    ),
    "totalsegmentator_mr_v2": (
        ["s0001/mri.nii.gz", "s0001/segmentations/scapula_left.nii.gz"],
        {"s0001": ("MR", None, "s0001/segmentations", None)},
        {1: "scapula_left"},
    ),
}
for task, organ, meaning in (
    ("Task03_Liver", "liver", {1: "liver", 2: "liver_tumor"}),
    ("Task07_Pancreas", "pancreas", {1: "pancreas", 2: "pancreas_tumor"}),
    ("Task09_Spleen", "spleen", {1: "spleen"}),
):
    PUBLIC[f"msd_{organ}"] = (
        [f"{task}/imagesTr/{organ}_2.nii.gz", f"{task}/labelsTr/{organ}_2.nii.gz", f"{task}/imagesTs/{organ}_9.nii.gz"],
        {
            f"{organ}_2": ("CT", "ct", f"{task}/labelsTr/{organ}_2.nii.gz", None),
            f"{organ}_9": ("CT", "ct", None, None),
        },
        meaning,
    )


def built(name: str, folder: Path) -> Path:
    for file in PUBLIC[name][0]:
        touched(folder / file)
    if name == "totalsegmentator_ct_v2":
        (folder / "meta.csv").write_text("image_id;age;split\ns0000;50;test\n", encoding="utf-8")
    return folder


def test_all_fourteen_layouts_are_tried() -> None:
    assert len(PUBLIC) == 14


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_data_set_is_recognised(name: str, tmp_path: Path) -> None:
    _, expected, meaning = PUBLIC[name]
    dataset = the_set(built(name, tmp_path))
    cases = by_name(dataset)
    assert dataset.name == name and dataset.findings == () and dataset.licence
    assert {
        key: (
            case.modality,
            case.expert,
            case.label.relative_to(tmp_path).as_posix() if case.label else None,
            case.split,
        )
        for key, case in cases.items()
    } == expected
    labels = next(case.labels for case in dataset.cases if case.label)
    assert {value: labels[value] for value in meaning} == meaning


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_data_set_is_recognised_from_the_folder_above(name: str, tmp_path: Path) -> None:
    assert the_set(built(name, tmp_path / "a" / "b").parents[1]).name == name


def test_every_public_meaning_is_a_structure_of_ours() -> None:
    for facts in _facts()["sets"].values():
        for kind in facts["kinds"]:
            keys = {*kind.get("labels", {}).values(), *facts.get("labels", {}).values(), *kind.get("absent", ())}
            assert keys <= set(catalogue())


def test_overlaps_name_sets_that_exist() -> None:
    names = {*_facts()["sets"], *(f"totalsegmentator_{m}_{v}" for m in ("ct", "mr") for v in ("v1", "v2"))}
    assert {name for entry in _facts()["overlaps"] for name in entry["sets"]} <= names
    assert overlaps(names) and not overlaps({"flare22", "amos22"})


@given(number=st.integers(1, 9999))
def test_amos_tells_ct_from_mr_by_the_number(number: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected = "CT" if number <= 500 or 5000 <= number <= 6899 else "MR" if number <= 600 else None
    folder = tmp_path_factory.mktemp("amos")
    touched(folder / f"imagesTr/amos_{number:04}.nii.gz")
    assert [case.modality for case in the_set(folder).cases] == [expected]


def test_mr_cases_of_amos_are_not_annotated_for_bladder_and_prostate(tmp_path: Path) -> None:
    cases = by_name(the_set(built("amos22", tmp_path)))
    assert set(cases["amos_0001"].annotated) - set(cases["amos_0544"].annotated) == {
        "urinary_bladder",
        "prostate_or_uterus",
    }


def test_chaos_grey_values_have_ranges_and_phases_share_a_patient(tmp_path: Path) -> None:
    cases = by_name(the_set(built("chaos", tmp_path)))
    labels = cases["MR_1_T2SPIR"].labels
    assert {value: labels.get(value) for value in (55, 63, 126, 189, 252)} == {
        55: None,
        63: "liver",
        126: "kidney_right",
        189: "kidney_left",
        252: "spleen",
    }
    assert cases["CT_1"].labels[255] == "liver" and cases["CT_1"].annotated == ("liver",)
    assert {case.patient for case in cases.values()} == {"CT_1", "MR_1", "MR_4"}


def test_files_that_find_no_partner_are_named(tmp_path: Path) -> None:
    touched(tmp_path / "imagesTr/amos_0001.nii.gz")
    touched(tmp_path / "labelsTr/amos_0002.nii.gz")
    touched(tmp_path / "labelsTr/notes.nii.gz")
    dataset = the_set(tmp_path)
    assert "error: " in sentences(dataset) and "amos_0002.nii.gz has no image" in sentences(dataset)
    assert "amos_0001.nii.gz has no label" in sentences(dataset)
    assert "note: 1 images or folders belong to no case, such as" in sentences(dataset)


def test_two_copies_of_a_case_are_seen(tmp_path: Path) -> None:
    for copy in ("a", "b"):
        built("word", tmp_path / copy)
    dataset = the_set(tmp_path)
    assert len(dataset.cases) == 2
    assert "word_0002.nii.gz is left out" in sentences(dataset)


def test_several_data_sets_lie_in_one_folder(tmp_path: Path) -> None:
    for name in ("atlas23", "word", "kits23", "totalsegmentator_ct_v2", "totalsegmentator_mr_v2"):
        built(name, tmp_path / name)
    found = find_datasets(tmp_path)
    assert [dataset.name for dataset in found] == sorted(path.name for path in tmp_path.iterdir())
    assert [dataset.findings for dataset in found] == [()] * 5


def test_own_data_under_a_public_name_keeps_its_own_meanings(tmp_path: Path) -> None:
    built("msd_spleen", tmp_path)
    items = [{"image": "./imagesTr/spleen_2.nii.gz", "label": "./labelsTr/spleen_2.nii.gz"}]
    facts = {"labels": {"0": "background", "1": "liver"}, "modality": {"0": "CT"}, "training": items}
    (tmp_path / "Task09_Spleen" / "dataset.json").write_text(json.dumps(facts), encoding="utf-8")
    dataset = the_set(tmp_path)
    assert (dataset.name, dataset.layout, dataset.cases[0].annotated) == ("Task09_Spleen", "decathlon", ("liver",))


def test_a_data_set_with_another_dataset_json_is_recognised(tmp_path: Path) -> None:
    built("atlas23", tmp_path)
    (tmp_path / "atlas-train-dataset-1.0.1/train/dataset.json").write_text('{"name": "cgfl"}', encoding="utf-8")
    assert the_set(tmp_path).name == "atlas23"


def test_ct_and_mr_of_totalsegmentator_may_lie_side_by_side(tmp_path: Path) -> None:
    built("totalsegmentator_ct_v2", tmp_path)
    built("totalsegmentator_mr_v2", tmp_path)
    assert [(dataset.name, len(dataset.cases), dataset.findings) for dataset in find_datasets(tmp_path)] == [
        ("totalsegmentator_ct_v2", 1, ()),
        ("totalsegmentator_mr_v2", 1, ()),
    ]


def test_masks_of_unknown_structures_are_named(tmp_path: Path) -> None:
    touched(built("totalsegmentator_ct_v2", tmp_path) / "s0000/segmentations/left_antenna.nii.gz")
    dataset = the_set(tmp_path)
    assert "left_antenna" in sentences(dataset) and len(dataset.cases[0].labels) == 2


# ---- other layouts


def nnunet(folder: Path, **facts: Any) -> Path:
    for file in ("imagesTr/a_0000", "labelsTr/a", "imagesTr/b_0000", "labelsTr/b", "imagesTs/c_0000"):
        touched(folder / f"{file}.nii.gz")
    given = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "tumour": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(given | facts), encoding="utf-8")
    return folder


def test_nnunet_raw_is_read(tmp_path: Path) -> None:
    dataset = the_set(nnunet(tmp_path / "Dataset123_Liver"))
    assert (dataset.name, dataset.layout, dataset.findings) == ("Liver", "nnU-Net", ())
    assert [(case.case, case.modality, case.expert, case.split) for case in dataset.cases] == [
        ("a", "CT", "ct", None),
        ("b", "CT", "ct", None),
        ("c", "CT", "ct", "test"),
    ]
    assert dataset.cases[0].labels == {1: "liver", 2: "liver_tumor"} and dataset.cases[2].label is None


def test_nnunet_regions_channels_splits_and_lacks_are_read(tmp_path: Path) -> None:
    folder = nnunet(
        tmp_path,
        channel_names={"0": "T2", "1": "T1"},
        labels={"background": 0, "whole liver": [1, 2], "liver tumor": 2, "edema": 3},
        numTraining=4,
    )
    (folder / "labelsTr/b.nii.gz").rename(folder / "labelsTr/z.nii.gz")
    (folder / "splits_final.json").write_text('[{"train": ["a"], "val": ["b"]}]', encoding="utf-8")
    dataset = the_set(folder)
    assert [(case.modality, case.expert, case.split) for case in dataset.cases] == [
        ("MR", "mr_t2", None),
        ("MR", "mr_t2", "val"),
        ("MR", "mr_t2", "test"),
    ]
    assert dataset.cases[0].labels == {1: "liver", 2: "liver_tumor"}
    text = sentences(dataset)
    assert "The label 3 ('edema') is no structure" in text
    assert "Of 2 channels the first is used: T2" in text and "announces 4 training cases, 2 are" in text
    assert "b_0000.nii.gz has no label" in text and "z.nii.gz has no image" in text


def test_nnunet_files_may_lie_elsewhere(tmp_path: Path) -> None:
    elsewhere = {"x": {"images": ["../far/x.nii.gz"], "label": "../far/y.nii.gz"}}
    touched(tmp_path / "far/x.nii.gz"), touched(tmp_path / "far/y.nii.gz")
    dataset = the_set(nnunet(tmp_path / "raw", dataset=elsewhere, numTraining=1))
    assert [case.image.resolve() for case in dataset.cases] == [tmp_path / "far/x.nii.gz"]


def test_a_damaged_description_is_an_error_and_stops_nothing(tmp_path: Path) -> None:
    nnunet(tmp_path / "bad", labels={"liver": "one"})
    nnunet(tmp_path / "good")
    bad, good = find_datasets(tmp_path)
    assert bad.cases == () and "error: " in sentences(bad) and "dataset.json" in sentences(bad)
    assert len(good.cases) == 3


def test_a_decathlon_list_is_read(tmp_path: Path) -> None:
    facts = {
        "labels": {"0": "background", "1": "LK", "2": "gall bladder"},
        "modality": {"0": "T1w"},
        "training": [{"image": "./i/a.nii.gz", "label": "./l/a.nii.gz", "fold": 0, "patient": 7}],
        "validation": [{"image": ["./i/b.nii.gz", "./i/b2.nii.gz"], "label": "./l/b.nii.gz", "modality": "CT"}],
        "test": ["./i/c.nii.gz"],
    }
    (tmp_path / "list.json").write_text(json.dumps(facts), encoding="utf-8")
    (tmp_path / "settings.json").write_text('{"training": {"rate": 1}}', encoding="utf-8")
    dataset = the_set(tmp_path)
    assert (dataset.layout, dataset.findings) == ("decathlon", ())
    assert [(c.case, c.patient, c.modality, c.expert, c.split, c.image.name) for c in dataset.cases] == [
        ("a", "7", "MR", "mr_t1", None, "a.nii.gz"),
        ("b", "b", "CT", "ct", "val", "b.nii.gz"),
        ("c", "c", "MR", "mr_t1", "test", "c.nii.gz"),
    ]
    assert dataset.cases[0].labels == {1: "kidney_left", 2: "gallbladder"}


def test_any_task_of_the_decathlon_is_read(tmp_path: Path) -> None:
    items = [{"image": f"./imagesTr/BRATS_{n}.nii.gz", "label": f"./labelsTr/BRATS_{n}.nii.gz"} for n in (1, 2)]
    facts = {"labels": {"0": "background", "1": "edema"}, "modality": {"0": "FLAIR", "1": "T1w"}, "training": items}
    touched(tmp_path / "Task01_BrainTumour/dataset.json").write_text(json.dumps(facts), encoding="utf-8")
    dataset = the_set(tmp_path)
    assert dataset.name == "Task01_BrainTumour" and dataset.cases[0].modality == "MR"
    assert "Of 2 channels the first is used: FLAIR" in sentences(dataset) and "'edema'" in sentences(dataset)


def test_bids_derivatives_are_read(tmp_path: Path) -> None:
    touched(tmp_path / "sub-01/anat/sub-01_T2w.nii.gz")
    touched(tmp_path / "sub-02/ses-1/anat/sub-02_ses-1_T2w.nii.gz")
    segmentations = tmp_path / "derivatives/manual"
    touched(segmentations / "sub-01/anat/sub-01_space-orig_desc-manual_dseg.nii.gz")
    touched(segmentations / "sub-02/ses-1/anat/sub-02_ses-1_dseg.nii.gz")
    touched(segmentations / "sub-03/anat/sub-03_dseg.nii.gz")
    touched(segmentations / "desc-manual_dseg.tsv").write_text("index\tname\n0\tbackground\n3\tLeft kidney\n", "utf-8")
    dataset = the_set(tmp_path)
    assert dataset.layout == "BIDS"
    assert [(c.case, c.patient, c.modality, c.expert, c.image.name, c.labels) for c in dataset.cases] == [
        ("sub-01_space-orig_desc-manual", "sub-01", "MR", "mr_t2", "sub-01_T2w.nii.gz", {3: "kidney_left"}),
        ("sub-02_ses-1", "sub-02", "MR", "mr_t2", "sub-02_ses-1_T2w.nii.gz", {3: "kidney_left"}),
    ]
    assert "sub-03_dseg.nii.gz needs one image named sub-03_*, found none" in sentences(dataset)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("a.nii.gz", "a_label.nii.gz"),
        ("a_0000.nii.gz", "a_seg.nrrd"),
        ("a_image.mha", "a-mask.mha"),
        ("images/a.nii.gz", "labels/a.nii.gz"),
        ("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"),
        ("p1/img/a.nii.gz", "p1/segmentations/a_seg.nii.gz"),
        ("a/1.dcm", "a_label.nii.gz"),
    ],
)
def test_pairs_are_found(image: str, label: str, tmp_path: Path) -> None:
    touched(tmp_path / image), touched(tmp_path / label)
    dataset = the_set(tmp_path, names={1: "RK"}, modality="MR", expert="mr_t2")
    assert (dataset.layout, dataset.findings) == ("pairs", ())
    (case,) = dataset.cases
    assert (case.label, case.modality, case.expert) == (tmp_path / label, "MR", "mr_t2")
    assert case.labels == {1: "kidney_right"} and case.image in ((tmp_path / image), (tmp_path / image).parent)


def test_pairs_without_a_table_and_what_fits_nothing_are_errors(tmp_path: Path) -> None:
    for file in ("a", "a_label", "a_label_two", "b", "c_label"):
        touched(tmp_path / f"{file}.nii.gz")
    touched(tmp_path / "a.png")
    dataset = the_set(tmp_path)
    assert [(case.case, case.modality) for case in dataset.cases] == [("a", None), ("b", None)]
    text = sentences(dataset)
    assert "give label values (--labels, or" in text and "a_label_two.nii.gz is left out" in text
    assert "c_label.nii.gz has no image" in text and "b.nii.gz has no label" in text


def test_a_table_beside_the_data_gives_the_meanings(tmp_path: Path) -> None:
    for file in ("a", "a_label", "b", "b_label"):
        touched(tmp_path / f"{file}.nii.gz")
    (tmp_path / "labels.csv").write_text("label,name\n1,Liver\n", encoding="utf-8")
    (tmp_path / "b_label.csv").write_text("LabelValue,Name,Color_R\n1,Spleen,9\n", encoding="utf-8")
    cases = by_name(the_set(tmp_path))
    assert (cases["a"].labels, cases["b"].labels) == ({1: "liver"}, {1: "spleen"})


def test_equal_names_in_several_folders_stay_apart(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        touched(tmp_path / patient / "ct.nii.gz"), touched(tmp_path / patient / "ct_label.nii.gz")
    assert sorted(by_name(the_set(tmp_path))) == ["p1_ct", "p2_ct"]


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_table_of_cases_has_the_last_word(tmp_path: Path, sign: str) -> None:
    folder = nnunet(tmp_path)
    text = "case,patient,modality,expert\na,p,MR,mr_t1\nb,p,,\n".replace(",", sign)
    (folder / "cases.csv").write_text(text, encoding="utf-8-sig")
    cases = by_name(the_set(folder))
    assert [(c.patient, c.modality, c.expert) for c in cases.values()] == [
        ("p", "MR", "mr_t1"),
        ("p", "CT", "ct"),
        ("c", "CT", "ct"),
    ]


def test_only_the_table_of_cases_keeps_a_case_for_training(tmp_path: Path) -> None:
    folder = nnunet(tmp_path)
    (folder / "splits_final.json").write_text('[{"train": ["a", "b"], "val": []}]', encoding="utf-8")
    (folder / "cases.csv").write_text("case,split\nb,train\n", encoding="utf-8")
    assert {name: case.split for name, case in by_name(the_set(folder)).items()} == {
        "a": None,
        "b": "train",
        "c": "test",
    }


@pytest.mark.parametrize(
    ("row", "said"), [("z,p,MR", "'z'; expected 'a'"), ("a,p,PET", "'PET'; expected one of CT, MR")]
)
def test_a_wrong_table_of_cases_is_refused(row: str, said: str, tmp_path: Path) -> None:
    folder = nnunet(tmp_path)
    (folder / "cases.csv").write_text(f"case,patient,modality\n{row}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        find_datasets(folder)
    (folder / "cases.csv").write_text("name\na\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has the columns name; expected case"):
        find_datasets(folder)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    touched(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="holds no data set"):
        find_datasets(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        find_datasets(tmp_path / "notes.txt")


def test_links_that_lead_back_and_hidden_files_are_no_trap(tmp_path: Path) -> None:
    folder = nnunet(tmp_path / "data")
    touched(folder / "imagesTr/._a_0000.nii.gz")
    (folder / "imagesTr/back").symlink_to(tmp_path)
    dataset = the_set(tmp_path)
    assert len(dataset.cases) == 3 and dataset.findings == ()


# ---- labels that are no single file


def test_masks_are_joined(saved: Saved, tmp_path: Path) -> None:
    expected = np.zeros((4, 4, 4), np.uint8)
    expected[1], expected[2] = 1, 2
    for value, name in ((1, "atrial_appendage_left"), (2, "liver")):
        saved(tmp_path / f"s0000/segmentations/{name}.nii.gz", expected == value)
    saved(tmp_path / "s0000/ct.nii.gz")
    labels = read_labels(the_set(tmp_path).cases[0])
    assert labels.array.dtype == np.uint8 and np.array_equal(labels.array, expected)


def dicom_series(folder: Path, volume: np.ndarray) -> None:
    """Slices whose names run against their places, as in CHAOS."""
    folder.mkdir(parents=True)
    for index, plane in enumerate(volume):
        image = sitk.GetImageFromArray(plane[None])
        tags = {"0008|0060": "CT", "0020|000e": "1.2.3", "0020|000d": "1.2", "0020|0013": str(index)}
        tags |= {"0020|0032": f"0\\0\\{3 * index}", "0020|0037": "1\\0\\0\\0\\1\\0"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"i{len(volume) - index:04}.dcm"))
        writer.Execute(image)


def test_png_slices_go_with_the_dicom_files_of_their_rank(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.int16) * 100
    dicom_series(tmp_path / "Train_Sets/CT/1/DICOM_anon", volume)
    for rank, plane in enumerate(volume[::-1]):  # by name the last slice comes first
        path = tmp_path / f"Train_Sets/CT/1/Ground/liver_GT_{rank:03}.png"
        path.parent.mkdir(exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(((plane == 200) * 255).astype(np.uint8)), str(path))
    (case,) = the_set(tmp_path).cases
    assert np.array_equal(read_labels(case).array, (volume == 200) * 255)
    path.unlink()
    with pytest.raises(ValueError, match="has 4 slices, the image 5"):
        read_labels(case)


# ---- names


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Left kidney", "kidney_left"),
        ("LK", "kidney_left"),
        ("kidney_right", "kidney_right"),
        ("postcava", "inferior_vena_cava"),
        ("IVC", "inferior_vena_cava"),
        ("arota", "aorta"),
        ("gall bladder", "gallbladder"),
        ("bladder", "urinary_bladder"),
        ("Right Adrenal Gland", "adrenal_gland_right"),
        ("RAG", "adrenal_gland_right"),
        ("Oesophagus", "esophagus"),
        ("Head_of_femur_L", "femur_head_left"),
        ("prostate/uterus", "prostate_or_uterus"),
        ("liver tumour", "liver_tumor"),
        ("background", "background"),
        ("edema", None),
        ("", None),
    ],
)
def test_names_are_understood(name: str, key: str | None) -> None:
    assert key_of(name) == key


@pytest.mark.parametrize("key", list(catalogue()))
def test_every_key_and_display_name_means_itself(key: str) -> None:
    assert key_of(key) == key_of(catalogue()[key].name) == key_of(key.upper().replace("_", " ")) == key


def test_a_bare_tumour_belongs_to_the_only_organ() -> None:
    assert keys_of({0: "background", 1: "pancreas", 2: "cancer"}) == ({1: "pancreas", 2: "pancreas_tumor"}, {})
    assert keys_of({1: "liver", 2: "pancreas", 3: "cancer"})[1] == {3: "cancer"}


@given(labels=st.dictionaries(st.integers(1, 300), st.sampled_from(sorted(catalogue())), min_size=1))
def test_a_table_of_labels_is_read_from_every_form(
    labels: dict[int, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    texts = {
        "a.json": json.dumps(labels),
        "b.json": json.dumps({"labels": {str(value): key for value, key in labels.items()}}),
        "c.csv": "LabelValue,Name\n" + "".join(f"{value},{key}\n" for value, key in labels.items()),
        "d.tsv": "index\tname\tcolor\n" + "".join(f"{value}\t{key}\t#fff\n" for value, key in labels.items()),
        "e.csv": "\ufeffkey;value\n" + "".join(f"{key};{value}\n" for value, key in labels.items()),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        assert read_label_table(folder / name) == labels
    unique = {key: value for value, key in labels.items()}
    assert named_values(unique) == {value: key for key, value in unique.items()}


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "label,name\nliver,1\n", "label,name\n"])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="t.csv"):
        read_label_table(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"1=livre names what is no structure: 1 \(livre\)"):
        read_label_table("1=livre")
    with pytest.raises(ValueError, match="none.json cannot be read"):
        read_label_table(tmp_path / "none.json")
