"""`m4oe doctor`: what of this Python, its packages, the GPU and the disk keeps M4oE from working, and the cure.

Standard library only, as it runs where all else is missing or broken. Packages are imported in another process, as
that may crash; the network is never used.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, getproxies_environment

from . import __version__
from .install import REQUIREMENTS, Package, in_slicer, installed, is_importable, is_older, missing, same_name
from .spec import installed_models, model_folders, read_spec
from .terminal import count

_OLDEST_PYTHON = (3, 11)
_PATIENCE = 120  # seconds that importing may take, on a slow disk for the first time
_LONGEST_PREFIX = 100  # letters on Windows, as torch holds paths of 150 and 260 are allowed
_TORCH_GB, _SPARE_GB = 8.0, 1.0
_LITTLE_MEMORY_GB, _SOME_MEMORY_GB = 2.0, 4.0
_DRIVERS = {"11": ("450.80", "452.39"), "12": ("525.60", "528.33"), "13": ("580", "580")}  # Linux, Windows
_SLICERS_OWN = ("numpy", "SimpleITK", "vtk")
_A_DAY = 86400.0
_FOLDERS = re.compile(r"""(?<![\w/\\.:])(?:~|[A-Za-z]:|[\\/])?[\\/](?:[^\s\\/,;:"'][^\\/\n,;:"']*[\\/])+""")
_PROXY_HOST = re.compile(r"(?i)(_proxy=(?:\w+://)?)[^\s,:/]+")
_ANSWER = "m4oe-doctor:"
_PROBE = f"""
import importlib, json, sys
sys.path[:], names = json.load(sys.stdin)
def describe(torch):
    found = dict(version=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip, gpus=[], archs=[])
    if torch.cuda.is_available():
        every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found["gpus"] = [[gpu.name, gpu.major, gpu.minor, gpu.total_memory] for gpu in every]
        found["archs"] = torch.cuda.get_arch_list()
    return found
for name in names:
    error, more = "", None
    try:
        module = importlib.import_module(name)
        if name == "torch":
            more = describe(module)
        if name == "psutil":
            more = module.virtual_memory().available
    except Exception as problem:
        error = f"{{type(problem).__name__}}: {{problem}}"
    print("\\n{_ANSWER}" + json.dumps([name, error, more]), flush=True)
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: "ok"; "note", good to know; or "problem", which keeps M4oE from working.
        found: What there is.
        cure: What to do; empty where all is well.
    """

    name: str
    state: str
    found: str
    cure: str = ""


def add_doctor_command(commands: Any) -> None:
    """Adds `doctor` to the commands of the parser."""
    doctor = commands.add_parser("doctor", help="say what keeps M4oE from working here, and the cure")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON, with whole paths")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    findings = examine()
    print(json.dumps([asdict(finding) for finding in findings], indent=1) if options.json else report(findings))
    return int(any(finding.state == "problem" for finding in findings))


def examine() -> tuple[Finding, ...]:
    """Looks at this Python and its machine, for some seconds; changes nothing and asks no network."""
    packages = installed()
    present = [each.module for each in REQUIREMENTS if is_importable(each.module)]
    answers = _import_elsewhere(sorted(present, key="torch".__eq__))
    site = Path(sysconfig.get_path("purelib"))
    torch_is_there = answers.get("torch", ("absent", None))[0] == ""
    findings = [
        _python(),
        *_torch(packages, answers.get("torch"), _nvidia()),
        *_packages(packages, answers),
        *_slicers_own(packages),
        _remains(packages, site),
        _memory(answers),
        disk_space({"packages": site, "models": model_folders()[0], "temporary files": Path(tempfile.gettempdir())}),
        write_access(site),
        *([_path_length(str(site), torch_is_there)] if sys.platform == "win32" else []),
        _proxies(),
        _certificates(os.environ),
        _models(),
        _model_folder(model_folders()[0]),
    ]
    order = ("problem", "note", "ok")
    return tuple(sorted(findings, key=lambda finding: order.index(finding.state)))


def report(findings: Iterable[Finding]) -> str:
    """The findings as text to post: without the user, the proxy's name and all of a path but its end."""
    findings = list(findings)
    lines = [f"M4oE {__version__} on {platform.platform()}{', in Slicer' if in_slicer() else ''}"]
    for finding in findings:
        lines.append(f"{finding.state:<8} {finding.name}: {finding.found}")
        if finding.cure:
            lines.append(f"{'':<8}   -> {finding.cure}")
    problems = sum(finding.state == "problem" for finding in findings)
    lines.append(f"{count(problems, 'problem')}, {count(sum(f.state == 'note' for f in findings), 'note')}")
    return _anonymous("\n".join(lines))


def _anonymous(text: str) -> str:
    try:
        home = str(Path.home())
    except RuntimeError:  # nobody knows
        home = ""
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?=[\\/\s,;:)]|$)", "~", text, flags=re.IGNORECASE)
    text = re.sub(r"(?:[A-Za-z]:)?[\\/](?:home|Users)[\\/][^\\/\s,;:]+", "~", text, flags=re.IGNORECASE)
    text = _PROXY_HOST.sub(r"\1HOST", _FOLDERS.sub(".../", text))
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # as above
        return text
    return re.sub(rf"(?<=[\\/]){re.escape(name)}(?=[\\/\s,;:)]|$)", "USER", text)


