from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from m4oe.geometry import Grid, Volume
from m4oe.labels import catalogue
from m4oe.preview import write_preview
from m4oe.raster import lab

# Rows and columns of the panels without their letters, of the only one of a flat volume, and of the dots in the legend.
AXIAL, SURFACES = np.s_[154:548, 74:754], np.s_[154:548, 818:1498]
CORONAL, SAGITTAL = np.s_[612:1006, 74:754], np.s_[612:1006, 818:1498]
WHOLE, LEGEND = np.s_[154:1006, 74:1498], np.s_[170:1030, 1552:1570]
LETTER = (250, 209, 107)
LIVER = {1: "liver"}
FLARE = [
    *("liver", "kidney_right", "spleen", "pancreas", "aorta", "inferior_vena_cava", "adrenal_gland_right"),
    *("adrenal_gland_left", "gallbladder", "esophagus", "stomach", "duodenum", "kidney_left"),
]


def volume_of(array: np.ndarray, spacing: tuple[float, float, float] = (3, 3, 3)) -> Volume:
    return Volume(array, Grid(array.shape, np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])))  # LPS


def box(shape: tuple[int, int, int], *inside: slice) -> np.ndarray:
    array = np.zeros(shape, np.uint8)
    array[inside] = 1
    return array


def draw(folder: Path, volume: Volume, labels: Volume, structures: dict[int, str]) -> np.ndarray:
    write_preview(folder / "preview.png", volume, labels, structures, "A title")
    return sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "preview.png"))).astype(int)


def dots(picture: np.ndarray, count: int = 1) -> np.ndarray:
    """Colours [n, RGB] of the first rows of the legend."""
    return picture[[195 + 38 * n for n in range(count)], 1560]


