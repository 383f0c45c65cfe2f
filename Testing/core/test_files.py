from __future__ import annotations

import csv
import gzip
import struct
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.files import (
    atomic_write,
    find_inputs,
    find_label_maps,
    is_label_map,
    read_volume,
    write_segmentation,
    write_volume,
)
from m4oe.geometry import Grid, Volume
from m4oe.labels import structure
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

ARRAY = np.arange(-12, 48, dtype=np.int16).reshape(3, 4, 5)
STRUCTURES = {1: "liver", 2: "kidney_left", 3: "spleen", 16: "liver_tumor"}
TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHEARED = (-1, 0.2, 0, -10, 0, -2, 0.3, -20, 0, 0, 3, 30)


def an_image(array: NDArray[Any] = ARRAY, turn: float = 25) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.7, 0.9, 3.0, 1.0)[: image.GetDimension()])
    if image.GetDimension() == 3:
        image.SetDirection(Rotation.from_euler("xyz", [turn, -9, 200], degrees=True).as_matrix().ravel().tolist())
        image.SetOrigin((33.3, -44.4, 555.5))
    return image


def saved(path: Path, image: sitk.Image | None = None) -> Path:
    sitk.WriteImage(image or an_image(), str(path), useCompression=path.suffix in (".mha", ".nrrd"))
    return path


def patched(path: Path, offset: int, layout: str, *values: float) -> Path:
    """Changes one field of a NIfTI header in place."""
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, *values)
    path.write_bytes(data)
    return path


def a_nifti(folder: Path, srow: Iterable[float] = SHEARED, codes: tuple[int, int] = (0, 1)) -> Path:
    path = patched(saved(folder / "a.nii", an_image()), 280, "<12f", *srow)
    patched(path, 76, "<8f", 1, 1, 2, 3, 0, 0, 0, 0)
    return patched(path, 252, "<2h", *codes)


def affine_of(image: sitk.Image) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return TO_LPS @ affine


def labels_of(values: Iterable[int]) -> Volume:
    """An oblique label map with a few voxels of each value."""
    array = np.zeros((6, 7, 8), np.uint8)
    for n, value in enumerate(values):
        array[n + 1, 1:4, 2 : 3 + n] = value
    affine = affine_of(an_image())
    return Volume(array, Grid(array.shape, affine))


def a_series(
    folder: Path,
    positions: Iterable[tuple[float, float, float]],
    uid: str = "1.2.3",
    modality: str = "CT",
    name: str = "",
    thickness: str = "",
) -> Path:
    """Writes one axial DICOM slice, filled with its number, at each position."""
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, position in enumerate(positions):
        slice_ = sitk.GetImageFromArray(np.full((1, 4, 5), number, np.int16))
        slice_.SetSpacing((0.5, 0.5, 2.0))
        tags = {"0008|0060": modality, "0020|000d": "1.2", "0020|000e": uid, "0008|0018": f"{uid}.{number}"}
        tags |= {"0020|0032": "\\".join(map(str, position)), "0020|0037": "1\\0\\0\\0\\1\\0", "0008|103e": name}
        tags |= {"0018|0050": thickness} if thickness else {}
        for tag, value in (tags | {"0020|0013": str(number)}).items():
            slice_.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}.{number}.dcm"))
        writer.Execute(slice_)
    return folder


# Reading


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_every_format_gives_array_and_affine(tmp_path: Path, suffix: str) -> None:
    volume = read_volume(saved(tmp_path / f"case{suffix}"))
    assert np.array_equal(volume.array, ARRAY) and volume.array.dtype == np.int16
    np.testing.assert_allclose(volume.grid.affine, affine_of(an_image()), atol=1e-4)
    assert (volume.name, volume.modality, volume.warnings) == ("case", None, ())


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "f4", "f8"])
def test_nifti_keeps_the_voxel_type(tmp_path: Path, dtype: str) -> None:
    array = np.abs(ARRAY).astype(dtype)
    volume = read_volume(saved(tmp_path / "a.nii.gz", an_image(array)))
    assert volume.array.dtype == dtype and np.array_equal(volume.array, array)
    assert volume.array.flags.writeable


def test_path_may_have_spaces_and_any_letters(tmp_path: Path) -> None:
    folder = tmp_path / "Ü ñ 中"
    folder.mkdir()
    for name in ("Bild 1.nii.gz", "ø.mha", "中.nrrd"):
        (folder / name).write_bytes(saved(tmp_path / f"a{''.join(Path(name).suffixes)}").read_bytes())
        assert np.array_equal(read_volume(folder / name).array, ARRAY)


