from __future__ import annotations

from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.files import read_volume, write_segmentation
from m4oe.geometry import Grid, Volume
from m4oe.labelmap import (
    file_stem,
    find_structure,
    label_keys,
    label_values,
    read_label_map,
    uncropped,
)
from m4oe.labels import catalogue
from m4oe.names import read_meanings

KEYS = {1: "liver", 2: "kidney_left", 7: "liver_tumor"}
GRID = Grid((4, 5, 6), np.diag([-0.8, -0.9, 3.0, 1.0]))


def a_map(values: tuple[int, ...] = (0, 1, 2, 7), kind: type = np.uint8) -> Volume:
    array = np.random.default_rng(0).choice(values, GRID.shape).astype(kind)
    return Volume(array, GRID)


def plain(path: Path, array: np.ndarray) -> Path:
    """A file that says nothing of its labels."""
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    return path


def slicer_file(path: Path, layers: np.ndarray, *segments: dict[str, Any]) -> Path:
    """A .seg.nrrd of layers [k, j, i, layer] as Slicer writes it, 3 x 2 x 1 mm, in LPS."""
    directions = np.diag([1.0, 2, 3])
    header = {"space": "left-posterior-superior", "space origin": [10, 20, 30], "kinds": ["list"] + ["domain"] * 3}
    header["space directions"] = np.vstack([[np.nan] * 3, directions])
    for number, fields in enumerate(segments):
        header |= {f"Segment{number}_{field}": str(value) for field, value in fields.items()}
    nrrd.write(str(path), np.ascontiguousarray(layers), header, index_order="C")
    return path


# ---- what a file says itself


