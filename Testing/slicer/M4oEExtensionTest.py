"""What only the application can tell: that it finds the extension as installed. CTest runs it in Slicer."""

from __future__ import annotations

import sys
import tempfile
import unittest
from pathlib import Path

import slicer
import slicer.util


class M4oEExtensionTest(unittest.TestCase):
    def setUp(self) -> None:
        slicer.mrmlScene.Clear(False)

    def test_slicer_has_loaded_the_module_and_lists_it(self) -> None:
        self.assertFalse(slicer.modules.m4oesegmentation.hidden)
        self.assertEqual(tuple(slicer.modules.m4oesegmentation.categories), ("Segmentation",))

    def test_the_panel_opens_with_a_model_and_no_volume(self) -> None:
        panel = slicer.modules.m4oesegmentation.createNewWidgetRepresentation().self()
        self.assertGreater(panel.ui.modelSelector.count, 0)
        self.assertFalse(panel.ui.applyButton.enabled)
        panel.cleanup()

    def test_the_package_lies_beside_the_module_and_brings_its_data(self) -> None:
        import m4oe
        from m4oe.labels import catalogue

        module = Path(slicer.modules.m4oesegmentation.path)
        self.assertEqual(Path(m4oe.__file__).parents[1].resolve(), module.parent.resolve())
        self.assertIn("liver", catalogue())

    def test_starting_slicer_has_not_loaded_the_network(self) -> None:
        self.assertNotIn("m4oe.predictor", sys.modules)

    def test_labels_come_back_from_a_file_that_slicer_wrote(self) -> None:
        import numpy as np
        from m4oe.nodes import segmentation_to_node, volume_from_node
        from m4oe.training.phantom import STRUCTURES, make_phantom

        phantom = make_phantom(0, "ct")
        volumeNode = slicer.util.addVolumeFromArray(
            phantom.image.array, ijkToRAS=phantom.image.grid.affine, name="phantom"
        )
        self.assertTrue(volume_from_node(volumeNode).grid.is_close(phantom.image.grid))
        segmentationNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        keys = dict(enumerate(STRUCTURES, start=1))
        segmentation_to_node(phantom.labels, keys, segmentationNode, volumeNode, "truth 1")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "organs.seg.nrrd")
            self.assertTrue(slicer.util.saveNode(segmentationNode, path))
            loadedNode = slicer.util.loadSegmentation(path)
        liver = slicer.util.arrayFromSegmentBinaryLabelmap(loadedNode, "liver", volumeNode)
        np.testing.assert_array_equal(liver > 0, phantom.labels.array == STRUCTURES.index("liver") + 1)

    def test_the_result_lies_in_the_study_of_its_volume(self) -> None:
        import numpy as np
        from m4oe.geometry import Volume
        from m4oe.nodes import segmentation_to_node, volume_from_node

        volumeNode = slicer.util.addVolumeFromArray(np.zeros((4, 5, 6), np.int16))
        tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
        study = tree.CreateStudyItem(tree.GetSceneItemID(), "study")
        tree.SetItemParent(tree.GetItemByDataNode(volumeNode), study)
        segmentationNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        labels = Volume(np.ones((4, 5, 6), np.uint8), volume_from_node(volumeNode).grid)
        segmentation_to_node(labels, {1: "liver"}, segmentationNode, volumeNode, "truth 1")
        self.assertEqual(tree.GetItemParent(tree.GetItemByDataNode(segmentationNode)), study)
