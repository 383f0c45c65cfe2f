from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import m4oe.labels
import pytest
from m4oe.labels import Code, catalogue, structure

COUNTED = {"organ", "vessel", "bone", "muscle", "lesion"}


def test_liver_has_its_facts() -> None:
    liver = structure("liver")
    assert (liver.name, liver.kind, liver.color) == ("Liver", "organ", (221, 130, 101))
    assert liver.type == Code("SCT", "10200004", "Liver")
    assert liver.volume_ml == (653, 1238, 2781)
    assert (liver.nsd_tolerance_mm, liver.volume_depends_on_fov, liver.parent) == (5, False, None)


def test_terminology_of_an_organ_is_slicers_string() -> None:
    assert structure("liver").terminology == (
        "Segmentation category and type - 3D Slicer General Anatomy list~SCT^123037004^Anatomical Structure"
        "~SCT^10200004^Liver~^^~Anatomic codes - DICOM master list~^^~^^"
    )


def test_side_of_an_organ_modifies_its_type() -> None:
    kidney = structure("kidney_left")
    assert (kidney.parent, kidney.laterality) == ("kidney", "left")
    assert "~SCT^64033007^Kidney~SCT^7771000^Left~" in kidney.terminology


def test_side_of_a_lesion_modifies_its_region() -> None:
    cyst = structure("kidney_cyst_right").terminology.split("~")
    assert cyst[2:4] == ["SCT^367643001^Cyst", "^^"]
    assert cyst[5:] == ["SCT^64033007^Kidney", "SCT^24028007^Right"]


def test_context_is_the_list_that_holds_the_code() -> None:
    assert structure("inferior_vena_cava").terminology.startswith("Segmentation category and type - DICOM master")


def test_structure_without_code_has_no_terminology() -> None:
    assert structure("prostate_or_uterus").terminology == ""


def test_codes_are_complete_or_absent() -> None:
    for entry in catalogue().values():
        assert (entry.category is None) == (entry.type is None) == (entry.context == "")
        assert entry.terminology == "" or re.fullmatch(
            r"[^~]+(~[^~^]*\^[^~^]*\^[^~^]*){3}~[^~]+(~.*\^.*\^.*){2}", entry.terminology
        )


def test_coded_structures_differ_in_their_terminology() -> None:
    coded = [entry.terminology for entry in catalogue().values() if entry.terminology]
    assert len(coded) == len(set(coded)) == 135


def test_every_entry_is_plausible() -> None:
    for key, entry in catalogue().items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", key) and entry.key == key
        assert entry.kind in COUNTED and all(0 <= value <= 255 for value in entry.color)
        assert entry.parent is None or entry.parent in catalogue()
        assert entry.volume_ml is None or list(entry.volume_ml) == sorted(entry.volume_ml)


def test_names_are_unique() -> None:
    assert len({entry.name for entry in catalogue().values()}) == len(catalogue()) == 148


def test_every_line_of_the_file_is_in_the_catalogue() -> None:
    with Path(m4oe.labels.__file__).with_name("structures.csv").open(encoding="utf-8") as file:
        assert [row["key"] for row in csv.DictReader(file)] == list(catalogue())


def test_catalogue_can_not_be_changed() -> None:
    with pytest.raises(TypeError):
        catalogue()["liver"] = structure("spleen")  # pyright: ignore[reportIndexIssue]


def test_unknown_key_names_close_ones() -> None:
    with pytest.raises(ValueError, match=r"'kidney_lft'.*kidney_left"):
        structure("kidney_lft")


def test_unknown_key_without_resemblance_names_examples() -> None:
    with pytest.raises(ValueError, match="such as liver"):
        structure("???")


def test_labels_need_the_standard_library_alone() -> None:
    core = Path(m4oe.labels.__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(core)!r}); import m4oe.labels; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
