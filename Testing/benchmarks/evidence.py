"""Experiments behind Docs/evidence.md: each can be stopped, goes on where it was, and ends in JSON and a table.

    python Testing/benchmarks/evidence.py -o OUT anatomy FOLDER   cross-validation on CHAOS T2 (pairs of NIfTI)
    python Testing/benchmarks/evidence.py -o OUT mixture          dense, channel gate, soft and top-1 gate, one each
    python Testing/benchmarks/evidence.py -o OUT addition         one modality more, and the same trained alone

Seconds are processor seconds of this process, so that other load on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from m4oe.evaluation import Score, dice_scores
from m4oe.files import atomic_write
from m4oe.geometry import Volume
from m4oe.network.unet import MoESwinUNet
from m4oe.predictor import Predictor
from m4oe.spec import NetworkSpec, read_spec
from m4oe.training.cases import CaseFiles, DataSet, load_case
from m4oe.training.check import check_cases
from m4oe.training.config import DEMO, QUICK, Stage, TrainConfig
from m4oe.training.datasets import find_datasets
from m4oe.training.layouts import Hints
from m4oe.training.loop import TrainingData, train
from m4oe.training.phantom import MODALITIES, STRUCTURES, make_phantom
from m4oe.training.phantom_data import phantom_data
from m4oe.training.plan import make_plan
from m4oe.training.plan_data import addition_config, held_back, plan_config, plan_data
from m4oe.training.score import score_model
from m4oe.training.start import start_addition
from torch.utils.flop_counter import FlopCounterMode

CHAOS_LABELS = {1: "liver", 2: "kidney_right", 3: "kidney_left", 4: "spleen"}
FOLDS = 3
ANATOMY = TrainConfig(
    name="chaos-t2",
    network=replace(DEMO.network, experts=1),
    pixel_mm=2.0,
    slice_mm=3.0,
    crop=160,
    images=8,
    stages=(Stage("dense", 1300, 1.5e-3), Stage("joint", 300, 4e-4, balance=0.0)),
    optimiser="adamw",
    checkpoint_every=50,
)


def anatomy(options: argparse.Namespace) -> None:
    """Trains on the other folds and scores on one, for every fold."""
    dataset, *_ = find_datasets(options.folder, Hints(CHAOS_LABELS, "MR", "mr_t2"))
    config = replace(ANATOMY, seed=options.seed)
    rows: list[dict[str, Any]] = read_rows(options.output / "anatomy.json")
    for fold in range(len(rows), FOLDS):
        start = time.process_time()
        scores = run_fold(dataset, fold, config, options.output)
        rows.append({"fold": fold, "seconds": time.process_time() - start, "scores": [asdict(s) for s in scores]})
        write_rows(options.output / "anatomy.json", rows, options, config)
    print(anatomy_table(rows))


def run_fold(dataset: DataSet, fold: int, config: TrainConfig, output: Path) -> list[Score]:
    cases = tuple(
        replace(case, split="test" if index % FOLDS == fold else "train") for index, case in enumerate(dataset.cases)
    )
    of_fold = replace(dataset, cases=cases)
    plan, _ = make_plan([of_fold], {dataset.name: list(check_cases(cases))}, val=0.0, test=0.0)
    config = plan_config(config, plan)
    data = plan_data(config, plan, output / "cache", say)
    model = train(config, data, output / f"fold{fold}", say)
    return [score for result in score_model(model, held_back(plan, data.spec), say) for score in result.scores]


def anatomy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean Dice (and over all folds NSD and HD95) by structure and fold."""
    lines = ["| fold | cases | " + " | ".join(CHAOS_LABELS.values()) + " | processor minutes |", "|---" * 7 + "|"]
    everything = [Score(**score) for row in rows for score in row["scores"]]
    for name, part, seconds in [
        *((str(r["fold"] + 1), [Score(**s) for s in r["scores"]], r["seconds"]) for r in rows),
        ("all", everything, sum(row["seconds"] for row in rows)),
    ]:
        cells = [f"{mean(s.dice for s in part if s.structure == key):.3f}" for key in CHAOS_LABELS.values()]
        lines.append(f"| {name} | {len({s.case for s in part})} | {' | '.join(cells)} | {seconds / 60:.0f} |")
    for name, metric in (("NSD", "nsd"), ("HD95, mm", "hd95_mm")):
        by_key = (mean(getattr(s, metric) for s in everything if s.structure == key) for key in CHAOS_LABELS.values())
        lines.append(f"| all, {name} | | {' | '.join(f'{value:.3g}' for value in by_key)} | |")
    return "\n".join(lines)


# Does the mixture earn its keep?

