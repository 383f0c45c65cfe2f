"""The catalogue of structures: every organ, vessel, bone, muscle and lesion that a label may mean.

Read from structures.csv: codes as scheme^value^meaning, colours as R G B, volumes as low typical high.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType

MADE_BY = "M4oE.Model"  # tag of the segments that M4oE made: the tags of DICOM are those of other tools, too
_CONTEXTS = {
    "GeneralAnatomy": "Segmentation category and type - 3D Slicer General Anatomy list",
    "DICOM-Master": "Segmentation category and type - DICOM master list",
    "TotalSegmentator": "Segmentation category and type - Total Segmentator",
}
_REGION_CONTEXT = "Anatomic codes - DICOM master list"


@dataclass(frozen=True)
class Code:
    """A term of a coding scheme, such as SCT 10200004 Liver."""

    scheme: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Structure:
    """An organ or lesion.

    Attributes:
        key: Our lower-case id, such as "kidney_left".
        name: For people, such as "Left kidney".
        kind: "organ", "vessel", "bone", "muscle" or "lesion".
        laterality: "left", "right", "both" (one label for both sides), "unspecified" or "none".
        category: What sort of thing it is; None where the structure has no code.
        type: The structure itself, or the kind of lesion.
        type_modifier: Its side.
        region: The organ that a lesion lies in.
        region_modifier: That organ's side.
        color: Red, green and blue, 0 to 255.
        volume_ml: Smallest, typical and largest volume seen in patients (0: smallest unknown). For warnings
            only: these are no clinical normal values.
        volume_depends_on_fov: Small volumes are normal where the scan cuts the structure.
        nsd_tolerance_mm: Tolerance of the normalised surface Dice.
        parent: Key of the structure that this one is part of.
        context: Slicer's list of terms that holds the code.
    """

    key: str
    name: str
    kind: str
    laterality: str
    category: Code | None
    type: Code | None
    type_modifier: Code | None
    region: Code | None
    region_modifier: Code | None
    color: tuple[int, int, int]
    volume_ml: tuple[float, float, float] | None
    volume_depends_on_fov: bool
    nsd_tolerance_mm: float | None
    parent: str | None
    context: str

    @property
    def terminology(self) -> str:
        """Slicer's terminology entry for a segment; empty where the structure has no code."""
        if self.type is None:
            return ""
        terms = [_triplet(code) for code in (self.category, self.type, self.type_modifier)]
        return "~".join([self.context, *terms, _REGION_CONTEXT, _triplet(self.region), _triplet(self.region_modifier)])


@cache
def catalogue() -> Mapping[str, Structure]:
    """All structures by key, in the order of the file."""
    with (Path(__file__).parent / "structures.csv").open(encoding="utf-8", newline="") as file:
        return MappingProxyType({row["key"]: _structure(row) for row in csv.DictReader(file)})


def structure(key: str) -> Structure:
    """The structure of that key.

    Raises:
        ValueError: There is none; names the keys that look alike.
    """
    found = catalogue().get(key)
    if found is None:
        alike = _alike(key, catalogue()) or ["liver", "kidney_left", "liver_tumor"]
        raise ValueError(f"There is no structure {key!r}, expected a key such as {', '.join(alike)}.")
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Such as " (did you mean liver?)", or nothing; structures are known by key and by name."""
    return "".join(f" (did you mean {each}?)" for each in _alike(name, known)[:1])


def _alike(name: str, known: Iterable[str]) -> list[str]:
    names = {_letters(each): each for each in known}
    names |= {_letters(catalogue()[key].name): key for key in [*names.values()] if key in catalogue()}
    return list(dict.fromkeys(names[each] for each in get_close_matches(_letters(name), names, n=3)))


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _structure(row: Mapping[str, str]) -> Structure:
    red, green, blue = (int(value) for value in row["color"].split())
    volumes = tuple(float(value) for value in row["volume_ml"].split())
    return Structure(
        key=row["key"],
        name=row["name"],
        kind=row["kind"],
        laterality=row["laterality"],
        category=_code(row["category"]),
        type=_code(row["type"]),
        type_modifier=_code(row["type_modifier"]),
        region=_code(row["region"]),
        region_modifier=_code(row["region_modifier"]),
        color=(red, green, blue),
        volume_ml=(volumes[0], volumes[1], volumes[2]) if volumes else None,
        volume_depends_on_fov=row["volume_depends_on_fov"] == "yes",
        nsd_tolerance_mm=float(row["nsd_tolerance_mm"]) if row["nsd_tolerance_mm"] else None,
        parent=row["parent"] or None,
        context=_CONTEXTS.get(row["context"], ""),
    )


def _code(text: str) -> Code | None:
    return Code(*text.split("^")) if text else None


def _triplet(code: Code | None) -> str:
    return f"{code.scheme}^{code.value}^{code.meaning}" if code else "^^"


def ancestry(key: str) -> Iterator[str]:
    """A structure and those that it is part of, from small to large."""
    current: str | None = key
    while current:
        yield current
        current = structure(current).parent
