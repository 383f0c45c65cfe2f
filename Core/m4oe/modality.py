"""What a volume itself says about its modality: a DICOM header, or Hounsfield units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .geometry import CANONICAL_AXES, Volume

_SAMPLE_VOXELS = 2_000_000
_HU_OFFSET = 1024.0
_AIR_HU, _AIR_SHARE = -200.0, 0.005  # some MR has a few values as low, by resampling


@dataclass(frozen=True)
class Evidence:
    """What a volume's header and intensities say about its modality.

    Attributes:
        modality: "CT" or "MR": whose intensity rule applies.
        certain: Whether the DICOM tag or Hounsfield units prove it.
        offset: Added to the stored values to get HU (0 unless the CT was stored with an offset).
        doubt: A sentence for the user, or "".
    """

    modality: str
    certain: bool
    offset: float = 0.0
    doubt: str = ""


def modality_evidence(volume: Volume) -> Evidence:
    """Judges a volume by its DICOM modality, then by its intensities: only HU are clearly negative."""
    sample = finite_sample(volume.to_axes(CANONICAL_AXES).array)
    if sample.size == 0 or volume.modality == "MR":
        return Evidence(volume.modality or "MR", certain=volume.modality is not None)
    if np.mean(sample <= _AIR_HU) > _AIR_SHARE:
        return Evidence("CT", certain=True)
    if _looks_like_offset_hu(sample):
        doubt = f"values look like HU + {_HU_OFFSET:.0f}; {_HU_OFFSET:.0f} was subtracted"
        return Evidence("CT", certain=True, offset=-_HU_OFFSET, doubt=doubt)
    if volume.modality == "CT":
        return Evidence("CT", certain=True)
    return Evidence("MR", certain=False)


def finite_sample(array: NDArray[Any]) -> NDArray[Any]:
    """Values on a regular sub-grid of about two million voxels, without NaN and infinity."""
    step = max(1, int(np.ceil((array.size / _SAMPLE_VOXELS) ** (1 / 3))))
    sample = array[::step, ::step, ::step].ravel()
    return sample[np.isfinite(sample)].astype(np.float32)


def _looks_like_offset_hu(sample: NDArray[Any]) -> bool:
    """Whether a non-negative volume has CT's two peaks, air and soft tissue, 1024 too high, and little between."""
    if sample.min() < 0 or sample.max() < 1100:
        return False
    air, between, tissue = (
        float(np.mean((sample >= low) & (sample < high))) for low, high in ((0, 150), (250, 800), (850, 1250))
    )
    return air > 0.05 and tissue > 0.1 and between < 0.25 * tissue
