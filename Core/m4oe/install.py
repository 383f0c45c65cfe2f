"""What M4oE needs beside Python, what of it is missing, and how an install is kept from replacing what is there.

Standard library only, as it runs where nothing is installed yet. It installs nothing itself.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path


@dataclass(frozen=True)
class Requirement:
    """A package that M4oE needs.

    Attributes:
        name: As pip knows it.
        module: As Python imports it.
        oldest: The oldest version that will do.
        core: Whether it is Slicer's own there, or comes with its extension PyTorch, so that pip has to leave it alone.
    """

    name: str
    module: str
    oldest: str
    core: bool = False

    def __str__(self) -> str:
        """As pip takes it."""
        return f"{self.name}>={self.oldest}"


REQUIREMENTS = (
    Requirement("connected-components-3d", "cc3d", "3.18"),
    Requirement("highdicom", "highdicom", "0.24"),
    Requirement("numpy", "numpy", "1.26", core=True),
    Requirement("psutil", "psutil", "5.9"),
    Requirement("pynrrd", "nrrd", "1.1"),
    Requirement("safetensors", "safetensors", "0.4.3"),
    Requirement("scipy", "scipy", "1.15", core=True),
    Requirement("SimpleITK", "SimpleITK", "2.3", core=True),
    Requirement("torch", "torch", "2.7", core=True),
    Requirement("tqdm", "tqdm", "4.66"),
    Requirement("vtk", "vtk", "9.3", core=True),
)


_OF_TORCH = ("nvidia-", "torchaudio", "torchvision", "triton")


@dataclass(frozen=True)
class Package:
    """An installed package, as its folder of metadata tells it.

    Attributes:
        name: In the spelling that all share: lower case, hyphens.
        info: The folder `NAME-VERSION.dist-info`, or `.egg-info`.
        complete: Whether pip can read it; an install that broke off leaves one that it cannot.
    """

    name: str
    version: str
    info: Path
    complete: bool


def in_slicer() -> bool:
    """Whether this Python is Slicer's."""
    return "SLICER_HOME" in os.environ


def installed() -> tuple[Package, ...]:
    """All packages on this Python's path; of two with one name the first is the one that is imported."""
    folders = dict.fromkeys(Path(entry or ".").absolute() for entry in sys.path)
    infos = [info for folder in folders if folder.is_dir() for info in _infos(folder)]
    return tuple(_package(info) for info in infos)


def _infos(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in (".dist-info", ".egg-info"))
    except OSError:  # a folder of somebody else
        return []


def _package(info: Path) -> Package:
    name, _, version = info.stem.partition("-")
    if info.suffix == ".egg-info":
        version = re.sub(r"-py\d.*", "", version)
    complete = info.is_file() or any((info / file).is_file() for file in ("METADATA", "PKG-INFO"))
    return Package(same_name(name), version, info, complete)


def same_name(name: str) -> str:
    """The spelling of a package's name that all its spellings share."""
    return re.sub(r"[-_.]+", "-", name).lower()


def missing() -> tuple[Requirement, ...]:
    """What has to be installed: what is absent, incomplete or too old.

    What can be imported but is unknown to pip, as Slicer's own VTK, is there. In Slicer `torch` comes through the
    extension PyTorch: ask for the others by pip.
    """
    versions = _versions()
    return tuple(requirement for requirement in REQUIREMENTS if _is_missing(requirement, versions))


def _is_missing(requirement: Requirement, versions: dict[str, str]) -> bool:
    version = versions.get(same_name(requirement.name))
    if not is_importable(requirement.module):
        return True
    return version is not None and is_older(version, requirement.oldest)


def is_importable(module: str) -> bool:
    """Whether a module is on the path, with code in it: a bare folder is what is left of an install."""
    spec = PathFinder.find_spec(module)
    return spec is not None and spec.origin is not None


def is_older(version: str, than: str) -> bool:
    """Compares the numbers of two versions; what follows them, such as `+cpu` or `rc1`, does not count."""
    return _numbers(version) < _numbers(than)


def _numbers(version: str) -> list[int]:
    found = re.match(r"[\d.]*", version)
    numbers = re.findall(r"\d+", found[0]) if found else []
    return [int(number) for number in numbers] or [0]


def _versions() -> dict[str, str]:
    return {package.name: package.version for package in reversed(installed()) if package.complete}


def constraints() -> str:
    """Lines for `pip install --constraint`, with which pip can replace nothing that is installed here.

    The whole version is pinned, with its label as in `2.13.0+cpu`: pip takes no other build for it. What pip does not
    see, as Slicer's own VTK, it may not install at all. Free is only what M4oE needs newer and is not Slicer's own.
    """
    versions = _versions()
    if "torch" not in versions:  # an uninstall leaves what only it needed, and in versions that another torch refuses
        versions = {name: version for name, version in versions.items() if not name.startswith(_OF_TORCH)}
    free = {same_name(each.name) for each in missing() if not (each.core and in_slicer())}
    lines = [f"{name}=={version}" for name, version in sorted(versions.items()) if name not in free]
    unseen = [each for each in REQUIREMENTS if same_name(each.name) not in versions and is_importable(each.module)]
    lines += [f"{each.name}<0  # is there, but pip does not know it" for each in unseen if each.name != "torch"]
    return "".join(f"{line}\n" for line in lines)
