"""The command line: `m4oe segment`, `evaluate`, `models`, `info`, `train`, `demo`, `data`, `worker` and for installs.

Exit codes: 0 all done, 1 an input failed, 2 the command itself cannot be carried out, 130 interrupted, 141
output closed, 143 terminated.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .bundle import add_bundle_command
from .data_commands import add_data_commands
from .doctor import add_doctor_command
from .labels import structure
from .spec import DEFAULT_MODEL, ModelSpec, find_model, installed_models, model_folders, read_spec
from .terminal import count, one_line, prepare_folder, progress_bar, say, say_error, score_table
from .train_command import add_train_command

if TYPE_CHECKING:
    from .evaluation import Rules
    from .geometry import Volume
    from .jobs import Report
    from .predictor import Predictor

FORMATS = ("seg.nrrd", "nii.gz", "nrrd", "mha")
_LABEL_MAP = "It seems to be a label map, not an image."
_COLUMNS = ("case", "structure", "name", "volume_ml", "expert", "model", "note")
FAILURES = (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError)  # one sentence each, no traceback


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options = _parser().parse_args(arguments)
    if arguments is None:  # as a program
        signal.signal(signal.SIGTERM, _interrupt)
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # paths may hold any letter
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # nobody reads any more, as after `m4oe info | head -1`; nor at the last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ImportError as error:
        return say_error(f"a package is missing or broken ({error}); pip install it, for a preview: pip install vtk", 2)
    except FAILURES as error:
        return say_error(error, 2)
    except KeyboardInterrupt as stop:
        return say_error("interrupted; files already written are complete", *(stop.args or (130,)))


def _interrupt(number: int, frame: object) -> None:
    """Ends the run at SIGTERM as Ctrl-C does, so that no half-written file stays."""
    raise KeyboardInterrupt(128 + number)


def _parser() -> argparse.ArgumentParser:
    purpose = "Segments organs and lesions in CT and MR. Research use, not a medical device."
    parser = argparse.ArgumentParser(prog="m4oe", description=purpose)
    parser.add_argument("--version", action="version", version=f"m4oe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    segment = commands.add_parser("segment", help="segment volumes")
    segment.add_argument("inputs", nargs="+", metavar="INPUT", type=Path, help="file, DICOM folder, or folder of files")
    segment.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder for the results")
    segment.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s")
    segment.add_argument("--preview", action="store_true", help="also write a PNG of each result")
    _add_prediction_options(segment)
    segment.set_defaults(run=_segment)

    _add_evaluate(commands)

    commands.add_parser("models", help="list the installed models").set_defaults(run=_models)

    info = commands.add_parser("info", help="show what a model is and how it scored")
    info.add_argument("model", metavar="FILE", nargs="?", default=DEFAULT_MODEL, help="model file or name")
    info.set_defaults(run=_info)

    add_train_command(commands)

    demo = commands.add_parser("demo", help="segment a phantom and show the result")
    demo.add_argument("--input", type=Path, metavar="INPUT", help="segment this file or DICOM folder instead")
    demo.add_argument("-o", "--output", type=Path, default="m4oe-demo", metavar="OUT", help="default: %(default)s")
    demo.add_argument("--modality", default="ct", metavar="NAME", help="of the phantom: ct, mr_t1, mr_t2 or mr_t1ce")
    demo.add_argument("--seed", type=int, default=2026, metavar="N", help="of the phantom; default: %(default)s")
    _add_prediction_options(demo)
    demo.set_defaults(run=_demo, format=FORMATS[0], preview=True)

    add_data_commands(commands)
    add_doctor_command(commands)
    add_bundle_command(commands)

    worker = commands.add_parser("worker", help="segment for another program, such as Slicer, over stdin and stdout")
    worker.set_defaults(run=_worker)
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="score segmentations against the truth")
    evaluate.add_argument("predicted", metavar="PRED", type=Path, help="segmentation, or folder of them")
    evaluate.add_argument("truth", metavar="TRUTH", type=Path, help="the same, of the truth; paired by case names")
    evaluate.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder for the results")
    evaluate.add_argument("--compare", type=Path, metavar="PRED", help="another model's segmentations, to compare")
    evaluate.add_argument("--structures", type=_keys, metavar="KEY,KEY", help="default: all that any truth lists")
    evaluate.add_argument("--labels", metavar="FILE", help="what label values mean, where files do not say it")
    evaluate.add_argument("--predicted-labels", metavar="FILE", help="the same of predictions; default: as --labels")
    evaluate.add_argument("--preset", choices=("default", "flare"), default="default", help="rules of a challenge")
    evaluate.add_argument("--tolerance", type=_keys, metavar="MM|KEY=MM,..", help="of NSD; default: FLARE22's, else 2")
    evaluate.add_argument("--jobs", type=int, metavar="N", help="processes; default: up to 4")
    evaluate.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster that does it; or its file")
    evaluate.set_defaults(run=_evaluate)


def _add_prediction_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="file or name; default: %(default)s")
    parser.add_argument("--expert", default="auto", metavar="NAME", help="auto, or an expert to overrule the gate")
    parser.add_argument(
        "--structures", type=_keys, metavar="KEY,KEY", help="structures to keep; default: all of the model"
    )
    parser.add_argument("--frame", type=int, metavar="N", help="frame of 4-D volumes, from 0; 3-D ones have but one")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")


def _keys(text: str) -> list[str]:
    return [key.strip() for key in text.split(",")]


def _segment(options: argparse.Namespace) -> int:
    inputs, failed = _find_inputs(options.inputs)
    names = dict(zip(inputs, _case_names(inputs), strict=True))
    paths = [*inputs, *failed]
    if inputs:
        predictor = _predictor(options)
        _start(options.output, predictor.spec)
    for path, error in failed.items() if options.output.is_dir() else ():
        _record(options.output, _stem(path), {"error": error})
    outcomes: Counter[str] = Counter()
    for number, path in enumerate(inputs, start=1):
        say(f"{number}/{len(inputs)} {names[path]} ...")
        outcomes[_segment_file(predictor, path, names[path], options)] += 1
    done, skipped = outcomes["done"], outcomes["skipped"]
    skips = f", {skipped} skipped" if skipped else ""
    place = f"; results are in {options.output}" if done else ""
    print(f"{done} of {len(paths)} segmented{skips}{place}")
    return int(done == 0 or done + skipped < len(paths))


def _find_inputs(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """What there is to read, each once, and the error of each of `paths` that holds nothing."""
    from .files import find_inputs, find_label_maps

    inputs: dict[Path, None] = {}
    failed = {}
    for path in paths:
        try:
            for labels in find_label_maps(path):
                if labels not in paths:
                    _say_skipped(labels)
            inputs |= dict.fromkeys(find_inputs([path]))
        except (ValueError, OSError) as error:
            failed[path] = one_line(error)
            say_error(error, 1)
    return list(inputs), failed


def _say_skipped(path: Path) -> None:
    say(f"skipped {path}: it is a label map; name the file itself to segment it all the same")


def _case_names(inputs: Sequence[Path]) -> list[str]:
    """A file name for each input's results: its stem, where stems repeat with the folder's name, then the suffix."""
    places = [path.absolute() for path in inputs]  # not where a link leads
    stems = [_stem(place) for place in places]
    names = stems
    for longer in (stems, [place.name.replace(".", "_") for place in places]):
        repeated = Counter(["volumes", *names])  # volumes.csv is taken
        names = [
            name if repeated[name] == 1 else f"{place.parent.name}_{end}"
            for name, place, end in zip(names, places, longer, strict=True)
        ]
    if again := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"several inputs would be written as {', '.join(again)}; segment them into separate folders")
    return names


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else re.sub(r"(\.nii)?\.\w+$", "", path.name)


def _predictor(options: argparse.Namespace) -> Predictor:
    """The model, after the cheap checks: an unknown expert or structure fails before any volume is read."""
    spec = read_spec(find_model(options.model))
    if options.expert != "auto":
        spec.expert_index(options.expert)
    spec.labels_of(options.structures or [])
    if options.preview:
        from . import preview  # noqa: F401
    from .predictor import Predictor

    return Predictor(options.model, options.device)


def _start(folder: Path, spec: ModelSpec) -> None:
    """Prepares the folder, refuses a table of somebody else before the work, and says what the model is not for."""
    prepare_folder(folder)
    _entries(folder)
    say(f"{spec.name} {spec.version}: {spec.limits or 'Research use, not a medical device.'}")


def _segment_file(predictor: Predictor, path: Path, name: str, options: argparse.Namespace) -> str:
    """Segments one input and says what came of it: "done", "skipped" or "failed"."""
    try:
        volume = _read_input(path, name, options)
        if _LABEL_MAP in volume.warnings and path not in options.inputs:
            _say_skipped(path)
            return "skipped"
        labels, report = _segment_volume(predictor, volume, name, path, options)
        if options.preview:
            _draw(predictor, volume, labels, report, name, options)
    except BrokenPipeError:  # nobody reads what is printed; the case itself is done
        raise
    except FAILURES as error:
        sentence = one_line(error if str(path) in str(error) else f"{path}: {error}")
        say_error(sentence, 1)
        _record(options.output, name, {"error": sentence})
        return "failed"
    return "done"


def _read_input(path: Path, name: str, options: argparse.Namespace) -> Volume:
    """The volume, with a warning where it seems to be a label map."""
    from .files import is_label_map, read_volume

    target = options.output / f"{name}.{options.format}"
    if target.exists() and target.samefile(path):
        raise ValueError(f"{path}: its result would replace it; choose another folder or another --format")
    volume = read_volume(path, options.frame)
    return replace(volume, warnings=(*volume.warnings, _LABEL_MAP)) if is_label_map(path, volume) else volume


def _segment_volume(
    predictor: Predictor, volume: Volume, name: str, source: Path, options: argparse.Namespace
) -> tuple[Volume, Report]:
    """Writes the labels, adds the case to the tables and prints what was found."""
    from .files import write_segmentation

    with progress_bar(name) as show:
        labels, report = predictor(volume, options.expert, options.structures, show)
        show("write", 1.0)
        target = options.output / f"{name}.{options.format}"
        written = write_segmentation(target, labels, predictor.spec.label_keys, report.model)
    files = [path.name for path in written]
    _record(options.output, name, {"input": str(source.absolute()), "files": files, **asdict(report)})
    found = count(len(report.volumes_ml), "structure")
    print(f"{name}: {found}, {_experts(report)}, {sum(report.seconds.values()):.1f} s", flush=True)
    for warning in report.warnings:
        say(f"m4oe: warning: {name}: {warning}")
    return labels, report


def _experts(report: Report) -> str:
    """The experts in use, who chose them, and what the gate gave the one that it chose."""
    used = {key: weight for key, weight in report.expert_weights.items() if weight >= 0.005}
    names = ", ".join(used if len(used) == 1 else [f"{key} {weight:.0%}" for key, weight in used.items()])
    sure = "".join(f" ({report.gate[key]:.0%})" for key in used) if len(used) == 1 and report.gate else ""
    chosen = {"user": ", as you named it", "modality": " by header or HU", "gate": f" by the gate{sure}"}
    return f"expert {names}{chosen.get(report.chosen_by, '')}"


def _draw(
    predictor: Predictor, volume: Volume, labels: Volume, report: Report, name: str, options: argparse.Namespace
) -> None:
    from .preview import write_preview

    title = f"{name}   {report.model}   {_experts(report)}"
    write_preview(options.output / f"{name}.png", volume, labels, predictor.spec.label_keys, title)


def _record(folder: Path, case: str, entry: Mapping[str, Any]) -> None:
    """Puts a case into the tables, beside all that other runs wrote there before or write at the same time.

    volumes.json holds the whole reports, volumes.csv a row per case and structure. A result takes the place of an
    earlier one of the case; an error leaves it, as its files are still there.
    """
    from .files import atomic_write

    bytes_of_paths = "surrogateescape"
    with _alone_in(folder):
        entries = _entries(folder)
        earlier = entries.get(case, {})
        entries[case] = (earlier if "error" in entry else {}) | {**entry}
        with atomic_write(folder / "volumes.json") as new:
            new.write_text(json.dumps(entries, indent=2), encoding="utf-8")
        with (
            atomic_write(folder / "volumes.csv") as new,
            new.open("w", newline="", encoding="utf-8", errors=bytes_of_paths) as file,
        ):
            csv.writer(file).writerows([_COLUMNS, *_rows(entries)])
    if "files" in entry and earlier.get("input", entry["input"]) != entry["input"]:
        say(f"m4oe: warning: {case}: replaces the earlier result of {earlier['input']}")
    if stale := [name for name in earlier.get("files", ()) if "files" in entry and name not in entry["files"]]:
        say(f"m4oe: warning: {case}: {', '.join(stale)} in {folder} may be of an earlier run")


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
    """A row per case and structure; a case that failed, or where nothing was found, has one without a structure.

    The note of a row has the warnings of its case.
    """
    rows: list[tuple[str, ...]] = []
    for case, entry in entries.items():
        failed = entry.get("error", "")
        volumes = entry.get("volumes_ml", {}) if failed else entry["volumes_ml"]
        experts = " ".join(key for key, weight in entry.get("expert_weights", {}).items() if weight >= 0.005)
        about = (experts, entry.get("model", ""), "; ".join(entry.get("warnings", ())))
        rows += [(case, key, structure(key).name, f"{volume:.2f}", *about) for key, volume in volumes.items()]
        if failed:
            rows.append((case, "", "", "", "", "", failed))
        elif not volumes:
            rows.append((case, "", "", "", *about))
    return rows


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluation_files import evaluate_files, pair_files
    from .evaluation_report import score_table, write_evaluation

    places = [options.predicted, *([options.compare] if options.compare else [])]
    rules = _evaluation_rules(options)
    keys = [structure(key).key for key in options.structures or ()]
    truth_labels = _meanings(options.labels)
    labels = _meanings(options.predicted_labels) or truth_labels
    jobs = options.jobs or min(4, os.cpu_count() or 1)
    pairs = [pair_files(place, options.truth) for place in places]
    prepare_folder(options.output)
    evaluations = []
    for place, name, paired in zip(places, _model_names(places), pairs, strict=True):
        with progress_bar(name) as show:
            evaluations.append(
                evaluate_files(paired, name, rules, keys, truth_labels, labels, jobs, options.scheduler, show)
            )
        for case, problem in evaluations[-1].problems.items():
            say_error(f"{name}: {case}: {problem}", 1)
        for note in evaluations[-1].notes:
            say(f"m4oe: warning: {name}: {note}")
        if not evaluations[-1].scores:
            return say_error(f"nothing in {place} could be scored against {options.truth}", 1)
    summary = write_evaluation(options.output, evaluations, options.truth, rules)
    print("\n".join(map(score_table, summary["models"])))
    print(f"report: {options.output / 'report.html'}")
    return int(any(evaluation.problems for evaluation in evaluations))


def _evaluation_rules(options: argparse.Namespace) -> Rules:
    from .evaluation import Rules

    everywhere, by_key = None, {}
    for text in options.tolerance or ():
        key, _, number = text.rpartition("=")
        try:
            millimetres = float(number)
        except ValueError:
            millimetres = -1.0
        if not 0 <= millimetres < math.inf:
            raise ValueError(f"--tolerance {text} is not understood, expected a number of mm such as 3 or liver=5")
        if key:
            by_key[structure(key).key] = millimetres
        else:
            everywhere = millimetres
    return Rules(options.preset == "flare", everywhere, by_key)


def _meanings(source: str | None) -> dict[int, str] | None:
    from .names import read_meanings

    return read_meanings(source) if source else None


def _model_names(places: Sequence[Path]) -> list[str]:
    """Short names for the predictions, or their paths where those are alike."""
    names = [place.resolve().name for place in places]
    return names if len(set(names)) == len(names) else [str(place) for place in places]


def _models(options: argparse.Namespace) -> int:
    code, paths = 0, installed_models()
    for path in paths:
        try:
            spec = read_spec(path)
            kind = f"{count(len(spec.structures), 'structure')}, experts {', '.join(spec.expert_names)}"
            print(f"{path.stem}  version {spec.version}, {kind}, {path.stat().st_size / 1e6:.1f} MB  {path}")
        except ValueError as error:
            code = say_error(error, 1)
    if not paths:
        print(f"no model is installed; they are looked for in {' and '.join(map(str, model_folders()))}")
    return code


def _info(options: argparse.Namespace) -> int:
    path = find_model(options.model)
    spec = read_spec(path)
    lines = [f"{spec.name} {spec.version}  {path}", spec.description, spec.limits]
    lines.append(f"licence: {spec.licence or 'not given'}")
    lines += [line for key, value in spec.training.items() for line in _fact(f"training {key}", value)]
    lines.append(f"input: {spec.pixel_mm:g} mm pixels, {spec.slice_mm:g} mm slices or thicker\n")
    print("\n".join(line for line in (*lines, score_table(spec)) if line))
    return 0


def _fact(key: str, value: object) -> list[str]:
    """Lines of text for a value of a model's description: a list has a line for each of its items."""
    return [f"{key}:", *(f"  {_item(item)}" for item in value)] if isinstance(value, list) else [f"{key}: {value}"]


