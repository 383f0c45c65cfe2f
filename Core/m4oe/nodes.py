"""Slicer's nodes in and out, volume node -> Volume, labels -> segmentation node: all that knows MRML is here.

Slicer (or the slicer-core wheel) is imported inside the functions, so that the package imports without it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .geometry import Grid, Volume, foreground_box
from .labels import MADE_BY, structure

if TYPE_CHECKING:
    from slicer import (
        vtkMRMLNode,
        vtkMRMLScalarVolumeNode,
        vtkMRMLSegmentationNode,
        vtkOrientedImageData,
        vtkSegment,
        vtkSegmentation,
    )

_CLOSED_SURFACE = "Closed surface"
_MODALITY_TAG = "0008,0060"


def volume_from_node(volumeNode: vtkMRMLScalarVolumeNode) -> Volume:
    """The node's voxels [k, j, i] in their own type, a view, in the node's own frame.

    A parent transform is not applied: it may be anything, while anatomy as a rule lies as the scanner saw it.
    `segmentation_to_node` gives the result the same parent.

    Raises:
        ValueError: The node is no scalar volume, or it is empty.
    """
    import slicer.util
    import vtk

    _check_volume(volumeNode)
    array = slicer.util.arrayFromVolume(volumeNode)
    matrix = vtk.vtkMatrix4x4()
    volumeNode.GetIJKToRASMatrix(matrix)
    grid = Grid(array.shape, slicer.util.arrayFromVTKMatrix(matrix))
    return Volume(array, grid, volumeNode.GetName() or "", _modality(volumeNode))


def segmentation_to_node(
    labels: Volume,
    structures: Mapping[int, str],
    segmentationNode: vtkMRMLSegmentationNode,
    volumeNode: vtkMRMLScalarVolumeNode,
    source: str,
) -> None:
    """Puts labels into a segmentation node: one segment per structure present, all in one shared image.

    Segments that carry a key of `structures` as their id are replaced, or removed where the label is absent;
    all others stay as they are. A segmentation shown in 3D stays so.

    Args:
        labels: uint8 [k, j, i] in the volume node's frame, 0 is background.
        structures: Label value -> structure key, which becomes the segment's id.
        source: Model name and version, the name of the algorithm in DICOM.

    Raises:
        ValueError: A label has no structure, a structure is not in the catalogue, or
            `check_segmentation_node` refuses the node.
    """
    import slicer.util

    check_segmentation_node(segmentationNode, volumeNode, structures.values())
    segments = _segments(labels, structures, source)
    with slicer.util.NodeModify(segmentationNode):
        segmentationNode.CreateDefaultDisplayNodes()
        # The reference geometry is relative to the parent transform: parent first.
        segmentationNode.SetAndObserveTransformNodeID(volumeNode.GetTransformNodeID())
        segmentationNode.SetReferenceImageGeometryParameterFromVolumeNode(volumeNode)
        in_3d = segmentationNode.GetSegmentation().ContainsRepresentation(_CLOSED_SURFACE)
        _replace_segments(segmentationNode.GetSegmentation(), structures.values(), segments)
        if in_3d and segments:
            segmentationNode.CreateClosedSurfaceRepresentation()
    _place_beside(segmentationNode, volumeNode)


def check_segmentation_node(
    segmentationNode: vtkMRMLSegmentationNode, volumeNode: vtkMRMLScalarVolumeNode, keys: Collection[str]
) -> None:
    """Refuses a node that cannot take a result with the segment ids `keys`; worth asking before a long run.

    Raises:
        ValueError: No segmentation node, one whose other segments would move in space because its parent transform
            is not the volume's, or one that uses an id of the result for a segment not marked as made by M4oE.
    """
    if segmentationNode is None or not segmentationNode.IsA("vtkMRMLSegmentationNode"):
        raise ValueError(f"Expected a segmentation node for the result, got {_describe(segmentationNode)}.")
    others = set(segmentationNode.GetSegmentation().GetSegmentIDs()) - set(keys)
    if others and segmentationNode.GetTransformNodeID() != volumeNode.GetTransformNodeID():
        raise ValueError(
            f"'{segmentationNode.GetName()}' holds {len(others)} other segments, which would move: it is not "
            f"under the transform of '{volumeNode.GetName()}'. Choose a new segmentation or give both nodes "
            "the same transform."
        )
    if foreign := [name for key in keys if (name := _foreign(segmentationNode, key))]:
        raise ValueError(
            f"'{segmentationNode.GetName()}' holds {', '.join(foreign)}, not marked as made by M4oE, which the result "
            "would replace. Choose a new segmentation."
        )


def _foreign(segmentationNode: vtkMRMLSegmentationNode, key: str) -> str:
    """The name of the segment with this id that is not marked as made by M4oE; nothing if there is none."""
    segment = segmentationNode.GetSegmentation().GetSegment(key)
    return "" if segment is None or segment.HasTag(MADE_BY) else segment.GetName()


def percent_to_node(volume: Volume, volumeNode: vtkMRMLScalarVolumeNode) -> vtkMRMLScalarVolumeNode:
    """A new volume node with percents, such as an uncertainty, beside the volume that they belong to.

    Args:
        volume: Values from 0 to 100 on the grid of the volume node; its name becomes the node's.
    """
    import slicer.util

    node = slicer.util.addVolumeFromArray(volume.array, ijkToRAS=volume.grid.affine, name=volume.name)
    node.SetAndObserveTransformNodeID(volumeNode.GetTransformNodeID())
    node.CreateDefaultDisplayNodes()
    node.GetDisplayNode().SetAutoWindowLevel(False)
    node.GetDisplayNode().SetWindowLevel(100, 50)
    _place_beside(node, volumeNode)
    return node


def _check_volume(node: Any) -> None:
    if node is None or node.GetClassName() != "vtkMRMLScalarVolumeNode":
        raise ValueError(
            f"Expected a scalar volume (CT or MR, one value per voxel), got {_describe(node)}; "
            "of a colour or 4-D volume choose one component or one frame first."
        )
    image = node.GetImageData()
    if image is None or image.GetPointData().GetScalars() is None:
        raise ValueError(f"Volume '{node.GetName()}' has no voxels; load its image first.")
    if image.GetNumberOfScalarComponents() != 1:
        raise ValueError(
            f"Volume '{node.GetName()}' has {image.GetNumberOfScalarComponents()} values per voxel; "
            "expected one: choose one component first."
        )


def _describe(node: vtkMRMLNode | None) -> str:
    return "no node" if node is None else f"'{node.GetName()}' ({node.GetClassName()})"


def _modality(volumeNode: vtkMRMLScalarVolumeNode) -> str | None:
    """What Slicer's DICOM database says of the volume, if that is "CT" or "MR"."""
    import slicer

    database = getattr(slicer, "dicomDatabase", None)
    instances = (volumeNode.GetAttribute("DICOM.instanceUIDs") or "").split()
    if database is None or not instances:
        return None
    modality = database.instanceValue(instances[0], _MODALITY_TAG)
    return modality if modality in ("CT", "MR") else None


