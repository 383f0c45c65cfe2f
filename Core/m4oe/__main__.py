"""The command line: `m4oe segment`, `models`, `info`, `train` and `demo`.

Exit codes: 0 all done, 1 an input failed, 2 the command itself cannot be carried out, 130 interrupted.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .labels import structure
from .spec import DEFAULT_MODEL, ModelSpec, find_model, installed_models, read_spec

if TYPE_CHECKING:
    from .geometry import Volume
    from .predictor import Predictor, Report

FORMATS = ("seg.nrrd", "nii.gz", "nrrd", "mha")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, RuntimeError) as error:
        return _say_error(error, 2)
    except KeyboardInterrupt:
        return _say_error("interrupted; files already written are complete", 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="m4oe",
        description="Multi-organ and lesion segmentation of CT and MR. Research use, not a medical device.",
    )
    parser.add_argument("--version", action="version", version=f"m4oe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    segment = commands.add_parser("segment", help="segment volumes")
    segment.add_argument("inputs", nargs="+", metavar="INPUT", type=Path, help="file, DICOM folder, or folder of files")
    segment.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder for the results")
    segment.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="default: %(default)s")
    segment.add_argument("--frame", type=int, metavar="N", help="frame of a 4-D volume, from 0")
    segment.add_argument("--preview", action="store_true", help="also write a PNG of each result")
    _add_prediction_options(segment)
    segment.set_defaults(run=_segment)

    models = commands.add_parser("models", help="list the installed models")
    models.set_defaults(run=_models)

    info = commands.add_parser("info", help="show what a model is and how it scored")
    info.add_argument("model", metavar="FILE", nargs="?", default=DEFAULT_MODEL, help="model file or name")
    info.set_defaults(run=_info)

    train = commands.add_parser("train", help="train a model")
    train.add_argument("--phantoms", action="store_true", required=True, help="on computer-made phantoms")
    train.add_argument("--quick", action="store_true", help="in miniature, to see that training works")
    train.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    train.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder for the run")
    train.set_defaults(run=_train)

    demo = commands.add_parser("demo", help="segment a phantom and show the result")
    demo.add_argument("--input", type=Path, metavar="INPUT", help="segment this file or DICOM folder instead")
    demo.add_argument(
        "-o", "--output", type=Path, default=Path("m4oe-demo"), metavar="OUT", help="default: %(default)s"
    )
    demo.add_argument(
        "--modality", default="ct", metavar="NAME", help="ct, mr_t1, mr_t2 or mr_t1ce; default: %(default)s"
    )
    demo.add_argument("--seed", type=int, default=2026, help="seed of the phantom; default: %(default)s")
    _add_prediction_options(demo)
    demo.set_defaults(run=_demo)
    return parser


def _add_prediction_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME", help="model file or name; default: %(default)s"
    )
    parser.add_argument("--expert", default="auto", metavar="NAME", help="auto, or an expert to overrule the gate")
    parser.add_argument("--structures", nargs="+", metavar="KEY", help="structures to keep; default: all of the model")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")


def _segment(options: argparse.Namespace) -> int:
    from .files import find_inputs, read_volume

    inputs = find_inputs(options.inputs)
    predictor = _predictor(options)
    options.output.mkdir(parents=True, exist_ok=True)
    reports: dict[str, Report] = {}
    failed = 0
    for path, name in zip(inputs, _case_names(inputs), strict=True):
        try:
            volume = read_volume(path, options.frame)
            reports[str(path)] = _segment_case(predictor, volume, name, options, options.preview)
        except (ValueError, OSError) as error:
            failed = _say_error(error, 1)
    if reports:
        _write_volumes(options.output, reports)
    print(f"{len(reports)} of {len(inputs)} segmented; results are in {options.output}")
    return failed


def _predictor(options: argparse.Namespace) -> Predictor:
    """The model, after the cheap checks: an unknown expert or structure fails before any volume is read."""
    spec = read_spec(find_model(options.model))
    if options.expert != "auto":
        spec.expert_index(options.expert)
    spec.labels_of(options.structures or [])
    from .predictor import Predictor

    return Predictor(options.model, options.device)


def _segment_case(
    predictor: Predictor, volume: Volume, name: str, options: argparse.Namespace, preview: bool
) -> Report:
    from .files import write_segmentation
    from .preview import write_preview

    labels, report = _predict_with_bar(predictor, volume, name, options)
    spec = predictor.spec
    keys = spec.label_keys
    path = options.output / f"{name}.{getattr(options, 'format', FORMATS[0])}"
    written = write_segmentation(path, labels, keys, report.model)
    if preview:
        picture = options.output / f"{name}.png"
        write_preview(picture, volume, labels, keys, f"{name}   {report.model}   {_experts(report)}")
        written.append(picture)
    for warning in report.warnings:
        print(f"  warning: {warning}")
    print(f"  {_experts(report)}; {sum(report.seconds.values()):.1f} s; {', '.join(file.name for file in written)}")
    return report


def _predict_with_bar(
    predictor: Predictor, volume: Volume, name: str, options: argparse.Namespace
) -> tuple[Volume, Report]:
    from tqdm import tqdm

    with tqdm(total=1.0, desc=name, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}") as bar:

        def progress(phase: str, fraction: float) -> None:
            bar.set_postfix_str(phase, refresh=False)
            bar.update(fraction - bar.n)

        return predictor(volume, options.expert, options.structures, progress)


def _experts(report: Report) -> str:
    weights = sorted(report.expert_weights.items(), key=lambda item: -item[1])
    return "expert " + ", ".join(f"{name} {weight:.0%}" for name, weight in weights if weight >= 0.005)


def _case_names(inputs: list[Path]) -> list[str]:
    """A file name for each input's results: its own stem, with the folder's name in front where stems repeat."""
    stems = [path.resolve().name.split(".")[0] or path.name for path in inputs]
    repeated = Counter(stems)
    names = [
        f"{path.resolve().parent.name}_{path.name.replace('.', '_')}" if repeated[stem] > 1 else stem
        for path, stem in zip(inputs, stems, strict=True)
    ]
    again = [name for name, count in Counter(names).items() if count > 1]
    if again:
        raise ValueError(f"several inputs would be written as {', '.join(again)}; segment them into separate folders")
    return names


def _write_volumes(folder: Path, reports: Mapping[str, Report]) -> None:
    """volumes.csv has a row per case and structure; volumes.json the whole reports."""
    from .files import atomic_write

    with (
        atomic_write(folder / "volumes.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file)
        table.writerow(["input", "structure", "name", "volume_ml"])
        for path, report in reports.items():
            for key, volume_ml in report.volumes_ml.items():
                table.writerow([path, key, structure(key).name, f"{volume_ml:.2f}"])
    with atomic_write(folder / "volumes.json") as temporary:
        text = json.dumps({path: asdict(report) for path, report in reports.items()}, indent=2)
        temporary.write_text(text, encoding="utf-8")


def _models(options: argparse.Namespace) -> int:
    specs = [(path, read_spec(path)) for path in installed_models()]
    for path, spec in specs:
        print(f"{path.stem}  version {spec.version}, {len(spec.structures)} structures, ", end="")
        print(f"experts {', '.join(spec.expert_names)}, {path.stat().st_size / 1e6:.1f} MB  {path}")
    if not specs:
        print("no model is installed")
    return 0


def _info(options: argparse.Namespace) -> int:
    path = find_model(options.model)
    spec = read_spec(path)
    print(f"{spec.name} {spec.version}  {path}\n{spec.description}\n{spec.limits}\nlicence: {spec.licence}")
    for key, value in spec.training.items():
        print(f"training {key}: {value}")
    print(f"input: {spec.pixel_mm:g} mm pixels, {spec.slice_mm:g} mm slices or thicker\n")
    print(_score_table(spec))
    return 0


def _score_table(spec: ModelSpec) -> str:
    """Dice by structure and expert, as text."""
    lines = ["Dice on unseen cases".ljust(24) + "".join(name.rjust(10) for name in spec.expert_names)]
    for key in spec.structures:
        values = [spec.scores.get(name, {}).get(key) for name in spec.expert_names]
        lines.append(key.ljust(24) + "".join(("-" if v is None else f"{v:.3f}").rjust(10) for v in values))
    return "\n".join(lines)


def _train(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from .training.config import DEMO, QUICK
    from .training.loop import train_on_phantoms

    config = replace(QUICK if options.quick else DEMO, seed=options.seed)
    model = train_on_phantoms(config, options.output, _print_event)
    print(f"\n{_score_table(read_spec(model))}\n\nmodel: {model}")
    return 0


def _print_event(event: Mapping[str, Any]) -> None:
    if event["event"] == "step":
        losses = ", ".join(f"{key} {value:.3f}" for key, value in event["loss"].items())
        print(
            f"{event['stage']} {event['step']}/{event['steps']}: loss {losses}; {event['seconds']:.0f} s",
            flush=True,
        )
    elif event["event"] == "phantoms":
        print(f"phantoms {event['made']}/{event['of']}", flush=True)


def _demo(options: argparse.Namespace) -> int:
    from .evaluation import dice_scores
    from .files import read_volume, write_segmentation

    predictor = _predictor(options)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.input is not None:
        volume, truth = read_volume(options.input), None
        name = _case_names([options.input])[0]
    else:
        from .training.phantom import make_phantom

        phantom = make_phantom(options.seed, options.modality)
        volume, truth, name = phantom.image, phantom.labels, f"phantom_{options.modality}"
    print(predictor.spec.limits)
    report = _segment_case(predictor, volume, name, options, preview=True)
    print("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in report.seconds.items()))
    _write_volumes(options.output, {name: report})
    if truth is not None:
        labels = read_volume(options.output / f"{name}.{FORMATS[0]}")
        dice = dice_scores(labels.array, truth.array, len(predictor.spec.structures))
        print("Dice against the phantom's truth:")
        for label, value in dice.items():
            print(f"  {structure(predictor.spec.label_keys[label]).name:<24}{value:6.3f}")
        write_segmentation(options.output / f"{name}_truth.{FORMATS[0]}", truth, predictor.spec.label_keys, "phantom")
    print(f"results are in {options.output.resolve()}")
    return 0


def _say_error(error: object, code: int) -> int:
    print(f"m4oe: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
