"""Reads label maps together with the structure that every label value means.

A .seg.nrrd says it in its segments, other files in a colour table (.csv) beside them, as `files.write_segmentation`
writes it; for the rest somebody has to say it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dicom import read_dicom_seg
from .files import read_volume
from .geometry import LPS, Grid, Volume
from .labels import catalogue
from .names import BACKGROUND, delimiter, key_of, named_rows

SUFFIXES = (".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".dcm")
_HIGHEST = 65535  # label value
_WHOLE = 1e-3  # how far a label value stored as a float may lie from a whole number


class _Segment(NamedTuple):
    name: str
    key: str | None  # None: no structure of ours
    layer: int
    value: int  # in its layer


def read_label_map(path: Path, meanings: Mapping[int, str] | None = None) -> tuple[Volume, dict[int, str]]:
    """Reads a label map and the key of the structure of each of its values.

    Segments in several layers, as Slicer stores overlapping ones, are merged into one map.

    Args:
        path: Of one of SUFFIXES.
        meanings: Structure by label value, where the file itself does not say it.

    Returns:
        The map, of whole numbers, with a warning for what has no structure; and the structures by value, whether they
        have voxels or not.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, is no label map, or has segments that overlap; or nothing says what its values
            mean, or none of them is a structure.
    """
    named = _segments(path)
    keys, segments = _keys(path, named, meanings), named or {}
    layered = _is_layered(segments.values())
    try:
        is_seg = path.name.lower().endswith(".dcm")
        volume = _merged(path, segments) if layered else read_dicom_seg(path)[0] if is_seg else read_volume(path)
        volume = replace(volume, array=_whole_numbers(volume.array))
    except _NotLabels as error:
        raise ValueError(f"{path} is no label map: {error}.") from error
    values = segments if layered else label_values(volume.array)
    strange = [value for value in values if value not in keys]
    if not strange:
        return volume, keys
    listed = ", ".join(f"{value} ({segments[value].name})" if value in segments else f"{value}" for value in strange)
    if not keys:
        raise ValueError(
            f"No label of {path} is a known structure ({listed}); say what they are with a table of values."
        )
    warning = f"labels without a structure count as background: {listed}"
    return replace(volume, warnings=(*volume.warnings, warning)), keys


def label_keys(path: Path, meanings: Mapping[int, str] | None = None) -> dict[int, str]:
    """The structures by label value that `read_label_map` would find, without reading the voxels."""
    return _keys(path, _segments(path), meanings)


def uncropped(volume: Volume, other: Volume) -> Volume:
    """A map on the smallest grid that also holds the other one's voxels, with background around it.

    Slicer may crop a .seg.nrrd to its segments. A map whose voxels are not those of the other's lattice, or lie all
    outside of it, comes back as it is.

    Args:
        volume: The map that may be cropped.
        other: A map of the same order of axes.
    """
    start = np.rint(np.linalg.solve(volume.grid.affine, other.grid.affine[:, 3])[:3]).astype(int)[::-1]  # (k, j, i)
    here, there = np.array(volume.grid.shape), np.array(other.grid.shape)
    low, high = np.minimum(0, start), np.maximum(here, start + there)
    apart = (start >= here).any() or (start + there <= 0).any()
    if apart or not other.grid.is_close(_part(volume.grid, start, there)):
        return volume
    array = np.zeros(high - low, volume.array.dtype)
    array[tuple(slice(-first, -first + size) for first, size in zip(low, here, strict=True))] = volume.array
    return replace(volume, array=array, grid=_part(volume.grid, low, high - low))


def _part(grid: Grid, start: NDArray[np.int_], shape: NDArray[np.int_]) -> Grid:
    """The voxels of a grid's lattice from index `start` (k, j, i) on."""
    affine = np.array(grid.affine)
    affine[:3, 3] += affine[:3, :3] @ start[::-1]
    k, j, i = shape.tolist()
    return Grid((k, j, i), affine)


def find_structure(name: str, terminology: str = "") -> str | None:
    """The key of the structure with those codes, else with that key or name, whatever the case and order of its words.

    Args:
        name: Key or name, such as "kidney_left" or "Left kidney".
        terminology: Slicer's terminology entry of a segment.
    """
    key = _keys_by_codes().get(_codes(terminology)) or key_of(name)
    return None if key == BACKGROUND else key


def label_values(array: NDArray[Any]) -> list[int]:
    """The values above zero that a label map of unsigned numbers has."""
    counts = np.zeros(int(array.max()) + 1, np.int64)
    for plane in array:
        counts += np.bincount(plane.reshape(-1), minlength=counts.size)
    return [int(value) for value in np.flatnonzero(counts) if value]