def _python() -> Finding:
    found = f"{platform.python_version()}, {64 if sys.maxsize > 2**32 else 32} bit, {platform.machine()}"
    if sys.version_info < _OLDEST_PYTHON:
        cure = "M4oE needs Python 3.11 or newer: take Slicer 5.12 or newer, or another Python"
    elif sys.maxsize <= 2**32:
        cure = "there is no torch for 32 bit; install the 64 bit edition"
    elif sys.platform == "darwin" and platform.machine() == "x86_64":
        cure = "there is no new torch for Intel on macOS; have M4oE run in a native arm64 Python, as a worker"
    else:
        return Finding("Python", "ok", found)
    return Finding("Python", "problem", found, cure)


# Importing in another process


def _import_elsewhere(modules: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """By module: the error of importing it, empty if there is none, and what the module told."""
    answers: dict[str, tuple[str, Any]] = {}
    while rest := [module for module in modules if module not in answers]:
        output, end = _probe(rest)
        for line in output.splitlines():
            if line.startswith(_ANSWER):
                module, error, more = json.loads(line[len(_ANSWER) :])
                answers[module] = (error, more)
        if unanswered := [module for module in rest if module not in answers]:
            answers[unanswered[0]] = (end, None)  # the others are asked again
    return answers


def _probe(modules: Sequence[str]) -> tuple[str, str]:
    """Output of a process that imports them, and how it ended."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            input=json.dumps([[entry or str(Path.cwd()) for entry in sys.path], list(modules)]),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PATIENCE,
            check=False,
            env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"},
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        text = output.decode("utf-8", "replace") if isinstance(output, bytes) else output
        return text, f"importing it did not end within {_PATIENCE} s"
    except OSError as error:
        return "", f"{sys.executable} cannot be started ({error.strerror})"
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return done.stdout, f"importing it ended Python with code {done.returncode}: {last[0]}"


# torch and the GPU


@dataclass(frozen=True)
class _Gpu:
    name: str
    driver: str


def _nvidia() -> list[_Gpu]:
    """The GPUs that NVIDIA's driver knows."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=False,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if done.returncode == 0 and "," in line]
    return [_Gpu(name.strip(), driver.strip()) for name, driver in rows]


def _torch(packages: Sequence[Package], answer: tuple[str, Any] | None, gpus: Sequence[_Gpu]) -> list[Finding]:
    infos = [package.info for package in packages if package.name == "torch"]
    if not infos and answer is None and not _bare_folders("torch"):
        return [Finding("torch", "problem", "is not installed", f"{_how('torch')}")]
    broken = [package.info.name for package in packages if package.name == "torch" and not package.complete]
    if answer is None or broken:
        left = ", ".join(map(str, [*_bare_folders("torch"), *infos]))
        found = f"is installed in part only: {left}"
        return [Finding("torch", "problem", found, f"close Slicer, delete these folders, then {_how('torch')}")]
    error, about = answer
    if error:
        cure = f"install it again: close Slicer, remove torch by pip uninstall, then {_how('torch')}"
        return [Finding("torch", "problem", f"cannot be imported: {error}", cure)]
    build = f"for CUDA {about['cuda']}" if about["cuda"] else f"for ROCm {about['hip']}" if about["hip"] else "for CPUs"
    found = f"{about['version']} {build}"
    oldest = next(each.oldest for each in REQUIREMENTS if each.name == "torch")
    if is_older(about["version"], oldest):
        return [Finding("torch", "problem", f"{found}; {oldest} is needed", _how("torch"))]
    return [Finding("torch", "ok", found), _gpu(about, gpus)]


def _gpu(about: Mapping[str, Any], gpus: Sequence[_Gpu]) -> Finding:
    names = ", ".join(f"{gpu.name} (driver {gpu.driver})" for gpu in gpus)
    if about["gpus"]:
        return _architecture(about, names)
    if not gpus:
        apple = ", or on Apple's GPU" if sys.platform == "darwin" else ""
        return Finding("GPU", "ok", f"none of NVIDIA; M4oE computes on the CPU{apple}")
    if not about["cuda"]:
        cure = "for speed take a torch with CUDA; in Slicer: extension PyTorch, uninstall, install"
        return Finding("GPU", "note", f"{names}, which this torch for CPUs cannot use", cure)
    needed = _DRIVERS.get(about["cuda"].split(".")[0], ("", ""))[sys.platform == "win32"]
    if needed and is_older(gpus[0].driver, needed):
        found = f"{names}; CUDA {about['cuda']} needs driver {needed} or newer"
        return Finding("GPU", "problem", found, "update NVIDIA's driver, or take a torch for an older CUDA")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        cure = "remove the variable CUDA_VISIBLE_DEVICES if that is not meant"
        return Finding("GPU", "note", f"{names}, of which CUDA_VISIBLE_DEVICES={hidden} leaves none", cure)
    cure = "restart the computer; if that does not help, install NVIDIA's driver again"
    return Finding("GPU", "problem", f"{names}, but torch finds none", cure)


def _architecture(about: Mapping[str, Any], names: str) -> Finding:
    told = [f"{name}, {memory / 2**30:.0f} GB, sm_{major}{minor}" for name, major, minor, memory in about["gpus"]]
    found = "; ".join([*told, *([names] if names else [])])
    unfit = [
        f"sm_{major}{minor}" for _, major, minor, _ in about["gpus"] if not _serves(about["archs"], major * 10 + minor)
    ]
    if about["hip"] or not unfit:
        return Finding("GPU", "ok", found)
    found += f"; this torch has no code for {', '.join(unfit)}, only {', '.join(about['archs'])}"
    return Finding("GPU", "problem", found, "take a torch for another CUDA (newer for new GPUs), or the device cpu")


def _serves(archs: Sequence[str], capability: int) -> bool:
    """Whether code for these architectures runs on a GPU; 86 is 8.6."""
    for arch in archs:
        kind, _, text = arch.partition("_")
        code = int(re.sub(r"\D", "", text) or 0)
        if code == capability:
            return True
        if text.isdigit() and code < capability and (kind == "compute" or code // 10 == capability // 10):
            return True
    return False


# Packages


def _packages(packages: Sequence[Package], answers: Mapping[str, tuple[str, Any]]) -> list[Finding]:
    lacking, findings = missing(), []
    versions = {package.name: package.version for package in reversed(packages)}
    for each in REQUIREMENTS:
        if each.name == "torch":
            continue
        version = versions.get(same_name(each.name), "")
        error = answers.get(each.module, ("", None))[0]
        if each in lacking:
            found = f"{version or 'nothing'} is installed; {each} is needed"
            findings.append(Finding(each.name, "problem", found, _how(f'"{each}"') if not _own(each.name) else _ANEW))
        elif error:
            cure = _ANEW if _own(each.name) else f"install it again: {_pip()} install --force-reinstall --no-deps "
            cure = cure if _own(each.name) else f"{cure}{each.name}=={version}"
            findings.append(Finding(each.name, "problem", f"{version} cannot be imported: {error}", cure))
        else:
            findings.append(Finding(each.name, "ok", version or "there, unknown to pip"))
    return findings


_ANEW = "it is Slicer's own: install Slicer anew, in another folder"


def _own(name: str) -> bool:
    return in_slicer() and any(each.core for each in REQUIREMENTS if each.name == name)


def _slicers_own(packages: Sequence[Package]) -> list[Finding]:
    """What happened to the packages that break all of Slicer when they are replaced; nothing where all is well."""
    findings = []
    for name in _SLICERS_OWN:
        infos = [package for package in packages if package.name == same_name(name)]
        places = [str(place) for place in _places(name)]
        folders = [package.info.parent for package in infos]
        versions = ", ".join(f"{package.version} in {package.info.parent}" for package in infos)
        cure = "install Slicer anew, in another folder" if in_slicer() else f"{_pip()} install --force-reinstall {name}"
        if len(set(folders)) < len(folders):
            findings.append(Finding(f"{name}, twice", "problem", f"installed over one another: {versions}", cure))
        elif len(places) > 1:
            cure = f"remove all but Slicer's own ({_pip()} uninstall {name}, or delete the folder)"
            state = "problem" if in_slicer() else "note"
            findings.append(Finding(f"{name}, twice", state, f"{', '.join(places)}; the first is used", cure))
        elif in_slicer() and places and not _inside(Path(places[0])):
            cure = f"{places[0]} is outside of Slicer; remove it there, and the variable PYTHONPATH if it is set"
            findings.append(Finding(f"{name}, replaced", "problem", versions or places[0], cure))
    return [*findings, *_replaced_later(packages)]


def _replaced_later(packages: Sequence[Package]) -> list[Finding]:
    """Of packages that Slicer was built with, those that are much newer than the others were put in later."""
    if not in_slicer():
        return []
    own = {name: package for name in _SLICERS_OWN for package in packages if package.name == same_name(name)}
    times = {name: package.info.stat().st_mtime for name, package in own.items()}
    late = [name for name in own if times[name] > min(times.values()) + 2 * _A_DAY]
    cure = "if volumes do not load any more, install Slicer anew, in another folder"
    return [
        Finding(f"{name}, replaced", "note", f"{own[name].version} was installed after Slicer was built", cure)
        for name in late
    ]


def _places(module: str) -> list[Path]:
    """Where on the path this module is."""
    folders = dict.fromkeys(Path(entry or ".").resolve() for entry in sys.path)
    names = (f"{module}/__init__.py", f"{module}.py")
    return [folder for folder in folders if any((folder / name).is_file() for name in names)]


def _inside(place: Path) -> bool:
    homes = [Path(os.environ.get("SLICER_HOME", sys.base_prefix)), Path(sys.base_prefix)]
    return any(place.is_relative_to(home.resolve()) for home in homes)


def _bare_folders(module: str) -> list[Path]:
    """Folders of this module without code of its own, as an install leaves that broke off."""
    folders = dict.fromkeys(Path(entry or ".").absolute() / module for entry in sys.path)
    return [folder for folder in folders if folder.is_dir() and not (folder / "__init__.py").is_file()]


def _remains(packages: Sequence[Package], site: Path) -> Finding:
    """Folders that pip left behind when it could not finish, as on Windows with a library in use."""
    left = sorted(site.glob("~*")) if site.is_dir() else []
    left += [package.info for package in packages if not package.complete and package.name != "torch"]
    if left:
        names = {path.parent: [other.name for other in left if other.parent == path.parent] for path in left}
        found = "; ".join(f"{', '.join(there)} in {folder}" for folder, there in names.items())
        return Finding("installs that broke off", "problem", found, "close Slicer, delete them")
    return Finding("installs that broke off", "ok", "none")


def _pip() -> str:
    return "PythonSlicer -m pip" if in_slicer() else "python -m pip"


def _how(what: str) -> str:
    if what == "torch" and in_slicer():
        return "install it through the extension PyTorch, or from a bundle: m4oe bundle import FILE.zip"
    return f"{_pip()} install {what}, or without a network: m4oe bundle import FILE.zip"


# The machine


def _memory(answers: Mapping[str, tuple[str, Any]]) -> Finding:
    free = answers.get("psutil", ("", None))[1]
    if free is None:
        return Finding("memory", "note", "unknown", "install psutil, which tells it")
    found = f"{free / 2**30:.1f} GB free"
    if free >= _SOME_MEMORY_GB * 2**30:
        return Finding("memory", "ok", found)
    state = "problem" if free < _LITTLE_MEMORY_GB * 2**30 else "note"
    return Finding("memory", state, found, "close other programs, or crop large volumes")


def disk_space(places: Mapping[str, Path]) -> Finding:
    """Room where packages, models and pip's temporary files go; torch needs most of it."""
    needed = _TORCH_GB if any(each.name == "torch" for each in missing()) else _SPARE_GB
    free = {name: _free_gb(place) for name, place in places.items()}
    found = ", ".join(f"{value:.1f} GB free for {name}" for name, value in free.items())
    if min(free.values()) >= needed:
        return Finding("disk", "ok", found)
    short = ", ".join(f"{name} ({places[name]})" for name, value in free.items() if value < needed)
    return Finding("disk", "problem", found, f"free {needed:g} GB for {short}")


def _free_gb(place: Path) -> float:
    return shutil.disk_usage(_existing(place)).free / 2**30


def _existing(place: Path) -> Path:
    return next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def write_access(site: Path) -> Finding:
    """Whether packages can be installed there."""
    if _can_write(_existing(site)):
        return Finding("folder of packages", "ok", str(site))
    state = "problem" if missing() else "note"
    cure = "install Slicer into a folder of your own" if in_slicer() else "use a virtual environment: python -m venv"
    return Finding("folder of packages", state, f"{site} cannot be written, so nothing can be installed", cure)


def _path_length(site: str, torch_is_there: bool) -> Finding:
    """Windows allows 260 letters, and torch needs many of them."""
    if len(site) <= _LONGEST_PREFIX:
        return Finding("length of paths", "ok", f"{len(site)} letters")
    found = f"{site} has {len(site)} letters; above {_LONGEST_PREFIX} torch's files get paths that Windows refuses"
    cure = "install Slicer (or Python) into a folder with a short path, such as C:\\Slicer"
    return Finding("length of paths", "note" if torch_is_there else "problem", found, cure)


def _proxies() -> Finding:
    """What pip takes: the variables, else the settings of Windows or macOS."""
    found, bad = [], []
    given = getproxies()
    for name in ("http", "https", "all"):
        if value := given.get(name, ""):
            shown = re.sub(r"^(\w+://)?.*@", r"\1***@", value)  # no passwords
            found.append(f"{name}_proxy={shown}")
            if urlsplit(value).scheme not in ("http", "https", "socks4", "socks5", "socks5h"):
                bad.append(f"{name}_proxy")
    if bad:
        return Finding("proxy", "problem", ", ".join(found), f"write {', '.join(bad)} as http://HOST:PORT")
    if not found:
        return Finding("proxy", "ok", "none is set; a configuration script (PAC) would not be seen here, nor by pip")
    where = "" if getproxies_environment() else ", by the settings of the system"
    return Finding("proxy", "ok", f"{', '.join(found)}{where}")


def _certificates(environment: Mapping[str, str]) -> Finding:
    names = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE", "PIP_CERT")
    given = {name: environment[name] for name in names if environment.get(name)}
    lost = [name for name, file in given.items() if not Path(file).exists()]
    found = ", ".join(f"{name}={file}" for name, file in given.items()) or "those of Python"
    if lost:
        cure = f"{', '.join(lost)}: there is no such file; correct the variable or remove it"
        return Finding("certificates", "problem", found, cure)
    return Finding("certificates", "ok", found)


# Models


def _models() -> Finding:
    whole, damaged = [], []
    for path in installed_models():
        try:
            spec = read_spec(path)
            whole.append(f"{path.stem} {spec.version}")
        except ValueError as error:
            damaged.append(str(error))
    if damaged:
        return Finding("models", "problem", "; ".join(damaged), "delete the file, and copy it here again")
    if not whole:
        return Finding("models", "problem", "none is installed", "install M4oE again, as it brings m4oe-demo")
    return Finding("models", "ok", ", ".join(whole))


def _model_folder(folder: Path) -> Finding:
    if folder.exists() and not folder.is_dir():
        return Finding("folder of models", "problem", f"{folder} is a file", "set M4OE_MODELS to a folder")
    if not _can_write(_existing(folder)):
        return Finding("folder of models", "note", f"{folder} cannot be written", "set M4OE_MODELS to one of yours")
    return Finding("folder of models", "ok", f"{folder}{'' if folder.exists() else ', made when it is needed'}")
