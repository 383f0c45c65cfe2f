"""Trains a demonstration model from data that may be shipped; the same command goes on where it was stopped.

    python Testing/benchmarks/demo_model.py DATA -o OUT
    python Testing/benchmarks/demo_model.py DATA --score MODEL...
    torchrun --nproc-per-node 2 Testing/benchmarks/demo_model.py DATA -o OUT    (two at most, which share the batches)

DATA is a folder with the volumes and label maps named below; their licences are in the model's description. What came
of it, and how it got there, is told in Docs/demo-model.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from evidence import Held, dice_by_key, real_volumes
from m4oe.files import read_volume
from m4oe.names import keys_of
from m4oe.package import load_model
from m4oe.predictor import Predictor
from m4oe.preview import write_synthesis
from m4oe.resample import CanonicalVolume
from m4oe.spec import ModelSpec
from m4oe.training.atlas import Atlas, load_atlas, negative_atlas
from m4oe.training.cases import CaseFiles, load_case
from m4oe.training.config import DEMO, Stage, TrainConfig
from m4oe.training.data import Case, make_case
from m4oe.training.loop import TrainingData, check_run, train
from m4oe.training.phantom import STRUCTURES
from m4oe.training.phantom_data import phantom_data, unseen_phantoms
from m4oe.training.ranks import Ranks, joined_ranks, local_device
from m4oe.training.score import score_model
from m4oe.training.start import start_network
from m4oe.training.synthesis import Synthesiser

LIMITS = (
    "A demonstration, trained on two patients, three label maps of other bodies, and computer-made phantoms. It finds "
    "large organs in most volumes of the abdomen, with errors that are to be looked for in every case, small ones "
    "often not at all, and no tumour: a segment of that name is a false alarm. Among the MR experts its gate can be "
    "wrong: name the expert. Beyond the abdomen it may find organs. To try M4oE out; not a medical device."
)
DATA = (
    "1 CT and 1 T1 MR of TotalSegmentator's tests with their labels, 3 label maps without images (SPL abdominal atlas, "
    "HuBMAP Visible Human male and female), all of them drawn in every contrast, computer-made phantoms, and for "
    "the gate 1 T2 MR of The Cancer Imaging Archive without labels"
)
LICENCES = (
    "TotalSegmentator: Apache-2.0; HuBMAP CCF 3D reference object library: CC BY 4.0, modified; "
    "SPL abdominal atlas: 3D Slicer licence part B, modified; CMB-06489: CC BY 4.0"
)
FOR_THE_GATE = (("mr/cmb_06489_t2.nii.gz", "mr_t2"),)  # images without labels
UNSEEN_BY_THE_GATE = (("ct/pancreas_cb001_ct.nii.gz", "ct"), ("ct/crlm_1004_dicom", "ct"))
PHANTOMS, NEGATIVES, UNSEEN = 40, 24, 5
ABDOMEN = tuple(key for key in STRUCTURES if key not in ("esophagus", "urinary_bladder", "prostate_or_uterus"))
PELVIS = ("urinary_bladder", "prostate_or_uterus")
BODY = {
    **dict(enumerate(("liver", "kidney_right", "spleen", "pancreas", "aorta", "inferior_vena_cava"), start=1)),
    **{7: "adrenal_gland_right", 8: "adrenal_gland_left", 9: "gallbladder", 12: "duodenum", 13: "kidney_left"},
    **{14: "urinary_bladder", 15: "prostate_or_uterus", 16: "colon", 17: "small_bowel", 18: "vein", 19: "blood"},
    **{20: "vein", 22: "heart", 23: "vertebrae", 24: "intervertebral_discs", 25: "bone", 26: "hip_left", 27: "muscle"},
    **{28: "body", 29: "spinal_cord", 30: "urine", 31: "stomach", 33: "colon"},
}
DRAWN = (
    "liver",
    "kidney_right",
    "kidney_left",
    "spleen",
    "pancreas",
    "inferior_vena_cava",
    "gallbladder",
    "liver_tumor",
)


@dataclass(frozen=True)
class Source:
    """A person: label map, image if there is one and it may be trained on, and what is annotated."""

    label: str
    annotated: tuple[str, ...]
    weight: float
    image: str = ""
    expert: str = ""


SOURCES = (
    Source("ct/ts_ct_3mm_label_totalseg.nii.gz", ABDOMEN + PELVIS, 4, "ct/ts_ct_3mm.nii.gz", "ct"),
    Source("mr/ts_mr_t1_3mm_label_totalseg.nii.gz", ABDOMEN, 3, "mr/ts_mr_t1_3mm.nii.gz", "mr_t1"),
    Source("anatomy/spl_abdominal_atlas.nii.gz", (*DRAWN, "aorta", "adrenal_gland_right", "adrenal_gland_left"), 2),
    Source("anatomy/hra_visible_human_male.nii.gz", (*DRAWN, "duodenum", *PELVIS), 1.5),
    Source("anatomy/hra_visible_human_female.nii.gz", (*DRAWN, "aorta", "duodenum", *PELVIS), 1.5),
)


def demo_case(data: Path, source: Source) -> CaseFiles:
    """The files of a source and what its label values mean."""
    label = data / source.label
    image = data / source.image if source.image else label
    meanings = BODY if not source.image else label_meanings(data, source.label)
    modality = ("CT" if source.expert == "ct" else "MR") if source.image else None
    name = label.name.removesuffix(".nii.gz")
    return CaseFiles(name, name, image, label, modality, source.expert or None, meanings, source.annotated)


def label_meanings(data: Path, path: str) -> dict[int, str]:
    """Structures by label value, from the index of the data; the prostate is named as AMOS names it."""
    entries = json.loads((data / "index.json").read_text(encoding="utf-8"))["entries"]
    [labels] = [entry["labels"] for entry in entries if entry["path"] == path]
    keys, _ = keys_of({int(value): entry["name"] for value, entry in labels.items()})
    return {value: "prostate_or_uterus" if key == "prostate" else key for value, key in keys.items()}


def demo_atlases(data: Path, spec: ModelSpec) -> list[Atlas]:
    """All label maps, and bodies without any of the structures."""
    found = [load_atlas(demo_case(data, source), spec, source.weight) for source in SOURCES]
    return [*found, *(replace(negative_atlas(seed, spec), weight=0.075) for seed in range(NEGATIVES))]


def demo_cases(data: Path, spec: ModelSpec) -> list[Case]:
    """The real images; each comes up three times as often as all phantoms of its expert."""
    found: list[Case] = []
    for source in SOURCES:
        if source.image:
            case = demo_case(data, source)
            image, labels = load_case(case, STRUCTURES)
            expert = spec.expert_index(source.expert)
            found += 3 * PHANTOMS * [make_case(image, labels, source.annotated, spec, expert)]
    for path, name in FOR_THE_GATE:
        image = read_volume(data / path, 0)
        nothing = replace(image, array=np.zeros(image.grid.shape, np.uint8))
        found += 3 * PHANTOMS * [make_case(image, nothing, (), spec, spec.expert_index(name))]
    return found


def demo_config(length: float, mixture: bool) -> TrainConfig:
    """The stages, `length` times as long; from a mixture on without the first, and slower lest it forgets."""
    pace = 0.5 if mixture else 1.0
    stages = (
        Stage("dense", 7000, 3e-3, balance=0.35),
        Stage("experts", 4000, pace * 1.5e-3, balance=0.35),
        Stage("experts", 1600, pace * 6e-4, balance=0.15),
        Stage("gate", 400, 2e-3),
        # added when the stages above were scored: the gate still took T2 for contrast-enhanced T1
        Stage("experts", 3600, pace * 1e-3, balance=0.15),
        Stage("gate", 1200, 2e-3),
    )
    stages = tuple(replace(stage, steps=max(1, round(length * stage.steps))) for stage in stages[mixture:])
    return replace(DEMO, crop=128, images=2, stages=stages, checkpoint_every=50)


def demo_data(data: Path, config: TrainConfig) -> TrainingData:
    """Atlases, real images and phantoms, and the model's description."""
    phantoms = phantom_data(config, PHANTOMS, say)
    spec = replace(
        phantoms.spec,
        version="0.8.0",
        description="Demonstration model: abdominal organs on CT and MR, the large ones best.",
        licence="Apache-2.0",
        limits=LIMITS,
        training={**phantoms.spec.training, "data": DATA, "licences": LICENCES},
    )
    return TrainingData(spec, [*demo_cases(data, spec), *phantoms.cases], atlases=demo_atlases(data, spec))