def file_stem(path: Path) -> str:
    """The name of a label map without its suffix; empty where the suffix is another one."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), path.name)
    return path.name[: -len(suffix)]


# Names


def _keys(path: Path, segments: Mapping[int, _Segment] | None, meanings: Mapping[int, str] | None) -> dict[int, str]:
    if segments is None and meanings is None:
        raise ValueError(
            f"{path} does not say which structures its labels are; give the label values, as in --labels "
            "1=liver,2=spleen, or a CSV or JSON file of them."
        )
    if not segments:  # a file may also say that it has none
        return dict(meanings or {})
    keys = {value: segment.key or (meanings or {}).get(value) for value, segment in segments.items()}
    return {value: key for value, key in keys.items() if key}


def _segments(path: Path) -> dict[int, _Segment] | None:
    """What the file or the colour table beside it says, by label value; None where they say nothing."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    name, table = path.name.lower(), path.with_name(f"{file_stem(path)}.csv")
    if name.endswith(".dcm"):
        named = read_dicom_seg(path)[1].items()
        return {
            value: _Segment(text, find_structure(key) or find_structure(text), 0, value) for value, (key, text) in named
        }
    segments = _nrrd_segments(path) if name.endswith(".nrrd") else {}
    if segments or name.endswith(".seg.nrrd"):
        return segments
    names = _color_table(table) if table.is_file() else None
    if names is None:
        return None
    return {value: _Segment(name, find_structure(name), 0, value) for value, name in names.items()}


def _nrrd_segments(path: Path) -> dict[int, _Segment]:
    """The segments by label value, or numbered from 1 where several layers use the same values."""
    import nrrd

    try:
        header = nrrd.read_header(str(path))
        numbers = sorted(int(found[1]) for field in header if (found := re.fullmatch(r"Segment(\d+)_ID", field)))
        segments = [_segment(header, number) for number in numbers]
    except (nrrd.NRRDError, ValueError, StopIteration) as error:  # the last of an empty file
        raise ValueError(f"Cannot read {path}: it is damaged, incomplete or not what its name says.") from error
    return {number if _is_layered(segments) else entry.value: entry for number, entry in enumerate(segments, start=1)}


def _segment(header: Mapping[str, Any], number: int) -> _Segment:
    ident, name, tags = (str(header.get(f"Segment{number}_{field}", "")) for field in ("ID", "Name", "Tags"))
    terminology = re.search(r"TerminologyEntry:([^|]*)", tags)
    key = find_structure(name, terminology[1] if terminology else "") or find_structure(ident)
    own_layer = number if header["dimension"] == 4 else 0  # Slicer before 4.11 wrote neither layer nor value
    layer, value = (header.get(f"Segment{number}_{field}") for field in ("Layer", "LabelValue"))
    return _Segment(name or ident, key, own_layer if layer is None else int(layer), 1 if value is None else int(value))


def _is_layered(segments: Iterable[_Segment]) -> bool:
    return len({segment.layer for segment in segments}) > 1


def _color_table(path: Path) -> dict[int, str] | None:
    """Names by label value; None where the file is a table of another kind."""
    text = path.read_text(encoding="utf-8-sig")
    if not {"LabelValue", "Name"} <= {*text.partition("\n")[0].split(delimiter(text))}:
        return None
    return {value: name for value, name in named_rows(text).items() if value}


@cache
def _keys_by_codes() -> dict[tuple[str, ...], str]:
    return {_codes(entry.terminology): entry.key for entry in catalogue().values() if entry.terminology}


def _codes(terminology: str) -> tuple[str, ...]:
    """The code values of Slicer's terminology entry: category, type and its modifier, region and its modifier."""
    return tuple(entry.split("^")[1] for entry in terminology.split("~") if "^" in entry)


# Voxels


class _NotLabels(Exception):
    """Half a sentence about why an array is no label map."""


def _whole_numbers(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself, or as uint16 where it is of a larger type, as of floats."""
    low, high = array.min(), array.max()
    if not 0 <= low <= high <= _HIGHEST:
        raise _NotLabels(f"its values run from {low:g} to {high:g}, expected whole numbers from 0 to {_HIGHEST}")
    if array.dtype.kind != "f" and array.itemsize <= 2:
        return array
    whole = np.empty(array.shape, np.uint16)
    for plane, target in zip(array, whole, strict=True):
        np.rint(plane, out=target, casting="unsafe")
        if np.abs(plane - target).max() > _WHOLE:
            raise _NotLabels("it holds fractions, expected whole numbers and not probabilities or intensities")
    return whole


def _merged(path: Path, segments: Mapping[int, _Segment]) -> Volume:
    """One map of all segments that are structures; the layers are the fastest axis of the file."""
    import nrrd

    try:
        array, header = nrrd.read(str(path), index_order="C")
    except (nrrd.NRRDError, ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"Cannot read {path}: it is damaged or incomplete.") from error
    labels = np.zeros(array.shape[:3], np.uint8)
    for number, segment in segments.items():
        inside = array[..., segment.layer] == segment.value
        if segment.key is None:
            continue
        if labels[inside].any():
            raise _NotLabels(f"its segment {segment.name} overlaps another one, subtract one of them from the other")
        labels[inside] = number
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = header["space directions"][-3:].T, header["space origin"]
    to_ras = LPS if header["space"].lower() in ("left-posterior-superior", "lps") else np.eye(4)
    return Volume(labels, Grid(labels.shape, to_ras @ affine), name=file_stem(path))
