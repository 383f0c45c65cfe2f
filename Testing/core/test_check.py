from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.files import read_header, read_volume
from m4oe.geometry import Grid, Volume
from m4oe.names import keys_of, read_label_table
from m4oe.training.cases import CaseFiles, load_case, on_grid
from m4oe.training.check import check_case, check_cases, find_structures, histogram

Saved = Callable[..., Path]
KEYS = {1: "liver", 2: "kidney_left", 3: "kidney_right", 4: "spleen", 5: "liver"}


@pytest.fixture
def a_case(saved: Saved, tmp_path: Path) -> Callable[..., CaseFiles]:
    """A case of 4 x 4 x 4 voxels of 64 mL: its label's values, and what differs in the headers."""

    def make(values: Any = 0, image: Any = 0, **differs: Any) -> CaseFiles:
        sizes = {"spacing": (40.0, 40.0, 40.0)}
        label = saved(tmp_path / "l.nii.gz", values, differs.pop("label_kind", np.uint8), **sizes | differs)
        path = saved(tmp_path / "i.nii.gz", image, np.float32 if np.ndim(image) == 3 else np.int16, **sizes)
        return CaseFiles("a", "a", path, label, "CT", "ct", KEYS, ("liver", "kidney_left", "kidney_right", "spleen"))

    return make


def found(case: CaseFiles, severity: str = "") -> str:
    return "\n".join(f.sentence for f in check_case(case).findings if severity in (f.severity, ""))


def organs() -> np.ndarray:
    """Values [k, j, i] of a sound patient; i grows to the right."""
    values = np.zeros((4, 4, 4), np.uint8)
    values[:, :, 3], values[1, 2, 3], values[1, 2, 0], values[2, 1:3, 0] = 1, 3, 2, 4
    return values


def test_a_sound_case_has_no_findings(a_case: Callable[..., CaseFiles]) -> None:
    report = check_case(a_case(organs()))
    assert (report.findings, report.is_usable) == ((), True)
    assert report.spacing == pytest.approx((40, 40, 40)) and report.size == (4, 4, 4)
    assert report.volumes_ml == {"liver": 960, "kidney_right": 64, "spleen": 128, "kidney_left": 64}


def test_volumes_out_of_range_are_told_unless_the_scan_cuts_the_organ(a_case: Callable[..., CaseFiles]) -> None:
    whole = np.zeros((4, 4, 4), np.uint8)
    whole[1:3, 1, 1] = 4
    assert found(a_case(whole, spacing=(40.0, 40.0, 40.0))) == ""  # 128 mL
    whole[2, 1, 1] = 0
    whole[1, 1, 1] = 1
    assert "Liver has 64 mL; patients had 653 to 2781." in found(a_case(whole), "warning")
    whole[1, 1, 1], whole[0, 1, 1] = 0, 1
    assert found(a_case(whole)) == ""  # it reaches the lowest slice
    assert "Liver has 4096 mL" in found(a_case(1), "warning")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda case: replace(case, label=case.label.with_name("none.nii.gz")), "There is no file"),
        (lambda case: replace(case, image=case.image.with_name("none.nii.gz")), "There is no file"),
        (lambda case: replace(case, modality=None), "modality is not known"),
        (lambda case: replace(case, labels={1: "liver"}), "Its label holds 2, 3, 4, which"),
    ],
)
def test_a_case_that_is_of_no_use_has_an_error(change: Any, said: str, a_case: Callable[..., CaseFiles]) -> None:
    case = change(a_case(organs()))
    assert said in found(case, "error") and not check_case(case).is_usable