def own_patients(data: Path) -> list[Held]:
    """The real images that are trained on, with the labels that are learned."""
    held = []
    for source in SOURCES:
        if source.image:
            case = demo_case(data, source)
            held.append(Held(f"learned {source.expert}", case.case, source.expert, *load_case(case, STRUCTURES)))
    return held


def gate_rows(data: Path, predictors: Sequence[Predictor]) -> dict[str, list[list[float]]]:
    """Weight that the gate alone, without header and HU, gives to the right expert on unseen volumes."""
    rows: dict[str, list[list[float]]] = {}
    for name, expert in UNSEEN_BY_THE_GATE:
        image = read_volume(data / name, 0)
        for number, predictor in enumerate(predictors):
            spec = predictor.spec
            rule = spec.intensity[spec.experts[spec.expert_index(expert)].modality]
            volume = CanonicalVolume(image, spec.pixel_mm, spec.slice_mm, rule)
            with torch.inference_mode():
                stacks = volume.stacks(0, volume.shape[0], spec.network.channels)
                weight = predictor.network.gate_logits(stacks).mean(0).softmax(0)[spec.expert_index(expert)]
            cells = rows.setdefault(f"{Path(name).name}, gate alone, weight of {expert}", [[] for _ in predictors])
            cells[number].append(float(weight))
    return rows