def _segments(labels: Volume, structures: Mapping[int, str], source: str) -> dict[str, vtkSegment]:
    """Structure key -> segment, for the labels that are present."""
    box = foreground_box(labels.array)
    if box is None:
        return {}
    present = sorted({value for plane in labels.array[box] for value in np.unique(plane).tolist() if value})
    unknown = [value for value in present if value not in structures]
    if unknown:
        raise ValueError(f"Labels {unknown} have no structure; known are {dict(structures)}.")
    image = _image(labels, box)
    return {structures[value]: _segment(structures[value], value, image, source) for value in present}


def _image(labels: Volume, box: tuple[slice, ...]) -> vtkOrientedImageData:
    """The voxels in the box. Its extent counts from the grid's first voxel, so the affine is the grid's."""
    import slicer.util
    from vtk.util.numpy_support import numpy_to_vtk

    image = slicer.vtkOrientedImageData()
    image.SetExtent([int(edge) for side in reversed(box) for edge in (side.start, side.stop - 1)])
    image.SetGeometryFromImageToWorldMatrix(slicer.util.vtkMatrixFromArray(labels.grid.affine))
    scalars = numpy_to_vtk(labels.array[box].ravel(), deep=True)
    scalars.SetName("ImageScalars")  # the name by which Slicer's DICOM export finds the voxels
    image.GetPointData().SetScalars(scalars)
    return image


def _segment(key: str, value: int, image: vtkOrientedImageData, source: str) -> vtkSegment:
    import slicer

    facts = structure(key)
    segment = slicer.vtkSegment()
    segment.SetName(facts.name)
    segment.SetColor(*(channel / 255 for channel in facts.color))
    segment.SetNameAutoGenerated(False)  # else a change of the terminology renames and recolours the segment
    segment.SetColorAutoGenerated(False)
    segment.SetLabelValue(value)
    if facts.terminology:  # else Slicer's own "Tissue" stays: DICOM export wants a code for every segment
        segment.SetTerminology(facts.terminology)
    segment.SetTag("DICOM.SegmentAlgorithmType", "AUTOMATIC")
    segment.SetTag("DICOM.SegmentAlgorithmName", source)
    segment.SetTag(MADE_BY, source)
    name = slicer.vtkSegmentationConverter.GetSegmentationBinaryLabelmapRepresentationName()
    segment.AddRepresentation(name, image)
    return segment


def _replace_segments(segmentation: vtkSegmentation, keys: Collection[str], segments: Mapping[str, vtkSegment]) -> None:
    for key in set(segmentation.GetSegmentIDs()) & set(keys):
        segmentation.RemoveSegment(key)
    for key, segment in segments.items():
        segmentation.AddSegment(segment, key)


def _place_beside(resultNode: vtkMRMLNode, volumeNode: vtkMRMLScalarVolumeNode) -> None:
    """Moves the result to the volume's study or folder, unless it has a place of its own."""
    import slicer

    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(resultNode.GetScene())
    volume, result = (tree.GetItemByDataNode(node) for node in (volumeNode, resultNode))
    if volume and result and tree.GetItemParent(result) == tree.GetSceneItemID():
        tree.SetItemParent(result, tree.GetItemParent(volume))
