"""Volumes and segmentations on disk: NIfTI, NRRD, MetaImage and DICOM are read, .seg.nrrd and label maps written."""

from __future__ import annotations

import csv
import errno
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from .geometry import LPS, Grid, Volume
from .labels import MADE_BY, Code, Structure, structure
from .metaimage import check_metaimage
from .nifti import Header, are_orthogonal, check_spacing, choose_frame, read_nifti, read_nifti_header

_NIFTI = (".nii.gz", ".nii")
_DICOM = (".dcm", ".ima")
_METAIMAGE = (".mha", ".mhd")
_IMAGES = (*_NIFTI, ".nrrd", ".nhdr", *_METAIMAGE, *_DICOM)
_WRITTEN = (*_NIFTI, ".nrrd", ".mha")
_SEGMENTATIONS = (".seg.nrrd", *_WRITTEN)
_LABEL_NAME = re.compile(r"(^|[ ._-])(label(s|map)?([ ._-].*)?|seg|segmentation|mask)$", re.IGNORECASE)
_TABLE = ("LabelValue", "Name", "Color_R", "Color_G", "Color_B", "Color_A")
_MOST_LABELS = 256  # values that a label map may have
_ALIKE = 0.75  # of the voxels of a value equal the one before: 0.84 and more in maps of organs, far fewer in images
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HEADER_BYTES = 352  # of a NIfTI file without extensions, as ITK writes it
_UNEVEN = 0.05  # part of the usual slice gap by which a gap may differ
_CODES = {
    "Category": "category",
    "Type": "type",
    "TypeModifier": "type_modifier",
    "Region": "region",
    "RegionModifier": "region_modifier",
}


class WriteError(OSError):
    """A file could not be written, for no fault of what was read; the text names the file."""


def read_volume(path: str | os.PathLike[str], frame: int | None = None) -> Volume:
    """Reads a NIfTI, NRRD or MetaImage file, the longest series of a DICOM folder, or one DICOM file.

    The array keeps its own type. A 2-D image becomes one slice, 1 mm thick.

    Args:
        path: The file or folder.
        frame: Which frame of a 4-D image, from 0; one that has but one frame, as a 3-D image, ignores it.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: It is damaged or of an unknown kind, its geometry is impossible, or it has no such frame.
    """
    path = Path(path)
    with _reading(path):
        volume = _read(path, frame)
    if not are_orthogonal(volume.grid.direction):
        volume = _warned(volume, "The axes are not at right angles (tilted gantry?).")
    return replace(volume, name=_stem(path, _IMAGES) if path.is_file() else path.resolve().name)


def read_series(file: str | os.PathLike[str]) -> Volume:
    """Reads the DICOM series that a file belongs to from the file's folder, whatever other series lie there.

    Raises:
        FileNotFoundError: There is nothing at `file`.
        ValueError: As `read_volume`.
    """
    file = Path(file)
    with _reading(file):
        files = dicom_files(file)
        volume = _read_slices([str(path) for path in files]) if len(files) > 1 else _read(file, None)
    if not are_orthogonal(volume.grid.direction):
        volume = _warned(volume, "The axes are not at right angles (tilted gantry?).")
    return replace(volume, name=_stem(file, _IMAGES))


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file is DICOM, or a folder holds such files."""
    path = Path(path)
    return _is_dicom(path) if path.is_file() else path.is_dir() and _holds_dicom(path)


def dicom_files(path: str | os.PathLike[str]) -> list[Path]:
    """Files of the longest series in a folder, or of the series that a file belongs to, in the order of the slices."""
    path = Path(path)
    with _silent_itk():
        series = dicom_series(path if path.is_dir() else path.parent)
    if path.is_dir():
        return [Path(name) for name in series[0]] if series else []
    own = (names for names in series if path.name in {Path(name).name for name in names})
    return [Path(name) for name in next(own, [str(path)])]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Geometry, type and number of frames of what `read_volume` would read; of NIfTI without reading the voxels.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: As `read_volume`.
    """
    path = Path(path)
    with _reading(path):
        if path.is_file() and _suffix(path, _NIFTI):
            return read_nifti_header(path)
    frames, volume = count_frames(path), read_volume(path, 0)
    return Header(volume.grid, volume.array.dtype, frames, volume.warnings)


