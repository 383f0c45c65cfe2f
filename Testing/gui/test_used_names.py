"""Every attribute that the modules use is ours, Python's, or one that Slicer's class has.

Where a class is seen in the code (`qt.QTimer()`, a widget of the panel, a class name given to the scene, what a name
was assigned) or told by `TOLD`, the attribute has to be that class's.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import slicer.util
from harness.names import MODULES, PANELS, ROOT, SOURCES, WIDGETS, all_names, has, is_property, names_of, real

CODE = [*SOURCES, *ROOT.glob("Testing/slicer/*.py")]  # all that runs in Slicer

# Classes that the code does not say: of parameters, of attributes, of what methods return. A dot stands for any holder.
TOLD = {
    **{name: name for name in MODULES},
    ".app": "qSlicerApplication",
    ".layoutManager": "qSlicerLayoutManager",
    ".extensionsManagerModel": "qSlicerExtensionsManagerModel",
    ".clipboard": "QClipboard",
    ".mrmlScene": "vtkMRMLScene",
    ".dicomDatabase": "ctkDICOMDatabase",
    "database": "ctkDICOMDatabase",
    "slicer.modules": "slicer.modules",
    "slicer.cli": "slicer.cli",
    "packaging": "slicer.packaging",
    "parent": "qSlicerScriptedLoadableModule",
    **{f".{panel.lower()}": "qSlicerScriptedLoadableModule" for panel in PANELS},
    **{f".{panel.lower()}.createNewWidgetRepresentation().self().ui": panel for panel in PANELS},
    ".dicom": "qSlicerScriptedLoadableModule",
    ".segmenteditor": "qSlicerScriptedLoadableModule",
    ".plots": "qSlicerAbstractModule",
    ".sequences": "qSlicerAbstractModule",
    ".plots.logic": "vtkSlicerPlotsLogic",
    "sequences.logic": "vtkSlicerSequencesLogic",
    ".sequences.logic": "vtkSlicerSequencesLogic",
    ".widgetRepresentation": "qSlicerScriptedLoadableModuleWidget",
    ".createNewWidgetRepresentation": "qSlicerScriptedLoadableModuleWidget",
    ".dicom.widgetRepresentation().self": "DICOMWidget",
    ".browserWidget": "SlicerDICOMBrowser",
    ".dicomBrowser": "ctkDICOMBrowser",
    ".dicomTableManager": "ctkDICOMTableManager",
    ".segmenteditor.widgetRepresentation().self": "SegmentEditorWidget",
    ".segmenteditor.widgetRepresentation().self().editor": "qMRMLSegmentEditorWidget",
    ".examineForExport": "qSlicerDICOMExportable",
    ".runSync": "vtkMRMLCommandLineModuleNode",
    ".loadUI": "qMRMLWidget",
    "self.layout": "QVBoxLayout",
    "table": "QTableWidget",
    "selector": "QComboBox",
    "box": "QComboBox",
    "label": "QLabel",
    "listWidget": "QListWidget",
    "searchBox": "ctkSearchBox",
    "presetSelector": "QComboBox",
    "table.item": "QTableWidgetItem",
    "self._list.item": "QListWidgetItem",
    ".horizontalHeader": "QHeaderView",
    ".verticalHeader": "QHeaderView",
    ".view": "QAbstractItemView",
    ".selectedItems": "QTableWidgetItem",
    "volumeNode": "vtkMRMLScalarVolumeNode",
    "volumeNodes": "vtkMRMLScalarVolumeNode",
    "segmentationNode": "vtkMRMLSegmentationNode",
    "segmentationNodes": "vtkMRMLSegmentationNode",
    "self._result()": "vtkMRMLSegmentationNode",
    "node": "vtkMRMLNode",
    ".node": "vtkMRMLNode",
    "nodes": "vtkMRMLNode",
    "segment": "vtkSegment",
    "framesOf": "vtkMRMLSequenceNode",
    "self._frames": "vtkMRMLSequenceNode",
    ".getNodesByClass": "vtkMRMLNode",
    ".GetNodeReference": "vtkMRMLScalarVolumeNode",
    ".GetFirstBrowserNodeForProxyNode": "vtkMRMLSequenceBrowserNode",
    ".GetSubjectHierarchyNode": "vtkMRMLSubjectHierarchyNode",
    ".GetSegmentation": "vtkSegmentation",
    ".GetSegment": "vtkSegment",
    ".GetTable": "vtkTable",
    ".GetColumnByName": "vtkDoubleArray",
}


def assignments(scope: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What is assigned in a part of the code; of a loop, what it goes through."""
    for node in ast.walk(scope):
        if isinstance(node, (ast.For, ast.comprehension)):
            yield node.target, ast.Subscript(node.iter, ast.Constant(0))
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target, node.value
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=True)
            else:
                yield target, node.value


