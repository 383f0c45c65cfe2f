from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import m4oe
import pytest
from m4oe import doctor
from m4oe.__main__ import main
from m4oe.doctor import Finding, examine, report
from m4oe.install import REQUIREMENTS

CERTIFICATES = doctor._certificates
TEN_GB = 10 * 2**30


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the path of this Python, apart from Python's own."""
    folder = tmp_path / "site"
    folder.mkdir()
    own = [entry for entry in sys.path if entry and "site-packages" not in entry]
    monkeypatch.setattr(sys, "path", [str(folder), *own])
    monkeypatch.delenv("SLICER_HOME", raising=False)
    return folder


def put(folder: Path, file: str, text: str = "") -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def put_package(folder: Path, name: str, version: str, code: str = "") -> None:
    put(folder, f"{name}/__init__.py", code)
    put(folder, f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")


def finding(name: str) -> Finding:
    return next(each for each in examine() if each.name == name)


def torch_that(cuda: str | None = None, gpus: Any = (), archs: Any = ()) -> Mapping[str, Any]:
    return {"version": "2.13.0", "cuda": cuda, "hip": None, "gpus": gpus, "archs": archs}


def gpu(about: Mapping[str, Any], *drivers: str) -> Finding:
    return doctor._gpu(about, [doctor._Gpu("RTX", driver) for driver in drivers])


# This Python and others


def test_the_packages_of_the_tests_are_well() -> None:
    states = {each.name: each.state for each in examine()}
    assert {"GPU", "memory", "disk", "models"} <= states.keys()
    assert {states[name] for name in ("Python", "torch", *(each.name for each in REQUIREMENTS))} == {"ok"}


def test_torch_is_never_imported_here() -> None:
    code = "import sys; from m4oe.doctor import examine; examine(); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(m4oe.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_a_python_without_any_package_is_told_what_it_lacks() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(m4oe.__file__).parents[1])}
    command = [sys.executable, "-S", "-m", "m4oe", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    problems = [each["name"] for each in json.loads(done.stdout) if each["state"] == "problem"]
    assert done.returncode == 1
    assert {"torch", "numpy", "connected-components-3d"} <= set(problems)


def test_every_trouble_has_a_cure_and_comes_first(place: Path) -> None:
    findings = examine()
    assert all(bool(each.cure) == (each.state != "ok") for each in findings)
    assert findings[0].state == "problem"


# torch


def test_a_folder_that_was_left_of_torch_is_a_part_of_an_install(place: Path) -> None:
    put(place, "torch/lib/libtorch.so")
    assert finding("torch").state == "problem"
    assert str(place / "torch") in finding("torch").found
    assert "delete these folders" in finding("torch").cure


def test_torch_that_pip_cannot_read_is_a_part_of_an_install(place: Path) -> None:
    put(place, "torch/__init__.py")
    (place / "torch-2.13.0.dist-info").mkdir()
    assert "in part" in finding("torch").found


def test_torch_that_cannot_be_imported_says_why(place: Path) -> None:
    put_package(place, "torch", "2.13.0", "raise OSError('WinError 206')")
    assert "OSError: WinError 206" in finding("torch").found


def test_torch_that_ends_python_harms_nobody_else(place: Path) -> None:
    put_package(place, "tqdm", "5.0")
    put_package(place, "torch", "2.13.0", "import os; os._exit(7)")
    found = {each.name: each for each in examine()}
    assert "code 7" in found["torch"].found
    assert found["tqdm"].state == "ok"


def test_torch_that_never_comes_is_given_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE", 1)
    put_package(place, "torch", "2.13.0", "import time; time.sleep(60)")
    assert "did not end within 1 s" in finding("torch").found


def test_a_gpu_that_torch_for_cpus_leaves_idle_is_noted() -> None:
    assert gpu(torch_that(), "580.1").state == "note"


def test_a_driver_too_old_for_the_build_is_a_problem() -> None:
    old = gpu(torch_that("13.0"), "570.2")
    assert (old.state, "580" in old.found) == ("problem", True)
    assert "restart" in gpu(torch_that("12.8"), "570.2").cure


@pytest.mark.parametrize(
    ("archs", "capability", "serves"),
    [
        (["sm_80", "sm_90"], 86, True),
        (["sm_80", "sm_90"], 120, False),
        (["sm_90a"], 90, True),
        (["sm_100a"], 103, False),
        (["sm_90", "compute_90"], 120, True),
        (["sm_90"], 86, False),
    ],
)
def test_code_of_the_build_serves_the_gpu(archs: list[str], capability: int, serves: bool) -> None:
    found = gpu(torch_that("12.8", [["RTX", *divmod(capability, 10), TEN_GB]], archs))
    assert (found.state == "ok") is serves


# Packages


def test_one_package_over_another_is_a_problem(place: Path) -> None:
    put_package(place, "numpy", "2.4.6")
    put_package(place, "numpy", "2.0.2")
    assert "2.0.2" in finding("numpy, twice").found


def test_a_second_vtk_in_slicer_is_a_problem(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICER_HOME", str(tmp_path))
    put(tmp_path, "bin/Python/vtk.py")
    put_package(place, "vtk", "9.6.2")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "bin" / "Python"), *sys.path])
    assert finding("vtk, twice").state == "problem"