def count_frames(path: Path) -> int:
    """How many frames `read_volume` could choose from.

    Raises:
        ValueError: As `read_volume`.
    """
    with _reading(path):
        if path.is_file() and _suffix(path, _NIFTI):
            return read_nifti_header(path).frames
        size: tuple[int, ...] = _opened(path).GetSize() if path.is_file() else ()
    return size[3] if len(size) == 4 else 1


def find_inputs(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files and DICOM folders to read, in the order given, sorted within a folder.

    A folder with DICOM files is one input. In any other folder every image file and every DICOM folder is one;
    hidden files and label maps (see `find_label_maps`) are left out.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: Nothing was found.
    """
    places = [Path(path) for path in paths]
    found = [entry for place in places for entry in _expand(place)]
    if not found:
        searched = ", ".join(str(place) for place in places) or "an empty list"
        inner = any(entry.is_dir() for place in places for entry in _entries(place))
        cure = " Its subfolders are not searched: name them." if inner else ""
        raise ValueError(f"No image found in {searched}, expected DICOM or {' '.join(_IMAGES)}.{cure}")
    return found


def dicom_series(folder: Path) -> list[tuple[str, ...]]:
    """The DICOM files of each series of a folder in the order of its slices, the longest series first."""
    reader, place = sitk.ImageSeriesReader(), str(folder)
    found = (reader.GetGDCMSeriesFileNames(place, uid, True) for uid in reader.GetGDCMSeriesIDs(place, True))
    return sorted(found, key=len, reverse=True)


def find_label_maps(folder: str | os.PathLike[str]) -> list[Path]:
    """Files in a folder that their name (CT_label.nii.gz, CT.seg.nrrd) or header says to be label maps."""
    folder = Path(folder)
    files = (entry for entry in _entries(folder) if entry.is_file()) if folder.is_dir() else ()
    return [entry for entry in files if _suffix(entry, _IMAGES) and _is_called_labels(entry)]


def labelled_image(path: str | os.PathLike[str]) -> str:
    """Name without suffix of the image that a file's name (CT_label.nii.gz) says to be labelled there, or ""."""
    stem = _stem(Path(path), _IMAGES)
    match = _LABEL_NAME.search(stem)
    return stem[: match.start()] if match else ""


def is_label_map(path: str | os.PathLike[str], volume: Volume) -> bool:
    """Whether a volume that was read from `path` is a label map, by its name, header, colour table or voxels."""
    path = Path(path)
    ours = volume.array.dtype == np.uint8 and set(np.unique(volume.array).tolist()) <= _table_values(path)
    return ours or (path.is_file() and _is_called_labels(path)) or _holds_labels(volume.array)


def write_volume(path: str | os.PathLike[str], volume: Volume) -> None:
    """Writes an image as .nii.gz, .nii, .nrrd or .mha.

    Raises:
        ValueError: The suffix is unknown, or the axes are not at right angles and the format is NIfTI.
        OSError: The file cannot be written.
    """
    path = Path(path)
    _check_target(path, volume, _WRITTEN)
    with atomic_write(path) as temporary:
        _write_itk(temporary, volume)


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
    _check_target(path, labels, _SEGMENTATIONS)
    present = _present(labels, structures)
    if _suffix(path, _SEGMENTATIONS) == ".seg.nrrd":
        with atomic_write(path) as temporary:
            _write_seg_nrrd(temporary, labels, present, source)
        return [path]
    table = path.with_name(f"{_stem(path, _SEGMENTATIONS)}.csv")
    with atomic_write(table) as temporary_table, atomic_write(path) as temporary_image:
        _write_color_table(temporary_table, present)
        _write_itk(temporary_image, labels)
    return [path, table]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary file beside `path` that replaces it on success and is removed on any failure.

    Missing folders are made.

    Raises:
        WriteError: The disk is full, or a writer's error names the temporary file.
        OSError: The folder cannot be made or written, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"Cannot write {path}: it is a folder.")
    temporary = path.with_name(f".{uuid4().hex[:8]}-{path.name.lower()}")  # ITK knows small letters alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
    except OSError as error:
        raise WriteError(f"Cannot write into the folder {path.parent}: {error.strerror}.") from error
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own in the place, for the owner's eyes only
        temporary.replace(path)
    except OSError as error:
        if error.errno in _FULL:
            raise WriteError(f"Cannot write {path}: the disk is full; make room and try again.") from error
        if temporary.name in str(error):
            raise WriteError(str(error).replace(str(temporary), str(path))) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_room(file: str | os.PathLike[str]) -> None:
    """Has the system say that the disk is full where a library could not write a file, which it does not tell itself.

    Raises:
        OSError: The disk takes no more of it.
    """
    try:
        with Path(file).open("ab") as written:
            written.write(bytes(1 << 20))
    except OSError as error:
        if error.errno in _FULL:
            raise


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
    return bool(_suffix(path, _IMAGES)) and not _is_called_labels(path)


