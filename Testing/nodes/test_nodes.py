from __future__ import annotations

from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slicer
import slicer.util
import vtk
from m4oe.geometry import Grid, Volume
from m4oe.labels import structure
from m4oe.nodes import check_segmentation_node, percent_to_node, segmentation_to_node, volume_from_node
from scipy.spatial.transform import Rotation

STRUCTURES = {1: "spleen", 2: "kidney_right", 3: "prostate_or_uterus", 4: "liver"}
AXIS_ORDERS = [
    (order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)
]  # left-handed ones as well
RIGID = np.eye(4)
RIGID[:3, :3] = Rotation.from_euler("xyz", (20, -35, 50), degrees=True).as_matrix()
RIGID[:3, 3] = (15, -40, 8)


def make_affine(order: tuple[int, ...] = (0, 1, 2), signs: tuple[int, ...] = (-1, -1, 1)) -> np.ndarray:
    """Axes in this order and direction, then tilted; spacing 0.7 x 0.9 x 2.5 mm."""
    tilt = Rotation.from_euler("zyx", (9, -7, 12), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.eye(3)[list(order)] * signs @ np.diag((0.7, 0.9, 2.5))
    affine[:3, 3] = (31.5, -120.25, 7)
    return affine


def make_labels(grid: Grid) -> Volume:
    """Spleen in six voxels, right kidney in one, prostate or uterus in one; no liver."""
    array = np.zeros(grid.shape, np.uint8)
    array[1:3, 2:5, 3] = 1
    array[4, 1, 6] = 2
    array[2, 5, 2] = 3
    return Volume(array, grid)


def transform_node(matrix: np.ndarray) -> Any:
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    node.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(matrix))
    return node


def segment_array(segmentation_node: Any, key: str, volume_node: Any) -> np.ndarray:
    return slicer.util.arrayFromSegmentBinaryLabelmap(segmentation_node, key, volume_node)


def ids(segmentation_node: Any) -> tuple[str, ...]:
    return tuple(segmentation_node.GetSegmentation().GetSegmentIDs())


def draw_segment(segmentation_node: Any, volume_node: Any, key: str) -> np.ndarray:
    """A segment of the user's own, drawn by hand."""
    drawn = np.zeros(slicer.util.arrayFromVolume(volume_node).shape, np.uint8)
    drawn[0:2, 0:3, 0:4] = 1
    segmentation_node.GetSegmentation().AddEmptySegment(key, key)
    slicer.util.updateSegmentBinaryLabelmapFromArray(drawn, segmentation_node, key, volume_node)
    return drawn


@pytest.fixture
def volume_node(volume_node_of: Any) -> Any:
    return volume_node_of(np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8), make_affine())


@pytest.fixture
def result(volume_node: Any, segmentation_node: Any) -> Any:
    """The segmentation node after one run."""
    labels = make_labels(volume_from_node(volume_node).grid)
    segmentation_to_node(labels, STRUCTURES, segmentation_node, volume_node, "demo 1.0")
    return segmentation_node


# Volume node -> Volume


def test_voxels_are_a_view_in_their_own_type(volume_node: Any) -> None:
    volume = volume_from_node(volume_node)
    assert volume.array.dtype == np.int16
    assert np.shares_memory(volume.array, slicer.util.arrayFromVolume(volume_node))


@pytest.mark.parametrize(("order", "signs"), AXIS_ORDERS)
def test_grid_is_exact_in_every_axis_order(order: Any, signs: Any, volume_node_of: Any) -> None:
    affine = make_affine(order, signs)
    volume = volume_from_node(volume_node_of(np.zeros((3, 4, 5), np.uint8), affine))
    np.testing.assert_allclose(volume.grid.affine, affine, rtol=0, atol=1e-12)
    assert volume.grid.shape == (3, 4, 5)


