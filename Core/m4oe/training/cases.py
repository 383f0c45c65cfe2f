"""A case of a data set: its files, what its label values mean, and how it becomes an image and a label map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ..files import dicom_series, read_header, read_volume
from ..geometry import Grid, Volume

_WHOLE = 1e-3  # from a whole number, by which a label value may differ
_UNKNOWN = 255
_SPACING = 0.01  # part of the spacing by which a label's may differ from its image's


@dataclass(frozen=True)
class Finding:
    """Something that is wrong or worth knowing.

    Attributes:
        case: The case's id; empty where it is about the data set.
        severity: "error" keeps a case out of training, "warning" asks for a look, "note" tells what was assumed.
        sentence: What it is, and what to do.
    """

    case: str
    severity: str
    sentence: str


@dataclass(frozen=True)
class CaseFiles:
    """The files of a case.

    Attributes:
        case: Id, unique in its data set.
        patient: Id of the patient, who may have several cases.
        image: A file or DICOM folder; of several channels the first is used.
        label: A label map; a folder of masks named by structure; a folder of PNG slices in the order of the image's
            files; None where the case has none.
        modality: "CT" or "MR"; None where it is not known.
        expert: Which expert it trains, such as "mr_dixon", where the data set tells.
        labels: Structure key, or "background", by label value.
        annotated: Keys of the structures that were looked for, found or not; all others are unknown there.
        split: "val" or "test" where the data set itself or its cases.csv says so; "train" where cases.csv does, as
            val and test may be drawn from a data set's own training part.
    """

    case: str
    patient: str
    image: Path
    label: Path | None = None
    modality: str | None = None
    expert: str | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    annotated: tuple[str, ...] = ()
    split: str | None = None


def expert_of(case: CaseFiles) -> str:
    """The expert that a case trains: the one that it names, else that of its modality."""
    return case.expert or (case.modality or "").lower()


@dataclass(frozen=True)
class DataSet:
    """Cases with one origin.

    Attributes:
        name: As in "amos22"; for a data set of your own the folder's name.
        layout: How it was recognised: a public data set's title, "nnU-Net", "decathlon", "BIDS" or "pairs".
        folder: Holds all its files.
        findings: What was seen while listing.
    """

    name: str
    layout: str
    folder: Path
    cases: tuple[CaseFiles, ...]
    licence: str = ""
    findings: tuple[Finding, ...] = ()


def load_case(case: CaseFiles, structures: Sequence[str]) -> tuple[Volume, Volume]:
    """Reads a case for training.

    Args:
        case: One with a label.
        structures: Keys of the model; the label value of `structures[n]` is n + 1.

    Returns:
        The image, and its label map on the same grid, uint8. `case.annotated` says which structures to trust.

    Raises:
        ValueError: A file cannot be read, they do not belong together, or a label value has no meaning.
    """
    image = replace(read_volume(case.image, 0), name=case.case, modality=case.modality)
    labels = on_grid(read_labels(case), image.grid)
    array = np.empty(labels.array.shape, np.uint8)
    table = _table(case, structures)
    for plane, values in zip(array, whole_planes(labels.array), strict=True):
        index = values.astype(np.intp)
        np.take(table, index, out=plane, mode="clip")
        plane[(index < 0) | (index >= len(table))] = _UNKNOWN
        if (plane == _UNKNOWN).any():
            unknown = np.unique(values[plane == _UNKNOWN]).tolist()
            raise ValueError(f"{case.label} holds {unknown}, expected {sorted(case.labels)}.")
    return image, Volume(array, image.grid, case.case, warnings=labels.warnings)


def read_labels(case: CaseFiles) -> Volume:
    """The label map of a case in its own values and type, on its own grid.

    Raises:
        ValueError: It is missing or cannot be read.
    """
    if case.label is None:
        raise ValueError(f"The case {case.case} has no label.")
    if not case.label.is_dir():
        return read_volume(case.label, 0)
    slices = sorted(case.label.glob("*.png"))
    return _read_slices(case, slices) if slices else _read_masks(case)


def on_grid(labels: Volume, grid: Grid) -> Volume:
    """The label map with the geometry of its image; voxels are reordered where need be, never interpolated.

    A small difference of place is a header's mistake: voxels are taken one to one, with a warning.

    Raises:
        ValueError: Size, spacing or axes differ.
    """
    ordered = labels.to_axes(grid.axes)
    if ordered.grid.is_close(grid):
        return Volume(ordered.array, grid, labels.name, warnings=labels.warnings)
    if ordered.grid.shape != grid.shape:
        raise ValueError(f"Its label has {_text(labels.grid.shape[::-1])} voxels, the image {_text(grid.shape[::-1])}.")
    if not np.allclose(ordered.grid.spacing, grid.spacing, rtol=_SPACING):
        raise ValueError(f"Its label has voxels of {_text(ordered.grid.spacing)} mm, the image {_text(grid.spacing)}.")
    if labels.grid.axes != grid.axes:
        raise ValueError(
            f"Its label has axes {labels.grid.axes}, the image {grid.axes}, and they do not lie at one place; write "
            "the label anew with the image's header."
        )
    apart = np.abs(ordered.grid.affine[:3] - grid.affine[:3]) @ (*grid.shape[::-1], 1)
    warning = f"Label and image lie up to {np.linalg.norm(apart):.1f} mm apart, the voxels were taken one to one."
    return Volume(ordered.array, grid, labels.name, warnings=(*labels.warnings, warning))


def whole_planes(array: NDArray) -> Iterator[NDArray[np.integer]]:
    """Slices of a label map as integers.

    Raises:
        ValueError: A value is not a whole number, but for 0.001.
    """
    for plane in array:
        if plane.dtype.kind != "f":
            yield plane
            continue
        whole = np.rint(plane)
        if not (np.abs(plane - whole) <= _WHOLE).all():  # also where it is NaN
            raise ValueError("Its label holds values that are no whole numbers; a probability map?")
        yield whole.astype(np.int64)


def _read_masks(case: CaseFiles) -> Volume:
    """Joins masks, one file per structure, to one map."""
    masks = mask_files(case.label) if case.label else {}
    volumes = ((value, read_volume(masks[key], 0)) for value, key in case.labels.items())
    value, first = next(volumes, (0, None))
    if first is None:
        raise ValueError(f"The folder {case.label} holds no mask of a known structure.")
    joined = Volume((first.array > 0) * np.uint8(value), first.grid, case.case, warnings=first.warnings)
    for value, mask in volumes:
        if not mask.grid.is_close(joined.grid):
            raise ValueError(f"The masks {first.name} and {mask.name} in {case.label} lie on different grids.")
        joined.array[mask.array > 0] = value
    return joined


def mask_files(folder: Path) -> dict[str, Path]:
    """Files of a folder of masks, by the structure that they are named after."""
    files = sorted(path for path in folder.glob("*.nii.gz") if not path.name.startswith("."))
    return {path.name.removesuffix(".nii.gz").lower(): path for path in files}


def _read_slices(case: CaseFiles, slices: list[Path]) -> Volume:
    """Stacks PNG slices, whose names sort as those of the DICOM files do (and not as the slices lie: CHAOS)."""
    grid = read_header(case.image).grid
    files = next(iter(dicom_series(case.image)), ())
    if len(files) != len(slices):
        raise ValueError(f"{case.label} has {len(slices)} slices, the image {len(files)}.")
    by_name = dict(zip(sorted(files), slices, strict=True))
    array = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(by_name[file]))) for file in files])
    if array.shape != grid.shape:
        raise ValueError(f"Its label has {_text(array.shape[::-1])} voxels, the image {_text(grid.shape[::-1])}.")
    return Volume(array, grid, case.case)


def _table(case: CaseFiles, structures: Sequence[str]) -> NDArray[np.uint8]:
    """Model's label value by the case's; what was not looked for is background."""
    values = {key: value for value, key in enumerate(structures, start=1)}
    missing = [key for key in case.annotated if key not in values]
    if missing:
        raise ValueError(f"The model has no {', '.join(missing)}, which the case {case.case} has.")
    table = np.full(max(case.labels, default=0) + 1, _UNKNOWN, np.uint8)
    table[0] = 0
    for value, key in case.labels.items():
        table[value] = values[key] if key in case.annotated else 0
    return table


def _text(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)
