from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from m4oe.geometry import Grid, Volume
from m4oe.labels import structure
from m4oe.preview import write_preview

# Rows and columns of the panels without their letters.
AXIAL, SURFACES = np.s_[160:525, 80:750], np.s_[160:550, 825:1490]
CORONAL, SAGITTAL = np.s_[620:980, 80:750], np.s_[620:980, 825:1490]
LEGEND = np.s_[170:1030, 1560:1600]
LIVER = {1: "liver"}


def volume_of(array: np.ndarray, spacing: tuple[float, float, float] = (3, 3, 3)) -> Volume:
    return Volume(array, Grid(array.shape, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])))  # LPS


def box(shape: tuple[int, int, int], *inside: slice) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[inside] = 1
    return array


def draw(folder: Path, volume: Volume, labels: Volume, structures: dict[int, str]) -> np.ndarray:
    write_preview(folder / "preview.png", volume, labels, structures, "A title")
    return sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "preview.png"))).astype(int)


def colored(panel: np.ndarray, key: str) -> np.ndarray:
    """Pixels with the hue of a structure, light or dark: [row, column] bool."""
    color = np.array(structure(key).color) / np.linalg.norm(structure(key).color)
    length = np.linalg.norm(panel, axis=2)
    return (length > 60) & (panel @ color > 0.99 * length)


@pytest.fixture
def liver() -> Volume:
    return volume_of(box((20, 24, 30), np.s_[11:17], np.s_[4:12], np.s_[4:12]))  # above, in front, on the right


@pytest.fixture
def air(liver: Volume) -> Volume:
    return volume_of(np.zeros(liver.array.shape, np.int16))


def test_the_picture_is_written_and_nothing_else(tmp_path: Path, air: Volume, liver: Volume) -> None:
    assert draw(tmp_path, air, liver, LIVER).shape == (1080, 1920, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]


def test_patient_right_is_left_and_front_and_head_are_above(tmp_path: Path, air: Volume, liver: Volume) -> None:
    picture = draw(tmp_path, air, liver, LIVER)
    for panel in (AXIAL, CORONAL, SAGITTAL):
        found = colored(picture[panel], "liver")
        assert found.sum() > 1000
        assert (np.argwhere(found).mean(axis=0) < np.array(found.shape) / 2).all()


@pytest.mark.parametrize("axes", ["RAS", "ASR"])
def test_the_order_of_the_axes_changes_nothing_but_the_size_in_the_header(
    tmp_path: Path, liver: Volume, axes: str
) -> None:
    noise = volume_of(np.random.default_rng(0).integers(1, 99, liver.array.shape))
    expected = draw(tmp_path, noise, liver, LIVER)
    turned = draw(tmp_path, noise.to_axes(axes), liver.to_axes(axes), LIVER)
    np.testing.assert_array_equal(turned[110:], expected[110:])


def test_a_cube_of_long_voxels_is_square(tmp_path: Path) -> None:
    labels = volume_of(box((12, 60, 30), np.s_[4:8], np.s_[20:40], np.s_[10:20]), (4, 2, 10))  # 40 mm each way
    picture = draw(tmp_path, volume_of(np.zeros(labels.array.shape), (4, 2, 10)), labels, LIVER)
    for panel in (AXIAL, CORONAL, SAGITTAL):
        rows, columns = np.nonzero(colored(picture[panel], "liver"))
        assert np.ptp(rows) == pytest.approx(np.ptp(columns), rel=0.05)


def test_surfaces_are_seen_from_the_front(tmp_path: Path) -> None:
    labels = np.zeros((20, 24, 30), np.uint8)
    labels[5:15, 4:8, 4:12] = 1
    labels[5:15, 14:18, 4:12] = 2  # behind the first
    labels[5:15, 14:18, 18:26] = 3  # on the patient's left
    keys = {1: "liver", 2: "inferior_vena_cava", 3: "spleen"}
    panel = draw(tmp_path, volume_of(labels), volume_of(labels), keys)[SURFACES]
    assert colored(panel, "liver").sum() > 3 * colored(panel, "inferior_vena_cava").sum()
    assert np.nonzero(colored(panel, "liver"))[1].max() < np.nonzero(colored(panel, "spleen"))[1].min()