def test_parent_transform_is_not_applied(volume_node: Any) -> None:
    volume_node.SetAndObserveTransformNodeID(transform_node(RIGID).GetID())
    np.testing.assert_allclose(volume_from_node(volume_node).grid.affine, make_affine(), atol=1e-12)


def test_name_is_kept_and_modality_is_unknown_without_dicom(volume_node: Any) -> None:
    volume = volume_from_node(volume_node)
    assert (volume.name, volume.modality) == ("CT", None)


@pytest.mark.parametrize(("in_database", "expected"), [("MR", "MR"), ("CT", "CT"), ("PT", None), ("", None)])
def test_modality_comes_from_the_dicom_database(
    in_database: str, expected: str | None, volume_node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {("1.2.3", "0008,0060"): in_database}
    database = SimpleNamespace(instanceValue=lambda uid, tag: values[uid, tag])
    monkeypatch.setattr(slicer, "dicomDatabase", database, raising=False)
    volume_node.SetAttribute("DICOM.instanceUIDs", "1.2.3 1.2.4")
    assert volume_from_node(volume_node).modality == expected


def test_colour_volume_is_refused(scene: Any) -> None:
    node = slicer.util.addVolumeFromArray(
        np.zeros((2, 3, 4, 3), np.uint8), name="photo", nodeClassName="vtkMRMLVectorVolumeNode"
    )
    with pytest.raises(ValueError, match=r"got 'photo' \(vtkMRMLVectorVolumeNode\).*one component"):
        volume_from_node(node)


def test_several_values_per_voxel_are_refused(volume_node: Any) -> None:
    volume_node.GetImageData().AllocateScalars(vtk.VTK_SHORT, 3)
    with pytest.raises(ValueError, match="'CT' has 3 values per voxel"):
        volume_from_node(volume_node)


def test_label_map_is_refused(scene: Any) -> None:
    node = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "organs")
    with pytest.raises(ValueError, match=r"got 'organs' \(vtkMRMLLabelMapVolumeNode\)"):
        volume_from_node(node)


def test_empty_volume_is_refused(scene: Any) -> None:
    node = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "CT")
    with pytest.raises(ValueError, match="'CT' has no voxels"):
        volume_from_node(node)
    node.SetAndObserveImageData(vtk.vtkImageData())
    with pytest.raises(ValueError, match="'CT' has no voxels"):
        volume_from_node(node)


def test_no_volume_is_refused() -> None:
    with pytest.raises(ValueError, match="got no node"):
        volume_from_node(None)  # pyright: ignore[reportArgumentType]


# Labels -> segmentation node


@pytest.mark.parametrize(("order", "signs"), AXIS_ORDERS)
def test_segments_lie_where_numpy_says(order: Any, signs: Any, volume_node_of: Any, segmentation_node: Any) -> None:
    affine = make_affine(order, signs)
    volume_node = volume_node_of(np.zeros((6, 7, 8), np.int16), affine)
    labels = make_labels(Grid((6, 7, 8), affine))
    segmentation_to_node(labels, STRUCTURES, segmentation_node, volume_node, "demo 1.0")
    centre = segmentation_node.GetSegmentCenterRAS("kidney_right")
    np.testing.assert_allclose(centre, (affine @ (6, 1, 4, 1))[:3], atol=1e-9)
    np.testing.assert_array_equal(segment_array(segmentation_node, "spleen", volume_node), labels.array == 1)


def test_segments_follow_the_parent_transform_of_the_volume(volume_node: Any, segmentation_node: Any) -> None:
    volume_node.SetAndObserveTransformNodeID(transform_node(RIGID).GetID())
    labels = make_labels(volume_from_node(volume_node).grid)
    segmentation_to_node(labels, STRUCTURES, segmentation_node, volume_node, "demo 1.0")
    centre = segmentation_node.GetSegmentCenterRAS("kidney_right")
    np.testing.assert_allclose(centre, (RIGID @ make_affine() @ (6, 1, 4, 1))[:3], atol=1e-9)
    np.testing.assert_array_equal(segment_array(segmentation_node, "spleen", volume_node), labels.array == 1)


