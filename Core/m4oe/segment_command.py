"""The command `m4oe segment`: many cases with one model, and the tables of what was found."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .labels import structure
from .names import read_rows
from .spec import DEFAULT_MODEL, ModelSpec, find_model, read_spec
from .terminal import FAILURES, count, one_line, prepare_folder, progress_bar, say, say_error, structures

if TYPE_CHECKING:
    from .geometry import Volume
    from .jobs import Report
    from .predictor import Predictor

FORMATS = ("seg.nrrd", "nii.gz", "nrrd", "mha", "dcm")
_LABEL_MAP = "It seems to be a label map, not an image."
_COLUMNS = ("case", "structure", "name", "volume_ml", "expert", "model", "note", "case_note")
_TABLE_COLUMNS = ("input", "case", "expert", "frame")
_PAUSE = 0.25  # seconds between two events of progress


@dataclass(frozen=True)
class _Case:
    """One thing to segment; what a table leaves open is None or empty, and the options say it."""

    path: Path
    name: str = ""
    expert: str | None = None
    frame: int | None = None


@dataclass
class Voice:
    """Tells how it goes: in words or, for other programs, as a line of JSON per event; and in a log."""

    as_json: bool = False
    log: Path | None = None
    _unwritten: list[str] = field(default_factory=list)

    def event(self, event: str, **fields: Any) -> None:
        """An event for other programs, if any listens."""
        if self.as_json:
            print(json.dumps({"event": event, **fields}), flush=True)

    def result(self, text: str) -> None:
        """A result, in words on stdout unless events are told there."""
        self.note(text)
        if not self.as_json:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Anything else that the user should know."""
        self.note(text)
        say(text)

    def error(self, text: object) -> None:
        """An error of one input."""
        self.note(f"error: {one_line(text)}")
        say_error(text, 1)

    def note(self, text: str) -> None:
        """Writes into the log alone, each line with its date; what comes before there is a log is kept for it."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self._unwritten += [f"{now} {line}\n" for line in text.splitlines()]
        if self.log is None:
            return
        with (
            suppress(OSError),  # a disk that is full is told by what matters more than the log
            self.log.open("a", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.writelines(self._unwritten)
        self._unwritten.clear()

    @contextmanager
    def progress(self, case: str) -> Iterator[Callable[[str, float], None]]:
        """Yields what shows phase and fraction of a case."""
        if not self.as_json:
            with progress_bar(case) as show:
                yield show
            return
        last, before = "", 0.0

        def tell(phase: str, fraction: float) -> None:
            nonlocal last, before
            now = time.monotonic()
            if phase != last or now - before >= _PAUSE:
                last, before = phase, now
                self.event("progress", case=case, phase=phase, fraction=round(fraction, 3))

        yield tell


def add_segment_command(commands: Any) -> None:
    """Adds `segment` to the commands of the parser."""
    segment = commands.add_parser("segment", help="segment volumes")
    what = "file, DICOM folder or one of its files, folder of files, or table (.csv) with the column input"
    segment.add_argument("inputs", nargs="+", metavar="INPUT", type=Path, help=what)
    segment.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder for the results")
    segment.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s; dcm: DICOM SEG")
    segment.add_argument("--preview", action="store_true", help="also write a PNG of each result")
    segment.add_argument("--resume", action="store_true", help="leave out cases whose results are there already")
    segment.add_argument("--json", action="store_true", help="print events as JSON, one per line")
    add_prediction_options(segment)
    segment.set_defaults(run=_segment)


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how to segment."""
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="file or name; default: %(default)s")
    parser.add_argument("--expert", default="auto", metavar="NAME", help="auto, or an expert to overrule the gate")
    parser.add_argument(
        "--structures", type=structures, metavar="KEY,KEY", help="to keep, by key or name; default: all of the model"
    )
    parser.add_argument("--frame", type=int, metavar="N", help="frame of 4-D volumes, from 0; 3-D ones have but one")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--quality", choices=("standard", "fast"), default="standard", help="fast: half of the slices")