def test_a_lesion_is_seen_through_its_organ(tmp_path: Path, air: Volume, liver: Volume) -> None:
    plain = draw(tmp_path, air, liver, LIVER)[SURFACES]
    liver.array[13:15, 7:9, 7:9] = 2
    panel = draw(tmp_path, air, liver, LIVER | {2: "liver_tumor"})[SURFACES]
    drawn, before = (np.abs(picture - picture[:, :1]).max(axis=2) > 8 for picture in (panel, plain))
    assert drawn.sum() > 0.8 * before.sum()  # the organ is still there
    assert (panel - plain)[..., 1].max() > 20  # the lesion is green


def test_the_legend_lists_what_is_there(tmp_path: Path, air: Volume, liver: Volume) -> None:
    legend = draw(tmp_path, air, liver, LIVER | {2: "spleen"})[LEGEND]
    assert (legend == structure("liver").color).all(axis=2).any()
    assert not (legend == structure("spleen").color).all(axis=2).any()


def test_nothing_found_shows_the_middle_of_the_volume(tmp_path: Path, air: Volume) -> None:
    air.array[:] = 50
    air.array[10, 4:20, 4:26] = 100
    picture = draw(tmp_path, air, volume_of(np.zeros(air.array.shape, np.uint8)), LIVER)
    assert (picture[AXIAL] > 200).mean() > 0.1
    assert not colored(picture[SURFACES], "liver").any()


def test_values_without_a_name_are_not_drawn(tmp_path: Path, air: Volume, liver: Volume) -> None:
    assert not colored(draw(tmp_path, air, liver, {2: "liver"})[AXIAL], "liver").any()


def test_not_a_number_is_black(tmp_path: Path, air: Volume, liver: Volume) -> None:
    picture = draw(tmp_path, volume_of(np.full(air.array.shape, np.nan, np.float32)), liver, {})
    assert picture[AXIAL].max() == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64])
def test_ct_is_shown_from_minus_160_to_240(tmp_path: Path, air: Volume, dtype: type) -> None:
    volume = Volume(np.full(air.array.shape, 40, dtype), air.grid, modality="CT")
    picture = draw(tmp_path, volume, volume_of(np.zeros(air.array.shape, np.uint8)), {})
    assert np.abs(picture[350, 500] - 127.5).max() <= 1


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((1, 9, 9), (1, 1, 1)),
        ((9, 1, 9), (0.5, 0.5, 9)),
        ((9, 9, 1), (9, 0.5, 0.5)),
        ((1, 1, 1), (0.5, 9, 9)),
    ],
)
def test_one_voxel_is_shown_however_flat_the_volume(
    tmp_path: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    labels = np.zeros(shape, np.uint8)
    labels[tuple(size // 2 for size in shape)] = 1
    picture = draw(tmp_path, volume_of(np.zeros(shape), spacing), volume_of(labels, spacing), LIVER)
    assert colored(picture[SURFACES], "liver").any()


def test_another_grid_is_refused(tmp_path: Path, air: Volume, liver: Volume) -> None:
    with pytest.raises(ValueError, match="must lie on the grid of the volume"):
        write_preview(tmp_path / "a.png", air, volume_of(liver.array, (3, 3, 4)), LIVER, "")
    assert not list(tmp_path.iterdir())


def test_no_graphics_library_is_loaded() -> None:
    code = "import m4oe.preview; print([line for line in open('/proc/self/maps') if '/libX11' in line or 'GL' in line])"
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux lists the libraries of a process")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_real_kidneys_are_on_their_sides(tmp_path: Path, shared_data: Path) -> None:
    from m4oe.files import read_volume

    volume = read_volume(shared_data / "ct" / "ts_ct_3mm_small.nii.gz")
    labels = read_volume(shared_data / "ct" / "ts_ct_3mm_small_label_flare13.nii.gz")
    axial = draw(tmp_path, volume, labels, {3: "spleen", 6: "inferior_vena_cava"})[AXIAL]
    spleen, vena_cava = (colored(axial, key).nonzero()[1] for key in ("spleen", "inferior_vena_cava"))
    assert vena_cava.max() < spleen.min()
