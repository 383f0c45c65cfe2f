"""`m4oe bundle`: all that M4oE needs in one file, made on a machine with a network, for machines without one.

The file is a zip of `wheels/`, `models/` and `manifest.json`, which has the size and SHA-256 of each. Standard library
only, as it runs where nothing is installed yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from . import __version__
from .install import REQUIREMENTS, constraints, installed, missing, same_name
from .spec import installed_models, model_folders, read_spec
from .terminal import say

FORMAT_VERSION = 1
PLATFORMS = {
    "windows": ("win_amd64",),
    "linux": ("manylinux2014_x86_64", *(f"manylinux_2_{number}_x86_64" for number in range(28, 4, -1))),
    "macos": ("macosx_14_0_arm64",),
}
_MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 4 * 2**20
_MEMBER = re.compile(r"(wheels/[A-Za-z0-9_][\w.+!-]*\.whl|models/\w[\w .+-]*\.safetensors)")
_CHUNK = 2**20
_TAIL = 12  # lines of pip's that an error shows

OnLine = Callable[[str], object]


@dataclass(frozen=True)
class BundleFile:
    """A file in a bundle; the digest is SHA-256, in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and for whom it is.

    Attributes:
        python: Such as "3.12".
        platform: "windows", "linux" or "macos".
        packages: Version by name.
        models: Version by name.
        files: By their names in the bundle.
    """

    m4oe: str
    python: str
    platform: str
    packages: Mapping[str, str]
    models: Mapping[str, str]
    files: Mapping[str, BundleFile]
    format_version: int = FORMAT_VERSION


def add_bundle_command(commands: Any) -> None:
    """Adds `bundle` and what belongs to it to the commands of the parser."""
    bundle = commands.add_parser("bundle", help="bring M4oE's packages and models to a machine without a network")
    actions = bundle.add_subparsers(required=True, metavar="ACTION")

    make = actions.add_parser("make", help="download packages, and pack them with your models; needs a network")
    make.add_argument("file", type=Path, metavar="OUT.zip")
    make.add_argument("--platform", choices=tuple(PLATFORMS), help="of the other machine; default: as this one")
    make.add_argument("--python", metavar="X.Y", help="of the other machine, 3.12 for Slicer; default: as this one")
    make.set_defaults(run=_make)

    take = actions.add_parser("import", help="install a bundle into this Python; needs no network")
    take.add_argument("file", type=Path, metavar="FILE.zip")
    take.set_defaults(run=_import)


def _make(options: argparse.Namespace) -> int:
    manifest = make_bundle(options.file, options.platform, options.python, say)
    print(f"{_told(manifest)}\nfor Python {manifest.python} on {manifest.platform}: {options.file}")
    print(f"on the other machine: m4oe bundle import {options.file.name}, in Slicer PythonSlicer -m m4oe bundle import")
    return 0


def _import(options: argparse.Namespace) -> int:
    packages, models = import_bundle(options.file, say)
    print(f"packages installed: {', '.join(packages) or 'none, all were there'}")
    print(f"models copied: {', '.join(models) or 'none'}\nwhether all is well: m4oe doctor")
    return 0


def _told(manifest: Manifest) -> str:
    size = sum(file.size for file in manifest.files.values()) / 2**20
    names = [f"{name} {version}" for kind in (manifest.packages, manifest.models) for name, version in kind.items()]
    return f"{', '.join(names)}; {size:.0f} MB"


# Making


def make_bundle(
    path: Path | str,
    platform: str | None = None,
    python: str | None = None,
    on_line: OnLine = lambda line: None,
) -> Manifest:
    """Downloads what M4oE needs, and packs it with the models in the user's model folder.

    Where pip downloads from, and under which constraints, is said by its own configuration and variables.

    Args:
        path: A .zip file to be; one that is there is replaced when the new one is whole.
        platform: A key of `PLATFORMS`; None for this machine's.
        python: Such as "3.12"; None for this Python's.
        on_line: Hears what pip says.

    Raises:
        ValueError: The platform, the version, the name or a model cannot be used.
        RuntimeError: pip could not download all.
        OSError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".zip":
        raise ValueError(f"the bundle is to be {path}; expected a name that ends in .zip")
    if python is not None and not re.fullmatch(r"3\.\d+", python):
        raise ValueError(f"the Python is {python!r}; expected a version such as 3.12")
    if platform is not None and platform not in PLATFORMS:
        raise ValueError(f"the platform is {platform!r}; expected one of {', '.join(PLATFORMS)}")
    own = model_folders()[0]
    models = [model for model in installed_models() if model.parent == own]
    model_versions = {model.stem: read_spec(model).version for model in models}
    if odd := [model.name for model in models if not _MEMBER.fullmatch(f"models/{model.name}")]:
        raise ValueError(f"the name {odd[0]!r} of a model cannot be used; expected letters, digits and . _ -")
    with tempfile.TemporaryDirectory() as folder:
        _download(Path(folder), platform, python, on_line)
        wheels = sorted(Path(folder).glob("*.whl"))
        files = {f"wheels/{wheel.name}": wheel for wheel in wheels} | {f"models/{file.name}": file for file in models}
        manifest = Manifest(
            __version__,
            python or _this_python(),
            platform or _this_platform(),
            {same_name(wheel.name.split("-")[0]): wheel.name.split("-")[1] for wheel in wheels},
            model_versions,
            {name: _digest(file) for name, file in files.items()},
        )
        _pack(path, manifest, files)
    return manifest