def test_reference_geometry_is_the_whole_volume(volume_node: Any, segmentation_node: Any) -> None:
    volume_node.SetAndObserveTransformNodeID(transform_node(RIGID).GetID())
    labels = make_labels(volume_from_node(volume_node).grid)
    segmentation_to_node(labels, STRUCTURES, segmentation_node, volume_node, "demo 1.0")
    converter = slicer.vtkSegmentationConverter
    text = segmentation_node.GetSegmentation().GetConversionParameter(
        converter.GetReferenceImageGeometryParameterName()
    )
    image, matrix = slicer.vtkOrientedImageData(), vtk.vtkMatrix4x4()
    converter.DeserializeImageGeometry(text, image, False)
    image.GetImageToWorldMatrix(matrix)
    np.testing.assert_allclose(slicer.util.arrayFromVTKMatrix(matrix), make_affine(), atol=1e-6)
    assert image.GetDimensions() == (8, 7, 6)
    role = segmentation_node.GetReferenceImageGeometryReferenceRole()
    assert segmentation_node.GetNodeReference(role) is volume_node


def test_segments_carry_key_name_colour_and_codes(result: Any) -> None:
    spleen, facts = result.GetSegmentation().GetSegment("spleen"), structure("spleen")
    assert spleen.GetName() == facts.name
    np.testing.assert_allclose(spleen.GetColor(), np.array(facts.color) / 255)
    assert not spleen.GetNameAutoGenerated()
    assert not spleen.GetColorAutoGenerated()
    assert spleen.GetTerminology() == facts.terminology
    assert "SCT^78961009^Spleen" in spleen.GetTerminology()


def test_segments_say_that_a_model_made_them(result: Any) -> None:
    kind, name = vtk.reference(""), vtk.reference("")
    segment = result.GetSegmentation().GetSegment("kidney_right")
    segment.GetTag("DICOM.SegmentAlgorithmType", kind)
    segment.GetTag("DICOM.SegmentAlgorithmName", name)
    assert (str(kind), str(name)) == ("AUTOMATIC", "demo 1.0")


def test_structure_without_a_code_stays_generic_tissue(result: Any) -> None:
    assert structure("prostate_or_uterus").terminology == ""
    assert "Tissue" in result.GetSegmentation().GetSegment("prostate_or_uterus").GetTerminology()


def test_all_segments_share_one_cropped_layer(result: Any) -> None:
    segmentation = result.GetSegmentation()
    assert segmentation.GetNumberOfLayers() == 1
    image = segmentation.GetSegment("spleen").GetRepresentation("Binary labelmap")
    assert image.GetExtent() == (2, 6, 1, 5, 1, 4)
    assert image.GetPointData().GetScalars().GetName() == "ImageScalars"
    values = [segmentation.GetSegment(key).GetLabelValue() for key in ids(result)]
    assert dict(zip(values, ids(result), strict=True)) == {n: STRUCTURES[n] for n in (1, 2, 3)}


def test_absent_labels_give_no_segment(result: Any) -> None:
    assert ids(result) == ("spleen", "kidney_right", "prostate_or_uterus")


def test_flipped_view_of_labels_is_taken(volume_node: Any, segmentation_node: Any) -> None:
    labels = make_labels(volume_from_node(volume_node).grid)
    segmentation_to_node(labels.to_axes("SRA"), STRUCTURES, segmentation_node, volume_node, "demo 1.0")
    np.testing.assert_array_equal(segment_array(segmentation_node, "spleen", volume_node), labels.array == 1)


def test_second_run_replaces_the_first(volume_node: Any, result: Any) -> None:
    grid = volume_from_node(volume_node).grid
    array = np.zeros(grid.shape, np.uint8)
    array[5, 6, 7] = 1
    segmentation_to_node(Volume(array, grid), STRUCTURES, result, volume_node, "demo 1.1")
    assert ids(result) == ("spleen",)
    np.testing.assert_array_equal(segment_array(result, "spleen", volume_node), array)


