"""The report of a run and the modality of its volume, kept with the segmentation, also in saved scenes."""

from __future__ import annotations

import base64
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m4oe.jobs import Report
    from m4oe.spec import ModelSpec

_MODALITY = "M4oE.modality"
_ATTRIBUTE = "M4oE.report"  # JSON in base64, as MRML ends values at ":"


def setReport(segmentationNode: Any, report: Report, spec: ModelSpec) -> None:
    """Keeps the report with the segmentation, and the modality of the expert that weighed most."""
    most = max(report.expert_weights, key=report.expert_weights.__getitem__)
    segmentationNode.SetAttribute(_MODALITY, spec.experts[spec.expert_index(most)].modality)
    segmentationNode.SetAttribute(_ATTRIBUTE, base64.b64encode(report.to_json().encode()).decode())


def modalityOf(segmentationNode: Any) -> str:
    """ "CT", "MR", or "" where it is not known."""
    return segmentationNode.GetAttribute(_MODALITY) or ""


def reportOf(segmentationNode: Any) -> Report | None:
    """The report of the run that made a segmentation; None where it is none of ours, or cannot be read."""
    from m4oe.jobs import Report

    text = segmentationNode.GetAttribute(_ATTRIBUTE) if segmentationNode is not None else None
    try:
        return Report.from_json(base64.b64decode(text).decode()) if text else None
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # of another version, or damaged
        logging.warning("M4oE: the report of %s cannot be read: %s", segmentationNode.GetName(), error)
        return None
