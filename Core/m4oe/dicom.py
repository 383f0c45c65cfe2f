"""Segmentations as DICOM SEG."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import atomic_write, dicom_files
from .geometry import LPS, Grid, Volume
from .labels import Code, structure


def write_dicom_seg(
    path: Path, labels: Volume, structures: Mapping[int, str], model: str, version: str, source: Path
) -> None:
    """Writes the structures that have voxels as segments of algorithm type AUTOMATIC.

    Args:
        path: The file to write.
        labels: uint8 [k, j, i], 0 for background, on the grid of the series as `read_volume` gives it.
        structures: Key of the structure of every label value.
        model: Name of the model.
        version: Its version.
        source: The DICOM folder, or one file of the series.

    Raises:
        ValueError: highdicom is missing, nothing was found, a structure has no code, or the series lacks what
            DICOM SEG needs.
        OSError: The file cannot be written.
    """
    try:
        import highdicom
        import pydicom
    except ImportError as error:
        raise ValueError(f"DICOM SEG needs the package highdicom ({error}): pip install highdicom") from error
    present = [int(value) for value in np.unique(labels.array) if value]
    if not present:
        raise ValueError("nothing was found, and DICOM SEG cannot be empty; choose another format")
    numbers = np.zeros(256, np.uint8)
    numbers[present] = range(1, len(present) + 1)
    try:
        images = [pydicom.dcmread(file) for file in dicom_files(source)]
        with warnings.catch_warnings():  # patients of public data have numbers for names
            warnings.filterwarnings("ignore", "The string .* is unlikely to represent the intended person")
            segmentation = highdicom.seg.Segmentation(
                source_images=images,
                pixel_array=numbers[labels.array],
                segmentation_type="BINARY",
                segment_descriptions=[
                    _description(number, structures[value], model, version)
                    for number, value in enumerate(present, start=1)
                ],
                series_instance_uid=highdicom.UID(),
                series_number=300,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="M4oE",
                manufacturer_model_name=model,
                software_versions=version,
                device_serial_number="0",
            )
        segmentation.SeriesDescription = f"{model} {version}"[:64]
    except (AttributeError, KeyError, TypeError, ValueError, pydicom.errors.InvalidDicomError) as error:
        raise ValueError(f"no DICOM SEG can be made of {source}: {error}; choose another format") from error
    with atomic_write(path) as temporary:
        segmentation.save_as(temporary)


def read_dicom_seg(path: Path) -> tuple[Volume, dict[int, tuple[str, str]]]:
    """Reads a DICOM SEG without overlaps; slices without any segment may be missing at both ends.

    Returns:
        The numbers of the segments as labels, and by number the tracking ID and the label of each.

    Raises:
        ValueError: highdicom is missing, or the file is no such DICOM SEG.
    """
    try:
        import highdicom
        import pydicom
    except ImportError as error:
        raise ValueError(f"{path} needs the package highdicom ({error}): pip install highdicom") from error
    try:
        segmentation = highdicom.seg.segread(path)
        volume = segmentation.get_volume(combine_segments=True)
        about = [segmentation.get_segment_description(number) for number in segmentation.segment_numbers]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, pydicom.errors.InvalidDicomError) as error:
        raise ValueError(f"Cannot read {path} as DICOM SEG: {error}") from error
    affine = LPS @ volume.affine[:, [2, 1, 0, 3]]
    names = {each.segment_number: (each.tracking_id or "", each.segment_label) for each in about}
    return Volume(volume.array, Grid(volume.array.shape, affine)), names


def _description(number: int, key: str, model: str, version: str) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    entry = structure(key)
    if entry.category is None or entry.type is None:
        raise ValueError(f"the structure {key} has no code")
    description = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=entry.name,
        segmented_property_category=_concept(entry.category),
        segmented_property_type=_concept(entry.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=f"{model} {version}"[:64], family=codes.DCM.ArtificialIntelligence, version=version
        ),
        tracking_uid=highdicom.UID(),
        tracking_id=entry.key,
        anatomic_regions=[_concept(entry.region)] if entry.region else None,
        display_color=highdicom.color.CIELabColor.from_rgb(*entry.color),
    )
    if entry.type_modifier:
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_concept(entry.type_modifier)]
    if entry.region and entry.region_modifier:
        region = description.AnatomicRegionSequence[0]
        region.AnatomicRegionModifierSequence = [_concept(entry.region_modifier)]
    return description


def _concept(code: Code) -> Any:
    import highdicom

    return highdicom.sr.CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)