def _is_called_labels(path: Path) -> bool:
    """By its name, or by the fields that Slicer gives a segmentation."""
    if _LABEL_NAME.search(_stem(path, _IMAGES)):
        return True
    header = b""
    if _suffix(path, (".nrrd", ".nhdr")):
        with suppress(OSError), path.open("rb") as file:  # said when it is read
            header = file.read(1 << 16).partition(b"\n\n")[0]
    return re.search(rb"^Segment\w+:=", header, re.MULTILINE) is not None


def _table_values(path: Path) -> set[int]:
    """Background and the label values of a table of `write_segmentation` beside a file; empty without one."""
    table = path.with_name(f"{_stem(path, _IMAGES)}.csv")
    begin = ",".join(_TABLE)
    try:
        lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
        return (
            {0, *(int(line.partition(",")[0]) for line in lines[1:])} if lines and lines[0].startswith(begin) else set()
        )
    except (OSError, ValueError):
        return set()


def _holds_labels(array: NDArray[Any]) -> bool:
    """Whether voxels [k, j, i] are labels: few and small whole numbers, most of them equal to their neighbour."""
    highest = _highest_label(_MOST_LABELS)
    counts, alike = np.zeros((2, highest + 1), np.int64)
    for plane in array:
        if not (plane.min() >= 0 and plane.max() <= highest) or (plane.dtype.kind == "f" and (plane % 1).any()):
            return False
        values = plane.astype(np.intp)
        right = values[:, 1:]
        counts += np.bincount(right.ravel(), minlength=highest + 1)
        if np.count_nonzero(counts) > _MOST_LABELS:
            return False
        alike += np.bincount(right[right == values[:, :-1]], minlength=highest + 1)
    present = np.flatnonzero(counts[1:]) + 1
    if counts.argmax() > 0 or not present.size or present[-1] > _highest_label(present.size):
        return False
    return bool(np.median(alike[present] / counts[present]) >= _ALIKE)


def _highest_label(count: int) -> int:
    """The highest that so many labels go to; the grey values of a drawn image go higher."""
    return 16 + 8 * count


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


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns every failure into one sentence that names the file."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    try:
        with _silent_itk():
            yield
    except ValueError as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
    except MemoryError as error:
        raise ValueError(f"Cannot read {path}: there is not enough memory for it, or its header is damaged.") from error
    except RuntimeError as error:  # ITK's own message is a trace of its source code
        raise ValueError(f"Cannot read {path}: it is damaged, incomplete or not what its name says.") from error


def _read(path: Path, frame: int | None) -> Volume:
    if path.is_dir():
        return _read_series(path)
    if path.stat().st_size == 0:
        raise ValueError("it is empty.")
    if _suffix(path, _NIFTI):
        return read_nifti(path, frame)
    if _suffix(path, _METAIMAGE):
        check_metaimage(path)
    if _suffix(path, _IMAGES) or _is_dicom(path):
        return _read_itk(path, frame)
    raise ValueError(f"its kind is unknown, expected DICOM or {' '.join(_IMAGES)}.")


def _read_itk(path: Path, frame: int | None) -> Volume:
    reader = _opened(path)
    size = reader.GetSize()
    check_spacing(reader.GetSpacing()[:3])
    chosen = choose_frame(size[3] if len(size) == 4 else 1, frame)
    if len(size) == 4:
        reader.SetExtractSize([*size[:3], 0])
        reader.SetExtractIndex([0, 0, 0, chosen])
    volume = _from_itk(reader.Execute(), _tag(reader, "0008|0060"))
    return _thickened(volume, reader) if _is_dicom(path) else volume


def _read_series(folder: Path) -> Volume:
    series = dicom_series(folder)
    if not series:
        raise ValueError("the folder holds no DICOM image.")
    volume = _read_slices(series[0])
    if others := ", ".join(f"{_series_name(names[0])} ({len(names)})" for names in series[1:]):
        chosen = f"{_series_name(series[0][0])} ({len(series[0])} slices)"
        volume = replace(
            volume, warnings=(f"Only the longest series {chosen} was read, not {others}.", *volume.warnings)
        )
    return volume


