"""What only the application can tell: that it finds the extension as installed. CTest runs it in Slicer."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

import slicer
import slicer.util

WORKS = all(importlib.util.find_spec(name) is not None for name in ("torch", "cc3d", "safetensors", "nrrd", "psutil"))
needs_torch = unittest.skipUnless(WORKS, "press Install in M4oE Segmentation first")
needs_dicom_seg = unittest.skipUnless(
    importlib.util.find_spec("DICOMSegmentationPlugin"), "this Slicer writes no DICOM SEG"
)


def addPhantom() -> tuple[Any, Any]:
    """A volume node with made-up organs, and their labels."""
    from m4oe.training.phantom import make_phantom

    phantom = make_phantom(2026, "ct")
    affine = phantom.image.grid.affine
    return slicer.util.addVolumeFromArray(phantom.image.array, ijkToRAS=affine, name="phantom"), phantom.labels


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

    def test_the_panel_of_the_training_opens_with_models_and_no_data(self) -> None:
        panel = slicer.modules.m4oetraining.createNewWidgetRepresentation().self()
        self.assertGreater(panel.ui.baseModelSelector.count, 1)
        self.assertEqual(panel.ui.dataTable.rowCount, 0)
        self.assertIn("dense", panel.ui.stagesLabel.text)
        self.assertTrue(panel.ui.startButton.enabled)
        panel.cleanup()

    @needs_torch
    def test_the_model_that_ships_segments(self) -> None:
        from M4oESegmentation import M4oESegmentationLogic

        volumeNode, _labels = addPhantom()
        logic = M4oESegmentationLogic()
        segmentationNode, report = logic.process(volumeNode, structures=["liver"])
        logic.close()
        self.assertTrue(report.model.startswith("m4oe-demo "))
        self.assertGreater(report.volumes_ml["liver"], 0)
        self.assertEqual(list(segmentationNode.GetSegmentation().GetSegmentIDs()), ["liver"])

    @needs_torch
    def test_the_command_line_module_makes_a_label_map(self) -> None:
        volumeNode, _labels = addPhantom()
        labelMapNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
        parameters = {"inputVolume": volumeNode, "outputLabelMap": labelMapNode, "structures": "liver"}
        run = slicer.cli.runSync(slicer.modules.m4oesegmentcli, None, parameters)
        self.assertEqual(run.GetStatusString(), "Completed", run.GetErrorText())
        found, image = slicer.util.arrayFromVolume(labelMapNode), slicer.util.arrayFromVolume(volumeNode)
        self.assertEqual(found.shape, image.shape)
        self.assertGreater(found.max(), 0)

    @needs_dicom_seg
    def test_a_result_goes_as_dicom_seg_into_the_study_of_its_volume(self) -> None:
        from DICOMLib import DICOMUtils
        from DICOMScalarVolumePlugin import DICOMScalarVolumePluginClass
        from m4oe.nodes import segmentation_to_node
        from m4oe.training.phantom import STRUCTURES
        from M4oESegmentationLib.Results import saveAsDicom

        volumeNode, labels = addPhantom()
        tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
        study = tree.CreateStudyItem(tree.CreateSubjectItem(tree.GetSceneItemID(), "patient"), "study")
        item = tree.GetItemByDataNode(volumeNode)
        tree.SetItemParent(item, study)
        with tempfile.TemporaryDirectory() as folder, DICOMUtils.TemporaryDICOMDatabase() as database:
            plugin = DICOMScalarVolumePluginClass()
            exportables = plugin.examineForExport(item)
            for exportable in exportables:
                exportable.directory = folder
                exportable.setTag("PatientID", "patient")
                exportable.setTag("StudyID", "study")
            self.assertFalse(plugin.export(exportables))
            DICOMUtils.importDicom(folder, database)
            (patient,) = database.patients()
            (nodeId,) = DICOMUtils.loadPatientByUID(patient)
            loadedNode = slicer.mrmlScene.GetNodeByID(nodeId)
            segmentationNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
            keys = dict(enumerate(STRUCTURES, start=1))
            segmentation_to_node(labels, keys, segmentationNode, loadedNode, "truth 1")
            saveAsDicom(segmentationNode, loadedNode)
            (study,) = database.studiesForPatient(patient)
            files = [database.filesForSeries(series)[0] for series in database.seriesForStudy(study)]
            self.assertEqual(sorted(database.fileValue(file, "0008,0060") for file in files), ["CT", "SEG"])

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
        from m4oe.training.phantom import STRUCTURES

        volumeNode, labels = addPhantom()
        self.assertTrue(volume_from_node(volumeNode).grid.is_close(labels.grid))
        segmentationNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
        keys = dict(enumerate(STRUCTURES, start=1))
        segmentation_to_node(labels, keys, segmentationNode, volumeNode, "truth 1")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "organs.seg.nrrd")
            self.assertTrue(slicer.util.saveNode(segmentationNode, path))
            loadedNode = slicer.util.loadSegmentation(path)
        liver = slicer.util.arrayFromSegmentBinaryLabelmap(loadedNode, "liver", volumeNode)
        np.testing.assert_array_equal(liver > 0, labels.array == STRUCTURES.index("liver") + 1)

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
