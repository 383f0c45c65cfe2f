"""Volumes and segmentations on disk: reads NIfTI, NRRD, MetaImage and DICOM, writes .seg.nrrd and label maps.

NIfTI is parsed here and not by ITK, which refuses sheared headers, replaces a zero spacing by 1 mm and fills
truncated files up without a word.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import nrrd
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from .geometry import Grid, Volume, nearest_rotation
from .labels import Code, Structure, structure

_NIFTI = (".nii.gz", ".nii")
_DICOM = (".dcm", ".ima")
_IMAGES = (*_NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd", *_DICOM)
_SEGMENTATIONS = (".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".mha")
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS and back
_SHEAR = 1e-3  # cosine between two axes above which they are not at right angles
_UNEVEN = 0.05  # part of the usual slice gap by which a gap may differ
_CODES = {
    "Category": "category",
    "Type": "type",
    "TypeModifier": "type_modifier",
    "Region": "region",
    "RegionModifier": "region_modifier",
}


def read_volume(path: str | os.PathLike[str], frame: int | None = None) -> Volume:
    """Reads a NIfTI, NRRD or MetaImage file, the longest series of a DICOM folder, or one DICOM file.

    The array keeps its own type. A 2-D image becomes one slice, 1 mm thick.

    Args:
        path: The file or folder.
        frame: Which frame of a 4-D image, from 0; may be None where there is only one.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: It is damaged or of an unknown kind, its geometry is impossible, or it has no such frame.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    try:
        with _silent_itk():
            volume = _read(path, frame)
    except ValueError as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
    except RuntimeError as error:  # ITK's own message is a trace of its source code
        raise ValueError(f"Cannot read {path}: it is damaged, incomplete or not what its name says.") from error
    if _cosine(volume.grid.direction) > _SHEAR:
        volume = _warned(volume, "The axes are not at right angles (tilted gantry?).")
    return replace(volume, name=_stem(path, _IMAGES) if path.is_file() else path.resolve().name)


