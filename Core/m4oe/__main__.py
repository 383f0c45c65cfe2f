"""The command line: `m4oe segment`, `models`, `info`, `train` and `demo`.

Exit codes: 0 all done, 1 an input failed, 2 the command itself cannot be carried out, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from . import __version__
from .labels import structure
from .spec import DEFAULT_MODEL, ModelSpec, find_model, installed_models, model_folders, read_spec

if TYPE_CHECKING:
    from .geometry import Volume
    from .predictor import Predictor

FORMATS = ("seg.nrrd", "nii.gz", "nrrd", "mha")
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
        return _say_error(
            f"a package is missing or broken ({error}); pip install it, for a preview: pip install vtk", 2
        )
    except FAILURES as error:
        return _say_error(error, 2)
    except KeyboardInterrupt as stop:
        return _say_error("interrupted; files already written are complete", *(stop.args or (130,)))


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

    commands.add_parser("models", help="list the installed models").set_defaults(run=_models)

    info = commands.add_parser("info", help="show what a model is and how it scored")
    info.add_argument("model", metavar="FILE", nargs="?", default=DEFAULT_MODEL, help="model file or name")
    info.set_defaults(run=_info)

    train = commands.add_parser("train", help="train a model")
    train.add_argument("--phantoms", action="store_true", required=True, help="on computer-made phantoms")
    train.add_argument("--quick", action="store_true", help="in miniature, to see that training works")
    train.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    train.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder for the run")
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="segment a phantom and show the result")
    demo.add_argument("--input", type=Path, metavar="INPUT", help="segment this file or DICOM folder instead")
    demo.add_argument("-o", "--output", type=Path, default="m4oe-demo", metavar="OUT", help="default: %(default)s")
    demo.add_argument("--modality", default="ct", metavar="NAME", help="of the phantom: ct, mr_t1, mr_t2 or mr_t1ce")
    demo.add_argument("--seed", type=int, default=2026, metavar="N", help="of the phantom; default: %(default)s")
    _add_prediction_options(demo)
    demo.set_defaults(run=_demo, format=FORMATS[0], preview=True)
    return parser


def _add_prediction_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="file or name; default: %(default)s")
    parser.add_argument("--expert", default="auto", metavar="NAME", help="auto, or an expert to overrule the gate")
    parser.add_argument("--structures", nargs="+", metavar="KEY", help="structures to keep; default: all of the model")
    parser.add_argument("--frame", type=int, metavar="N", help="frame of a 4-D volume, from 0")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")


def _segment(options: argparse.Namespace) -> int:
    from .files import read_volume

    inputs, missing = _find_inputs(options.inputs)
    if not inputs:
        return 1
    names = _case_names(inputs)
    predictor = _predictor(options)
    _prepare_folder(options.output)
    done, total = 0, len(inputs) + missing
    with _tables(options.output) as reports:
        for path, name in zip(inputs, names, strict=True):
            target = options.output / f"{name}.{options.format}"
            try:
                if target.exists() and target.samefile(path):
                    raise ValueError("its result would replace it; choose another folder or another --format")
                _segment_volume(predictor, read_volume(path, options.frame), name, options, reports)
                done += 1
            except FAILURES as error:
                _say_error(error if str(path) in str(error) else f"{path}: {error}", 1)
    print(f"{done} of {total} segmented; results are in {options.output}")
    return int(done < total)


def _find_inputs(paths: Sequence[Path]) -> tuple[list[Path], int]:
    """What there is to read, each once, and how many of `paths` hold nothing."""
    from .files import find_inputs

    inputs: dict[Path, None] = {}
    missing = 0
    for path in paths:
        try:
            inputs |= dict.fromkeys(find_inputs([path]))
        except (ValueError, OSError) as error:
            missing += _say_error(error, 1)
    return list(inputs), missing


def _case_names(inputs: list[Path]) -> list[str]:
    """A file name for each input's results: its own stem, with the folder's name in front where stems repeat."""
    places = [path.resolve() for path in inputs]
    names = [place.name if place.is_dir() else re.sub(r"(\.nii)?\.\w+$", "", place.name) for place in places]
    repeated = Counter(["volumes", *names])  # volumes.csv is taken
    for index, place in enumerate(places):
        if repeated[names[index]] > 1:
            names[index] = f"{place.parent.name}_{place.name.replace('.', '_')}"
    if again := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"several inputs would be written as {', '.join(again)}; segment them into separate folders")
    return names


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


def _prepare_folder(folder: Path) -> None:
    """Makes the folder and tries it, as hours of work must not end at a folder that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror}); expected a folder with room") from error