def _download(folder: Path, platform: str | None, python: str | None, on_line: OnLine) -> None:
    words = ["download", "--only-binary", ":all:", "--dest", str(folder), "--progress-bar", "off"]
    if platform or python:  # pip wants both then
        tags = PLATFORMS.get(platform or _this_platform())
        if tags is None:
            raise ValueError(f"this machine is {_this_platform()}; name the other one's: {', '.join(PLATFORMS)}")
        words += [word for tag in tags for word in ("--platform", tag)]
        words += ["--python-version", python or _this_python(), "--implementation", "cp"]
    _pip([*words, *map(str, REQUIREMENTS)], os.environ, on_line)


def _pack(path: Path, manifest: Manifest, files: Mapping[str, Path]) -> None:
    """Writes the bundle beside its place first, so that there is never half of one."""
    new = path.with_name(f".{uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as bundle:  # wheels are compressed already
            bundle.writestr(_MANIFEST, json.dumps(asdict(manifest), indent=1))
            for name, file in files.items():
                bundle.write(file, name)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _digest(path: Path) -> BundleFile:
    with path.open("rb") as file:
        return BundleFile(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _this_platform() -> str:
    return {"win32": "windows", "darwin": "macos"}.get(sys.platform, sys.platform)


# Importing


def import_bundle(path: Path | str, on_line: OnLine = lambda line: None) -> tuple[list[str], list[str]]:
    """Installs from a bundle what is missing here, replaces nothing else, and copies the models.

    All files are checked first. If pip fails, packages that are new are removed again and no model is copied.

    Args:
        path: The bundle.
        on_line: Hears what pip says.

    Returns:
        What was installed, such as "tqdm 4.70.1", and the names of the models that were copied.

    Raises:
        ValueError: The bundle is damaged, changed, unsafe or for another Python, or a model of that name is there.
        RuntimeError: pip could not install all.
        OSError: There is no room, or a folder cannot be written.
    """
    path, models = Path(path), model_folders()[0]
    with ExitStack() as stack:
        try:
            bundle = stack.enter_context(zipfile.ZipFile(path))
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read ({error}); expected what m4oe bundle make wrote") from error
        manifest = _read_manifest(bundle, path)
        _check_target(manifest)
        new = _new_models(manifest, models)
        wheels = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = {name: wheels / name.partition("/")[2] for name in manifest.files if name.startswith("wheels/")}
        for name in new:
            places[name] = models / f".{uuid4().hex[:8]}-{name.partition('/')[2]}"
            stack.callback(places[name].unlink, missing_ok=True)
        _extract(bundle, path, manifest, places)
        for name in new:
            read_spec(places[name])
        packages = _install(wheels, on_line)
        for name in new:
            places[name].replace(models / name.partition("/")[2])
    return packages, [Path(name).stem for name in new]


def _read_manifest(bundle: zipfile.ZipFile, path: Path) -> Manifest:
    """What the bundle says it holds, which has to be what it holds.

    Raises:
        ValueError: It is not.
    """
    names = bundle.namelist()
    try:
        info = bundle.getinfo(_MANIFEST)
        values = json.loads(bundle.read(info) if info.file_size <= _MANIFEST_LIMIT else b"")
        version = values["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(f"its format {version} is newer than {FORMAT_VERSION}; update M4oE")
        files = {name: BundleFile(int(file["size"]), str(file["sha256"])) for name, file in values["files"].items()}
        manifest = Manifest(**{**values, "files": files})
    except (KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no bundle of M4oE, or is damaged: its manifest cannot be read ({error})"
        ) from error
    if unsafe := [name for name in (*names, *files) if name != _MANIFEST and not _MEMBER.fullmatch(name)]:
        raise ValueError(
            f"{path} is not safe: it holds {unsafe[0]!r}; expected only wheels/*.whl, models/*.safetensors"
        )
    if sorted(names) != sorted([_MANIFEST, *files]):
        odd = sorted({*names} ^ {_MANIFEST, *files}) or ["a name twice"]
        raise ValueError(f"{path} is damaged or was changed: contents and manifest differ in {odd[0]}; copy it again")
    return manifest


def _check_target(manifest: Manifest) -> None:
    here, there = (_this_python(), _this_platform()), (manifest.python, manifest.platform)
    if here != there:
        raise ValueError(
            f"the bundle is for Python {there[0]} on {there[1]}, this is Python {here[0]} on {here[1]}; make one with "
            f"--python {here[0]} --platform {here[1]}"
        )


def _new_models(manifest: Manifest, folder: Path) -> list[str]:
    """Names in the bundle of the models that are not here yet.

    Raises:
        ValueError: Another model has the name of one.
    """
    new = []
    for name, file in manifest.files.items():
        target = folder / name.partition("/")[2]
        if not name.startswith("models/"):
            continue
        if not target.exists():
            new.append(name)
        elif _digest(target) != file:
            raise ValueError(f"{target} is another model than the bundle's; move it away, then import again")
    return new


def _extract(bundle: zipfile.ZipFile, path: Path, manifest: Manifest, places: Mapping[str, Path]) -> None:
    """Writes files to their places, and checks every file of the bundle.

    Raises:
        ValueError: A file is not what the manifest says.
    """
    for name, expected in manifest.files.items():
        digest, size = hashlib.sha256(), 0
        with ExitStack() as stack:
            try:
                source = stack.enter_context(bundle.open(name))
                place = places.get(name, Path(os.devnull))
                place.parent.mkdir(parents=True, exist_ok=True)
                target = stack.enter_context(place.open("wb"))
                while size <= expected.size and (data := source.read(_CHUNK)):
                    digest.update(data)
                    size += len(data)
                    target.write(data)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                raise ValueError(f"{path} is damaged at {name} ({error}); copy it again") from error
        if BundleFile(size, digest.hexdigest()) != expected:
            raise ValueError(f"{path} is damaged or was changed: {name} is not what its manifest says; copy it again")


def _install(wheels: Path, on_line: OnLine) -> list[str]:
    """Installs what is missing, first as a trial.

    Raises:
        RuntimeError: pip could not; packages that are new are removed again.
    """
    wanted = [str(requirement) for requirement in missing()]
    if not wanted:
        return []
    before = _versions()
    pins = wheels / "constraints.txt"
    pins.write_text(constraints(), encoding="utf-8")
    # The variables and the configuration of pip could name other sources; packages belong into this Python alone.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PYTHONNOUSERSITE": "1"}
    words = ["--no-index", "--find-links", str(wheels), "--only-binary", ":all:", "--constraint", str(pins), *wanted]
    _pip(["install", "--dry-run", "--quiet", *words], environment, on_line)
    try:
        _pip(["install", *words], environment, on_line)
    except (RuntimeError, KeyboardInterrupt):
        if added := sorted(_versions().keys() - before.keys()):
            _pip(["uninstall", "--yes", *added], environment, on_line)
        raise
    return [f"{name} {version}" for name, version in sorted(_versions().items()) if before.get(name) != version]


def _versions() -> dict[str, str]:
    return {package.name: package.version for package in reversed(installed()) if package.complete}


def _pip(words: Sequence[str], environment: Mapping[str, str], on_line: OnLine) -> None:
    """Runs this Python's pip.

    Raises:
        RuntimeError: It failed; with its last lines.
    """
    tail: deque[str] = deque(maxlen=_TAIL)
    with subprocess.Popen(
        [sys.executable, "-m", "pip", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**environment, "PYTHONUTF8": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    ) as process:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            on_line(line.rstrip())
    if process.returncode:
        raise RuntimeError(f"pip {words[0]} failed with code {process.returncode}: {' | '.join(tail) or 'no message'}")