def test_segments_of_the_user_stay(volume_node: Any, segmentation_node: Any) -> None:
    drawn = draw_segment(segmentation_node, volume_node, "my lesion")
    labels = make_labels(volume_from_node(volume_node).grid)
    for _run in range(2):
        segmentation_to_node(labels, STRUCTURES, segmentation_node, volume_node, "demo 1.0")
    assert ids(segmentation_node) == ("my lesion", "spleen", "kidney_right", "prostate_or_uterus")
    np.testing.assert_array_equal(segment_array(segmentation_node, "my lesion", volume_node), drawn)
    np.testing.assert_array_equal(segment_array(segmentation_node, "spleen", volume_node), labels.array == 1)


def test_segment_of_the_user_in_our_layer_stays(volume_node: Any, result: Any) -> None:
    drawn = draw_segment(result, volume_node, "my lesion")
    result.GetSegmentation().CollapseBinaryLabelmaps(True)
    assert result.GetSegmentation().GetNumberOfLayers() == 1
    empty = Volume(np.zeros((6, 7, 8), np.uint8), volume_from_node(volume_node).grid)
    segmentation_to_node(empty, STRUCTURES, result, volume_node, "demo 1.0")
    assert ids(result) == ("my lesion",)
    np.testing.assert_array_equal(segment_array(result, "my lesion", volume_node), drawn)


def test_nothing_found_leaves_a_node_with_a_geometry_and_no_segments(volume_node: Any, segmentation_node: Any) -> None:
    empty = Volume(np.zeros((6, 7, 8), np.uint8), volume_from_node(volume_node).grid)
    segmentation_to_node(empty, STRUCTURES, segmentation_node, volume_node, "demo 1.0")
    assert ids(segmentation_node) == ()
    role = segmentation_node.GetReferenceImageGeometryReferenceRole()
    assert segmentation_node.GetNodeReference(role) is volume_node


def test_3d_view_survives_a_second_run(volume_node: Any, result: Any) -> None:
    result.CreateClosedSurfaceRepresentation()
    labels = make_labels(volume_from_node(volume_node).grid)
    segmentation_to_node(labels, STRUCTURES, result, volume_node, "demo 1.0")
    assert result.GetClosedSurfaceInternalRepresentation("spleen").GetNumberOfPoints() > 0


def test_result_goes_to_the_study_of_the_volume(scene: Any, volume_node: Any, segmentation_node: Any) -> None:
    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    study = tree.CreateStudyItem(tree.GetSceneItemID(), "study")
    tree.CreateItem(study, volume_node)
    item = tree.CreateItem(tree.GetSceneItemID(), segmentation_node)
    labels = make_labels(volume_from_node(volume_node).grid)
    segmentation_to_node(labels, STRUCTURES, segmentation_node, volume_node, "demo 1.0")
    assert tree.GetItemParent(item) == study


def test_result_stays_where_the_user_has_put_it(scene: Any, volume_node: Any, segmentation_node: Any) -> None:
    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    folder = tree.CreateFolderItem(tree.GetSceneItemID(), "results")
    tree.CreateItem(tree.CreateStudyItem(tree.GetSceneItemID(), "study"), volume_node)
    item = tree.CreateItem(folder, segmentation_node)
    labels = make_labels(volume_from_node(volume_node).grid)
    segmentation_to_node(labels, STRUCTURES, segmentation_node, volume_node, "demo 1.0")
    assert tree.GetItemParent(item) == folder


