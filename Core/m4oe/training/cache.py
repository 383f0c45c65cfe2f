"""Cases on disk: each volume is brought to the canonical grid once, and from then on mapped into memory.

An entry is one safetensors file, named by a hash of what its voxels depend on: the content of the volume, and of the
spec the grid, the intensity rule and the label values. It is written whole or not at all, so that a build that was
stopped goes on where it was, and two at once do no harm. What no spec asks for any more may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..files import atomic_write
from ..geometry import Volume
from ..package import write_tensors
from ..parallel import WorkerLost, ignore_interrupts, run_jobs
from ..spec import ModelSpec
from .data import Case, annotated_classes, make_case

CANONICAL_VERSION = 1  # to be raised when the same volume gets other voxels on the canonical grid
_HASH_DIGITS = 40
_STRIPES, _STRIPE_BYTES = 16, 4096
_SETTLED_SECONDS = 2  # a file written later might change again without another time
_DETACHED = (".mhd", ".nhdr")  # headers whose voxels lie in another file of the same name
_BAD_CASE = (OSError, ValueError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class CaseSource:
    """A case before it is read.

    Attributes:
        name: For messages.
        expert: Index of the expert of its modality.
        annotated: Keys of the structures that were looked for; none for an image without labels.
        content: All that decides what `load` gives: files and folders by their bytes, texts (such as a label table)
            as they are.
        load: Reads the image and its labels, in the spec's label values or None. Runs in another process.
    """

    name: str
    expert: int
    annotated: tuple[str, ...]
    content: tuple[Path | str, ...]
    load: Callable[[], tuple[Volume, Volume | None]]


class Failure(NamedTuple):
    """A case that could not be had, and why."""

    name: str
    reason: str


def build_cache(
    sources: Sequence[CaseSource],
    spec: ModelSpec,
    folder: Path,
    processes: int | None = None,
    scheduler: str | None = None,
    emit: Callable[[dict[str, Any]], None] = lambda event: None,
) -> tuple[list[Case], list[Failure]]:
    """Makes the entries that are missing, damaged or of another spec, and opens them all.

    Args:
        sources: The cases.
        spec: The model that is trained.
        folder: Holds the entries.
        processes: How many to make at a time, one per core if None; a single one is made in this process.
        scheduler: Of a Dask cluster that makes them instead, see `run_jobs`; `folder` is the same there.
        emit: Told after the first, every tenth and the last of them.

    Returns:
        The cases, in the order of their sources, and those that failed.

    Raises:
        RuntimeError: A process was killed; what was made until then is kept.
    """
    places = _locate_all(sources, spec, folder)
    wanted = {place: source for place, source in zip(places, sources, strict=True) if isinstance(place, Path)}
    missing = {path: source for path, source in wanted.items() if not _is_whole(path)}
    reasons: dict[Path, str] = {}
    with closing(_make_all(missing, spec, processes or os.cpu_count() or 1, scheduler)) as made:
        bar = tqdm(made, "preparing cases", len(missing), unit="case", disable=None)
        for number, (path, reason) in enumerate(bar, start=1):
            reasons[path] = reason
            if number % 10 == 0 or number in (1, len(missing)):
                emit({"event": "prepared", "made": number, "of": len(missing)})
    cases, failures = [], []
    for source, place in zip(sources, places, strict=True):
        if isinstance(place, Failure):
            failures.append(place)
        elif reason := reasons.get(place, ""):
            failures.append(Failure(source.name, reason))
        else:
            cases.append(_open(place, source, spec))
    return cases, failures


def load_or_fail(source: CaseSource) -> tuple[Volume, Volume | None] | Failure:
    """The image and labels of a case, or why they cannot be had: one bad file is no reason to stop a training."""
    try:
        return source.load()
    except _BAD_CASE as error:
        return Failure(source.name, str(error) or type(error).__name__)


def start_worker() -> None:
    """What a process of a pool does first."""
    ignore_interrupts()
    torch.set_num_threads(1)


# Names


def _locate_all(sources: Sequence[CaseSource], spec: ModelSpec, folder: Path) -> list[Path | Failure]:
    pool = ThreadPoolExecutor()
    try:
        places = pool.map(lambda source: _locate(source, spec, folder), sources)
        return list(tqdm(places, "looking for cases", len(sources), unit="case", disable=None))
    finally:
        pool.shutdown(cancel_futures=True)


def _locate(source: CaseSource, spec: ModelSpec, folder: Path) -> Path | Failure:
    """Where the entry of a case is, or would be."""
    try:
        parts = [part if isinstance(part, str) else [_digest(part, folder)] for part in source.content]
    except OSError as error:
        return Failure(source.name, str(error))
    rule = asdict(spec.intensity[spec.experts[source.expert].modality])
    labels = dict(zip(source.annotated, spec.labels_of(source.annotated), strict=True))
    key = json.dumps([CANONICAL_VERSION, parts, spec.pixel_mm, spec.slice_mm, rule, labels], sort_keys=True)
    return folder / f"{_hash(key)}.safetensors"


def _digest(path: Path, folder: Path) -> str:
    """Hash of the bytes of a file or of the files of a folder; kept, as long as their sizes and times stay."""
    files = _files(path)
    states = [file.stat() for file in files]
    seen = [(str(file.resolve()), state.st_size, state.st_mtime_ns) for file, state in zip(files, states, strict=True)]
    kept = folder / "digests" / _hash(json.dumps(seen))
    if kept.exists() and len(known := kept.read_text(encoding="ascii")) == _HASH_DIGITS:
        return known
    digest = _hash(" ".join(_file_digest(file) for file in files))
    if time.time() - max((state.st_mtime for state in states), default=0) > _SETTLED_SECONDS:
        with atomic_write(kept) as temporary:
            temporary.write_text(digest, encoding="ascii")
    return digest


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return sorted(path.parent.glob(f"{escape(path.stem)}.*")) if path.suffix in _DETACHED else [path]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]


# Entries


def _make_all(
    missing: Mapping[Path, CaseSource], spec: ModelSpec, processes: int, scheduler: str | None
) -> Generator[tuple[Path, str], None, None]:
    """Makes entries and gives for each the reason why it failed, or ""."""
    jobs = {path: (path, source, spec) for path, source in missing.items()}
    for path, reason in run_jobs(_make, jobs, processes, scheduler, start_worker):
        if isinstance(reason, WorkerLost) and scheduler is None:
            raise RuntimeError(
                f"a process that prepared cases was killed, perhaps for want of memory; start again with fewer than "
                f"{processes}: what is done is kept"
            ) from reason
        yield path, str(reason)


def _make(job: tuple[Path, CaseSource, ModelSpec]) -> str:
    path, source, spec = job
    try:
        image, labels = source.load()
        _write(path, make_case(image, labels, source.annotated, spec, source.expert), source.name)
    except _BAD_CASE as error:
        return str(error) or type(error).__name__
    return ""


def _write(path: Path, case: Case, name: str) -> None:
    arrays = {"image": case.image_ZHW}
    if case.labels_ZHW is not None:
        shown_KZ = np.zeros((max(case.slices_of, default=0) + 1, len(case.image_ZHW)), np.uint8)
        for label, slices in case.slices_of.items():
            shown_KZ[label, slices] = 1
        arrays |= {"labels": case.labels_ZHW, "shown": shown_KZ}
    tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
    write_tensors(path, tensors, {"name": name, "check": _check(arrays)})


def _is_whole(path: Path) -> bool:
    """Whether there is an entry as it was written; warns of a damaged one."""
    if not path.exists():
        return False
    try:
        arrays, check = _map(path)
        whole = _check(arrays) == check
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        warnings.warn(f"{path} is damaged and is made again", stacklevel=2)
    return whole


def _open(path: Path, source: CaseSource, spec: ModelSpec) -> Case:
    arrays, _ = _map(path)
    shown_KZ = arrays.get("shown", np.empty((0, 0), np.uint8))
    slices_of = {int(label): np.flatnonzero(shown_KZ[label]) for label in np.flatnonzero(shown_KZ.any(1))}
    annotated_K = annotated_classes(source.annotated, spec)
    image_ZHW, labels_ZHW = arrays["image"], arrays.get("labels")
    return Case(image_ZHW, labels_ZHW, annotated_K, source.expert, slices_of, source.name)


def _map(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """An entry's arrays, which are read when they are looked at and need no open file, and what `_check` gave."""
    with safe_open(path, "pt") as file:
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        check = file.metadata()["check"]
    for array in arrays.values():
        array.setflags(write=False)
    return arrays, check


def _check(arrays: Mapping[str, np.ndarray]) -> str:
    """Shapes, and a checksum of stripes all over the arrays.

    A file that was cut is noticed by its size. What is left are pages that never reached the disk, which come in long
    runs: reading 16 stripes finds those, and reading everything would cost every start the time to read all data.
    """
    sums = []
    for name, array in sorted(arrays.items()):
        data = array.reshape(-1).view(np.uint8)
        starts = np.linspace(0, max(0, data.size - _STRIPE_BYTES), _STRIPES).astype(int)
        total = zlib.crc32(b"".join(data[start : start + _STRIPE_BYTES].tobytes() for start in starts))
        sums.append(f"{name} {array.dtype} {array.shape} {total:08x}")
    return "; ".join(sums)