@pytest.mark.parametrize(
    ("header", "said", "severity"),
    [
        ({"spacing": (40.0, 40.0, 41.0)}, "voxels of 40 x 40 x 41 mm, the image 40 x 40 x 40", "error"),
        ({"origin": (3.0, 0.0, 4.0)}, "lie up to 5.0 mm apart", "warning"),
        ({"direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)}, "label has axes LPS, the image RAS", "error"),
    ],
)
def test_headers_that_differ_are_told(
    header: dict[str, Any], said: str, severity: str, a_case: Callable[..., CaseFiles]
) -> None:
    assert said in found(a_case(organs(), **header), severity)


def test_a_label_stored_in_another_axis_order_is_no_mistake(a_case: Callable[..., CaseFiles]) -> None:
    flipped = {"direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), "origin": (-120.0, -120.0, 0.0)}
    assert found(a_case(organs()[:, ::-1, ::-1], **flipped)) == ""


def test_sizes_that_differ_are_an_error(a_case: Callable[..., CaseFiles]) -> None:
    assert "label has 4 x 4 x 3 voxels, the image 4 x 4 x 4" in found(a_case(organs()[:3]), "error")


def test_float_labels_are_rounded_or_refused(a_case: Callable[..., CaseFiles]) -> None:
    assert "stored as float32" in found(a_case(organs() + 0.0004, label_kind=np.float32), "note")
    assert check_case(a_case(organs() + 0.0004, label_kind=np.float32)).volumes_ml["spleen"] == 128
    assert "no whole numbers" in found(a_case(organs() * 0.7, label_kind=np.float32), "error")
    assert "no whole numbers" in found(a_case(np.where(organs() == 2, np.nan, 1), label_kind=np.float32), "error")


def test_values_without_meaning_are_listed_or_counted(a_case: Callable[..., CaseFiles]) -> None:
    values = 100 + np.arange(64).reshape(4, 4, 4) % 12
    assert "holds 100, 101, 102, 103, 104, 105, 106, 107, 108, ... and 3 more, which" in found(a_case(values), "error")
    assert "holds 100, 101, which" in found(a_case(100 + values % 2), "error")


def test_values_below_zero_are_an_error(a_case: Callable[..., CaseFiles]) -> None:
    assert "label holds -1, expected" in found(
        a_case(np.where(organs() == 3, -1, organs().astype(int)), label_kind=np.int16), "error"
    )


def test_an_empty_label_and_lost_voxels_are_told(a_case: Callable[..., CaseFiles]) -> None:
    assert found(a_case(), "warning") == "Its label is empty."
    image = np.zeros((4, 4, 4))
    image[0, 0, :3] = np.nan, np.inf, -np.inf
    assert found(a_case(organs(), image)) == "Its image has 3 voxels that are no number (NaN or infinite)."


def test_swapped_sides_are_told(a_case: Callable[..., CaseFiles]) -> None:
    swapped = np.array([0, 1, 3, 2, 4], np.uint8)[organs()]
    assert found(a_case(swapped)) == "Left and right are likely swapped: kidney_left lies right of kidney_right."
    mirrored = found(a_case(organs()[:, :, ::-1]))
    assert "kidney_left lies right of kidney_right; spleen lies right of liver." in mirrored


def test_sheared_headers_and_frames_are_told(a_case: Callable[..., CaseFiles], shared_data: Path) -> None:
    case = replace(a_case(), image=shared_data / "negative/brain_mr_4d_oblique.nii.gz", label=None)
    assert "2 channels or frames, the first is used" in found(case, "note")
    data = bytearray(gzip.decompress(a_case().image.read_bytes()))
    data[280:296] = np.array([40, 20, 0, 0], "<f4").tobytes()
    data[252:256] = np.array([0, 1], "<i2").tobytes()
    sheared = a_case().image.with_name("sheared.nii")
    sheared.write_bytes(data)
    assert "not at right angles" in found(replace(case, image=sheared), "warning")


def test_damaged_images_are_seen_without_reading_them(a_case: Callable[..., CaseFiles]) -> None:
    case = a_case(organs())
    packed = case.image.read_bytes()
    case.image.write_bytes(packed[: len(packed) - 9])
    assert "damaged or incomplete" in found(case, "error")
    case.image.write_bytes(gzip.decompress(packed)[:-1])
    assert "incomplete: 127 bytes of voxels, expected 128" in found(case, "error")
    case.image.write_bytes(gzip.compress(gzip.decompress(packed) + b"more"))
    assert found(case) == ""


def test_one_bad_case_stops_nothing_and_the_order_is_kept(a_case: Callable[..., CaseFiles]) -> None:
    good = a_case(organs())
    cases = [replace(good, case=f"c{n}", label=good.label if n % 2 else good.image.parent / "none") for n in range(5)]
    alone = list(check_cases(cases, processes=1))
    assert [report.is_usable for report in alone] == [False, True, False, True, False]
    assert list(check_cases(cases, processes=2)) == alone


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([np.uint8, np.int16, np.uint16, np.float32]))
def test_voxels_and_places_are_those_numpy_finds(seed: int, kind: type) -> None:
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 7, rng.integers(1, 6, 3)).astype(kind)
    affine = np.eye(4)
    affine[:3] = rng.normal(size=(3, 4))
    grid = Grid(array.shape, affine)
    result = find_structures(Volume(array, grid), KEYS)
    k, j, i = np.indices(array.shape)
    right = affine[0, 0] * i + affine[0, 1] * j + affine[0, 2] * k + affine[0, 3]
    faces = np.ones(array.shape, bool)
    faces[1:-1, 1:-1, 1:-1] = False
    for key in set(KEYS.values()):
        mask = np.isin(array, [value for value, name in KEYS.items() if name == key])
        assert result.voxels.get(key, 0) == mask.sum()
        assert (key in result.cut) == (mask & faces).any()
        if mask.any():
            assert result.right_mm[key] == pytest.approx(right[mask].mean())
    assert result.unknown == ((6,) if (array == 6).any() else ())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["RAS", "LPS", "ASL", "PIR"]))