def test_image_of_two_dimensions_becomes_a_slice(tmp_path: Path) -> None:
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        volume = read_volume(saved(tmp_path / f"a{suffix}", an_image(ARRAY[0])))
        assert np.array_equal(volume.array, ARRAY[:1])
        assert volume.grid.spacing == pytest.approx((0.7, 0.9, 1.0))
        assert volume.grid.axes == "LPS"


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_frame_of_a_4d_image_is_chosen(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"a{suffix}", sitk.JoinSeries([an_image(), an_image(ARRAY + 1)]))
    volume = read_volume(path, frame=1)
    assert np.array_equal(volume.array, ARRAY + 1)
    np.testing.assert_allclose(volume.grid.affine, affine_of(an_image()), atol=1e-4)
    with pytest.raises(ValueError, match=r"2 frames, choose one of 0 to 1, by --frame N .*, frame=N"):
        read_volume(path)
    with pytest.raises(ValueError, match="no frame 2, its frames are 0 to 1"):
        read_volume(path, frame=2)


@pytest.mark.parametrize("frame", [None, 0, 7])
@pytest.mark.parametrize("suffix", [".nii", ".nrrd"])
def test_image_of_one_frame_needs_and_heeds_no_choice(tmp_path: Path, suffix: str, frame: int | None) -> None:
    for image in (an_image(), sitk.JoinSeries([an_image()])):
        assert np.array_equal(read_volume(saved(tmp_path / f"a{suffix}", image), frame).array, ARRAY)


def test_nan_stays_nan(tmp_path: Path) -> None:
    array = np.where(ARRAY < 0, np.nan, ARRAY).astype(np.float32)
    volume = read_volume(saved(tmp_path / "a.nii.gz", an_image(array)))
    assert np.array_equal(volume.array, array, equal_nan=True)


def test_big_endian_nifti_is_read(tmp_path: Path) -> None:
    path = a_nifti(tmp_path, (-1, 0, 0, 5, 0, -2, 0, 6, 0, 0, 3, 7))
    data = bytearray(path.read_bytes())
    fields = {0: "i", 40: "8h", 70: "2h", 76: "8f", 108: "f", 112: "2f", 252: "2h", 256: "18f"}
    for offset, layout in fields.items():
        struct.pack_into(f">{layout}", data, offset, *struct.unpack_from(f"<{layout}", data, offset))
    data[352:] = ARRAY.astype(">i2").tobytes()
    path.write_bytes(data)
    volume = read_volume(path)
    assert np.array_equal(volume.array, ARRAY) and volume.array.dtype.isnative
    np.testing.assert_allclose(volume.grid.affine, affine_of(sitk.ReadImage(str(path))), atol=1e-6)


@pytest.mark.parametrize(("slope", "intercept"), [(2.5, -1024.0), (1.0, -1024.0), (1.0, 0.0)])
def test_nifti_scaling_agrees_with_itk(tmp_path: Path, slope: float, intercept: float) -> None:
    path = patched(saved(tmp_path / "a.nii"), 112, "<2f", slope, intercept)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    volume = read_volume(path)
    np.testing.assert_allclose(volume.array, expected, rtol=1e-6)
    assert volume.array.dtype == expected.dtype


@pytest.mark.parametrize("slope", [0.0, float("nan")])
def test_nifti_without_valid_slope_is_not_scaled(tmp_path: Path, slope: float) -> None:
    volume = read_volume(patched(saved(tmp_path / "a.nii"), 112, "<2f", slope, 7.0))
    assert np.array_equal(volume.array, ARRAY) and volume.array.dtype == np.int16


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), codes=st.sampled_from([(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 4)]))
def test_nifti_affine_is_the_one_that_itk_chooses(
    tmp_path_factory: pytest.TempPathFactory, seed: int, codes: tuple[int, int]
) -> None:
    turn = Rotation.random(random_state=seed).as_matrix() * (1, 1, 1 if seed % 2 else -1)
    srow = np.column_stack([turn * (1, 2, 3), (5, 6, 7)])
    path = a_nifti(tmp_path_factory.mktemp("nifti"), srow.ravel().tolist(), codes)
    expected = affine_of(sitk.ReadImage(str(path)))
    np.testing.assert_allclose(read_volume(path).grid.affine, expected, atol=2e-5)


def test_sheared_nifti_is_read_by_the_nearest_rotation(tmp_path: Path) -> None:
    path = a_nifti(tmp_path)
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(path))
    volume = read_volume(path)
    columns = np.reshape(SHEARED, (3, 4))[:, :3]
    lengths = np.linalg.norm(columns, axis=0)
    axes, _ = Rotation.align_vectors((columns / lengths * (-1, -1, 1)).T, np.diag([1, 1, 1]))
    assert np.array_equal(volume.array, ARRAY)
    assert volume.grid.spacing == pytest.approx(lengths)
    np.testing.assert_allclose(volume.grid.direction, axes.as_matrix() * (-1, -1, 1), atol=1e-6)
    assert [warning for warning in volume.warnings if "nearest rotation" in warning]