def class_of(node: ast.expr, known: dict[str, list[ast.expr]]) -> str:
    """The class, module or panel that an expression is, "" where nobody says it; `known` is what words stand for."""
    words = ast.unparse(node)
    match node:
        case ast.Call(args=[ast.Constant(value=str(first)), *_]) if first.startswith("vtkMRML"):
            return first
        case ast.Call():
            return told(words) or class_of(node.func, known)
        case ast.IfExp():
            return class_of(node.body, known)
        case ast.List():
            return "list"
        case ast.Subscript(value=ast.Tuple(elts=[item, *_])) | ast.Subscript(value=item):
            return class_of(item, known).replace("list", "")
        case ast.Attribute() if (panel := class_of(node.value, known)) in PANELS:
            return PANELS[panel].get(node.attr, "")
        case ast.Attribute(ast.Name(name), attribute) if name in known:
            others = {key: values for key, values in known.items() if key != name}
            chains = (class_of(ast.Attribute(value, attribute), others) for value in known[name])
            if found := next(filter(None, chains), ""):
                return found
    if words in known:
        others = {key: values for key, values in known.items() if key != words}
        return next(filter(None, (class_of(value, others) for value in known[words])), "")
    last = words.rpartition(".")[2]
    return told(words) or (last if last in {**PANELS, **WIDGETS} or real(last) is not None else "")


def told(words: str) -> str:
    keys = [key for key in TOLD if words == key or (key[0] == "." and words.endswith(key))]
    return TOLD[max(keys, key=len)] if keys else ""


def expressions(path: Path) -> Iterator[tuple[ast.AST, dict[str, list[ast.expr]]]]:
    """All parts of a file's code, each with what words stand for there."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    panel: ast.expr = ast.Name(path.relative_to(ROOT).parts[0])
    shared = [(target, value) for target, value in assignments(tree) if isinstance(target, ast.Attribute)]
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef))]
    for scope in [node for body in bodies for node in body if not isinstance(node, ast.ClassDef)]:
        known = {words: [panel] for words in ("ui", "self.ui", "self._ui")}
        for target, value in [*shared, *assignments(scope)]:
            known.setdefault(ast.unparse(target), []).append(value)
        yield from ((node, known) for node in ast.walk(scope))


def own_names() -> Iterator[str]:
    """Functions, classes, attributes and fields of our code, and parameters of the command-line module."""
    yield from (name for widgets in PANELS.values() for name in widgets)
    for path in [*CODE, *(ROOT / "Core").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                yield node.attr
            elif isinstance(node, ast.keyword) and node.arg == "dest":
                yield str(ast.literal_eval(node.value))
            if isinstance(node, (ast.Module, ast.ClassDef)):
                for statement in node.body:
                    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
                    found = [name for target in targets if target is not None for name in ast.walk(target)]
                    yield from (name.id for name in found if isinstance(name, ast.Name))


def python_names() -> Iterator[str]:
    """Names of the modules of Python that the modules import, and of their classes."""
    yield from ("returncode", "CREATE_NO_WINDOW")  # of instances, and on Windows
    places: list[object] = [np, np.testing, builtins]
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            names += [name.split(".")[0] for name in names]
            places += [importlib.import_module(name) for name in names if name.split(".")[0] in sys.stdlib_module_names]
    for place in places:
        yield from dir(place)
        yield from (name for item in vars(place).values() if isinstance(item, type) for name in dir(item))


def base_names() -> Iterator[str]:
    """What our classes have of Slicer's base classes."""
    for name in WIDGETS["slicer.ScriptedLoadableModule"]["properties"]:
        yield from all_names(name)
    yield from all_names("parameterNodeWrapper")
    yield from (*dir(slicer.util.VTKObservationMixin), *dir(unittest.TestCase))


def test_every_attribute_is_ours_or_pythons_or_of_its_class_in_slicer() -> None:
    free = {*own_names(), *python_names(), *base_names()}
    used = [
        (path, class_of(node.value, known), node)
        for path in CODE
        for node, known in expressions(path)
        if isinstance(node, ast.Attribute)
    ]
    assert sum(bool(holder) for _, holder, _ in used) > 500
    wrong = [
        f"{path.name}:{node.lineno}: {holder or 'nobody'} has no {node.attr}"
        for path, holder, node in used
        if not (has(holder, node.attr) if holder else node.attr in free)
    ]
    assert not wrong, "\n".join(wrong)


def test_properties_of_qt_are_read_and_its_methods_called() -> None:
    """PythonQt makes attributes of properties, whose values cannot be called."""
    wrong = []
    for path in CODE:
        parts = list(expressions(path))
        called = [node.func for node, _ in parts if isinstance(node, ast.Call)]
        for node, known in parts:
            if isinstance(node, ast.Attribute) and not node.attr[0].isupper():  # which enumerators have
                holder = class_of(node.value, known)
                if holder.startswith(("Q", "q", "ctk")) and is_property(holder, node.attr) == (node in called):
                    wrong.append((path.name, node.lineno, node.attr))
    assert wrong == []


def test_signals_are_connected_by_signatures_that_exist() -> None:
    connected = [
        (class_of(node.func.value, known), ast.literal_eval(node.args[0]))
        for path in CODE
        for node, known in expressions(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "connect"
    ]
    assert len(connected) > 50
    assert [pair for pair in connected if pair[1] not in names_of(pair[0], "signals")] == []


def test_what_is_imported_from_slicer_is_there() -> None:
    elsewhere = {
        *sys.stdlib_module_names,
        "m4oe",
        "M4oESegmentation",
        "M4oESegmentationLib",
        "M4oETrainingLib",
        "numpy",
    }
    modules, names = [], []
    for node in (node for path in CODE for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names if alias.name.split(".")[0] not in elsewhere]
        elif isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] not in elsewhere:
            names += [(str(node.module), alias.name) for alias in node.names]
    assert len(names) > 20
    assert {*modules} - {*WIDGETS, *MODULES} == set()
    assert [pair for pair in names if not has(*pair)] == []
