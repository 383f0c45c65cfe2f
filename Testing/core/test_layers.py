"""Imports point down only, and a light file loads nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import m4oe
import pytest
from m4oe.install import REQUIREMENTS

PACKAGE = Path(m4oe.__file__).parent
LAYERS = (
    ("__init__", "labels", "names", "spec", "jobs", "parallel", "training_run", "install"),
    ("geometry", "modality", "nifti", "metaimage", "files", "dicom", "labelmap", "nodes", "page"),
    ("network", "resample", "package", "parts", "cleanup", "predictor"),
    ("raster", "preview", "surface", "evaluation", "evaluation_files", "evaluation_report", "training"),
    (
        "terminal",
        "doctor",
        "bundle",
        "data_commands",
        "segment_command",
        "train_report",
        "train_command",
    ),
    ("worker", "connection", "client", "__main__"),
)
HEAVY = ("numpy", "SimpleITK", "nrrd", "scipy", "torch", "safetensors", "cc3d", "vtk", "slicer")
ALLOWED = {0: (), 1: ("numpy", "SimpleITK"), 2: tuple(set(HEAVY) - {"vtk", "slicer"})}


def layer_of(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if module.split(".")[0] in names)


def imported_modules(file: Path) -> set[str]:
    """Modules of the package that a file imports, at any place in it, by their dotted names."""
    folder = file.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join((*above, name)) for name in names if name != "__version__"}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_point_down(file: Path) -> None:
    own = layer_of(file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    assert [module for module in imported_modules(file) if layer_of(module) > own] == []


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_loads_only_its_own_libraries(layer: int) -> None:
    names = [f"m4oe.{name}" for name in LAYERS[layer] if name != "__init__"]
    code = f"import sys, {', '.join(names)}; print(*(name for name in {HEAVY} if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) <= set(ALLOWED[layer])


def test_the_client_loads_numpy_alone() -> None:
    code = f"import sys, m4oe.client; print(*(name for name in {(*HEAVY, 'psutil')} if name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split() == [b"numpy"]


def test_slicer_is_not_needed_to_import_the_nodes_file() -> None:
    code = "import sys, m4oe.nodes; sys.exit('slicer' in sys.modules or 'vtk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_the_panels_import_needs_only_what_slicer_brings() -> None:
    root = PACKAGE.parents[1]
    files = [path for module in ("M4oESegmentation", "M4oETraining") for path in (root / module).rglob("*.py")]
    sources = (path.read_text(encoding="utf-8") for path in files)
    names = {name for text in sources for name in re.findall(r"^ *from (m4oe(?:\.\w+)+) import", text, re.MULTILINE)}
    absent = ["torch", *(each.module for each in REQUIREMENTS if not each.core)]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {', '.join(sorted(names))}"
    assert {"m4oe.labelmap", "m4oe.files", "m4oe.client"} <= names
    subprocess.run([sys.executable, "-c", code], check=True)