def test_sheared_nifti_with_a_qform_is_read_by_the_qform(tmp_path: Path) -> None:
    path = a_nifti(tmp_path, codes=(1, 1))
    volume = read_volume(path)
    np.testing.assert_allclose(volume.grid.affine, affine_of(sitk.ReadImage(str(path))), atol=1e-5)
    assert volume.warnings == ()


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_nifti_is_known_by_its_content_packed_or_not(tmp_path: Path, suffix: str) -> None:
    data = saved(tmp_path / "plain.nii").read_bytes()
    path = tmp_path / f"other{suffix}"
    path.write_bytes(data if suffix == ".nii.gz" else gzip.compress(data))
    assert np.array_equal(read_volume(path).array, ARRAY)


# Bad files


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*nothing\.nii"):
        read_volume(tmp_path / "nothing.nii")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".dcm"])
@pytest.mark.parametrize("content", [b"", b"some text\n" * 100])
def test_files_that_are_no_images_are_refused(
    tmp_path: Path, suffix: str, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^Cannot read .*text{suffix}: it is [^\n]*$") as caught:
        read_volume(path)
    assert "sitk" not in str(caught.value) and capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 1000, (9, 30, 30)).astype(np.int16)
    path = saved(tmp_path / f"a{suffix}", an_image(noise))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"Cannot read .*: it is (damaged|incomplete)"):
        read_volume(path)


def test_damaged_compressed_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii.gz")
    data = bytearray(path.read_bytes())
    data[-8] ^= 255  # the checksum
    path.write_bytes(data)
    with pytest.raises(ValueError, match="do not unpack"):
        read_volume(path)


