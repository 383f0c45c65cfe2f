"""Names of the stand-ins and in the .ui files are Slicer's, and the code keeps Slicer's manners."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import qt
import slicer
from harness import application, ctk_widgets, parameter_node, qmrml_widgets
from harness.names import ROOT, SOURCES, UI_FILES, has, names_of
from PySide6 import QtCore

STAND_INS = {
    **{cls.__name__: cls for cls in (*ctk_widgets.CLASSES, *qmrml_widgets.CLASSES)},
    "qSlicerApplication": application.Application,
    "qSlicerModuleManager": application.ModuleManager,
    "qSlicerLayoutManager": application.LayoutManager,
    "qSlicerExtensionsManagerModel": application.ExtensionsManagerModel,
    "qSlicerCoreIOManager": application.IOManager,
    "vtkSlicerPlotsLogic": application._Plots,
    "Default": parameter_node.Default,
    **{cls.__name__: cls for cls in vars(slicer.ScriptedLoadableModule).values() if isinstance(cls, type)},
}
OURS = {"stand_in", "signatures", "installed", "shown"}  # names of the harness itself


@pytest.mark.parametrize("name", sorted(STAND_INS))
def test_a_stand_in_has_no_name_that_slicer_has_not(name: str) -> None:
    cls: Any = STAND_INS[name]
    bases = [base for base in cls.__mro__ if base.__module__.startswith("harness")]
    own = {key for base in bases for key in {*vars(base), *set_on_self(base)} if not key.startswith("_")} - OURS
    assert bases and {key for key in own if not has(name, key)} == set()


def set_on_self(cls: type) -> set[str]:
    """Attributes that a class's methods give to its objects."""
    nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    found = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in found if ast.unparse(node.value) == "self"}


def test_a_stand_in_of_a_module_in_python_has_no_name_that_slicer_has_not() -> None:
    made = [name for name, module in sys.modules.items() if name.startswith("slicer.") and module.__spec__ is None]
    own = [(name, key) for name in made for key in vars(sys.modules[name]) if not key.startswith("_")]
    assert len(own) > 5
    assert [pair for pair in own if not has(*pair)] == []


def test_functions_that_the_harness_replaces_are_slicers() -> None:
    tree = ast.parse(Path(str(slicer.util.__file__)).read_text(encoding="utf-8"))
    slicers = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = {name: str(getattr(value, "__module__", "")) for name, value in vars(slicer.util).items()}
    ours = {name for name, module in found.items() if module.startswith("harness")}
    assert len(ours) > 5
    assert ours - slicers == set()


def test_a_wrapped_parameter_node_has_no_name_that_slicers_has_not() -> None:
    @parameter_node.parameterNodeWrapper
    class Wrapped:
        text: str = ""

    own = {*vars(Wrapped), *vars(Wrapped(slicer.vtkMRMLScriptedModuleNode()))} - {"text"}
    assert "connectGui" in own
    assert {name for name in own if not name.startswith("_") and not has("parameterNodeWrapper", name)} == set()


def test_modules_have_no_name_that_slicers_have_not(open_panel: Callable[[str], Any]) -> None:
    open_panel("M4oESegmentation")
    modules = vars(slicer.modules)
    assert [name for name in modules if not has("slicer.modules", name)] == []
    own = {(name, key) for name, module in modules.items() for key in vars(module)}
    assert {pair for pair in own if not has("qSlicerScriptedLoadableModule", pair[1])} == set()


@pytest.mark.parametrize("name", [name for name, cls in STAND_INS.items() if hasattr(cls, "signatures")])
def test_a_stand_in_has_slicers_signals(name: str) -> None:
    assert set(STAND_INS[name].signatures) <= names_of(name, "signals")


@pytest.mark.parametrize("cls", [*ctk_widgets.CLASSES, *qmrml_widgets.CLASSES], ids=lambda cls: cls.__name__)
def test_properties_of_a_stand_in_are_known_to_qt(cls: Any) -> None:
    widget = cls()
    declared = {key for base in cls.__mro__ for key, value in vars(base).items() if isinstance(value, QtCore.Property)}
    assert {key for key in declared if widget.metaObject().indexOfProperty(key) < 0} == set()


@pytest.mark.parametrize("ui", UI_FILES, ids=lambda path: path.stem)
def test_a_ui_file_uses_only_properties_that_its_widgets_have(ui: Path) -> None:
    unknown = []
    for item in ET.parse(ui).iter("widget"):
        properties = {str(entry.get("name")) for entry in item.findall("property") if entry.get("stdset") != "0"}
        cls = str(item.get("class"))
        unknown += [(item.get("name"), name) for name in properties - names_of(cls, "properties")]
    assert unknown == []