def _segment(options: argparse.Namespace) -> int:
    voice = Voice(options.json)
    outcomes: Counter[str] = Counter()
    cases, failed = _find_cases(options.inputs, voice, outcomes)
    total = len(cases) + len(failed)
    ready = None
    if cases:
        predictor = load_predictor(options)
        start_folder(options, predictor, voice)
        ready = _entries(options.output)
    for name, entry in failed if options.output.is_dir() else ():
        _record(options.output, name, entry, voice)
    try:
        for number, case in enumerate(cases, start=1):
            if options.resume and _is_done(case, ready or {}, predictor.spec, options):
                outcomes["there"] += 1
                voice.note(f"{case.name}: skipped, its result is there")
                voice.event("skipped", case=case.name, reason="done")
                continue
            voice.say(f"{number}/{len(cases)} {case.name} ...")
            voice.event("case", number=number, of=len(cases), case=case.name)
            outcomes[_segment_case(predictor, case, options, voice)] += 1
    except KeyboardInterrupt:
        voice.note("interrupted")
        raise
    return _sum_up(outcomes, total, options, voice)


def _sum_up(outcomes: Counter[str], total: int, options: argparse.Namespace, voice: Voice) -> int:
    """Says what came of all inputs, and gives back the exit code."""
    done, there = outcomes["done"], outcomes["there"]
    skipped, failed = there + outcomes["skipped"] + outcomes["label map"], total - done - there - outcomes["skipped"]
    if there:
        voice.say(f"results were there already: {there} of {total}")
    where = f"; results are in {options.output}" if done + there else ""
    voice.result(f"{done} done, {skipped} skipped, {failed} failed{where}")
    voice.event("end", done=done, failed=failed, skipped=skipped)
    return int(done + there == 0 or failed > 0)


# What there is to segment


def _find_cases(
    paths: Sequence[Path], voice: Voice, outcomes: Counter[str]
) -> tuple[list[_Case], list[tuple[str, dict[str, str]]]]:
    """What there is to read, each once, and the name, input and error of what holds nothing.

    Label maps that only a folder names, or that are named with their images, are counted in `outcomes` and left out.
    """
    from .files import labelled_image

    found: dict[_Case, None] = {}
    failed: list[tuple[str, dict[str, str]]] = []
    wanted: list[_Case] = []

    def fail(path: Path, name: str, error: Exception) -> None:
        failed.append((name, {"input": str(path.absolute()), "error": one_line(error)}))
        voice.error(error)
        voice.event("failed", case=name, error=one_line(error))

    for path in paths:
        try:
            is_table = path.suffix.lower() == ".csv" and path.is_file()
            rows = _read_table(path) if is_table else [_Case(path)]
        except (ValueError, OSError) as error:
            fail(path, _stem(path), error)
            continue
        for row in rows:
            if isinstance(row, _Case):
                wanted.append(row)
            else:
                fail(path, *row)
    named = {case.path for case in wanted}
    images = {(path.parent, _stem(path)): path for path in named}
    for case in wanted:
        image = images.get((case.path.parent, labelled_image(case.path)))
        if image and case.path in paths:  # as a pattern such as *.nii.gz names both
            outcomes["label map"] += _say_label_map(case.path, _stem(case.path), voice, f"it without {image.name}")
            continue
        try:
            found |= dict.fromkeys(_expand(case, named, voice, outcomes))
        except (ValueError, OSError) as error:
            fail(case.path, case.name or _stem(case.path), error)
    return _named(list(found)), failed


def _expand(case: _Case, named: set[Path], voice: Voice, outcomes: Counter[str]) -> list[_Case]:
    from .files import find_inputs, find_label_maps

    inputs = find_inputs([case.path])
    if case.name and len(inputs) > 1:
        raise ValueError(
            f"{case.path} holds {len(inputs)} inputs for the one case {case.name}; leave the column case empty there"
        )
    for labels in find_label_maps(case.path):
        if labels not in named:
            outcomes["label map"] += _say_label_map(labels, _stem(labels), voice)
    return [replace(case, path=path) for path in inputs]


def _read_table(table: Path) -> list[_Case | tuple[str, Exception]]:
    """The cases of a table, or for a row that says none its case and error; paths are relative to the table."""
    try:
        reader = read_rows(table)
        columns, lines = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is no table in UTF-8 ({error}); save it as CSV in UTF-8") from error
    if "input" not in columns:
        came = ", ".join(columns) or "none"
        raise ValueError(f"{table} has the columns {came}; expected input and, if wanted, case, expert, frame")
    return [_row_case(table, number, row) for number, row in enumerate(lines, start=1)]