def test_unknown_kind_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"a\.txt: its kind is unknown, expected DICOM or \.nii\.gz"):
        read_volume(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_zero_spacing_is_refused(tmp_path: Path, suffix: str) -> None:
    image = sitk.GetImageFromArray(ARRAY)
    image.SetSpacing((1, 2, 3))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    path = tmp_path / f"a{suffix}"
    data = path.read_bytes().replace(b"(0,2,0)", b"(0,0,0)").replace(b"Spacing = 1 2 3", b"Spacing = 1 0 3")
    path.write_bytes(data)
    if suffix == ".nii":
        patched(path, 80, "<3f", 1, 0, 3)
    with pytest.raises(ValueError, match="1 x 0 x 3 mm, expected above zero"):
        read_volume(path)


def test_zero_column_in_the_sform_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected above zero"):
        read_volume(a_nifti(tmp_path, (0, 0, 0, 5, 0, -2, 0, 6, 0, 0, 3, 7)))


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (70, "<h", 128, "NIfTI type 128"),
        (344, "<4s", b"ni1\0", "half of a .hdr/.img pair"),
        (40, "<h", 9, "expected 2 to 4 dimensions"),
        (42, "<h", 0, "expected 2 to 4 dimensions"),
        (0, "<i", 540, "not a NIfTI-1 file"),
    ],
)
def test_odd_nifti_headers_are_refused(tmp_path: Path, offset: int, layout: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_volume(patched(saved(tmp_path / "a.nii"), offset, layout, value))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("NDims = 3", "NDims = 99999999", "NDims 99999999, expected 2 to 4 dimensions"),
        ("NDims = 3", "NDims = -1", "NDims -1, expected 2 to 4 dimensions"),
        ("NDims = 3", "NDims = 3\nNDims = 99", "names NDims twice"),
        ("NDims = 3", "NDims = three", "NDims is 'three', expected whole numbers"),
        ("NDims = 3\n", "", "NDims is 'missing'"),
        ("DimSize = 5 4 3", "DimSize = 5 4", r"DimSize is \[5, 4\] and its NDims 3"),
        ("DimSize = 5 4 3", "DimSize = 5 4 0", "expected 2 to 4 dimensions"),
        ("DimSize = 5 4 3", "DimSize = 5 4 -3", "expected 2 to 4 dimensions"),
        ("DimSize = 5 4 3", "DimSize = 5 4 30", "120 bytes of voxels, expected 1200"),
        ("DimSize = 5 4 3", "DimSize = 99999 99999 99999", "120 bytes of voxels, expected 19999"),
        ("MET_SHORT", "MET_STRING", "ElementType is MET_STRING, expected MET_CHAR"),
        ("MET_SHORT", "MET_SHORT\nElementNumberOfChannels = 2147483647", "120 bytes of voxels, expected"),
        ("ElementSpacing = 0.7 ", "ElementSpacing = nan ", "expected above zero"),
        ("CompressedData = False", "CompressedData = True\nCompressedDataSize = 0", "compressed voxels, expected 0"),
        (
            "CompressedData = False",
            "CompressedData = True\nCompressedDataSize = 121",
            "compressed voxels, expected 121",
        ),
        ("= LOCAL", "= nowhere.raw", "its voxels should lie in .*nowhere.raw, which is no file"),
    ],
)
def test_odd_metaimage_headers_are_refused_in_words(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "a.mha"
    image = an_image()
    image.SetSpacing((0.7, 0.9, 3))
    sitk.WriteImage(image, str(path))
    data = path.read_bytes().replace(b"0.69999999999999996", b"0.7")
    assert old.encode() in data
    path.write_bytes(data.replace(old.encode(), new.encode()))
    with pytest.raises(ValueError, match=f"Cannot read .*a.mha: .*{message}"):
        read_volume(path)


@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
@pytest.mark.parametrize("packed", [True, False])
def test_metaimage_headers_may_be_written_in_several_ways(tmp_path: Path, suffix: str, packed: bool) -> None:
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(an_image(), str(path), useCompression=packed)
    head, last, rest = path.read_bytes().partition(b"ElementDataFile")
    path.write_bytes(b"0008|0060 = a: b\n\n" + head.replace(b" = ", b":  ").replace(b"\n", b"\r\n") + last + rest)
    assert np.array_equal(read_volume(path).array, ARRAY)


TEXTS = ("", "0", "-1", "2", "17", "99999999", "4294967296", "1e30", "nan", "3 3", "x" * 99, "LIST")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(changes=st.dictionaries(st.integers(1, 12), st.tuples(st.integers(0, 9), st.sampled_from(TEXTS)), min_size=1))
def test_no_metaimage_header_ends_the_process(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[int, tuple[int, str]]
) -> None:
    path = saved(tmp_path_factory.mktemp("mha") / "a.mha")
    head, end, data = path.read_bytes().partition(b"LOCAL\n")
    lines = (head + end).decode().splitlines()
    for number, (place, text) in changes.items():
        key, _, value = lines[number].partition(" = ")
        words = value.split()
        words[place % len(words)] = text
        lines[number] = f"{key} = {' '.join(words)}"
    path.write_bytes("\n".join([*lines, ""]).encode() + data)
    with suppress(ValueError):
        assert read_volume(path).array.size == ARRAY.size


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii"])
def test_colours_are_refused(tmp_path: Path, suffix: str) -> None:
    image = sitk.GetImageFromArray(np.zeros((2, 3, 4, 3), np.uint8), isVector=True)
    with pytest.raises(ValueError, match="Cannot read"):
        read_volume(saved(tmp_path / f"a{suffix}", image))


# DICOM


def test_dicom_folder_is_sorted_by_position(tmp_path: Path) -> None:
    folder = a_series(tmp_path / "scan", [(1, 2, z) for z in (4, 0, 2)], modality="MR")
    volume = read_volume(folder)
    assert volume.array[:, 0, 0].tolist() == [1, 2, 0]
    assert (volume.name, volume.modality, volume.warnings) == ("scan", "MR", ())
    np.testing.assert_allclose(
        volume.grid.affine, TO_LPS @ [[0.5, 0, 0, 1], [0, 0.5, 0, 2], [0, 0, 2, 0], [0, 0, 0, 1]]
    )


def test_one_dicom_file_is_read_alone(tmp_path: Path) -> None:
    file = find_first(a_series(tmp_path / "scan", [(0, 0, 0), (0, 0, 2)]))
    volume = read_volume(file)
    assert (volume.array.shape, volume.modality) == ((1, 4, 5), "CT")


def find_first(folder: Path) -> Path:
    return sorted(folder.iterdir())[0]


def test_dicom_file_needs_no_suffix(tmp_path: Path) -> None:
    file = find_first(a_series(tmp_path / "scan", [(0, 0, 0)]))
    assert read_volume(file.rename(tmp_path / "IM0001")).modality == "CT"


def a_slice(folder: Path, thickness: str) -> Path:
    """A DICOM file without Spacing Between Slices: where ITK writes it, its tag becomes another one."""
    file = find_first(a_series(folder, [(1, 2, 3)], thickness=thickness))
    file.write_bytes(file.read_bytes().replace(b"\x18\x00\x88\x00", b"\x18\x00\x89\x00"))
    return file


@pytest.mark.parametrize("alone", [True, False])
def test_slice_alone_is_as_thick_as_its_tag_says(tmp_path: Path, alone: bool) -> None:
    file = a_slice(tmp_path / "scan", "5.5")
    grid = read_volume(file if alone else file.parent).grid
    assert grid.voxel_ml == pytest.approx(0.5 * 0.5 * 5.5 / 1000)
    np.testing.assert_allclose(
        grid.affine, TO_LPS @ [[0.5, 0, 0, 1], [0, 0.5, 0, 2], [0, 0, 5.5, 3], [0, 0, 0, 1]], atol=1e-9
    )


@pytest.mark.parametrize("thickness", ["", "0", "-5", "5 mm", "nan"])
def test_slice_without_valid_thickness_is_one_millimetre_thick(tmp_path: Path, thickness: str) -> None:
    assert read_volume(a_slice(tmp_path / "scan", thickness)).grid.spacing == pytest.approx((0.5, 0.5, 1))


def test_spacing_between_slices_goes_before_their_thickness(tmp_path: Path) -> None:
    file = find_first(a_series(tmp_path / "scan", [(0, 0, 0)], modality="MR", thickness="5.5"))
    assert read_volume(file).grid.spacing == pytest.approx((0.5, 0.5, 2))


def test_real_slice_alone_is_as_thick_as_its_tag_says(shared_data: Path) -> None:
    volume = read_volume(shared_data / "ct" / "crlm_1004_dicom" / "1-01.dcm")
    assert volume.grid.spacing == pytest.approx((0.796875, 0.796875, 5))


def test_longest_series_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    a_series(tmp_path / "scan", [(0, 0, 0)], uid="1.2.4", name="Localizer")
    folder = a_series(tmp_path / "scan", [(0, 0, z) for z in range(3)], uid="1.2.3", name="Portal")
    volume = read_volume(folder)
    assert volume.array.shape[0] == 3
    assert len(volume.warnings) == 1 and "'Portal' (3 slices)" in volume.warnings[0]
    assert "'Localizer' (1)" in volume.warnings[0]


def test_missing_slice_warns(tmp_path: Path) -> None:
    folder = a_series(tmp_path / "scan", [(0, 0, z) for z in (0, 2, 4, 8, 10)])
    assert "unevenly spaced (2.00 to 4.00 mm)" in read_volume(folder).warnings[0]


def test_slices_at_one_place_are_refused(tmp_path: Path) -> None:
    folder = a_series(tmp_path / "scan", [(0, 0, z) for z in (0, 0, 2, 2)])
    with pytest.raises(ValueError, match="several slices lie at one place"):
        read_volume(folder)


def test_tilted_gantry_warns(tmp_path: Path) -> None:
    volume = read_volume(a_series(tmp_path / "scan", [(0, z / 2, 2 * z) for z in range(4)]))
    assert "not at right angles" in volume.warnings[0]
    np.testing.assert_allclose(volume.grid.affine[:3, 2], (0, -0.5, 2))


def test_folder_without_dicom_is_no_volume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no DICOM"):
        read_volume(tmp_path)


# Finding


def test_folders_expand_to_images_and_dicom_folders(tmp_path: Path) -> None:
    saved(tmp_path / "b.nii.gz")
    saved(tmp_path / "a.mha")
    a_series(tmp_path / "c", [(0, 0, 0)])
    for name in ("._b.nii.gz", "notes.txt", "b.seg.nrrd"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").mkdir()
    assert find_inputs([tmp_path]) == [tmp_path / "a.mha", tmp_path / "b.nii.gz", tmp_path / "c"]


def test_dicom_folder_is_one_input(tmp_path: Path) -> None:
    folder = a_series(tmp_path / "c", [(0, 0, 0), (0, 0, 1)])
    for file in folder.iterdir():
        file.rename(file.with_name(f"IM{file.stem[-1]}"))
    assert find_inputs([str(folder)]) == [folder]


def test_named_files_keep_their_order(tmp_path: Path) -> None:
    files = [saved(tmp_path / "b.mha"), saved(tmp_path / "a.mha")]
    assert find_inputs(files) == files


def test_finding_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"No image found in {tmp_path}"):
        find_inputs([tmp_path])
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        find_inputs([tmp_path / "nothing"])
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match="Its subfolders are not searched: name them"):
        find_inputs([tmp_path / "a"])