@pytest.mark.parametrize("ui", UI_FILES, ids=lambda path: path.stem)
def test_a_ui_file_names_enums_as_qt_5_can_read_them(ui: Path) -> None:
    """Designer of Qt 6 writes Qt::Orientation::Vertical, where the loader of Qt 5 knows Qt::Vertical alone."""
    named = [
        name for kind in ("enum", "set") for entry in ET.parse(ui).iter(kind) for name in str(entry.text).split("|")
    ]
    assert named and [name for name in named if name.count("::") != 1] == []


@pytest.mark.parametrize("ui", UI_FILES, ids=lambda path: path.stem)
def test_every_node_selector_gets_the_scene(ui: Path) -> None:
    tree = ET.parse(ui)
    selectors = {str(item.get("name")) for item in tree.iter("widget") if item.get("class") == "qMRMLNodeComboBox"}
    connected = {entry.findtext("receiver") for entry in tree.iter("connection")}
    assert selectors <= connected


def test_qt_and_ctk_constructors_get_no_keywords() -> None:
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.keywords and isinstance(node.func, ast.Attribute):
                holder = getattr(node.func.value, "id", "")
                if holder in ("qt", "ctk"):
                    wrong.append((path.name, node.func.attr))
    assert wrong == []


def test_files_of_the_modules_begin_with_python_slicer_and_each_other_alone() -> None:
    """Slicer loads them at its start: numpy and all that takes time wait for their first use."""
    light = {*sys.stdlib_module_names, "qt", "vtk", "slicer", "M4oESegmentationLib", "M4oETrainingLib"}
    light_parts = {"m4oe.labels", "m4oe.training_run"}  # standard library alone
    heavy = []
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            heavy += [
                (path.name, name) for name in names if name.split(".")[0] not in light and name not in light_parts
            ]
    assert heavy == []


def test_texts_for_people_can_be_translated() -> None:
    assert [place for path in SOURCES for place in untranslated(path)] == []


def untranslated(path: Path) -> list[tuple[str, str]]:
    """Words in the code that are shown without `_`."""
    shown = {"addItem", "setText", "setToolTip", "setPlainText", "setHorizontalHeaderLabels", "QTableWidgetItem"}
    shown |= {"errorsShown", "showError", "errorDisplay", "confirmOkCancelDisplay", "_tell"}
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in shown:
            found += [word for argument in node.args[: 1 + (len(node.args) > 2)] for word in words(argument)]
        if isinstance(node, ast.Assign):
            targets = [part for target in node.targets for part in ast.walk(target)]
            if any(getattr(target, "attr", "") in ("text", "toolTip") for target in targets):
                found += words(node.value)
        found += [word for entry in entries(node) for word in words(entry) if re.sub(r"{.*?}|\W", "", word)]
    return [(path.name, text) for text in found]


def entries(node: ast.AST) -> list[ast.expr]:
    """What a dictionary gets: mostly texts by the words of a command."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
        return [node.value]
    items = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
    return [value for key, value in items if getattr(key, "value", "") != "PYTHONIOENCODING"]


def words(node: ast.AST) -> list[str]:
    """Texts with letters in an expression, but for those that go through a call or a key."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) and re.search("[A-Za-z]", node.value) else []
    if isinstance(node, (ast.Call, ast.Subscript, ast.Compare, ast.Dict)):  # whose entries are looked at on their own
        return []
    return [text for child in ast.iter_child_nodes(node) for text in words(child)]


def test_functions_of_slicer_util_are_not_taken_from_slicer() -> None:
    """slicer-core has them in both places, Slicer only in slicer.util."""
    functions = {name for name in dir(slicer.util) if callable(getattr(slicer.util, name)) and name[0].islower()}
    wrong = []
    for path in SOURCES:
        names = set(re.findall(r"\bslicer\.(\w+)\(", path.read_text(encoding="utf-8")))
        wrong += [(path.name, name) for name in names & functions]
    assert wrong == []


def test_pythonqt_manners_are_kept() -> None:
    button = qt.QPushButton("go")
    with pytest.raises(TypeError, match="not callable"):
        button.text()
    with pytest.raises(AttributeError, match="no property txt"):
        button.txt = "stop"
    with pytest.raises(AttributeError, match="does not accept a list"):
        button.checkable = []
    with pytest.raises(ValueError, match=r"no signal clickd\(bool\)"):
        button.connect("clickd(bool)", print)
    with pytest.raises(TypeError, match="no keyword arguments"):
        qt.QPushButton(text="go")
    assert int(qt.Qt.Checked) == 2


def test_the_tests_for_slicer_itself_can_be_imported() -> None:
    import importlib.util
    import unittest

    path = ROOT / "Testing" / "slicer" / "M4oEExtensionTest.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = unittest.defaultTestLoader.loadTestsFromModule(module)
    assert tests.countTestCases() >= 10