def contour_row(data: Path, predictors: Sequence[Predictor]) -> dict[str, list[list[float]]]:
    """How much of a contour of the stomach with the first part of the duodenum is found, where little else is drawn."""
    image, contour = (read_volume(data / f"ct/pancreas_cb001_{part}.nii.gz", 0) for part in ("ct", "label_partial"))
    cells = []
    for predictor in predictors:
        found = predictor(image)[0].array
        wanted = predictor.spec.labels_of(["stomach", "duodenum"])
        cells.append([float(np.isin(found[contour.array == 1], wanted).mean())])
    return {"pancreas_cb001, stomach and duodenum, share found": cells}


def score_table(data: Path, models: Sequence[str]) -> str:
    """Dice of the models on labelled real volumes, and mL that they find where there is no abdomen, as Markdown."""
    predictors = [Predictor(model, "cpu", "float32") for model in models]
    rows: dict[str, list[list[float]]] = {}
    for held in [*own_patients(data), *real_volumes(data)]:
        for number, predictor in enumerate(predictors):
            labels, report = predictor(held.image)
            right = report.expert_weights[held.expert] == 1
            forced = labels if right else predictor(held.image, held.expert)[0]
            told = {f"{held.group}, {key}": value for key, value in dice_by_key(labels, held.truth).items()}
            named = {
                f"{held.group}, {key}, expert named": value for key, value in dice_by_key(forced, held.truth).items()
            }
            for key, value in {**told, **named, f"{held.group}, right expert": float(right)}.items():
                rows.setdefault(key, [[] for _ in models])[number].append(value)
    rows |= gate_rows(data, predictors) | contour_row(data, predictors)
    for path in sorted([*data.glob("negative/*.nii.gz"), *data.glob("negative_nc/*.nii.gz")]):
        volumes = [predictor(read_volume(path, 0))[1].volumes_ml for predictor in predictors]
        rows[f"{path.name}, mL found"] = [[sum(found.values())] for found in volumes]
    lines = [f"| | {' | '.join(Path(model).stem for model in models)} |", "|---" * (len(models) + 1) + "|"]
    lines += [f"| {key} | {' | '.join(f'{fmean(values):.3f}' for values in cells)} |" for key, cells in rows.items()]
    return "\n".join(lines)


def say(event: dict[str, Any]) -> None:
    """Prints an event."""
    print(json.dumps(event), flush=True)


def main() -> None:
    """Trains the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("-o", "--output", type=Path, default=Path("run"), metavar="OUT", help="folder of the run")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default=local_device(), metavar="NAME", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--length", type=float, default=1.0, metavar="F", help="times the steps")
    parser.add_argument("--init", metavar="MODEL[:EXPERT]", help="to start from: one expert, or all")
    parser.add_argument("--score", nargs="+", metavar="MODEL", help="score these models instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.score:
        print(score_table(options.data, options.score))
        return
    with joined_ranks() as ranks:
        train_demo(options, ranks)


def train_demo(options: argparse.Namespace, ranks: Ranks) -> None:
    """Trains the model, or goes on with it, and scores it on phantoms."""
    options.output.mkdir(parents=True, exist_ok=True)
    mixture = bool(options.init) and ":" not in options.init
    config = replace(demo_config(options.length, mixture), seed=options.seed)
    check_run(options.output, config)
    data = demo_data(options.data, config)
    start = None
    if options.init:
        start = load_model(Path(options.init))[0] if mixture else start_network(options.init, config, STRUCTURES)
    check_run(options.output, config, data, start)
    if ranks.rank == 0:
        synthesiser = Synthesiser(data.spec, data.atlases, config.images, config.crop, config.seed)
        write_synthesis(options.output / "synthesis.png", synthesiser)
    model = train(config, data, options.output, say, ranks, options.device, start)
    if ranks.rank == 0:
        score_model(model, unseen_phantoms(UNSEEN), say, options.device)
        print(model)


if __name__ == "__main__":
    main()
