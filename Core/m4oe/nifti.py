"""NIfTI-1 files, parsed here and not by ITK.

ITK refuses sheared headers, replaces a zero spacing by 1 mm and fills truncated files up without a word. The message
of an error is half a sentence that starts with "it"; the caller names the file.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .geometry import Grid, Volume, nearest_rotation

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
_CHUNK = 1 << 24  # bytes read at once
_COSINE = 1e-3  # between two axes from which on they are not at right angles


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says of its voxels before they are read.

    Attributes:
        dtype: Of the voxels as they are stored.
        frames: More than 1 where it is 4-D.
        warnings: What had to be assumed, one sentence each.
    """

    grid: Grid
    dtype: np.dtype[Any]
    frames: int
    warnings: tuple[str, ...] = ()


def read_nifti(path: Path, frame: int | None) -> Volume:
    """Reads one frame of a file, packed or not, with the affine that ITK and Slicer choose.

    A sform that ITK refuses is replaced by the nearest rotation, with a warning.

    Raises:
        ValueError: The file is damaged, incomplete or no single-file NIfTI-1 of real numbers, its spacing is not above
            zero, or it has no such frame.
    """
    with _unpacked(path) as file:
        header, order = _header(file.read(_HEADER.itemsize))
        array = _voxels(file, header, order, frame)
    affine, warnings = _affine(header)
    return Volume(array, Grid(array.shape, affine), warnings=warnings)


def read_nifti_header(path: Path) -> Header:
    """Reads the header alone, and sees at the file's length whether the voxels are there.

    Raises:
        ValueError: As `read_nifti`.
    """
    with _unpacked(path) as file:
        header, order = _header(file.read(_HEADER.itemsize))
    *shape, frames = _sizes(header)
    dtype = np.dtype(f"{order}{_TYPES[int(header['datatype'])]}")
    needed = max(352, int(header["vox_offset"])) + math.prod((*shape, frames)) * dtype.itemsize
    if not _holds(path, needed):
        read_nifti(path, frames - 1)  # says what is missing, or that there is only more than expected
    affine, warnings = _affine(header)
    i, j, k = shape
    return Header(Grid((k, j, i), affine), dtype, frames, warnings)


def choose_frame(frames: int, frame: int | None) -> int:
    """The index of the frame to read: `frame`, or the only one, for a folder may hold 3-D and 4-D images.

    Raises:
        ValueError: There is no such frame, or several to choose from.
    """
    if frames == 1:
        return 0
    if frame is None:
        choice = f"0 to {frames - 1}, by --frame N in a command, frame=N in Python, or the column frame of a table"
        raise ValueError(f"it has {frames} frames, choose one of {choice}.")
    if not 0 <= frame < frames:
        raise ValueError(f"it has no frame {frame}, its frames are 0 to {frames - 1}.")
    return frame


def check_spacing(spacing: Iterable[float]) -> None:
    """Refuses voxel sizes (mm) that are not finite and above zero.

    Raises:
        ValueError: One is not.
    """
    sizes = [float(size) for size in spacing]
    if not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"its voxel spacing is {' x '.join(f'{size:g}' for size in sizes)} mm, expected above zero.")


def are_orthogonal(columns: NDArray[np.float64]) -> bool:
    """Whether unit columns [3, 3] are at right angles, but for rounding."""
    return bool(np.abs(columns.T @ columns - np.eye(3)).max() < _COSINE)


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """Opens by content, for plain files are at times called .nii.gz."""
    try:
        with gzip.open(path) if _is_zipped(path) else path.open("rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError("it is damaged or incomplete, its compressed data do not unpack.") from error


def _is_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _holds(path: Path, size: int) -> bool:
    """Whether the file's length, or the unpacked length in its last four bytes (modulo 2^32), tells of `size` bytes."""
    with path.open("rb") as file:
        if not _is_zipped(path):
            return file.seek(0, io.SEEK_END) >= size
        file.seek(-4, io.SEEK_END)
        return int.from_bytes(file.read(4), "little") == size % 2**32


def _header(data: bytes) -> tuple[Any, str]:
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
    if not 0 <= header["vox_offset"] < 2**31:
        raise ValueError(f"its voxels begin at byte {header['vox_offset']:g}, expected a place in the file.")
    check_spacing(header["pixdim"][1 : 1 + min(count, 3)])
    return header, order


def _sizes(header: Any) -> tuple[int, int, int, int]:
    """Number of voxels along i, j, k, and of frames."""
    i, j, k, t = (int(size) if axis < header["dim"][0] else 1 for axis, size in enumerate(header["dim"][1:5]))
    return i, j, k, t


def _voxels(file: io.BufferedReader | gzip.GzipFile, header: Any, order: str, frame: int | None) -> NDArray[Any]:
    """Voxels [k, j, i] of one frame."""
    i, j, k, frames = _sizes(header)
    chosen = choose_frame(frames, frame)
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


def _affine(header: Any) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The affine that ITK, and so Slicer, chooses; the nearest rotation to a sform that ITK refuses."""
    qform_code, sform_code = header["codes"].tolist()
    columns, spacing = header["srow"][:, :3].astype(np.float64), header["pixdim"][1:4].astype(np.float64)
    flat = header["dim"][0] < 3
    if flat:
        columns[:, 2], spacing[2] = np.cross(columns[:, 0], columns[:, 1]), 1.0
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    warnings: tuple[str, ...] = ()
    if sform_code and (not qform_code or (sform_code == 1 and are_orthogonal(columns / spacing))):
        lengths = np.linalg.norm(columns, axis=0)
        check_spacing(lengths)
        spacing[: 2 if flat else 3] = lengths[: 2 if flat else 3]
        affine[:3, :3], affine[:3, 3] = nearest_rotation(columns / lengths), header["srow"][:, 3]
        if not are_orthogonal(columns / lengths):
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
