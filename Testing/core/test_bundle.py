from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import m4oe
import numpy as np
import pip
import pytest
from m4oe import bundle
from m4oe.bundle import import_bundle, make_bundle
from m4oe.install import Requirement
from m4oe.spec import METADATA_KEY, ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from safetensors.numpy import save_file

SPEC = ModelSpec(
    name="tiny",
    version="3",
    network=NetworkSpec(),
    structures=("liver",),
    experts=(ExpertSpec("ct", "CT"),),
    intensity={"CT": IntensityRule("window", -160, 240)},
    pixel_mm=2.0,
    slice_mm=3.0,
)
TINY = Requirement("m4oe-tiny", "m4oe_tiny", "1.0")
_IMPORT = """
import sys
from m4oe import bundle, install
from m4oe.__main__ import main
install.REQUIREMENTS = (install.Requirement(sys.argv[1], sys.argv[1], "1.0"),)
sys.exit(main(["bundle", "import", sys.argv[2]]))
"""


def a_wheel(folder: Path, name: str, needs: str = "", file: str = "") -> Path:
    """A package that can be installed, with one file; unless that is to lie outside."""
    info = f"{name}-1.0.dist-info"
    needed = f"Requires-Dist: {needs}\n" if needs else ""
    contents = {
        file or f"{name}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needed}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*contents, f"{info}/RECORD"))
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in (contents | {f"{info}/RECORD": record}).items():
            wheel.writestr(member, text)
    return path


def a_model(folder: Path, value: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": np.full(6, value, np.float32)}, folder / "tiny.safetensors", {METADATA_KEY: SPEC.to_json()})
    return folder / "tiny.safetensors"


def rewritten(path: Path, changes: Mapping[str, bytes], manifest: Mapping[str, object] = {}) -> Path:
    """The bundle with other contents; the manifest stays but for its changes."""
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()} | dict(changes)
    values = json.loads(contents["manifest.json"])
    contents["manifest.json"] = json.dumps(values | dict(manifest)).encode()
    with zipfile.ZipFile(path, "w") as new:
        for name, data in contents.items():
            new.writestr(name, data)
    return path


@dataclass(frozen=True)
class Machine:
    """Another Python, with nothing in it but pip, and its folder of models."""

    python: Path
    environment: Mapping[str, str]
    models: Path

    def takes(self, path: Path, name: str = "m4oe_tiny") -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-c", _IMPORT, name, str(path)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def has(self, module: str) -> bool:
        command = [str(self.python), "-c", f"import {module}"]
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    folder, models = tmp_path / "machine", tmp_path / "machine" / "models"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (folder / "path").mkdir()
    (folder / "path" / "pip").symlink_to(Path(pip.__file__).parent)
    places = os.pathsep.join([str(folder / "path"), str(Path(m4oe.__file__).parents[1])])
    environment = {
        **os.environ,
        "PYTHONPATH": places,
        "M4OE_MODELS": str(models),
        "PIP_INDEX_URL": "http://127.0.0.1:9",
    }
    return Machine(folder / "bin" / "python", environment, models)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows, and a model folder with one model."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    a_wheel(folder, "m4oe_tiny")
    a_model(tmp_path / "own")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("M4OE_MODELS", str(tmp_path / "own"))
    monkeypatch.setattr(bundle, "REQUIREMENTS", (TINY,))
    return folder


@pytest.fixture
def made(wheels: Path, tmp_path: Path) -> Path:
    make_bundle(tmp_path / "tiny.zip")
    return tmp_path / "tiny.zip"


# Making


def test_a_bundle_holds_wheels_models_and_what_they_are(wheels: Path, tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "tiny.zip")
    assert (manifest.packages, manifest.models) == ({"m4oe-tiny": "1.0"}, {"tiny": "3"})
    with zipfile.ZipFile(tmp_path / "tiny.zip") as made:
        assert set(made.namelist()) == {"manifest.json", *manifest.files}
    assert set(manifest.files) == {"wheels/m4oe_tiny-1.0-py3-none-any.whl", "models/tiny.safetensors"}


def test_a_bundle_can_be_for_another_machine(wheels: Path, tmp_path: Path) -> None:
    manifest = make_bundle(tmp_path / "tiny.zip", "windows", "3.12")
    assert (manifest.platform, manifest.python) == ("windows", "3.12")


def test_what_pip_cannot_find_leaves_no_bundle(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "REQUIREMENTS", (replace(TINY, oldest="2.0"),))
    with pytest.raises(RuntimeError, match="pip download failed.*m4oe-tiny>=2.0"):
        make_bundle(tmp_path / "tiny.zip")
    assert not list(tmp_path.glob("*.zip"))


@pytest.mark.parametrize(
    "arguments", [("a.tar",), ("a.zip", "amiga"), ("a.zip", "linux", "2.7")], ids=["name", "platform", "python"]
)
def test_what_cannot_be_made_is_refused(arguments: tuple[str, ...], wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected"):
        make_bundle(tmp_path / arguments[0], *arguments[1:])


# Importing


def test_a_bundle_brings_packages_and_models_without_a_network(made: Path, machine: Machine) -> None:
    done = machine.takes(made)
    assert done.returncode == 0, done.stderr
    assert "packages installed: m4oe-tiny 1.0" in done.stdout
    assert "models copied: tiny" in done.stdout
    assert machine.has("m4oe_tiny")
    assert [path.name for path in machine.models.iterdir()] == ["tiny.safetensors"]


def test_the_second_import_has_nothing_to_do(made: Path, machine: Machine) -> None:
    machine.takes(made)
    done = machine.takes(made)
    assert (done.returncode, "all were there" in done.stdout, "copied: none" in done.stdout) == (0, True, True)


def test_a_package_that_fails_takes_back_the_others(wheels: Path, tmp_path: Path, machine: Machine) -> None:
    (wheels / "m4oe_tiny-1.0-py3-none-any.whl").unlink()
    a_wheel(wheels, "m4oe_good")
    a_wheel(wheels, "m4oe_tiny", needs="m4oe-good", file="../../../../outside.py")
    make_bundle(tmp_path / "tiny.zip")
    done = machine.takes(tmp_path / "tiny.zip")
    assert done.returncode == 2
    assert "Successfully uninstalled m4oe_good" in done.stderr.replace("-", "_")
    assert not machine.has("m4oe_good")
    assert list(machine.models.iterdir()) == []


def test_a_bundle_without_what_is_needed_changes_nothing(made: Path, machine: Machine) -> None:
    done = machine.takes(made, "m4oe_other")
    assert done.returncode == 2
    assert "m4oe_other" in done.stderr
    assert not machine.has("m4oe_tiny")


@pytest.mark.parametrize("name", ["wheels/m4oe_tiny-1.0-py3-none-any.whl", "models/tiny.safetensors"])
def test_a_changed_file_is_refused(name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M4OE_MODELS", str(tmp_path / "new"))
    with pytest.raises(ValueError, match=f"{name} is not what its manifest says"):
        import_bundle(rewritten(made, {name: b"changed"}))
    assert not list(tmp_path.glob("new/*"))


@pytest.mark.parametrize("name", ["../evil.whl", "wheels/../../evil.whl", "/evil.whl", "wheels\\evil.whl", "evil.py"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_path_that_leads_elsewhere_is_refused(name: str, listed: bool, made: Path) -> None:
    files = {"files": {name: {"size": 1, "sha256": ""}}} if listed else {}
    with pytest.raises(ValueError, match="not safe"):
        import_bundle(rewritten(made, {name: b"x"}, files))


def test_a_file_that_the_manifest_does_not_list_is_refused(made: Path) -> None:
    with pytest.raises(ValueError, match="differ in wheels/more.whl"):
        import_bundle(rewritten(made, {"wheels/more.whl": b"x"}))


@pytest.mark.parametrize(
    ("values", "told"),
    [({"python": "3.1"}, "--python"), ({"platform": "amiga"}, "on amiga"), ({"format_version": 99}, "update M4oE")],
)
def test_a_bundle_for_others_is_refused(values: Mapping[str, object], told: str, made: Path) -> None:
    with pytest.raises(ValueError, match=told):
        import_bundle(rewritten(made, {}, values))


def test_another_model_of_the_same_name_stays(made: Path, tmp_path: Path) -> None:
    other = a_model(tmp_path / "own", value=1).read_bytes()
    with pytest.raises(ValueError, match="move it away"):
        import_bundle(made)
    assert (tmp_path / "own" / "tiny.safetensors").read_bytes() == other


def test_no_zip_and_half_a_zip_are_refused(made: Path, tmp_path: Path) -> None:
    for data in (b"", b"no zip", made.read_bytes()[:-40]):
        (tmp_path / "half.zip").write_bytes(data)
        with pytest.raises(ValueError, match="half.zip (cannot be read|is no bundle)"):
            import_bundle(tmp_path / "half.zip")