@pytest.mark.parametrize("suffix", ["seg.nrrd", "nii.gz", "nrrd", "mha"])
def test_what_is_written_is_read_with_its_structures(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"CT.{suffix}"
    write_segmentation(path, a_map(), KEYS, "test")
    volume, keys = read_label_map(path)
    assert keys == label_keys(path) == KEYS
    assert np.array_equal(volume.array, a_map().array) and volume.grid.is_close(GRID) and volume.warnings == ()


def test_layers_that_do_not_overlap_become_one_map(tmp_path: Path) -> None:
    layers = np.zeros((2, 3, 4, 2), np.uint8)
    layers[0, ..., 0], layers[1, ..., 1] = 1, 1
    spleen, liver = ({"ID": f"Segment_{n}", "Name": name} for n, name in enumerate(["Spleen", "my LIVER"]))
    liver["Tags"] = f"TerminologyEntry:{catalogue()['liver'].terminology}|"
    segments = [fields | {"LabelValue": 1, "Layer": layer} for layer, fields in enumerate((spleen, liver))]
    volume, keys = read_label_map(slicer_file(tmp_path / "a.seg.nrrd", layers, *segments))
    assert keys == {1: "spleen", 2: "liver"}
    assert [np.unique(plane).tolist() for plane in volume.array] == [[1], [2]]
    corner = volume.grid.affine @ (1, 1, 1, 1)
    np.testing.assert_allclose(corner[:3], (-11, -22, 33))  # LPS 11, 22, 33


def test_the_files_of_an_old_slicer_have_a_layer_per_segment(tmp_path: Path) -> None:
    layers = np.zeros((1, 1, 3, 2), np.uint8)
    layers[..., 0, 0], layers[..., 2, 1] = 1, 1
    path = slicer_file(tmp_path / "a.seg.nrrd", layers, {"ID": "liver"}, {"ID": "spleen"})
    volume, keys = read_label_map(path)
    assert volume.array.tolist() == [[[1, 0, 2]]] and keys == {1: "liver", 2: "spleen"}


def test_segments_are_found_under_any_nrrd_name(tmp_path: Path) -> None:
    write_segmentation(tmp_path / "a.seg.nrrd", a_map(), KEYS, "test")
    assert label_keys((tmp_path / "a.seg.nrrd").rename(tmp_path / "a.nrrd")) == KEYS


def test_segments_that_overlap_are_refused(tmp_path: Path) -> None:
    segments = ({"ID": "liver", "Name": "Liver"}, {"ID": "liver_tumor", "Name": "Tumour"})
    path = slicer_file(tmp_path / "a.seg.nrrd", np.ones((1, 2, 2, 2), np.uint8), *segments)
    with pytest.raises(ValueError, match=r"a\.seg\.nrrd is no label map: its segment Tumour overlaps another one"):
        read_label_map(path)


def test_a_segment_that_is_no_structure_is_named_and_left_out(tmp_path: Path) -> None:
    layers = np.ones((1, 2, 2, 2), np.uint8)
    path = slicer_file(tmp_path / "a.seg.nrrd", layers, {"ID": "liver"}, {"ID": "S", "Name": "Region of interest"})
    volume, keys = read_label_map(path)
    assert keys == {1: "liver"} and (volume.array == 1).all()
    assert volume.warnings == ("labels without a structure count as background: 2 (Region of interest)",)


@pytest.mark.parametrize("suffix", ["seg.nrrd", "nii.gz"])
def test_a_result_in_which_nothing_was_found_is_a_label_map(tmp_path: Path, suffix: str) -> None:
    write_segmentation(tmp_path / f"CT.{suffix}", Volume(np.zeros(GRID.shape, np.uint8), GRID), KEYS, "test")
    volume, keys = read_label_map(tmp_path / f"CT.{suffix}")
    assert keys == {} and not volume.array.any() and volume.warnings == ()


def test_a_file_without_any_known_structure_is_refused_with_its_names(tmp_path: Path) -> None:
    layers = np.ones((1, 2, 2, 2), np.uint8)
    path = slicer_file(tmp_path / "a.seg.nrrd", layers, {"ID": "S", "Name": "Bob"}, {"ID": "T", "Name": "Eve"})
    with pytest.raises(
        ValueError, match=r"No label of .*a\.seg\.nrrd is a known structure \(1 \(Bob\), 2 \(Eve\)\); say"
    ):
        read_label_map(path)


def test_a_table_beside_the_file_that_is_no_colour_table_says_nothing(tmp_path: Path) -> None:
    path = plain(tmp_path / "CT.mha", a_map().array)
    (tmp_path / "CT.csv").write_text("case,volume_ml\nCT,70\n")
    with pytest.raises(ValueError, match=r"CT\.mha does not say which structures its labels are"):
        read_label_map(path)


# ---- what somebody says of it


def test_meanings_serve_files_that_say_nothing(tmp_path: Path) -> None:
    path = plain(tmp_path / "CT.mha", a_map().array)
    volume, keys = read_label_map(path, {1: "spleen", 2: "aorta"})
    assert keys == label_keys(path, {1: "spleen", 2: "aorta"}) == {1: "spleen", 2: "aorta"}
    assert volume.warnings == ("labels without a structure count as background: 7",)


def test_a_file_is_believed_before_the_meanings(tmp_path: Path) -> None:
    write_segmentation(tmp_path / "CT.mha", a_map(), KEYS, "test")
    (tmp_path / "CT.csv").write_text("LabelValue,Name\n1,liver\n2,what is this\n7,that\n")
    assert label_keys(tmp_path / "CT.mha", {1: "spleen", 2: "aorta", 5: "stomach"}) == {1: "liver", 2: "aorta"}


@pytest.mark.parametrize(
    "content",
    [
        '{"1": "liver", "2": "Kidney, left", "0": "background"}',
        '{"liver": 1, "LEFT kidney": 2, "background": 0}',
        '{"name": "a set", "labels": {"background": "0", "liver": "1", "kidney_left": "2"}}',
    ],
)
def test_meanings_are_read_from_json_of_either_direction(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    assert read_meanings(tmp_path / "dataset.json") == {1: "liver", 2: "kidney_left"}


def test_meanings_are_read_from_a_text() -> None:
    assert read_meanings("1=liver, 2=Left kidney") == {1: "liver", 2: "kidney_left"}
    with pytest.raises(ValueError, match="the labels 1=liver,spleen are not understood, expected a file or such as"):
        read_meanings("1=liver,spleen")


def test_meanings_are_read_from_a_colour_table(tmp_path: Path) -> None:
    write_segmentation(tmp_path / "CT.nii.gz", a_map(), KEYS, "test")
    assert read_meanings(tmp_path / "CT.csv") == KEYS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"1": "livre"}', r"a\.json names what is no structure: 1 \(livre\); take English names"),
        ("a.json", "{", r"a\.json is not a table of label values"),
        ("a.json", "[1]", r"a\.json is not a table of label values"),
        ("a.json", '{"liver": "one"}', r"a\.json is not a table of label values"),
        ("a.json", "{}", r"a\.json holds no label value; expected rows such as 1,liver"),
        ("a.csv", "a,b\n1,liver\n", r"a\.csv is not a table of label values"),
        ("a.csv", "LabelValue,Name\none,liver\n", r"a\.csv is not a table of label values"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_meanings(tmp_path / name)


# ---- names


@pytest.mark.parametrize("key", catalogue())
def test_every_structure_is_found_by_key_name_and_codes(key: str) -> None:
    entry = catalogue()[key]
    assert find_structure(key) == find_structure(entry.name.upper()) == key
    assert not entry.terminology or find_structure("?", entry.terminology) == key


def test_codes_count_before_the_name_and_the_name_before_the_id(tmp_path: Path) -> None:
    spleen = catalogue()["spleen"].terminology
    assert find_structure("liver", spleen) == "spleen"
    assert find_structure("liver", "a list~SCT^1^Tissue~SCT^2^Tissue") == "liver"
    coded = {"ID": "liver", "Name": "liver", "Tags": f"TerminologyEntry:{spleen}|", "LabelValue": 1, "Layer": 0}
    named = {"ID": "spleen", "Name": "Liver", "LabelValue": 2, "Layer": 0}
    path = slicer_file(tmp_path / "a.seg.nrrd", np.ones((2, 2, 2, 1), np.uint8), coded, named)
    assert label_keys(path) == {1: "spleen", 2: "liver"}


@pytest.mark.parametrize(
    ("name", "key"),
    [("kidney (left)", "kidney_left"), ("liver tumour", "liver_tumor"), ("oesophagus", "esophagus"), ("left", None)],
)
def test_names_are_found_in_any_spelling(name: str, key: str | None) -> None:
    assert find_structure(name) == key


@pytest.mark.parametrize(
    ("name", "stem"), [("a.b.seg.nrrd", "a.b"), ("A.NII.GZ", "A"), ("a.mha", "a"), ("a.csv", ""), ("nrrd", "")]
)
def test_a_stem_has_no_suffix(name: str, stem: str) -> None:
    assert file_stem(Path(name)) == stem


# ---- voxels


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int32, np.uint32])
def test_whole_numbers_of_any_type_are_labels(tmp_path: Path, kind: type) -> None:
    volume, _ = read_label_map(plain(tmp_path / "CT.mha", a_map((0, 1, 300), kind).array), {1: "liver"})
    assert volume.array.dtype == np.uint16
    assert np.array_equal(volume.array, a_map((0, 1, 300), np.uint16).array)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 0.5, 1), "it holds fractions, expected whole numbers and not probabilities"),
        ((-1000, 40), "its values run from -1000 to 40, expected whole numbers from 0 to 65535"),
        ((0, np.nan), "its values run from nan to nan"),
        ((0, 70000), "its values run from 0 to 70000"),
    ],
)
def test_an_image_is_no_label_map(tmp_path: Path, values: tuple[float, ...], message: str) -> None:
    array = np.random.default_rng(0).choice(values, (3, 4, 5)).astype(np.float32)
    with pytest.raises(ValueError, match=rf"CT\.mha is no label map: {message}"):
        read_label_map(plain(tmp_path / "CT.mha", array), {1: "liver"})


