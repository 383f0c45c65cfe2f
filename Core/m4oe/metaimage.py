"""The header of MetaImage files (.mha, .mhd), checked before ITK reads it, as some mistakes in it end the process.

The message of an error is half a sentence that starts with "it"; the caller names the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

_BYTES = {
    "MET_CHAR": 1,
    "MET_UCHAR": 1,
    "MET_SHORT": 2,
    "MET_USHORT": 2,
    "MET_INT": 4,
    "MET_UINT": 4,
    "MET_LONG": 4,
    "MET_ULONG": 4,
    "MET_LONG_LONG": 8,
    "MET_ULONG_LONG": 8,
    "MET_FLOAT": 4,
    "MET_DOUBLE": 8,
}
_UNPACKED = 1032  # most bytes that one byte of deflate can stand for
_LONGEST = 1 << 24  # bytes of a header


def check_metaimage(path: Path) -> None:
    """Refuses a header whose sizes are impossible or do not fit the file.

    Raises:
        ValueError: It is no MetaImage of real numbers in 2 to 4 dimensions, or its voxels are incomplete.
    """
    fields, length = _header(path)
    sizes = _whole_numbers(fields, "DimSize")
    if _whole_numbers(fields, "NDims") != [len(sizes)] or not 2 <= len(sizes) <= 4 or min(sizes) < 1:
        raise ValueError(f"its DimSize is {sizes} and its NDims {fields['NDims']}, expected 2 to 4 dimensions.")
    kind = fields.get("ElementType", "missing")
    if kind not in _BYTES:
        raise ValueError(f"its ElementType is {kind}, expected {' '.join(_BYTES)}.")
    announced = math.prod([*sizes, *_whole_numbers(fields, "ElementNumberOfChannels", "1"), _BYTES[kind]])
    there = _bytes_of_data(path, fields["ElementDataFile"], length)
    if there is not None and _is_true(fields.get("BinaryData", "True")):
        _check_bytes(announced, there, fields)


def _header(path: Path) -> tuple[dict[str, str], int]:
    """The fields of the header, and its length in bytes; ElementDataFile ends it."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while file.tell() < _LONGEST and (line := file.readline(_LONGEST)):
            key, text = (*(part.strip() for part in re.split("[=:]", line.decode("latin-1"), maxsplit=1)), "")[:2]
            if key in fields and key in ("NDims", "DimSize"):
                raise ValueError(f"it is damaged, its header names {key} twice.")
            fields[key] = text
            if key == "ElementDataFile":
                return fields, file.tell()
    raise ValueError("it is not a MetaImage, or its header is damaged.")


def _whole_numbers(fields: Mapping[str, str], key: str, default: str = "missing") -> list[int]:
    text = fields.get(key, default)
    if not re.fullmatch(r"-?\d{1,18}(\s+-?\d{1,18})*", text):
        raise ValueError(f"its {key} is {text!r}, expected whole numbers.")
    return [int(word) for word in text.split()]


def _is_true(text: str) -> bool:
    return text[:1] in ("T", "t", "1")


def _bytes_of_data(path: Path, place: str, header: int) -> int | None:
    """Bytes that may be voxels; None where they lie in several files."""
    if place.upper() == "LOCAL":
        return path.stat().st_size - header
    if "LIST" in place or "%" in place:
        return None
    data = path.parent / place
    if not data.is_file():
        raise ValueError(f"its voxels should lie in {data}, which is no file.")
    return data.stat().st_size


def _check_bytes(announced: int, there: int, fields: Mapping[str, str]) -> None:
    if not _is_true(fields.get("CompressedData", "False")):
        if there < announced:
            raise ValueError(f"it is incomplete: {there} bytes of voxels, expected {announced}.")
        return
    packed = _whole_numbers(fields, "CompressedDataSize", str(there))[0]
    if not 0 < packed <= there or announced > _UNPACKED * packed:
        raise ValueError(f"it is incomplete: {there} bytes of compressed voxels, expected {packed} for {announced}.")