def test_a_core_package_outside_of_slicer_is_a_problem(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICER_HOME", str(place.parent / "Slicer"))
    put_package(place, "SimpleITK", "2.5.7")
    assert finding("SimpleITK, replaced").state == "problem"


def test_a_core_package_that_came_after_slicer_is_noted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLICER_HOME", str(place))
    put_package(place, "numpy", "2.4.6")
    put_package(place, "SimpleITK", "2.5.7")
    os.utime(place / "numpy-2.4.6.dist-info", (0, 0))
    assert finding("SimpleITK, replaced").state == "note"


def test_what_pip_left_behind_is_found(tmp_path: Path) -> None:
    (tmp_path / "~umpy").mkdir()
    assert doctor._remains((), tmp_path).found == f"~umpy in {tmp_path}"
    half = doctor.Package("tqdm", "4.0", tmp_path / "user" / "tqdm-4.0.dist-info", complete=False)
    remains = doctor._remains((half,), tmp_path)
    assert remains.found == f"~umpy in {tmp_path}; tqdm-4.0.dist-info in {tmp_path / 'user'}"
    assert f"~umpy in .../{tmp_path.name}; tqdm-4.0.dist-info in .../user" in doctor.report([remains])


# The machine


def test_a_long_path_on_windows_matters_until_torch_is_there() -> None:
    assert doctor._path_length("C:/" + "x" * 98, False).state == "problem"
    assert doctor._path_length("C:/" + "x" * 98, True).state == "note"
    assert doctor._path_length("C:/" + "x" * 97, False).state == "ok"


@pytest.mark.parametrize(("free", "state"), [(1, "problem"), (3, "note"), (5, "ok")])
def test_little_memory_is_told(free: int, state: str) -> None:
    assert doctor._memory({"psutil": ("", free * 2**30)}).state == state


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free_gb", lambda place: 0.5)
    assert str(tmp_path) in doctor.disk_space({"models": tmp_path}).cure


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize("password", ["secret", "se/cr@t"])
def test_a_proxy_is_told_without_its_password(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://anna:{password}@proxy:80")
    found = doctor._proxies()
    assert (found.state, found.found) == ("ok", "https_proxy=http://***@proxy:80")


@pytest.mark.usefixtures("no_proxy")
def test_a_proxy_of_the_system_is_told_and_not_named_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "getproxies", dict)
    assert doctor._proxies().found.startswith("none is set")
    monkeypatch.setattr(doctor, "getproxies", lambda: {"http": "http://anna:secret@klinik.de:3128"})
    found = doctor._proxies()
    assert found.found == "http_proxy=http://***@klinik.de:3128, by the settings of the system"
    assert "http_proxy=http://HOST:3128, by the settings of the system" in report([found])


@pytest.mark.usefixtures("no_proxy")
def test_a_proxy_without_a_scheme_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "proxy:80")
    assert doctor._proxies().state == "problem"


def test_certificates_that_are_not_there_are_a_problem(tmp_path: Path) -> None:
    file = put(tmp_path, "ca.pem")
    assert CERTIFICATES({"SSL_CERT_FILE": str(file)}).state == "ok"
    assert CERTIFICATES({"SSL_CERT_FILE": str(tmp_path / "none.pem")}).state == "problem"


def test_a_damaged_model_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M4OE_MODELS", str(tmp_path))
    assert doctor._models().state == "ok"
    put(tmp_path, "half.safetensors", "half")
    assert "half.safetensors" in doctor._models().found


def test_a_file_in_the_place_of_the_model_folder_is_a_problem(tmp_path: Path) -> None:
    assert doctor._model_folder(put(tmp_path, "models")).state == "problem"
    assert doctor._model_folder(tmp_path / "new").state == "ok"


# What is told


def test_the_report_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/data/anna")
    monkeypatch.setenv("USERPROFILE", "/data/anna")
    monkeypatch.setenv("LOGNAME", "anna")
    places = "/data/anna/x, C:\\Users\\ANNA~1\\y, /media/anna/z, /home/berta/q, /data/annabel"
    text = report([Finding("disk", "problem", places, "tidy /data/anna")])
    assert "~/x, ~\\y, .../z, ~/q, .../annabel" in text
    assert "-> tidy ~" in text


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ("/data/hospitalX/lib/site-packages", ".../site-packages"),
        ("1.0 in D:\\Klinik Nord (neu)\\lib, 2.0 in \\\\server\\klinik\\lib", "1.0 in .../lib, 2.0 in .../lib"),
        ("SSL_CERT_FILE=/etc/klinik/ca.pem", "SSL_CERT_FILE=.../ca.pem"),
        ("OSError: '/data/klinik/torch.so': none", "OSError: '.../torch.so': none"),
        ("/data/anna", ".../USER"),
        (
            "https_proxy=http://***@klinik.de:3128, ALL_PROXY=klinik:80",
            "https_proxy=http://HOST:3128, ALL_PROXY=HOST:80",
        ),
        ("and/or C:\\Slicer, https://numpy.org/a/b", "and/or C:\\Slicer, https://numpy.org/a/b"),
    ],
)
def test_the_report_tells_of_a_place_no_more_than_its_end(
    found: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "anna")
    assert f"ok       it: {told}\n" in report([Finding("it", "ok", found)])


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_the_gpu_of_apple_is_named_on_a_mac_alone(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    assert ("Apple" in gpu(torch_that()).found) is (system == "darwin")


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("problem", 1)])
def test_the_command_tells_by_its_code(
    state: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: (Finding("torch", state, "is so", "do so"),))
    assert main(["doctor"]) == code
    assert f"{state:<8} torch: is so" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)[0]["state"] == state