def test_the_values_are_those_of_numpy() -> None:
    array = np.random.default_rng(0).choice([0, 3, 200, 999], (3, 4, 5)).astype(np.uint16)
    assert label_values(array) == np.unique(array)[1:].tolist()
    assert label_values(np.zeros((1, 2, 3), np.uint8)) == []


@pytest.mark.parametrize("name", ["none.seg.nrrd", "bad.seg.nrrd", "cut.seg.nrrd", "empty.seg.nrrd"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad.seg.nrrd").write_text("Dear colleague", encoding="utf-8")
    (tmp_path / "empty.seg.nrrd").touch()
    layers = np.random.default_rng(0).integers(0, 2, (9, 9, 9, 2)).astype(np.uint8)
    cut = slicer_file(tmp_path / "cut.seg.nrrd", layers, {"ID": "liver"}, {"ID": "spleen"})
    cut.write_bytes(cut.read_bytes()[:-300])
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        read_label_map(tmp_path / name)


# ---- cropped maps


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_a_cropped_map_fits_the_whole_one_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = [int(rng.integers(0, size)) for size in GRID.shape]
    high = [int(rng.integers(first + 1, size + 1)) for first, size in zip(low, GRID.shape, strict=True)]
    box = tuple(slice(*ends) for ends in zip(low, high, strict=True))
    affine = np.array(GRID.affine)
    affine[:3, 3] = (GRID.affine @ (*low[::-1], 1))[:3]
    part = Volume(a_map().array[box], Grid(a_map().array[box].shape, affine))
    expected = np.zeros_like(a_map().array)
    expected[box] = part.array
    whole = uncropped(part, a_map())
    assert whole.grid.is_close(GRID) and np.array_equal(whole.array, expected)
    assert uncropped(a_map(), part).grid.is_close(GRID)


@pytest.mark.parametrize("move", [0.5, 1000])
def test_a_map_of_another_lattice_stays_as_it_is(move: float) -> None:
    affine = np.array(GRID.affine)
    affine[0, 3] += move * 0.8
    part = Volume(np.zeros((2, 2, 2), np.uint8), Grid((2, 2, 2), affine))
    assert uncropped(part, a_map()) is part


def test_the_labels_of_a_real_mr_are_read(shared_data: Path) -> None:
    path = shared_data / "mr_nc" / "chaos_t2_39_label.nii.gz"  # float64, oblique
    volume, _ = read_label_map(path, dict(enumerate(("liver", "kidney_right", "kidney_left", "spleen"), start=1)))
    assert volume.array.dtype == np.uint16 and np.array_equal(volume.array, read_volume(path).array)
    assert label_values(volume.array) == [1, 2, 3, 4] and volume.warnings == ()