def _segment_volume(
    predictor: Predictor, volume: Volume, name: str, options: argparse.Namespace, reports: dict[str, Any]
) -> Volume:
    """Writes and returns the labels; `reports` receives the report even if the preview fails."""
    from .files import write_segmentation

    keys = predictor.spec.label_keys
    with _progress_bar(name) as show:
        labels, report = predictor(volume, options.expert, options.structures, show)
        show("write", 1.0)
        write_segmentation(options.output / f"{name}.{options.format}", labels, keys, report.model)
        reports[name] = asdict(report)
        weights = sorted(report.expert_weights.items(), key=lambda item: -item[1])
        experts = "expert " + ", ".join(f"{key} {weight:.0%}" for key, weight in weights if weight >= 0.005)
        if options.preview:
            from .preview import write_preview

            show("draw", 1.0)
            write_preview(options.output / f"{name}.png", volume, labels, keys, f"{name}   {report.model}   {experts}")
    print(f"{name}: {len(report.volumes_ml)} structures, {experts}, {sum(report.seconds.values()):.1f} s", flush=True)
    for warning in report.warnings:
        print(f"m4oe: warning: {name}: {warning}", file=sys.stderr)
    return labels


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """Yields what shows phase and fraction on a bar; there is none where stderr is no terminal."""
    from tqdm import tqdm

    style = "{desc} {percentage:3.0f}%|{bar:30}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, desc=title, bar_format=style, leave=False, disable=None) as bar:

        def show(phase: str, fraction: float) -> None:
            bar.n = fraction
            bar.set_postfix_str(phase)

        yield show