def colored(panel: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Pixels with the hue of a colour, light or dark: [row, column] bool."""
    length = np.linalg.norm(panel, axis=2)
    return (length > 60) & (panel @ color > 0.99 * length * np.linalg.norm(color))


def filled(volume: Volume) -> Volume:
    """Brighter than air all over, so that no slice is cropped."""
    return Volume(np.full_like(volume.array, -110), volume.grid, modality="CT")


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
    picture = draw(tmp_path, filled(air), liver, LIVER)
    for panel in (AXIAL, CORONAL, SAGITTAL):
        found = colored(picture[panel], dots(picture)[0])
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
        rows, columns = np.nonzero(colored(picture[panel], dots(picture)[0]))
        assert np.ptp(rows) == pytest.approx(np.ptp(columns), rel=0.05)


def test_the_legend_marks_what_is_to_be_checked(tmp_path: Path, air: Volume, liver: Volume) -> None:
    def yellow(flags: dict[str, tuple[str, ...]]) -> np.ndarray:
        """Pixels of the name and of the line below it."""
        write_preview(tmp_path / "a.png", air, liver, LIVER, "", flags)
        row = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.png"))).astype(int)[176:214, 1580:1800]
        light = (row[..., 0] - row[..., 2] > 80).sum(axis=1)
        return np.array([light[:22].sum(), light[22:].sum()])

    assert (yellow({"spleen": ("cut",)}) == 0).all()
    once, twice = yellow({"liver": ("cut",)}), yellow({"liver": ("cut", "low confidence")})
    assert (once > 20).all() and twice[0] == once[0] and twice[1] > 2 * once[1]


def test_surfaces_are_seen_from_the_front(tmp_path: Path) -> None:
    labels = np.zeros((20, 24, 30), np.uint8)
    labels[5:15, 4:8, 4:12] = 1
    labels[5:15, 14:18, 4:12] = 2  # behind the first
    labels[5:15, 14:18, 18:26] = 3  # on the patient's left
    keys = {1: "liver", 2: "inferior_vena_cava", 3: "spleen"}
    picture = draw(tmp_path, volume_of(labels), volume_of(labels), keys)
    liver, vena_cava, spleen = (colored(picture[SURFACES], color) for color in dots(picture, 3))
    assert liver.sum() > 3 * vena_cava.sum()
    assert np.nonzero(liver)[1].max() < np.nonzero(spleen)[1].min()


def test_a_lesion_is_seen_through_its_organ(tmp_path: Path, air: Volume, liver: Volume) -> None:
    keys = LIVER | {2: "liver_tumor"}
    plain = draw(tmp_path, air, liver, keys)[SURFACES]
    liver.array[13:15, 7:9, 7:9] = 2
    panel = draw(tmp_path, air, liver, keys)[SURFACES]
    drawn, before = (np.abs(picture - picture[:, :1]).max(axis=2) > 8 for picture in (panel, plain))
    assert drawn.sum() > 0.8 * before.sum()  # the organ is still there
    redder = (panel[..., 0] - panel[..., 1]) - (plain[..., 0] - plain[..., 1])
    assert redder.min() < -20  # the lesion is green


def test_the_legend_lists_what_is_there(tmp_path: Path, air: Volume, liver: Volume) -> None:
    keys = LIVER | {2: "spleen"}
    liver.array[0, 0, 0] = 2
    color, other = dots(draw(tmp_path, air, liver, keys), 2)
    liver.array[0, 0, 0] = 0
    legend = draw(tmp_path, air, liver, keys)[LEGEND]
    assert (legend == color).all(axis=2).any()
    assert not (legend == other).all(axis=2).any()


def test_the_legend_tells_what_was_looked_for_and_not_found(tmp_path: Path, air: Volume, liver: Volume) -> None:
    def texts(*asked: str) -> int:
        """Lines of the legend behind the first, of names that have no dot."""
        keys = dict(enumerate(list(catalogue())[:40], start=1))
        liver.array[liver.array > 0] = list(keys.values()).index("liver") + 1
        write_preview(tmp_path / "a.png", air, liver, keys, "", asked=asked)
        picture = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.png"))).astype(int)
        bright = picture[220:1030, 1582:1660].max(axis=(1, 2)) > 80
        return int((np.diff(np.concatenate([[0], bright, [0]])) == 1).sum())

    assert (texts(), texts("liver"), texts("liver", "spleen"), texts("liver", "spleen", "stomach")) == (0, 0, 1, 2)
    assert texts(*list(catalogue())[:40]) == 1  # "39 others"


def test_organs_have_colours_that_can_be_told_apart(tmp_path: Path, air: Volume) -> None:
    labels = np.zeros(air.array.shape, np.uint8)
    labels[5, 5, 5:18] = range(1, 14)
    colors = lab(dots(draw(tmp_path, air, volume_of(labels), dict(enumerate(FLARE, start=1))), 13))
    apart = np.linalg.norm(colors[:, None] - colors, axis=2)
    assert apart[~np.eye(13, dtype=bool)].min() > 25


@pytest.mark.parametrize("organ", ["kidney", "adrenal_gland"])
def test_left_and_right_are_unlike_among_many_structures(tmp_path: Path, air: Volume, organ: str) -> None:
    keys = list(catalogue())[:60]
    labels = np.zeros(air.array.shape, np.uint8)
    labels[5, 5, 5:7] = [keys.index(f"{organ}_{side}") + 1 for side in ("left", "right")]
    left, right = lab(dots(draw(tmp_path, air, volume_of(labels), dict(enumerate(keys, start=1))), 2))
    assert np.linalg.norm(left - right) > 50


def test_an_organ_has_one_colour_whatever_was_found_and_however_it_is_numbered(
    tmp_path: Path, air: Volume, liver: Volume
) -> None:
    color = dots(draw(tmp_path, air, liver, dict(enumerate(FLARE, start=1))))
    liver.array[liver.array == 1] = 13
    liver.array[0] = 2
    picture = draw(tmp_path, air, liver, dict(zip(range(13, 0, -1), FLARE, strict=True)))
    np.testing.assert_array_equal(dots(picture), color)


def test_the_legend_of_many_structures_ends_on_the_page(tmp_path: Path, air: Volume) -> None:
    keys = dict(enumerate(list(catalogue())[:100], start=1))
    labels = np.zeros(air.array.shape, np.uint8)
    labels.flat[1:101] = range(1, 101)
    picture = draw(tmp_path, air, volume_of(labels), keys)
    rows = np.flatnonzero(np.ptp(picture[:, 1552:1870].max(axis=2), axis=1) > 60)
    assert 900 < rows[-1] < 1050


def test_slices_are_cropped_to_the_body(tmp_path: Path) -> None:
    body, table = np.s_[:, 40:70, 50:90], np.s_[:, 130:132, 20:120]
    volume = volume_of(np.full((40, 160, 160), -1000, np.int16))
    volume.array[table] = 200
    volume.array[body] = 100
    panel = draw(tmp_path, volume, volume_of(np.zeros(volume.array.shape, np.uint8)), {})[AXIAL]
    rows, columns = np.nonzero(panel.min(axis=2) > 100)
    assert np.ptp(rows) > 0.7 * len(panel)
    assert np.ptp(rows) / np.ptp(columns) == pytest.approx(30 / 40, rel=0.05)


def test_labels_outside_the_body_are_not_cropped(tmp_path: Path) -> None:
    volume = volume_of(np.full((40, 160, 160), -1000, np.int16))
    volume.array[:, 40:70, 50:90] = 100
    labels = volume_of(box(volume.array.shape, np.s_[18:22], np.s_[130:150], np.s_[130:150]))
    picture = draw(tmp_path, volume, labels, LIVER)
    rows, columns = np.nonzero(colored(picture[AXIAL], dots(picture)[0]))
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), rel=0.05)
    assert np.ptp(rows) > 40


def test_letters_lie_beside_the_slice(tmp_path: Path, air: Volume) -> None:
    volume = Volume(np.full((60, 60, 60), 1000, np.int16), Grid((60, 60, 60), air.grid.affine), modality="CT")
    picture = draw(tmp_path, volume, Volume(np.zeros((60, 60, 60), np.uint8), volume.grid), {})
    for panel in (AXIAL, CORONAL, SAGITTAL):
        white = (picture[panel] == 255).all(axis=2)
        rows, columns = np.nonzero(white)
        assert np.ptp(rows) + 1 == len(white)
        assert white[:, columns.min() : columns.max() + 1].all()


def test_the_name_stands_in_the_title_alone(tmp_path: Path, air: Volume, liver: Volume) -> None:
    named = Volume(air.array, air.grid, "a long name")
    np.testing.assert_array_equal(draw(tmp_path, named, liver, LIVER), draw(tmp_path, air, liver, LIVER))


def test_the_picture_has_a_footer(tmp_path: Path, air: Volume, liver: Volume) -> None:
    assert np.ptp(draw(tmp_path, air, liver, LIVER)[1040:1075, 48:400]) > 60


def test_nothing_found_is_said_and_shows_the_middle_of_the_volume(tmp_path: Path, air: Volume) -> None:
    air.array[:] = 50
    air.array[10, 4:20, 4:26] = 100
    picture = draw(tmp_path, air, volume_of(np.zeros(air.array.shape, np.uint8)), LIVER)
    assert (picture[AXIAL] > 200).mean() > 0.1
    for place in (SURFACES, np.s_[125:160, 1550:1872]):
        assert (picture[place] == LETTER).all(axis=2).sum() > 100


@pytest.mark.parametrize("shape", [(1, 24, 30), (20, 1, 30), (20, 24, 3)])
def test_a_flat_volume_is_one_large_slice(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    picture = draw(tmp_path, volume_of(np.full(shape, 50)), volume_of(np.ones(shape, np.uint8)), LIVER)
    found = colored(picture[WHOLE], dots(picture)[0])
    assert np.ptp(np.nonzero(found)[0]) > 840


def test_nothing_found_in_a_flat_volume_is_said(tmp_path: Path) -> None:
    picture = draw(tmp_path, volume_of(np.ones((1, 9, 9))), volume_of(np.zeros((1, 9, 9), np.uint8)), LIVER)
    assert (picture[125:160, 1550:1872] == LETTER).all(axis=2).sum() > 100


def test_a_small_structure_in_a_thick_slice_draws_no_line_across(tmp_path: Path) -> None:
    labels = volume_of(box((6, 20, 400), np.s_[3:4], np.s_[8:12], np.s_[198:202]), (1, 1, 2))
    volume = volume_of(np.zeros(labels.array.shape), (1, 1, 2))
    panel = draw(tmp_path, filled(volume), labels, LIVER)[CORONAL]
    seen = np.flatnonzero((np.ptp(panel, axis=2) > 20).any(axis=0))
    assert np.ptp(seen) < 0.1 * panel.shape[1]


def test_a_few_negative_values_do_not_make_an_mr_a_ct(tmp_path: Path, air: Volume) -> None:
    ramp = np.broadcast_to(np.linspace(100, 4000, 30, dtype=np.int16), air.array.shape).copy()
    ramp[0, 0, :5] = -269
    panel = draw(tmp_path, volume_of(ramp), volume_of(np.zeros(ramp.shape, np.uint8)), {})[AXIAL]
    assert np.unique(panel[200, :, 0]).size > 50


def test_values_without_a_name_are_not_drawn(tmp_path: Path, air: Volume, liver: Volume) -> None:
    picture = draw(tmp_path, filled(air), liver, {2: "liver"})
    assert np.ptp(picture[AXIAL], axis=2).max() == 0


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
    assert colored(picture[WHOLE], dots(picture)[0]).any()


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
    picture = draw(tmp_path, volume, labels, {3: "spleen", 6: "inferior_vena_cava"})
    spleen, vena_cava = (colored(picture[AXIAL], color).nonzero()[1] for color in dots(picture, 2))
    assert vena_cava.max() < spleen.min()
