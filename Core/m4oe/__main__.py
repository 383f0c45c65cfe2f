"""The command line: `m4oe segment`, `evaluate`, `models`, `info`, `train`, `demo`, `data`, `worker` and for installs.

Exit codes: 0 all done, 1 an input failed, 2 the command itself cannot be carried out, 130 interrupted, 141
output closed, 143 terminated.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .bundle import add_bundle_command
from .data_commands import add_data_commands
from .doctor import add_doctor_command
from .labels import did_you_mean, structure
from .segment_command import (
    FORMATS,
    Voice,
    add_prediction_options,
    add_segment_command,
    case_names,
    draw,
    load_predictor,
    read_input,
    segment_volume,
    start_folder,
)
from .spec import DEFAULT_MODEL, ModelSpec, find_model, installed_models, model_folders, read_spec
from .terminal import FAILURES, count, keys, prepare_folder, progress_bar, say, say_error, score_table, structures
from .train_command import add_train_command

if TYPE_CHECKING:
    from .evaluation import Rules
    from .geometry import Volume


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
        after = getattr(options, "after_stop", "")
        return say_error(f"interrupted; files already written are complete{after}", *(stop.args or (130,)))


def _interrupt(number: int, frame: object) -> None:
    """Ends the run at SIGTERM as Ctrl-C does, so that no half-written file stays."""
    raise KeyboardInterrupt(128 + number)


class _Parser(argparse.ArgumentParser):
    """Refuses an unknown option with the usage of its command, and says what looks like an unknown word."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            hinted = [word + (did_you_mean(word, known) if word.startswith("--") else "") for word in unknown]
            self.error(f"unrecognized arguments: {' '.join(hinted)}")
        return options, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise


def _parser() -> argparse.ArgumentParser:
    purpose = "Segments organs and lesions in CT and MR. Research use, not a medical device."
    parser = _Parser(prog="m4oe", description=purpose)
    parser.add_argument("--version", action="version", version=f"m4oe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    parser.set_defaults(run=lambda options: parser.error(f"expected a command: {', '.join(commands.choices)}"))

    add_segment_command(commands)
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
    add_prediction_options(demo)
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
    evaluate.add_argument("--structures", type=structures, metavar="KEY,KEY", help="default: all that any truth lists")
    meanings = "what label values mean, where files do not say it: CSV, JSON, or 1=liver,2=spleen"
    evaluate.add_argument("--labels", metavar="FILE|V=KEY,..", help=meanings)
    evaluate.add_argument(
        "--predicted-labels", metavar="FILE|V=KEY,..", help="the same of predictions; default: as --labels"
    )
    evaluate.add_argument("--preset", choices=("default", "flare"), default="default", help="rules of a challenge")
    evaluate.add_argument("--tolerance", type=keys, metavar="MM|KEY=MM,..", help="of NSD; default: FLARE22's, else 2")
    evaluate.add_argument("--jobs", type=int, metavar="N", help="processes; default: up to 4")
    evaluate.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster that does it; or its file")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluation_files import evaluate_files, pair_files
    from .evaluation_report import score_table, write_evaluation

    places = [options.predicted, *([options.compare] if options.compare else [])]
    rules = _evaluation_rules(options)
    wanted = [structure(key).key for key in options.structures or ()]
    truth_labels = _meanings(options.labels)
    labels = _meanings(options.predicted_labels) or truth_labels
    jobs = options.jobs or min(4, os.cpu_count() or 1)
    pairs = [pair_files(place, options.truth) for place in places]
    is_new = not options.output.exists()
    prepare_folder(options.output)
    evaluations = []
    for place, name, paired in zip(places, _model_names(places), pairs, strict=True):
        with progress_bar(name) as show:
            evaluations.append(
                evaluate_files(paired, name, rules, wanted, truth_labels, labels, jobs, options.scheduler, show)
            )
        for case, problem in evaluations[-1].problems.items():
            say_error(f"{name}: {case}: {problem}", 1)
        for note in evaluations[-1].notes:
            say(f"m4oe: warning: {name}: {note}")
        if not evaluations[-1].scores:
            if is_new:
                options.output.rmdir()
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
            lesions = sum(structure(key).kind == "lesion" for key in spec.structures)
            kinds = [
                count(len(spec.structures) - lesions, "structure"),
                *([count(lesions, "lesion")] if lesions else []),
            ]
            kind = f"{' and '.join(kinds)}, experts {', '.join(spec.expert_names)}"
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
    with path.open("rb") as file:
        lines.append(f"sha256: {hashlib.file_digest(file, 'sha256').hexdigest()}")
    facts = {key: value for key, value in spec.training.items() if key != "scored_cases"}  # which the table shows
    lines += [line for key, value in facts.items() for line in _fact(f"training {key}", value)]
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

    predictor = load_predictor(options)
    phantom = None if options.input else make_phantom(options.seed, options.modality)
    name = f"phantom_{options.modality}" if phantom else case_names([options.input])[0]
    volume = phantom.image if phantom else read_input(options.input, name, options)
    image = options.output / f"{name}.nii.gz" if phantom else options.input
    voice = Voice()
    start_folder(options, predictor, voice)
    if phantom:
        write_volume(image, volume)
    say(f"1/1 {name} ...")
    labels, report = segment_volume(predictor, volume, name, image, options, voice)
    draw(predictor, volume, labels, report, name, options)
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
        elif found_ml.get(key):
            print(f"  {structure(key).name:<25}absent; {found_ml[key]:.2f} mL found wrongly")


def _worker(options: argparse.Namespace) -> int:
    from .worker import serve

    serve()


if __name__ == "__main__":
    sys.exit(main())