@contextmanager
def _tables(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the reports by case, with those of earlier runs into `folder`, and writes them however the run ends.

    volumes.json holds the whole reports, volumes.csv a row per case and structure.
    """
    from .files import atomic_write

    path = folder / "volumes.json"
    try:
        reports = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        _rows(reports)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what m4oe writes; move it away or choose another folder") from error
    try:
        yield reports
    finally:
        if reports:
            with atomic_write(path) as new:
                new.write_text(json.dumps(reports, indent=2), encoding="utf-8")
            table, bytes_of_paths = path.with_suffix(".csv"), "surrogateescape"
            with atomic_write(table) as new, new.open("w", newline="", encoding="utf-8", errors=bytes_of_paths) as file:
                csv.writer(file).writerows([("case", "structure", "name", "volume_ml"), *_rows(reports)])


def _rows(reports: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (case, key, structure(key).name, f"{volume_ml:.2f}")
        for case, report in reports.items()
        for key, volume_ml in report["volumes_ml"].items()
    ]


def _models(options: argparse.Namespace) -> int:
    code, paths = 0, installed_models()
    for path in paths:
        try:
            spec = read_spec(path)
            kind = f"{len(spec.structures)} structures, experts {', '.join(spec.expert_names)}"
            print(f"{path.stem}  version {spec.version}, {kind}, {path.stat().st_size / 1e6:.1f} MB  {path}")
        except ValueError as error:
            code = _say_error(error, 1)
    if not paths:
        print(f"no model is installed; they are looked for in {' and '.join(map(str, model_folders()))}")
    return code


def _info(options: argparse.Namespace) -> int:
    path = find_model(options.model)
    spec = read_spec(path)
    facts = {
        "licence": spec.licence or "not given",
        **{f"training {key}": value for key, value in spec.training.items()},
    }
    lines = [f"{spec.name} {spec.version}  {path}", spec.description, spec.limits]
    lines += [f"{key}: {value}" for key, value in facts.items()]
    lines.append(f"input: {spec.pixel_mm:g} mm pixels, {spec.slice_mm:g} mm slices or thicker\n")
    print("\n".join(line for line in (*lines, _score_table(spec)) if line))
    return 0


def _score_table(spec: ModelSpec) -> str:
    """Dice by structure and expert, as text."""
    width = max(10, *(len(name) + 2 for name in spec.expert_names))
    lines = ["Dice on unseen cases".ljust(24) + "".join(name.rjust(width) for name in spec.expert_names)]
    for key in spec.structures:
        values = [spec.scores.get(name, {}).get(key) for name in spec.expert_names]
        lines.append(key.ljust(24) + "".join(("-" if v is None else f"{v:.3f}").rjust(width) for v in values))
    return "\n".join(lines)


def _train(options: argparse.Namespace) -> int:
    from .training.config import DEMO, QUICK
    from .training.loop import train_on_phantoms

    _prepare_folder(options.output)
    config = replace(QUICK if options.quick else DEMO, seed=options.seed)
    model = train_on_phantoms(config, options.output, _print_event)
    print(f"\n{_score_table(read_spec(model))}\n\nmodel: {model}")
    return 0


def _print_event(event: Mapping[str, Any]) -> None:
    if event["event"] == "step":
        losses = ", ".join(f"{key} {value:.3f}" for key, value in event["loss"].items())
        step = f"{event['stage']} {event['step']}/{event['steps']}"
        print(f"{step}: loss {losses}; {event['seconds']:.0f} s", flush=True)
    elif event["event"] == "phantoms":
        print(f"phantoms {event['made']}/{event['of']}", flush=True)


def _demo(options: argparse.Namespace) -> int:
    from .files import read_volume
    from .training.phantom import make_phantom

    predictor = _predictor(options)
    phantom = None if options.input else make_phantom(options.seed, options.modality)
    volume = phantom.image if phantom else read_volume(options.input, options.frame)
    name = f"phantom_{options.modality}" if phantom else _case_names([options.input])[0]
    _prepare_folder(options.output)
    print(predictor.spec.limits)
    with _tables(options.output) as reports:
        labels = _segment_volume(predictor, volume, name, options, reports)
    print("seconds: " + ", ".join(f"{phase} {value:.2f}" for phase, value in reports[name]["seconds"].items()))
    if phantom:
        _compare(labels, phantom.labels, predictor.spec, options)
    print(f"results are in {options.output.resolve()}")
    return 0


def _compare(labels: Volume, truth: Volume, spec: ModelSpec, options: argparse.Namespace) -> None:
    """Writes the phantom's truth beside the result and prints the Dice of the structures that were asked for."""
    import numpy as np

    from .evaluation import dice_scores
    from .files import write_segmentation
    from .training.phantom import STRUCTURES

    path = options.output / f"phantom_{options.modality}_truth.{options.format}"
    write_segmentation(path, truth, dict(enumerate(STRUCTURES, start=1)), "phantom")
    asked = options.structures or spec.structures
    values = [0, *(spec.labels_of([key])[0] if key in asked else 0 for key in STRUCTURES)]
    expected = np.array(values, labels.array.dtype)[truth.array]
    print("Dice against the phantom's truth:")
    for label, value in dice_scores(labels.array, expected, len(spec.structures)).items():
        print(f"  {structure(spec.label_keys[label]).name:<24}{value:6.3f}")


def _say_error(error: object, code: int) -> int:
    print(f"m4oe: error: {' '.join(str(error).split())}", file=sys.stderr)  # on one line, whatever a library says
    return code


if __name__ == "__main__":
    sys.exit(main())