STEPS = (800, 350, 250)  # that train the segmentation, in every arm; the gate's own are cheap and come on top
RATES = (2e-3, 1e-3, 1e-3)
PHANTOMS, UNSEEN = 24, 4  # per modality
MIXTURE = replace(QUICK, images=2, optimiser="adamw")
FLARE = (
    "liver", "kidney_right", "spleen", "pancreas", "aorta", "inferior_vena_cava", "adrenal_gland_right",
    "adrenal_gland_left", "gallbladder", "esophagus", "stomach", "duodenum", "kidney_left",
)  # fmt: skip


def stages(*names: str) -> tuple[Stage, ...]:
    """The three of the segmentation, all arms alike, with the gate's where they are asked for."""
    thirds = iter(zip(STEPS, RATES, (0.5, 0.5, 0.0), strict=True))
    return tuple(Stage("gate", 400, 2e-3) if name == "gate" else Stage(name, *next(thirds)) for name in names)


ARMS = {  # network, stages; "one each" trains four networks
    "dense": (QUICK.network, stages("dense", "dense", "dense")),  # experts that never part are one network
    "channel gate": (replace(QUICK.network, gate="channel", top_k=0), stages("experts", "experts", "joint")),
    "soft gate": (replace(QUICK.network, top_k=0), stages("dense", "experts", "gate", "joint", "gate")),
    "top-1 gate": (QUICK.network, stages("dense", "experts", "gate", "joint", "gate")),
    "one each": (replace(QUICK.network, experts=1), stages("dense", "dense", "dense")),
}


def mixture(options: argparse.Namespace) -> None:
    """Every arm with every seed on the same phantoms, scored on unseen ones and on real volumes."""
    data = phantom_data(QUICK, PHANTOMS, say)
    volumes = [*unseen_phantoms(), *real_volumes(options.real)]
    path = options.output / "mixture.json"
    rows = read_rows(path)
    for seed in range(options.seed, options.seed + options.seeds):
        for arm, (network, plan) in ARMS.items():
            if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                continue
            config = replace(MIXTURE, network=network, stages=plan, seed=seed)
            rows.append({"arm": arm, "seed": seed, **run_arm(arm, config, data, volumes, options.output)})
            write_rows(path, rows, options, config)
    print(mixture_table(rows))


def run_arm(arm: str, config: TrainConfig, data: TrainingData, volumes: Sequence[Held], output: Path) -> dict[str, Any]:
    folder = output / f"{arm} {config.seed}".replace(" ", "_")
    network, names = replace(config.network, drop_path=0.0), data.spec.expert_names
    start = time.process_time()
    if arm == "one each":
        models = [train(config, only(data, network, index), folder / name, say) for index, name in enumerate(names)]
    else:
        models = [train(config, replace(data, spec=replace(data.spec, network=network)), folder, say)] * len(names)
    trained = time.process_time() - start
    predictors = {model: Predictor(model, "cpu", "float32") for model in set(models)}
    scores = [score(predictors[models[MODALITIES.index(volume.expert)]], volume) for volume in volumes]
    dense = arm in ("dense", "one each")
    return {"trained": trained, "scores": scores, **cost(predictors[models[0]].network, arm, dense)}


def only(data: TrainingData, network: NetworkSpec, index: int) -> TrainingData:
    """The data of one expert, which becomes the only one."""
    cases = [replace(case, expert=0) for case in data.cases if case.expert == index]
    return TrainingData(replace(data.spec, network=network, experts=(data.spec.experts[index],)), cases)


def cost(network: MoESwinUNet, arm: str, dense: bool) -> dict[str, float]:
    """Parameters in millions, in all and at work on a slice, and GFLOP per slice of the canonical grid."""
    gated = network.router is not None
    chosen = network.select_experts((1.0,) + (0.0,) * (network.spec.experts - 1)) if gated else network
    active = chosen if dense or arm == "top-1 gate" else network
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        active(torch.zeros(1, network.spec.channels, QUICK.crop, QUICK.crop))
    held = {"dense": chosen, "one each": network}.get(arm, network)
    times = 4 if arm == "one each" else 1
    return {
        "parameters": times * size(held) / 1e6,
        "active": size(active) / 1e6,
        "gflop": counter.get_total_flops() / 1e9,
    }


def size(network: MoESwinUNet) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@dataclass(frozen=True)
class Held:
    """A volume to score on: its group in the table, the expert that should serve it, image and truth."""

    group: str
    name: str
    expert: str
    image: Volume
    truth: Volume