# Label maps


def an_organ_map(dtype: str = "u1", values: tuple[int, ...] = (1, 2)) -> NDArray[Any]:
    array = np.zeros((6, 20, 20), dtype)
    for n, value in enumerate(values):
        array[2:5, 4 * n + 2 : 4 * n + 6, 5:15] = value
    return array


def as_read(array: NDArray[Any]) -> Volume:
    return Volume(array, Grid(array.shape, np.eye(4)))


@pytest.mark.parametrize(
    "name",
    ["CT_label.nii.gz", "ct_label_flare13.nrrd", "label.mha", "CT.labels.nii", "CT-seg.nii.gz", "CT Segmentation.mha",
     "CT_mask.nrrd", "CT.seg.nrrd", "Labelmap.nii"],
)  # fmt: skip
def test_label_maps_in_a_folder_are_known_by_their_names(tmp_path: Path, name: str) -> None:
    for image in ("CT.nii.gz", "CT_labelled.nii.gz", "segovia.mha", "masked_T1.nrrd", "CT_seg_2.mha"):
        (tmp_path / image).touch()
    images = find_inputs([tmp_path])
    (tmp_path / name).touch()
    assert len(images) == 5 and find_inputs([tmp_path]) == images
    assert find_label_maps(tmp_path) == [tmp_path / name] == find_inputs([tmp_path / name])


