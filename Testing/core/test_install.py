from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from m4oe import install
from m4oe.install import REQUIREMENTS, constraints, installed, is_older, missing

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
Install = Callable[..., Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a package on the otherwise empty path of this Python."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("SLICER_HOME", raising=False)

    def put(name: str, version: str, module: str = "", code: str | None = "", metadata: bool = True) -> Path:
        folder = tmp_path / (module or name)
        folder.mkdir(exist_ok=True)
        if code is not None:
            (folder / "__init__.py").write_text(code, encoding="utf-8")
        if version:
            info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            if metadata:
                (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n", encoding="utf-8")
        return folder

    return put


def all_but(fake: Install, *names: str) -> None:
    for each in REQUIREMENTS:
        if each.name not in names:
            fake(each.name, each.oldest, each.module)


def missing_names() -> list[str]:
    return [each.name for each in missing()]


def test_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    assert [str(each) for each in REQUIREMENTS] == project["dependencies"]


def test_nothing_is_missing_where_the_tests_run() -> None:
    assert missing() == ()


def test_all_is_missing_from_an_empty_python(fake: Install) -> None:
    assert missing() == REQUIREMENTS


def test_what_is_absent_or_too_old_is_missing(fake: Install) -> None:
    all_but(fake, "psutil", "tqdm")
    fake("tqdm", "4.65.9")
    assert missing_names() == ["psutil", "tqdm"]


def test_a_folder_without_code_is_missing(fake: Install) -> None:
    all_but(fake, "torch")
    fake("torch", "2.13.0", code=None)
    assert missing_names() == ["torch"]


def test_vtk_that_pip_does_not_know_is_not_missing(fake: Install) -> None:
    all_but(fake, "vtk")
    fake("vtk", "")
    assert missing_names() == []


def test_constraints_pin_what_is_installed_with_its_label(fake: Install) -> None:
    fake("SimpleITK", "2.5.7", "SimpleITK")
    fake("torch", "2.13.0+cpu")
    fake("connected-components-3d", "4.1", "cc3d")
    fake("neighbour", "1.0")
    pins = constraints().splitlines()
    assert pins == ["connected-components-3d==4.1", "neighbour==1.0", "simpleitk==2.5.7", "torch==2.13.0+cpu"]


def test_what_an_uninstalled_torch_left_binds_no_other_torch(fake: Install) -> None:
    fake("nvidia-cublas-cu12", "12.6.4.1", "nvidia")
    fake("triton", "3.3.0")
    assert constraints() == ""
    fake("torch", "2.7.0")
    assert constraints() == "nvidia-cublas-cu12==12.6.4.1\ntorch==2.7.0\ntriton==3.3.0\n"


def test_vtk_that_pip_does_not_know_cannot_be_installed_over(fake: Install) -> None:
    fake("vtk", "")
    assert constraints().startswith("vtk<0 ")


def test_what_is_too_old_is_free_unless_it_is_slicers(fake: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("tqdm", "4.0")
    fake("numpy", "1.0")
    assert constraints() == ""
    monkeypatch.setenv("SLICER_HOME", "/slicer")
    assert constraints() == "numpy==1.0\n"


def test_an_incomplete_install_is_seen_and_not_pinned(fake: Install) -> None:
    fake("torch", "2.13.0", metadata=False)
    assert [package.complete for package in installed()] == [False]
    assert "torch" not in constraints()


def test_of_two_installs_the_first_on_the_path_counts(
    fake: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("numpy", "2.4.6")
    (tmp_path / "later" / "numpy-9.0.dist-info").mkdir(parents=True)
    (tmp_path / "later" / "numpy-9.0.dist-info" / "METADATA").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "later")])
    assert constraints() == "numpy==2.4.6\n"


@pytest.mark.parametrize(
    ("version", "than", "older"),
    [("4.9", "4.66", True), ("4.100", "4.66", False), ("2.7.0+cpu", "2.7", False), ("2.6.1rc1", "2.7", True)],
)
def test_versions_compare_by_number(version: str, than: str, older: bool) -> None:
    assert is_older(version, than) is older


def test_the_module_is_found_without_importing_it(fake: Install) -> None:
    fake("broken", "1.0", code="raise ImportError")
    assert install.is_importable("broken")