def unseen_phantoms() -> list[Held]:
    made = [(m, n, make_phantom(1_000_000 + n, m)) for m in MODALITIES for n in range(UNSEEN)]
    return [Held(f"phantoms {m}", f"{m} {n}", m, phantom.image, phantom.labels) for m, n, phantom in made]


def real_volumes(folder: Path | None) -> list[Held]:
    """Labelled real volumes below `folder`: CHAOS T2, and those with labels in the order of FLARE22."""
    if folder is None:
        return []
    held = []
    flare, chaos = dict(enumerate(FLARE, start=1)), CHAOS_LABELS
    for pattern, ending, labels, expert, modality in (
        ("ct/ts_ct_3mm", "_label_flare13", flare, "ct", "CT"),
        ("mr/ts_mr_t1_3mm", "_label_flare13", flare, "mr_t1", "MR"),
        ("mr_nc/chaos_t2_??", "_label", chaos, "mr_t2", "MR"),
    ):
        for path in sorted(folder.glob(f"{pattern}.nii.gz")):
            name = path.name.removesuffix(".nii.gz")
            truth = path.with_name(f"{name}{ending}.nii.gz")
            case = CaseFiles(name, name, path, truth, modality, None, labels, tuple(labels.values()))
            image, mapped = load_case(case, STRUCTURES)
            held.append(Held(f"real {expert}", name, expert, image, mapped))
    return held


def score(predictor: Predictor, volume: Held) -> dict[str, Any]:
    """Dice by structure, routed as any volume is, and with the right expert named."""
    start = time.process_time()
    labels, report = predictor(volume.image)
    seconds = time.process_time() - start
    named = volume.expert in predictor.spec.expert_names and predictor.network.router is not None
    right = named and report.expert_weights[volume.expert] == 1
    forced = predictor(volume.image, volume.expert)[0] if named and not right else labels
    return {
        "group": volume.group,
        "name": volume.name,
        "expert": volume.expert,
        "gate": report.gate,
        "seconds": seconds,
        "dice": dice_by_key(labels, volume.truth),
        "named": dice_by_key(forced, volume.truth),
    }


def dice_by_key(labels: Volume, truth: Volume) -> dict[str, float]:
    dice = dice_scores(labels.array, truth.array, len(STRUCTURES))
    return {STRUCTURES[label - 1]: value for label, value in dice.items()}


def mixture_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over seeds of the mean Dice of liver, kidneys and spleen, and what each arm costs."""
    groups = list(dict.fromkeys(score["group"] for row in rows for score in row["scores"]))
    arms = {name: [row for row in rows if row["arm"] == name] for name in dict.fromkeys(row["arm"] for row in rows)}
    kinds = {kind: f"{kind}, expert named" for kind in ("phantoms", "real") if any(g.startswith(kind) for g in groups)}
    lines = [
        f"| Dice | {' | '.join([*groups, 'phantoms', *kinds.values()])} |",
        "|---" * (len(groups) + len(kinds) + 2),
    ]
    for name, mine in arms.items():
        cells = [spread([group_dice(row, group) for row in mine]) for group in (*groups, "phantoms")]
        cells += [spread([group_dice(row, kind, "named") for row in mine]) for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    head = ("parameters, M", "at work, M", "GFLOP per slice", "s per volume", "s to train", "gate right")
    lines += ["", f"| cost | {' | '.join(head)} |", "|---" * (len(head) + 1)]
    for name, mine in arms.items():
        cells = [f"{mine[0][key]:.3f}" for key in ("parameters", "active", "gflop")]
        spent = mean(score["seconds"] for row in mine for score in row["scores"])
        cells += [f"{spent:.2f}", f"{mean(row['trained'] for row in mine):.0f}", gate_accuracy(mine)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(f"{line}|" if line.startswith("|---") else line for line in lines)


def group_dice(row: Mapping[str, Any], group: str, kind: str = "dice") -> float:
    return mean(value for s in row["scores"] if s["group"].startswith(group) for value in large(s[kind]))


def large(dice: Mapping[str, float]) -> list[float]:
    """Those of the structures that all groups have, and that networks this small find."""
    return [value for key, value in dice.items() if key in CHAOS_LABELS.values()]


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def gate_accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of unseen phantoms and of real volumes, by what the gate says without header or HU."""
    words = []
    for kind in ("phantoms", "real"):
        asked = [s for row in rows for s in row["scores"] if s["gate"] and s["group"].startswith(kind)]
        right = sum(max(s["gate"], key=s["gate"].get) == s["expert"] for s in asked)
        words += [f"{kind} {right} of {len(asked)}"] if asked else []
    return ", ".join(words) if rows[0]["arm"] not in ("dense", "one each") and words else "-"


# What does one modality more cost, and leave as it was?