def _row_case(table: Path, number: int, row: Mapping[str, str | None]) -> _Case | tuple[str, Exception]:
    place, name, expert, frame = ((row.get(column) or "").strip() for column in _TABLE_COLUMNS)
    where = f"{table}, case {number}"
    if not place:
        return name or f"{table.stem}_{number}", ValueError(f"{where}: the column input is empty; expected a path")
    path = table.parent / place
    if name and (re.search(r'[/\\:*?"<>|]', name) or name.startswith(".")):
        problem = f'{where}: the case {name!r} cannot name a file; leave out dots in front and / \\ : * ? " < > |'
        return _stem(path), ValueError(problem)
    if name.lower() == "volumes":
        return _stem(path), ValueError(f"{where}: the name volumes is that of the tables; choose another")
    if frame and not re.fullmatch("[0-9]+", frame):
        return name or _stem(path), ValueError(f"{where}: the frame is {frame!r}, expected a number from 0")
    return _Case(path, name, expert or None, int(frame) if frame else None)


def _say_label_map(path: Path, name: str, voice: Voice, how: str = "the file itself") -> int:
    voice.say(f"skipped {path}: it is a label map; name {how} to segment it all the same")
    voice.event("skipped", case=name, reason="label map")
    return 1


def _named(cases: Sequence[_Case]) -> list[_Case]:
    """The cases with names for all; those of a table are taken."""
    given = [case.name for case in cases if case.name]
    names = iter(case_names([case.path for case in cases if not case.name], given))
    return [case if case.name else replace(case, name=next(names)) for case in cases]


def case_names(inputs: Sequence[Path], taken: Sequence[str] = ()) -> list[str]:
    """A file name for each input's results: its stem, where stems repeat with the folder's name, then the suffix.

    Raises:
        ValueError: Several would share one, or a name of `taken` is there twice.
    """
    places = [path.absolute() for path in inputs]  # not where a link leads
    stems = [_stem(place) for place in places]
    names = stems
    for longer in (stems, [place.name.replace(".", "_") for place in places]):
        repeated = Counter(["volumes", *taken, *names])  # volumes.csv is taken
        names = [
            name if repeated[name] == 1 else f"{place.parent.name}_{end}"
            for name, place, end in zip(names, places, longer, strict=True)
        ]
    if again := [name for name, count in Counter([*taken, *names]).items() if count > 1]:
        raise ValueError(f"several inputs would be written as {', '.join(again)}; segment them into separate folders")
    return names


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else re.sub(r"(\.nii)?\.\w+$", "", path.name)


def load_predictor(options: argparse.Namespace) -> Predictor:
    """The model, after the cheap checks: an unknown expert or structure fails before any volume is read."""
    spec = read_spec(find_model(options.model))
    if options.expert != "auto":
        spec.expert_index(options.expert)
    spec.labels_of(options.structures or [])
    if options.format == "dcm" and importlib.util.find_spec("highdicom") is None:
        cure = f"press Install in M4oE Segmentation, or: {sys.executable} -m pip install highdicom"
        raise ValueError(f"--format dcm needs the package highdicom, which is not installed; {cure}")
    if options.preview:
        from . import preview  # noqa: F401
    from .predictor import Predictor

    return Predictor(options.model, options.device)


def start_folder(options: argparse.Namespace, predictor: Predictor, voice: Voice) -> None:
    """Prepares the folder, refuses a table of somebody else before the work, and tells of the model and the device."""
    from .predictor import why_cpu

    prepare_folder(options.output)
    _entries(options.output)
    voice.log = options.output / "log.txt"
    spec, why = predictor.spec, why_cpu() if options.device == "auto" else ""
    voice.say(f"{spec.name} {spec.version}: {spec.limits or 'Research use, not a medical device.'}")
    voice.say(f"device: {predictor.device}{why and f', as {why}'}")


# One case


def _is_done(case: _Case, entries: Mapping[str, Any], spec: ModelSpec, options: argparse.Namespace) -> bool:
    """Whether the folder holds the whole result of the same input, unchanged since, by the same model and options."""
    entry = entries.get(case.name, {})
    target = options.output / f"{case.name}.{options.format}"
    files = [options.output / name for name in entry.get("files", ())]
    files += [target.with_name(f"{case.name}.png")] if options.preview else []
    same = (
        "error" not in entry
        and entry.get("input") == str(case.path.absolute())
        and entry.get("model") == f"{spec.name} {spec.version}"
        and entry.get("asked") == _asked(case, options)
    )
    return (
        same
        and target in files
        and all(file.is_file() for file in files)
        and case.path.stat().st_mtime <= target.stat().st_mtime
    )