def find_inputs(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files and DICOM folders to read, in the order given, sorted within a folder.

    A folder with DICOM files is one input. In any other folder every image file and every DICOM folder is one;
    hidden files and segmentations (.seg.nrrd) are left out.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: Nothing was found.
    """
    places = [Path(path) for path in paths]
    found = [entry for place in places for entry in _expand(place)]
    if not found:
        searched = ", ".join(str(place) for place in places) or "an empty list"
        raise ValueError(f"No image found in {searched}, expected DICOM or {' '.join(_IMAGES)}.")
    return found


def write_segmentation(
    path: str | os.PathLike[str], labels: Volume, structures: Mapping[int, str], source: str
) -> list[Path]:
    """Writes a label map with the names, colours and codes of its structures.

    A .seg.nrrd holds them itself; .nii.gz, .nii, .nrrd and .mha get a colour table (.csv) beside them.

    Args:
        path: Its suffix chooses the format; missing folders are made.
        labels: uint8 [k, j, i], 0 for background.
        structures: Key of the structure of every label value.
        source: Name and version of the model.

    Returns:
        The files written.

    Raises:
        ValueError: The suffix is unknown, the array is not uint8 or holds a value without structure, or the axes
            are not at right angles and the format is NIfTI.
        OSError: The file cannot be written.
    """
    path = Path(path)
    suffix = _suffix(path, _SEGMENTATIONS)
    if not suffix:
        raise ValueError(f"Cannot write {path}: expected a name that ends in {' '.join(_SEGMENTATIONS)}.")
    if suffix in _NIFTI and _cosine(labels.grid.direction) > _SHEAR:
        raise ValueError(f"Cannot write {path}: NIfTI needs axes at right angles, choose .seg.nrrd or .nrrd.")
    present = _present(labels, structures)
    if suffix == ".seg.nrrd":
        with atomic_write(path) as temporary:
            _write_seg_nrrd(temporary, labels, present, source)
        return [path]
    table = path.with_name(f"{_stem(path, _SEGMENTATIONS)}.csv")
    with atomic_write(path) as temporary_image, atomic_write(table) as temporary_table:
        _write_itk(temporary_image, labels)
        _write_color_table(temporary_table, present)
    return [path, table]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary file beside `path` that replaces it on success and is removed on any failure.

    Missing folders are made.

    Raises:
        OSError: The folder cannot be made or written, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"Cannot write {path}: it is a folder.")
    temporary = path.with_name(f".{uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
    except OSError as error:
        raise OSError(f"Cannot write into the folder {path.parent}: {error.strerror}.") from error
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own in the place, for the owner's eyes only
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Finding


def _expand(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if path.is_file() or _holds_dicom(path):
        return [path]
    return [entry for entry in _entries(path) if (_holds_dicom if entry.is_dir() else _is_image)(entry)]


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _holds_dicom(folder: Path) -> bool:
    return any(entry.is_file() and _is_dicom(entry) for entry in _entries(folder))


def _is_image(path: Path) -> bool:
    return bool(_suffix(path, _IMAGES)) and not _suffix(path, (".seg.nrrd",))


def _is_dicom(path: Path) -> bool:
    """By suffix, or by content where the suffix says nothing, as DICOM files often have none."""
    if suffix := _suffix(path, _IMAGES):
        return suffix in _DICOM
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _suffix(path: Path, choices: tuple[str, ...]) -> str:
    return next((suffix for suffix in choices if path.name.lower().endswith(suffix)), "")


def _stem(path: Path, choices: tuple[str, ...]) -> str:
    return path.name[: len(path.name) - len(_suffix(path, choices))]


# Reading


def _read(path: Path, frame: int | None) -> Volume:
    if path.is_dir():
        _choose_frame(1, frame)
        return _read_series(path)
    if path.stat().st_size == 0:
        raise ValueError("it is empty.")
    if _suffix(path, _NIFTI):
        return _read_nifti(path, frame)
    if _suffix(path, _IMAGES) or _is_dicom(path):
        return _read_itk(path, frame)
    raise ValueError(f"its kind is unknown, expected DICOM or {' '.join(_IMAGES)}.")


def _read_itk(path: Path, frame: int | None) -> Volume:
    reader = _opened(path)
    size = reader.GetSize()
    _check_spacing(reader.GetSpacing()[:3])
    chosen = _choose_frame(size[3] if len(size) == 4 else 1, frame)
    if len(size) == 4:
        reader.SetExtractSize([*size[:3], 0])
        reader.SetExtractIndex([0, 0, 0, chosen])
    return _from_itk(reader.Execute(), _tag(reader, "0008|0060"))


def _read_series(folder: Path) -> Volume:
    reader = sitk.ImageSeriesReader()
    ids = reader.GetGDCMSeriesIDs(str(folder), True)
    series = sorted((reader.GetGDCMSeriesFileNames(str(folder), uid, True) for uid in ids), key=len, reverse=True)
    if not series:
        raise ValueError("the folder holds no DICOM image.")
    reader.SetFileNames(series[0])
    reader.MetaDataDictionaryArrayUpdateOn()
    volume = _from_itk(reader.Execute(), reader.GetMetaData(0, "0008|0060"))
    if others := ", ".join(f"{_series_name(names[0])} ({len(names)})" for names in series[1:]):
        chosen = f"{_series_name(series[0][0])} ({len(series[0])} slices)"
        volume = _warned(volume, f"Only the longest series {chosen} was read, not {others}.")
    return _placed(volume, _positions(reader, len(series[0]))) if len(series[0]) > 1 else volume


def _positions(reader: sitk.ImageSeriesReader, slices: int) -> NDArray[np.float64]:
    """LPS mm [slice, xyz]."""
    if not all(reader.HasMetaDataKey(index, "0020|0032") for index in range(slices)):
        raise ValueError("its slices have no position (tag 0020,0032), expected CT or MR slices.")
    texts = [reader.GetMetaData(index, "0020|0032") for index in range(slices)]
    return np.array([text.split("\\") for text in texts], dtype=np.float64)


def _from_itk(image: sitk.Image, modality: str) -> Volume:
    components, dimensions = image.GetNumberOfComponentsPerPixel(), image.GetDimension()
    if components != 1 or dimensions > 3:
        raise ValueError(f"it has {components} values per voxel in {dimensions} dimensions, expected one in 2 to 4.")
    image = sitk.JoinSeries(image) if dimensions == 2 else image
    array = sitk.GetArrayFromImage(image)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"its voxels are {array.dtype}, expected real numbers.")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    known = modality.strip() if modality.strip() in ("CT", "MR") else None
    return Volume(array, Grid(array.shape, _LPS @ affine), modality=known)


def _opened(path: Path | str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _tag(reader: sitk.ImageFileReader, tag: str) -> str:
    return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""


def _series_name(file: str) -> str:
    reader = _opened(file)
    return repr(_tag(reader, "0008|103e") or _tag(reader, "0020|000e"))


def _placed(volume: Volume, positions: NDArray[np.float64]) -> Volume:
    """Takes the step between slices from their positions (LPS mm [slice, xyz]), for ITK does not see a tilt."""
    affine = np.array(volume.grid.affine)
    affine[:3, 2] = _LPS[:3, :3] @ (positions[-1] - positions[0]) / (len(positions) - 1)
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    if gaps.min() < _UNEVEN * gaps.max():
        raise ValueError("several slices lie at one place, expected a series of one phase, echo or time.")
    volume = replace(volume, grid=Grid(volume.grid.shape, affine))
    if np.ptp(gaps) > _UNEVEN * np.median(gaps):
        gap = f"{gaps.min():.2f} to {gaps.max():.2f} mm"
        volume = _warned(volume, f"The slices are unevenly spaced ({gap}), some may be missing.")
    return volume


def _warned(volume: Volume, warning: str) -> Volume:
    return replace(volume, warnings=(*volume.warnings, warning))


def _cosine(direction: NDArray[np.float64]) -> float:
    """Largest cosine between two of the unit columns: 0 at right angles."""
    return float(np.abs(direction.T @ direction - np.eye(3)).max())


def _choose_frame(frames: int, frame: int | None) -> int:
    if frame is None and frames > 1:
        raise ValueError(f"it has {frames} frames, choose one from 0 to {frames - 1}.")
    if not 0 <= (frame or 0) < frames:
        raise ValueError(f"it has no frame {frame}, the last one is {frames - 1}.")
    return frame or 0


def _check_spacing(spacing: Iterable[float]) -> None:
    sizes = [float(size) for size in spacing]
    if not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"its voxel spacing is {' x '.join(f'{size:g}' for size in sizes)} mm, expected above zero.")


@contextmanager
def _silent_itk() -> Iterator[None]:
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


# NIfTI

_FIELDS = {  # of NIfTI-1: offset in bytes and type
    "size": (0, "i4"),
    "dim": (40, "8i2"),
    "datatype": (70, "i2"),
    "pixdim": (76, "8f4"),
    "vox_offset": (108, "f4"),
    "scl": (112, "2f4"),
    "codes": (252, "2i2"),
    "quaternion": (256, "3f4"),
    "offset": (268, "3f4"),
    "srow": (280, "(3,4)f4"),
    "magic": (344, "S4"),
}
_OFFSETS, _FORMATS = zip(*_FIELDS.values(), strict=True)
_HEADER = np.dtype({"names": [*_FIELDS], "formats": _FORMATS, "offsets": _OFFSETS, "itemsize": 348})
_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
_CHUNK = 1 << 24


def _read_nifti(path: Path, frame: int | None) -> Volume:
    try:
        with _unpacked(path) as file:
            header, order = _nifti_header(file.read(_HEADER.itemsize))
            array = _nifti_array(file, header, order, frame)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError("it is damaged or incomplete, its compressed data do not unpack.") from error
    affine, warnings = _nifti_affine(header)
    return Volume(array, Grid(array.shape, affine), warnings=warnings)


def _unpacked(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """Opens by content, for plain files are at times called .nii.gz."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if zipped else path.open("rb")


def _nifti_header(data: bytes) -> tuple[Any, str]:
    """The checked header as a record of `_HEADER`, and the byte order."""
    if len(data) < _HEADER.itemsize:
        raise ValueError("it is not a NIfTI-1 file.")
    records = {order: np.frombuffer(data, _HEADER.newbyteorder(order))[0] for order in ("<", ">")}
    order = next((order for order, record in records.items() if record["size"] == _HEADER.itemsize), None)
    if order is None:
        raise ValueError("it is not a NIfTI-1 file.")
    header = records[order]
    if header["magic"] != b"n+1":
        raise ValueError("it is half of a .hdr/.img pair, expected a single file.")
    if header["datatype"] not in _TYPES:
        raise ValueError(f"its voxels are of NIfTI type {header['datatype']}, expected real numbers.")
    count, sizes = int(header["dim"][0]), header["dim"][1:]
    if not 2 <= count <= 7 or (sizes[:count] < 1).any() or (sizes[4:count] > 1).any():
        raise ValueError(f"its size is {sizes[: max(count, 1)].tolist()}, expected 2 to 4 dimensions.")
    _check_spacing(header["pixdim"][1 : 1 + min(count, 3)])
    return header, order


def _nifti_array(file: io.BufferedReader | gzip.GzipFile, header: Any, order: str, frame: int | None) -> NDArray[Any]:
    """Voxels [k, j, i] of one frame."""
    i, j, k, frames = (int(size) if axis < header["dim"][0] else 1 for axis, size in enumerate(header["dim"][1:5]))
    chosen = _choose_frame(frames, frame)
    array = np.empty((k, j, i), f"{order}{_TYPES[int(header['datatype'])]}")
    file.seek(max(352, int(header["vox_offset"])) + chosen * array.nbytes)
    rest = array.reshape(-1).view(np.uint8).data
    while rest and (got := file.readinto(rest[:_CHUNK])):
        rest = rest[got:]
    if rest:
        raise ValueError(f"it is incomplete: {array.nbytes - len(rest)} bytes of voxels, expected {array.nbytes}.")
    file.read(1)  # the end of a compressed file: its checksum is compared
    slope, intercept = header["scl"].tolist()
    if slope == 0 or not math.isfinite(slope * intercept) or (slope, intercept) == (1, 0):
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    return array * np.float32(slope) + np.float32(intercept)


def _nifti_affine(header: Any) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The affine that ITK, and so Slicer, chooses; the nearest rotation to a sform that ITK refuses."""
    qform_code, sform_code = header["codes"].tolist()
    columns, spacing = header["srow"][:, :3].astype(np.float64), header["pixdim"][1:4].astype(np.float64)
    flat = header["dim"][0] < 3
    if flat:
        columns[:, 2], spacing[2] = np.cross(columns[:, 0], columns[:, 1]), 1.0
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    warnings: tuple[str, ...] = ()
    if sform_code and (not qform_code or (sform_code == 1 and _cosine(columns / spacing) < _SHEAR)):
        lengths = np.linalg.norm(columns, axis=0)
        _check_spacing(lengths)
        spacing[: 2 if flat else 3] = lengths[: 2 if flat else 3]
        affine[:3, :3], affine[:3, 3] = nearest_rotation(columns / lengths), header["srow"][:, 3]
        if _cosine(columns / lengths) > _SHEAR:
            warnings = ("The axes in the header are not at right angles, the nearest rotation was taken.",)
    elif qform_code:
        affine[:3, :3], affine[:3, 3] = _rotation(header["quaternion"].astype(np.float64)), header["offset"]
        affine[:3, 2] *= -1 if header["pixdim"][0] < 0 else 1
    affine[:3, :3] *= spacing
    return affine, warnings


def _rotation(bcd: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation [3, 3] of the unit quaternion (a, b, c, d) with a >= 0, of which the file holds (b, c, d)."""
    length = float(np.linalg.norm(bcd))
    a, bcd = (math.sqrt(1 - length**2), bcd) if length < 1 else (0.0, bcd / length)
    return (a * a - bcd @ bcd) * np.eye(3) + 2 * np.outer(bcd, bcd) + 2 * a * np.cross(np.eye(3), bcd)


# Writing


def _present(labels: Volume, structures: Mapping[int, str]) -> dict[int, Structure]:
    """The structures that have voxels, by label value."""
    if labels.array.dtype != np.uint8:
        raise ValueError(f"Labels must be uint8, got {labels.array.dtype}.")
    counts = sum(np.bincount(plane.reshape(-1), minlength=256) for plane in labels.array)
    values = [int(value) for value in np.flatnonzero(counts) if value]
    unknown = [value for value in values if value not in structures]
    if unknown:
        raise ValueError(f"Label values {unknown} have no structure, expected some of {sorted(structures)}.")
    return {value: structure(structures[value]) for value in values}


def _write_seg_nrrd(path: Path, labels: Volume, present: Mapping[int, Structure], source: str) -> None:
    affine = _LPS @ labels.grid.affine
    extent = " ".join(f"0 {size - 1}" for size in labels.grid.shape[::-1])
    header: dict[str, Any] = {
        "space": "left-posterior-superior",
        "kinds": ["domain"] * 3,
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
        "encoding": "gzip",
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for number, (value, entry) in enumerate(present.items()):
        fields = _segment(value, entry, source) | {"Extent": extent}
        header |= {f"Segment{number}_{field}": text for field, text in fields.items()}
    nrrd.write(str(path), np.ascontiguousarray(labels.array), header, index_order="C", compression_level=4)


def _segment(value: int, entry: Structure, source: str) -> dict[str, str]:
    tags = {
        "TerminologyEntry": entry.terminology,
        "DICOM.SegmentAlgorithmType": "AUTOMATIC",
        "DICOM.SegmentAlgorithmName": source.encode("ascii", "replace").decode().replace("|", "/"),
    }
    return {
        "ID": entry.key,
        "Name": entry.name,
        "NameAutoGenerated": "0",
        "Color": " ".join(f"{part / 255:.6f}" for part in entry.color),
        "ColorAutoGenerated": "0",
        "LabelValue": str(value),
        "Layer": "0",
        "Tags": "".join(f"{name}:{text}|" for name, text in tags.items() if text),
    }


def _write_itk(path: Path, labels: Volume) -> None:
    image = sitk.GetImageFromArray(labels.array)
    affine = _LPS @ labels.grid.affine
    image.SetSpacing(labels.grid.spacing)
    image.SetDirection((affine[:3, :3] / labels.grid.spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    try:
        with _silent_itk():
            sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError(f"Cannot write {path}: {str(error).splitlines()[-1]}") from error


def _write_color_table(path: Path, present: Mapping[int, Structure]) -> None:
    columns = [f"{part}_{item}" for part in _CODES for item in ("CodingScheme", "CodeValue", "CodeMeaning")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["LabelValue", "Name", "Color_R", "Color_G", "Color_B", "Color_A", *columns])
        for value, entry in present.items():
            codes: list[Code | None] = [getattr(entry, field) for field in _CODES.values()]
            texts = (text for code in codes for text in (_texts(code)))
            writer.writerow([value, entry.name, *entry.color, 255, *texts])


def _texts(code: Code | None) -> tuple[str, str, str]:
    return (code.scheme, code.value, code.meaning) if code else ("", "", "")