def test_slicer_segmentation_of_any_name_is_known_by_its_header(tmp_path: Path) -> None:
    (path,) = write_segmentation(tmp_path / "a.seg.nrrd", labels_of([1]), STRUCTURES, "model")
    path = path.rename(tmp_path / "b.nrrd")
    image = saved(tmp_path / "c.nrrd")
    (tmp_path / "d.nrrd").symlink_to(tmp_path / "nowhere")
    assert find_label_maps(tmp_path) == [path] and find_inputs([tmp_path]) == [image, tmp_path / "d.nrrd"]
    assert is_label_map(path, read_volume(path)) and not is_label_map(image, read_volume(image))


def test_only_a_folder_holds_label_maps(tmp_path: Path) -> None:
    path = saved(tmp_path / "a_label.mha")
    assert find_label_maps(path) == find_label_maps(tmp_path / "nothing") == []


@pytest.mark.parametrize("empty", [True, False])
def test_label_map_of_ours_is_known_by_its_colour_table(tmp_path: Path, empty: bool) -> None:
    labels = as_read(an_organ_map(values=() if empty else (1, 16)))
    path, table = write_segmentation(tmp_path / "a.nii.gz", labels, STRUCTURES, "model")
    assert is_label_map(path, read_volume(path))
    table.write_text("patient,age\n1,70\n")
    assert is_label_map(path, read_volume(path)) == (not empty)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("values", [(1,), (13,), (1, 2, 4), (40, 41, 42, 43)])
def test_label_map_is_known_by_its_voxels(tmp_path: Path, dtype: str, values: tuple[int, ...]) -> None:
    assert is_label_map(tmp_path / "a.mha", as_read(an_organ_map(dtype, values)))