def _asked(case: _Case, options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for a case, as volumes.json keeps it."""
    frame = options.frame if case.frame is None else case.frame
    expert = case.expert or options.expert
    return {"expert": expert, "structures": options.structures, "frame": frame, "quality": options.quality}


def _segment_case(predictor: Predictor, case: _Case, options: argparse.Namespace, voice: Voice) -> str:
    """Segments one input and says what came of it: "done", "skipped" or "failed"."""
    from .files import WriteError

    asked = _asked(case, options)
    options = argparse.Namespace(**{**vars(options), "expert": asked["expert"], "frame": asked["frame"]})
    try:
        volume = read_input(case.path, case.name, options)
        if _LABEL_MAP in volume.warnings and not _is_named(case, options):
            _say_label_map(case.path, case.name, voice)
            return "skipped"
        labels, report = segment_volume(predictor, volume, case.name, case.path, options, voice)
        drawn = options.preview and _is_drawn(predictor, volume, labels, report, case.name, options, voice)
    except (BrokenPipeError, ImportError):  # nobody reads what is printed, the case is done; or no case can be
        raise
    except Exception as error:  # a fault of ours in one case must not stop the others
        expected = isinstance(error, FAILURES)
        what = one_line(error) if expected else f"unexpected {type(error).__name__}: {one_line(error)}"
        sentence = what if isinstance(error, WriteError) or str(case.path) in what else f"{case.path}: {what}"
        voice.error(sentence)
        if not expected:
            voice.note("".join(traceback.format_exception(error)))
        _record(options.output, case.name, {"input": str(case.path.absolute()), "error": sentence}, voice)
        voice.event("failed", case=case.name, error=sentence)
        return "failed"
    files = _entries(options.output)[case.name]["files"] + ([f"{case.name}.png"] if drawn else [])
    voice.event("done", case=case.name, files=files, report=asdict(report))
    return "done"


def _is_drawn(
    predictor: Predictor,
    volume: Volume,
    labels: Volume,
    report: Report,
    name: str,
    options: argparse.Namespace,
    voice: Voice,
) -> bool:
    """Draws a result that is written already, so that a failure is no more than a warning."""
    try:
        draw(predictor, volume, labels, report, name, options)
    except FAILURES as error:
        voice.say(f"m4oe: warning: {name}: the result is written, its picture is not: {one_line(error)}")
        return False
    return True


def _is_named(case: _Case, options: argparse.Namespace) -> bool:
    """Whether the user named the file itself, not only a folder that holds it."""
    return (
        not any(path.is_dir() and path in case.path.parents for path in options.inputs) or case.path in options.inputs
    )


def read_input(path: Path, name: str, options: argparse.Namespace) -> Volume:
    """The volume, with a warning where it seems to be a label map; of a DICOM file the series that it belongs to."""
    from .files import count_frames, is_dicom, is_label_map, read_series, read_volume

    target = options.output / f"{name}.{options.format}"
    if target.exists() and target.samefile(path):
        raise ValueError(f"{path}: its result would replace it; choose another folder or format (--format)")
    if options.format == "dcm" and not is_dicom(path):
        raise ValueError(
            f"{path} is not DICOM, and DICOM SEG needs the series it was made of; choose another format (--format)"
        )
    volume = read_series(path) if path.is_file() and is_dicom(path) else read_volume(path, options.frame)
    added: tuple[str, ...] = (_LABEL_MAP,) if is_label_map(path, volume) else ()
    if options.frame and count_frames(path) == 1:
        added += (f"It has one frame, which was taken; there is no frame {options.frame}.",)
    return replace(volume, warnings=(*volume.warnings, *added))


def segment_volume(
    predictor: Predictor, volume: Volume, name: str, source: Path, options: argparse.Namespace, voice: Voice
) -> tuple[Volume, Report]:
    """Writes the labels, adds the case to the tables and tells what was found."""
    with voice.progress(name) as show:
        labels, report = predictor(volume, options.expert, options.structures, show, quality=options.quality)
        show("write", 1.0)
        target = options.output / f"{name}.{options.format}"
        written = _write(target, labels, predictor.spec, source)
    entry = {"input": str(source.absolute()), "files": [path.name for path in written], **asdict(report)}
    asked = {"expert": options.expert, "structures": options.structures, "frame": options.frame}
    _record(options.output, name, entry | {"asked": asked | {"quality": options.quality}}, voice)
    found = count(sum(found_ml > 0 for found_ml in report.volumes_ml.values()), "structure")
    voice.result(f"{name}: {found}, {_experts(report)}, {sum(report.seconds.values()):.1f} s")
    for warning in report.warnings:
        voice.say(f"m4oe: warning: {name}: {warning}")
    return labels, report


def _write(target: Path, labels: Volume, spec: ModelSpec, source: Path) -> list[Path]:
    if target.name.endswith(".dcm"):
        from .dicom import write_dicom_seg

        write_dicom_seg(target, labels, spec.label_keys, spec.name, spec.version, source)
        return [target]
    from .files import write_segmentation

    return write_segmentation(target, labels, spec.label_keys, f"{spec.name} {spec.version}")


def _experts(report: Report) -> str:
    """The experts in use, who chose them, and what the gate gave the one that it chose."""
    used = {key: weight for key, weight in report.expert_weights.items() if weight >= 0.005}
    names = ", ".join(used if len(used) == 1 else [f"{key} {weight:.0%}" for key, weight in used.items()])
    sure = "".join(f" ({report.gate[key]:.0%})" for key in used) if len(used) == 1 and report.gate else ""
    by = {"user": "you", "modality": "the header or HU", "gate": f"the gate{sure}"}.get(report.chosen_by)
    return f"expert {names}{f', chosen by {by}' if by else ''}"


def draw(
    predictor: Predictor, volume: Volume, labels: Volume, report: Report, name: str, options: argparse.Namespace
) -> None:
    """Writes the picture of a result."""
    from .preview import write_preview

    title = f"{name}   {report.model}   {_experts(report)}"
    path, keys = options.output / f"{name}.png", predictor.spec.label_keys
    write_preview(path, volume, labels, keys, title, report.flags, report.volumes_ml)


# The tables


def _record(folder: Path, case: str, entry: Mapping[str, Any], voice: Voice) -> None:
    """Puts a case into the tables, beside all that other runs wrote there before or write at the same time.

    volumes.json holds the whole reports, volumes.csv a row per case and structure. A result takes the place of an
    earlier one of the case; an error leaves it, as its files are still there.
    """
    from .files import atomic_write

    bytes_of_paths = "surrogateescape"
    with _alone_in(folder):
        entries = _entries(folder)
        earlier = entries.get(case, {})
        kept = earlier if "error" in entry and "volumes_ml" in earlier else {}
        entries[case] = {**entry, **kept, "error": entry["error"]} if "error" in entry else {**entry}
        with atomic_write(folder / "volumes.json") as new:
            new.write_text(json.dumps(entries, indent=2), encoding="utf-8")
        with (
            atomic_write(folder / "volumes.csv") as new,
            new.open("w", newline="", encoding="utf-8", errors=bytes_of_paths) as file,
        ):
            csv.writer(file).writerows([_COLUMNS, *_rows(entries)])
    if "files" in entry and "files" in earlier and earlier.get("input", entry["input"]) != entry["input"]:
        voice.say(f"m4oe: warning: {case}: replaces the earlier result of {earlier['input']}")
    if stale := [name for name in earlier.get("files", ()) if "files" in entry and name not in entry["files"]]:
        voice.say(f"m4oe: warning: {case}: {', '.join(stale)} in {folder} may be of an earlier run")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lets one process at a time change the tables; Windows, and disks without locks, take the rare clash."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    place = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def _entries(folder: Path) -> dict[str, Any]:
    """What the tables in `folder` hold, by case."""
    path, table = folder / "volumes.json", folder / "volumes.csv"
    if table.exists() and not table.read_bytes().startswith(b"case,structure,name,volume_ml"):
        raise ValueError(f"{table} is not what m4oe writes; move it away or choose another folder")
    try:
        entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        _rows(entries)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what m4oe writes; move it away or choose another folder") from error
    return entries


def _rows(entries: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row per case and structure that was asked for; a case that failed has one without a structure.

    The note of a row has the flags of its structure or the error of its case, the case_note the warnings of its case.
    """
    rows: list[tuple[str, ...]] = []
    for case, entry in entries.items():
        failed = entry.get("error", "")
        volumes = entry.get("volumes_ml", {}) if failed else entry["volumes_ml"]
        experts = " ".join(key for key, weight in entry.get("expert_weights", {}).items() if weight >= 0.005)
        about, warnings = (experts, entry.get("model", "")), "; ".join(entry.get("warnings", ()))
        for key, volume in volumes.items():
            flags = entry.get("flags", {}).get(key, ()) if volume else ("not found",)
            rows.append((case, key, structure(key).name, f"{volume:.2f}", *about, "; ".join(flags), warnings))
        if failed:
            rows.append((case, "", "", "", "", "", failed, ""))
        elif not volumes:
            rows.append((case, "", "", "", *about, "", warnings))
    return rows