def _item(item: object) -> str:
    match item:
        case [str(stage), int(steps), float(rate)]:
            return f"{stage}: {count(steps, 'step')}, learning rate {rate:g}"
        case list():
            return ", ".join(map(str, item))
    return str(item)


def _demo(options: argparse.Namespace) -> int:
    from .files import write_volume
    from .training.phantom import make_phantom

    predictor = _predictor(options)
    phantom = None if options.input else make_phantom(options.seed, options.modality)
    name = f"phantom_{options.modality}" if phantom else _case_names([options.input])[0]
    volume = phantom.image if phantom else _read_input(options.input, name, options)
    image = options.output / f"{name}.nii.gz" if phantom else options.input
    _start(options.output, predictor.spec)
    if phantom:
        write_volume(image, volume)
    say(f"1/1 {name} ...")
    labels, report = _segment_volume(predictor, volume, name, image, options)
    _draw(predictor, volume, labels, report, name, options)
    print("seconds: " + ", ".join(f"{phase} {value:.2f}" for phase, value in report.seconds.items()))
    if phantom:
        _compare(labels, phantom.labels, report.volumes_ml, predictor.spec, options)
    result = options.output.resolve() / name
    print(f"open in Slicer: {image.resolve()} and {result}.{options.format}\nlook at: {result}.png")
    return 0