def test_labels_in_any_axis_order_come_to_the_grid_of_the_image(seed: int, axes: str) -> None:
    rng = np.random.default_rng(seed)
    grid = Grid((2, 3, 4), np.diag([-1.0, -2.0, 3.0, 1.0]))
    labels = Volume(rng.integers(0, 9, grid.shape), grid)
    moved = on_grid(labels.to_axes(axes), grid)
    assert np.array_equal(moved.array, labels.array) and moved.grid is grid and moved.warnings == ()


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_a_header_says_what_the_volume_is(suffix: str, saved: Saved, tmp_path: Path) -> None:
    path = saved(tmp_path / f"a{suffix}", 0, np.float32, spacing=(1.0, 2.0, 3.0), origin=(5.0, 6.0, 7.0))
    header, volume = read_header(path), read_volume(path)
    assert header.grid.is_close(volume.grid)
    assert (header.dtype, header.frames, header.warnings) == (volume.array.dtype, 1, volume.warnings)


def test_real_volumes_have_the_headers_that_reading_finds(shared_data: Path) -> None:
    for path in sorted(shared_data.glob("*/*.nii.gz"))[:12]:
        if "4d" not in path.name:
            header, volume = read_header(path), read_volume(path)
            assert header.grid.is_close(volume.grid) and header.warnings == volume.warnings, path


def test_a_histogram_counts_in_equal_bins() -> None:
    assert histogram([1, 1.5, 2, 5, 6]) == "1 to 6, median 2:  2 | 1 | 0 | 0 | 2"
    assert histogram([3, 3]) == "3, all alike"


def test_a_value_that_means_none_of_the_named_structures_is_allowed(a_case: Callable[..., CaseFiles]) -> None:
    case = replace(a_case(organs()), labels=keys_of(read_label_table("1=liver,2-4=-"))[0], annotated=("liver",))
    assert check_case(case).is_usable and check_case(case).volumes_ml == {"liver": 960}
    assert set(np.unique(load_case(case, ("liver", "spleen"))[1].array)) == {0, 1}


def test_hounsfield_units_prove_a_ct_whatever_was_said(a_case: Callable[..., CaseFiles], saved: Saved) -> None:
    case = a_case(organs())
    hu = np.full((4, 4, 4), 40)
    hu[0] = -1000
    saved(case.image, hu, np.int16, spacing=(40.0, 40.0, 40.0))
    report = check_case(replace(case, modality=None))
    assert report.is_usable and report.modality == "CT"
    assert "said to be MR, but its header or HU say CT" in found(replace(case, modality="MR"), "warning")
    assert check_case(replace(case, modality="MR")).modality == "MR"