def test_percents_become_a_volume_beside_their_own(volume_node: Any) -> None:
    transform = transform_node(RIGID)
    volume_node.SetAndObserveTransformNodeID(transform.GetID())
    percents = Volume(np.full((6, 7, 8), 40, np.uint8), volume_from_node(volume_node).grid, "uncertainty")
    node = percent_to_node(percents, volume_node)
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(node), percents.array)
    assert volume_from_node(node).grid.is_close(percents.grid)
    assert (node.GetName(), node.GetParentTransformNode()) == ("uncertainty", transform)
    display = node.GetDisplayNode()
    assert (display.GetWindowLevelMin(), display.GetWindowLevelMax()) == (0, 100)


def test_file_written_by_slicer_reads_back_the_same(scene: Any, volume_node: Any, result: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "organs.seg.nrrd")
    result.AddDefaultStorageNode(path)
    assert result.GetStorageNode().WriteData(result)
    loaded = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    storage = scene.AddNewNodeByClass("vtkMRMLSegmentationStorageNode")
    storage.SetFileName(path)
    assert storage.ReadData(loaded)
    assert ids(loaded) == ids(result)
    labels = make_labels(volume_from_node(volume_node).grid).array
    np.testing.assert_array_equal(segment_array(loaded, "spleen", volume_node), labels == 1)
    spleen = loaded.GetSegmentation().GetSegment("spleen")
    assert (spleen.GetName(), spleen.GetTerminology()) == ("Spleen", structure("spleen").terminology)
    check_segmentation_node(loaded, volume_node, STRUCTURES.values())  # known as ours, to be replaced


def test_label_without_a_structure_is_refused_and_nothing_changes(volume_node: Any, result: Any) -> None:
    array = np.full((6, 7, 8), 9, np.uint8)
    with pytest.raises(ValueError, match=r"Labels \[9\] have no structure"):
        segmentation_to_node(
            Volume(array, volume_from_node(volume_node).grid), STRUCTURES, result, volume_node, "demo 1.0"
        )
    assert ids(result) == ("spleen", "kidney_right", "prostate_or_uterus")


def test_node_whose_other_segments_would_move_is_refused(volume_node: Any, segmentation_node: Any) -> None:
    draw_segment(segmentation_node, volume_node, "my lesion")
    volume_node.SetAndObserveTransformNodeID(transform_node(RIGID).GetID())
    with pytest.raises(ValueError, match="'organs' holds 1 other segments.*would move"):
        check_segmentation_node(segmentation_node, volume_node, STRUCTURES.values())


def test_result_follows_a_volume_that_was_transformed_later(volume_node: Any, result: Any) -> None:
    volume_node.SetAndObserveTransformNodeID(transform_node(RIGID).GetID())
    labels = make_labels(volume_from_node(volume_node).grid)
    segmentation_to_node(labels, STRUCTURES, result, volume_node, "demo 1.0")
    assert result.GetTransformNodeID() == volume_node.GetTransformNodeID()


@pytest.mark.parametrize("tool", ["", "TotalSegmentator"])
def test_a_segment_that_m4oe_did_not_make_is_never_replaced(
    tool: str, volume_node: Any, segmentation_node: Any
) -> None:
    drawn = draw_segment(segmentation_node, volume_node, "spleen")
    if tool:
        segmentation_node.GetSegmentation().GetSegment("spleen").SetTag("DICOM.SegmentAlgorithmName", tool)
    labels = make_labels(volume_from_node(volume_node).grid)
    with pytest.raises(ValueError, match="'organs' holds spleen, not marked as made by M4oE"):
        segmentation_to_node(labels, STRUCTURES, segmentation_node, volume_node, "demo 1.0")
    assert ids(segmentation_node) == ("spleen",)
    np.testing.assert_array_equal(segment_array(segmentation_node, "spleen", volume_node), drawn)


@pytest.mark.parametrize("wrong", ["nothing", "volume"])
def test_only_a_segmentation_node_is_taken(wrong: str, volume_node: Any) -> None:
    node = volume_node if wrong == "volume" else None
    with pytest.raises(ValueError, match="Expected a segmentation node"):
        check_segmentation_node(node, volume_node, ())