def _compare(
    labels: Volume, truth: Volume, found_ml: Mapping[str, float], spec: ModelSpec, options: argparse.Namespace
) -> None:
    """Writes the phantom's truth beside the result and prints how well the structures that were asked for agree."""
    import numpy as np

    from .evaluation import dice_scores
    from .files import write_segmentation
    from .training.phantom import STRUCTURES

    path = options.output / f"phantom_{options.modality}_truth.{options.format}"
    write_segmentation(path, truth, dict(enumerate(STRUCTURES, start=1)), "phantom")
    asked = options.structures or spec.structures
    values = [0, *(spec.labels_of([key])[0] if key in asked else 0 for key in STRUCTURES)]
    expected = np.array(values, labels.array.dtype)[truth.array]
    there = set(np.unique(expected).tolist())
    dice = dice_scores(labels.array, expected, len(spec.structures))
    print("Dice against the phantom's truth:")
    for label, key in spec.label_keys.items():
        if label in there:
            print(f"  {structure(key).name:<25}{dice[label]:.3f}")
        elif key in found_ml:
            print(f"  {structure(key).name:<25}absent; {found_ml[key]:.2f} mL found wrongly")


def _worker(options: argparse.Namespace) -> int:
    from .worker import serve

    serve()


if __name__ == "__main__":
    sys.exit(main())