BUDGETS = (100, 200, 400, 800)  # steps


def addition(options: argparse.Namespace) -> None:
    """Adds contrast-enhanced T1 to a mixture of three, and trains a network on it alone, with equal steps."""
    data, volumes = phantom_data(QUICK, PHANTOMS, say), unseen_phantoms()
    new, old = data.spec.experts[-1].name, [volume for volume in volumes if volume.expert != MODALITIES[-1]]
    network = replace(QUICK.network, experts=len(MODALITIES) - 1)
    three = replace(data.spec, network=replace(network, drop_path=0.0), experts=data.spec.experts[:-1])
    config = replace(MIXTURE, network=network, stages=ARMS["top-1 gate"][1], seed=options.seed)
    cases = [case for case in data.cases if case.expert < network.experts]
    base = train(config, TrainingData(three, cases), options.output / "three", say)
    before = [Predictor(base, "cpu", "float32")(volume.image)[0].array for volume in old]
    path = options.output / "addition.json"
    rows = read_rows(path)
    for steps in BUDGETS[len(rows) :]:
        added = add_expert(base, data, steps, options)
        alone = train_alone(data, steps, options)
        predictor, own = Predictor(added, "cpu", "float32"), Predictor(alone, "cpu", "float32")
        results = [predictor(volume.image) for volume in old]
        mine = [volume for volume in volumes if volume.expert == new]
        rows.append(
            {
                "steps": steps,
                "same": sum(np.array_equal(a, b.array) for a, (b, _) in zip(before, results, strict=True)),
                "taken": sum(report.expert_weights[new] > 0 for _, report in results),
                "old": len(old),
                "added": [score(predictor, volume) for volume in mine],
                "alone": [score(own, volume) for volume in mine],
            }
        )
        write_rows(path, rows, options, config)
    print(addition_table(rows))


def add_expert(base: Path, data: TrainingData, steps: int, options: argparse.Namespace) -> Path:
    spec = read_spec(base)
    halves = (Stage("add", steps * 3 // 4, 1e-3), Stage("add", steps // 4, 5e-4, balance=0.0))
    config = replace(addition_config(MIXTURE, spec), stages=halves, seed=options.seed)
    whole = replace(data, spec=replace(data.spec, network=replace(config.network, drop_path=0.0)))
    return train(config, whole, options.output / f"added{steps}", say, start=start_addition(base, whole))


def train_alone(data: TrainingData, steps: int, options: argparse.Namespace) -> Path:
    halves = (Stage("dense", steps * 3 // 4, 2e-3), Stage("dense", steps // 4, 1e-3, balance=0.0))
    network = replace(QUICK.network, experts=1)
    config = replace(MIXTURE, network=network, stages=halves, seed=options.seed)
    mine = only(data, replace(network, drop_path=0.0), len(MODALITIES) - 1)
    return train(config, mine, options.output / f"alone{steps}", say)


def addition_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean Dice as in `mixture_table` on unseen phantoms of the new modality, and what became of the old results."""
    head = ("steps", "added", "added, expert named", "alone", "old results the same", "old taken by the new expert")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        dice = [mean(v for s in row[arm] for v in large(s[kind])) for arm, kind in SHOWN]
        counts = (f"{row[key]} of {row['old']}" for key in ("same", "taken"))
        lines.append(f"| {row['steps']} | {' | '.join([*(f'{value:.3f}' for value in dice), *counts])} |")
    return "\n".join(lines)


SHOWN = (("added", "dice"), ("added", "named"), ("alone", "dice"))


# What the experiments share


def mean(values: Iterable[float | None]) -> float:
    """The mean of the values that are there."""
    return statistics.fmean(value for value in values if value is not None)


def say(event: Mapping[str, Any]) -> None:
    if event["event"] != "step" or event["step"] % 100 == 0:
        print(json.dumps(event), flush=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], options: argparse.Namespace, config: TrainConfig) -> None:
    """Results so far, with what is needed to get them again."""
    about = {
        "command": " ".join(["python", *sys.argv]),
        "seed": options.seed,
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "config": asdict(config),
    }
    with atomic_write(path) as new:
        new.write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    experiments = parser.add_subparsers(required=True)
    one = experiments.add_parser("anatomy")
    one.add_argument("folder", type=Path)
    one.set_defaults(run=anatomy)
    two = experiments.add_parser("mixture")
    two.add_argument("--seeds", type=int, default=3)
    two.add_argument("--real", type=Path, help="folder with ct, mr and mr_nc")
    two.set_defaults(run=mixture)
    experiments.add_parser("addition").set_defaults(run=addition)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    options.run(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