NOISE = np.random.default_rng(0).normal(0, 3, (6, 20, 20))
IMAGES = {
    "empty": np.zeros((6, 20, 20), np.uint8),
    "one grey value": an_organ_map(values=(200,)),
    "doubled pixels": np.clip(np.where(an_organ_map() > 0, 12 + NOISE, 0), 0, 40).astype(np.uint8).repeat(2, axis=2),
    "drawn in grey values": an_organ_map(values=(50, 100, 255)),
    "CT": (an_organ_map("i2", (60, 40)) - 1000),
    "negative": an_organ_map("i2", (-1, -2)),
    "noise in bytes": np.clip(np.where(an_organ_map() > 0, 12 + NOISE, 0), 0, 255).astype(np.uint8),
    "saturated": np.clip(60 * NOISE + 100 * (NOISE > 0), 0, 255).astype(np.uint8),
    "not whole": an_organ_map("f4") / 4,
    "not a number": np.where(an_organ_map("f4") > 1, np.nan, an_organ_map("f4")),
    "infinite": np.where(an_organ_map("f4") > 1, np.inf, an_organ_map("f4")),
    "many values": np.maximum(np.arange(-4800, 4800, dtype=np.int16) // 16, 0).reshape(12, 20, 40),
    "no background": an_organ_map(values=(1, 2)) + np.uint8(1),
    "one voxel wide": np.ones((6, 20, 1), np.uint8),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_image_is_no_label_map(tmp_path: Path, kind: str) -> None:
    image = IMAGES[kind]
    path = saved(tmp_path / "a.nii.gz", sitk.GetImageFromArray(image))
    assert not is_label_map(path, read_volume(path))


def test_real_label_maps_are_told_from_images_by_their_voxels(shared_data: Path, tmp_path: Path) -> None:
    names = [f"ct/ts_ct_3mm_small{end}.nii.gz" for end in ("", "_label_flare13")]
    names += [f"mr/ts_mr_t1_3mm{end}.nii.gz" for end in ("", "_label_totalseg")]
    names += ["odd/ct_uint8_window.nii.gz", "negative_nc/head_mr_pd.nii.gz", "mr_nc/chaos_t2_01_label.nii.gz"]
    found = [name for name in names if is_label_map(tmp_path / "a.nii.gz", read_volume(shared_data / name))]
    assert found == [name for name in names if "label" in name]


# Writing


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_written_image_comes_back_on_its_grid(tmp_path: Path, suffix: str) -> None:
    volume = Volume(ARRAY, Grid(ARRAY.shape, affine_of(an_image()))).to_axes("SAL")
    path = tmp_path / "new" / f"a b{suffix}"
    write_volume(path, volume)
    back = read_volume(path)
    assert np.array_equal(back.array, volume.array) and back.array.dtype == np.int16
    np.testing.assert_allclose(back.grid.affine, volume.grid.affine, atol=1e-4 if ".nii" in suffix else 1e-9)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["A.NII.GZ", "A.Nii", "A.NRRD", "A.MHA"])
def test_suffix_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    volume = Volume(ARRAY, Grid(ARRAY.shape, np.diag([-1.0, -1.0, 3.0, 1.0])))
    write_volume(tmp_path / name, volume)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert np.array_equal(read_volume(tmp_path / name).array, ARRAY)


def test_image_is_not_written_as_a_segmentation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tif: expected a name that ends in \.nii\.gz \.nii \.nrrd \.mha\."):
        write_volume(tmp_path / "a.tif", as_read(ARRAY))


@pytest.mark.parametrize("suffix", [".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("axes", ["LPS", "RAS", "SAL"])
def test_written_labels_come_back_on_their_grid(tmp_path: Path, suffix: str, axes: str) -> None:
    labels = labels_of([1, 2, 16]).to_axes(axes)
    files = write_segmentation(tmp_path / "new" / f"a b{suffix}", labels, STRUCTURES, "model 1.0")
    back = read_volume(files[0])
    assert np.array_equal(back.array, labels.array) and back.array.dtype == np.uint8
    np.testing.assert_allclose(back.grid.affine, labels.grid.affine, atol=1e-4 if ".nii" in suffix else 1e-9)
    assert sorted((tmp_path / "new").iterdir()) == sorted(files)


def test_colour_table_lies_beside_a_label_map(tmp_path: Path) -> None:
    files = write_segmentation(tmp_path / "a.v1.nii.gz", labels_of([2, 16]), STRUCTURES, "model 1.0")
    assert files == [tmp_path / "a.v1.nii.gz", tmp_path / "a.v1.csv"]
    kidney, tumor = csv.DictReader(files[1].read_text().splitlines())
    assert [kidney[f"Color_{part}"] for part in "RGBA"] == ["185", "102", "83", "255"]
    assert (kidney["LabelValue"], kidney["Name"]) == ("2", "Left kidney")
    assert (kidney["Type_CodeValue"], kidney["TypeModifier_CodeMeaning"]) == ("64033007", "Left")
    assert (tumor["Type_CodeMeaning"], tumor["Region_CodeValue"]) == ("Neoplasm", "10200004")


def test_only_present_structures_become_segments(tmp_path: Path) -> None:
    path = tmp_path / "a.seg.nrrd"
    write_segmentation(path, labels_of([3, 16]), STRUCTURES, "model | Ü 1.0")
    header = nrrd.read_header(str(path))
    assert [header[f"Segment{n}_ID"] for n in (0, 1)] == ["spleen", "liver_tumor"]
    assert "Segment2_ID" not in header
    assert header["Segment1_LabelValue"] == "16"
    assert header["Segment0_Tags"].split("|")[1:3] == [
        "DICOM.SegmentAlgorithmType:AUTOMATIC",
        "DICOM.SegmentAlgorithmName:model / ? 1.0",
    ]


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.tif: expected a name that ends in \.seg\.nrrd"):
        write_segmentation(tmp_path / "a.tif", labels_of([1]), STRUCTURES, "model")


def test_sheared_labels_keep_their_place_or_are_refused(tmp_path: Path) -> None:
    affine = np.array([[-1, 0, 0, 5], [0, -1, 0.5, 6], [0, 0, 2, 7], [0, 0, 0, 1]], dtype=float)
    labels = Volume(labels_of([1]).array, Grid((6, 7, 8), affine))
    (path,) = write_segmentation(tmp_path / "a.seg.nrrd", labels, STRUCTURES, "model")
    np.testing.assert_allclose(read_volume(path).grid.affine, affine, atol=1e-9)
    with pytest.raises(ValueError, match="NIfTI needs axes at right angles"):
        write_segmentation(tmp_path / "a.nii.gz", labels, STRUCTURES, "model")


def test_labels_must_be_uint8(tmp_path: Path) -> None:
    labels = labels_of([1])
    with pytest.raises(ValueError, match="must be uint8, got int16"):
        write_segmentation(tmp_path / "a.mha", Volume(labels.array.astype(np.int16), labels.grid), STRUCTURES, "m")


def test_value_without_structure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[7\] have no structure, expected some of \[1, 2, 3, 16\]"):
        write_segmentation(tmp_path / "a.mha", labels_of([1, 7]), STRUCTURES, "model")
    assert list(tmp_path.iterdir()) == []


def test_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    for failure in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(failure), atomic_write(path) as temporary:  # noqa: PT012
            temporary.write_text("half")
            raise failure
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("name", ["a.seg.nrrd", "a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.png"])
def test_file_that_finds_no_room_is_told_and_not_left(tmp_path: Path, name: str) -> None:
    program = f"""
import resource, sys
import numpy as np
from m4oe.files import Grid, Volume, atomic_write, write_segmentation, write_volume
from m4oe.raster import write_png
noise = np.random.default_rng(0).integers(0, 2, (64, 64, 64)).astype(np.uint8)
path, labels = {str(tmp_path / name)!r}, Volume(noise, Grid(noise.shape, np.eye(4)))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    if path.endswith(".png"):
        with atomic_write(path) as temporary:
            write_png(temporary, np.random.default_rng(0).random((300, 300, 3)))
    write_segmentation(path, labels, {{1: "liver"}}, "model")
except OSError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == f"Cannot write {tmp_path / name}: the disk is full; make room and try again.\n"
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.seg.nrrd"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path and temporary.name.endswith(".seg.nrrd")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(OSError, match=r"Cannot write into the folder .*file: "),
        atomic_write(tmp_path / "file" / "a.mha"),
    ):
        pass
    with pytest.raises(IsADirectoryError, match="it is a folder"), atomic_write(tmp_path):
        pass


def test_slicer_reads_names_colours_codes_and_place(tmp_path: Path) -> None:
    slicer, vtk = pytest.importorskip("slicer"), pytest.importorskip("vtk")
    labels = labels_of([1, 2, 16])
    (path,) = write_segmentation(tmp_path / "a.seg.nrrd", labels, STRUCTURES, "model 1.0")
    scene, storage = slicer.vtkMRMLScene(), slicer.vtkMRMLSegmentationStorageNode()
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    storage.SetFileName(str(path))
    assert storage.ReadData(node)
    segmentation = node.GetSegmentation()
    assert list(segmentation.GetSegmentIDs()) == ["liver", "kidney_left", "liver_tumor"]
    assert segmentation.GetNumberOfLayers() == 1
    for value in (1, 2, 16):
        entry = structure(STRUCTURES[value])
        segment, text, matrix = segmentation.GetSegment(entry.key), vtk.mutable(""), vtk.vtkMatrix4x4()
        assert segment.GetTag("TerminologyEntry", text) and text.get() == entry.terminology
        assert segment.GetTag("DICOM.SegmentAlgorithmName", text) and text.get() == "model 1.0"
        assert segment.GetTag("M4oE.Model", text) and text.get() == "model 1.0"
        assert (segment.GetName(), segment.GetLabelValue()) == (entry.name, value)
        assert tuple(round(part * 255) for part in segment.GetColor()) == entry.color
        image = segment.GetRepresentation("Binary labelmap")
        image.GetImageToWorldMatrix(matrix)
        affine = [[matrix.GetElement(row, column) for column in range(4)] for row in range(4)]
        np.testing.assert_allclose(affine, labels.grid.affine, atol=1e-9)
        assert image.GetDimensions() == labels.grid.shape[::-1]


# Real files


@pytest.mark.parametrize(
    ("name", "axes", "dtype", "modality"),
    [
        ("ct/crlm_1004_dicom", "LPS", "i4", "CT"),
        ("mr/cmb_06489_adc_dicom", "LPS", "i2", "MR"),
        ("mr_nc/chaos_t2_39.nii.gz", "LAS", "f8", None),
        ("odd/ct_orient_asl.nrrd", "ASL", "i2", None),
        ("odd/ct_uint16_plus1024.mha", "RAS", "u2", None),
        ("odd/ct_oblique.nii.gz", "RAS", "i2", None),
        ("odd/ct_2d.nii.gz", "RAS", "i2", None),
        ("odd/ct_float64.nii.gz", "RAS", "f8", None),
        ("negative_nc/head_mr_pd.nii.gz", "RAS", "u1", None),
    ],
)
def test_real_volumes_are_read(shared_data: Path, name: str, axes: str, dtype: str, modality: str | None) -> None:
    volume = read_volume(shared_data / name)
    assert (volume.grid.axes, volume.array.dtype, volume.modality) == (axes, np.dtype(dtype), modality)
    assert volume.warnings == () and np.ptp(volume.array) > 50


def test_real_volume_in_another_axis_order_is_the_same_image(shared_data: Path) -> None:
    straight = read_volume(shared_data / "ct" / "ts_ct_3mm_small.nii.gz").to_axes("LPS")
    turned = read_volume(shared_data / "odd" / "ct_orient_asl.nrrd").to_axes("LPS")
    assert np.array_equal(straight.array, turned.array) and straight.grid.is_close(turned.grid)


def test_real_4d_image_needs_a_frame(shared_data: Path) -> None:
    path = shared_data / "negative" / "brain_mr_4d_oblique.nii.gz"
    assert read_volume(path, frame=1).array.shape == (24, 96, 128)
    with pytest.raises(ValueError, match="it has 2 frames"):
        read_volume(path)