def _read_slices(files: Sequence[str]) -> Volume:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    volume = _from_itk(reader.Execute(), reader.GetMetaData(0, "0008|0060"))
    if len(files) == 1:
        return _thickened(volume, _opened(files[0]))
    return _placed(volume, _positions(reader, len(files)))


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
    return Volume(array, Grid(array.shape, LPS @ affine), modality=known)


def _opened(path: Path | str) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    if _suffix(Path(path), _METAIMAGE):
        reader.SetImageIO("MetaImageIO")  # which ITK finds by small letters alone
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
    affine[:3, 2] = LPS[:3, :3] @ (positions[-1] - positions[0]) / (len(positions) - 1)
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    if gaps.min() < _UNEVEN * gaps.max():
        raise ValueError("several slices lie at one place, expected a series of one phase, echo or time.")
    volume = replace(volume, grid=Grid(volume.grid.shape, affine))
    if np.ptp(gaps) > _UNEVEN * np.median(gaps):
        gap = f"{gaps.min():.2f} to {gaps.max():.2f} mm"
        volume = _warned(volume, f"The slices are unevenly spaced ({gap}), some may be missing.")
    return volume


def _thickened(volume: Volume, reader: sitk.ImageFileReader) -> Volume:
    """Gives a slice alone its Slice Thickness, where ITK found no Spacing Between Slices and took 1 mm."""
    thickness = _number(_tag(reader, "0018|0050"))
    if volume.grid.shape[0] > 1 or _number(_tag(reader, "0018|0088")) > 0 or not 0 < thickness < math.inf:
        return volume
    affine = np.array(volume.grid.affine)
    affine[:3, 2] = volume.grid.direction[:, 2] * thickness
    return replace(volume, grid=Grid(volume.grid.shape, affine))


def _number(text: str) -> float:
    """The number that a tag holds, 0 where it holds none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _warned(volume: Volume, warning: str) -> Volume:
    return replace(volume, warnings=(*volume.warnings, warning))


@contextmanager
def _silent_itk() -> Iterator[None]:
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


# Writing


def _check_target(path: Path, volume: Volume, suffixes: tuple[str, ...]) -> None:
    if not _suffix(path, suffixes):
        raise ValueError(f"Cannot write {path}: expected a name that ends in {' '.join(suffixes)}.")
    if _suffix(path, _NIFTI) and not are_orthogonal(volume.grid.direction):
        raise ValueError(f"Cannot write {path}: NIfTI needs axes at right angles, choose .nrrd.")


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
    import nrrd

    affine = LPS @ labels.grid.affine
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
    model = source.encode("ascii", "replace").decode().replace("|", "/")
    tags = {
        "TerminologyEntry": entry.terminology,
        "DICOM.SegmentAlgorithmType": "AUTOMATIC",
        "DICOM.SegmentAlgorithmName": model,
        MADE_BY: model,
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


def _write_itk(path: Path, volume: Volume) -> None:
    image = sitk.GetImageFromArray(volume.array)
    affine = LPS @ volume.grid.affine
    image.SetSpacing(volume.grid.spacing)
    image.SetDirection((affine[:3, :3] / volume.grid.spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    try:
        with _silent_itk():
            sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        check_room(path)
        raise OSError(f"Cannot write {path}: {str(error).splitlines()[-1]}") from error
    if _suffix(path, _NIFTI) and _unpacked_bytes(path) != (_HEADER_BYTES + volume.array.nbytes) % 2**32:
        check_room(path)
        raise OSError(f"Cannot write {path}: it came out incomplete; check the disk and try again.")


def _unpacked_bytes(path: Path) -> int:
    """Length of a NIfTI file, unpacked as the end of a gzip file says, modulo 2^32; ITK does not tell a cut one."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if _suffix(path, _NIFTI) == ".nii":
            return size % 2**32
        file.seek(max(0, size - 4))
        return int.from_bytes(file.read(4), "little")


def _write_color_table(path: Path, present: Mapping[int, Structure]) -> None:
    columns = [f"{part}_{item}" for part in _CODES for item in ("CodingScheme", "CodeValue", "CodeMeaning")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_TABLE, *columns])
        for value, entry in present.items():
            codes: list[Code | None] = [getattr(entry, field) for field in _CODES.values()]
            texts = (text for code in codes for text in (_texts(code)))
            writer.writerow([value, entry.name, *entry.color, 255, *texts])


def _texts(code: Code | None) -> tuple[str, str, str]:
    return (code.scheme, code.value, code.meaning) if code else ("", "", "")
