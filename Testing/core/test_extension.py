from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "M4oESegmentation",
    "M4oETraining",
)
COMMANDS = ("M4oESegmentCLI",)  # scripted CLI modules: a script and its XML, found by name
NOT_INSTALLED = {"__pycache__", "CMakeLists.txt", "m4oe.egg-info"}


def cmake_text(folder: str = "") -> str:
    text = (ROOT / folder / "CMakeLists.txt").read_text(encoding="utf-8")
    return re.sub(r"#.*", "", text)


def listed_files(folder: str) -> list[str]:
    """What the folder's CMakeLists.txt hands to Slicer's build as scripts and resources."""
    lists = re.findall(r"set\(MODULE_PYTHON_(?:SCRIPTS|RESOURCES)\s+(.*?)\)", cmake_text(folder), re.DOTALL)
    return " ".join(lists).replace("${MODULE_NAME}", folder).split()


def files_on_disk(folder: str) -> list[str]:
    base = ROOT / folder
    files = [path.relative_to(base) for path in base.rglob("*") if path.is_file()]
    return [path.as_posix() for path in files if not NOT_INSTALLED & set(path.parts)]


def metadata() -> dict[str, str]:
    return dict(re.findall(r'set\(EXTENSION_(\w+)\s+"([^"]*)"', cmake_text()))


def description() -> dict[str, str]:
    """M4oE.s4ext: a keyword, a space, a value per line."""
    lines = (ROOT / "M4oE.s4ext").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))


def catalog_entry() -> dict[str, object]:
    return json.loads((ROOT / "M4oE.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", ["Core", *MODULES])
def test_every_file_is_installed_and_every_installed_file_exists(folder: str) -> None:
    assert sorted(listed_files(folder)) == sorted(files_on_disk(folder))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_its_script_and_its_description(name: str) -> None:
    assert sorted(files_on_disk(name)) == [f"{name}.py", f"{name}.xml"]
    assert f"set(MODULE_NAME {name})" in cmake_text(name) and "SlicerMacroBuildScriptedCLI(" in cmake_text(name)


@pytest.mark.parametrize("folder", ["Core", *MODULES, *COMMANDS, "Testing"])
def test_every_folder_is_part_of_the_build(folder: str) -> None:
    assert f"add_subdirectory({folder})" in cmake_text()


def test_modules_are_all_that_slicer_would_find() -> None:
    assert sorted(path.parent.name for path in ROOT.glob("M4oE*/M4oE*.py")) == sorted((*MODULES, *COMMANDS))


def test_name_is_the_same_everywhere() -> None:
    assert "project(M4oE)" in cmake_text()
    assert (ROOT / "M4oE.json").is_file()
    assert (ROOT / "M4oE.s4ext").is_file()


@pytest.mark.parametrize(
    "field",
    ["HOMEPAGE", "CATEGORY", "CONTRIBUTORS", "DESCRIPTION", "ICONURL", "SCREENSHOTURLS", "DEPENDS", "TIER"],
)
def test_cmake_and_s4ext_agree(field: str) -> None:
    assert description()[field.lower()] == metadata()[field]


def test_catalog_entry_and_s4ext_agree() -> None:
    entry, text = catalog_entry(), description()
    assert (entry["category"], entry["scm_type"], entry["scm_url"], entry["scm_revision"]) == (
        text["category"],
        text["scm"],
        text["scmurl"],
        text["scmrevision"],
    )
    assert entry["build_dependencies"] == text["depends"].split()
    assert entry["build_subdirectory"] == text["build_subdirectory"]
    assert (entry["enabled"], entry["tier"]) == (bool(int(text["enabled"])), int(text["tier"]))


def test_category_and_dependency_are_those_we_want() -> None:
    assert (metadata()["CATEGORY"], metadata()["DEPENDS"]) == ("Segmentation", "PyTorch")


def test_catalog_entry_has_only_fields_that_the_index_takes() -> None:
    allowed = {"$schema", "category", "scm_type", "scm_url", "scm_revision", "build_dependencies"}
    assert set(catalog_entry()) <= allowed | {"build_subdirectory", "enabled", "tier"}


@pytest.mark.parametrize("icon", ["M4oE.png", *(f"{name}/Resources/Icons/{name}.png" for name in MODULES)])
def test_icons_are_png_of_128_by_128(icon: str) -> None:
    header = (ROOT / icon).read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (128, 128)


def test_urls_of_pictures_point_into_this_repository() -> None:
    raw = metadata()["HOMEPAGE"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    for url in (metadata()["ICONURL"], *metadata()["SCREENSHOTURLS"].split()):
        assert url.startswith(raw)
    assert (ROOT / metadata()["ICONURL"].removeprefix(raw)).is_file()


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("Docs/*.md")]), ids=lambda path: path.name)
def test_every_link_of_a_page_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)[)#]", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_picture_of_the_pages_is_shown_by_one() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("Docs/*.md")))
    assert [path.name for path in ROOT.glob("Docs/pictures/*") if f"pictures/{path.name}" not in pages] == []
