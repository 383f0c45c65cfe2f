"""Data sets of your own, in the layouts that others use: nnU-Net raw, decathlon lists, BIDS derivatives and pairs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..names import BACKGROUND, keys_of, named_values, read_label_table
from .cases import CaseFiles, DataSet, Finding

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
LABEL_VALUES = "label values (--labels, or Label values in the panel)"
_TABLES = ("labels.csv", "labels.tsv", "labels.json")
_ROLE = re.compile(
    r"(?i:(images?|imgs?|volumes?|scans?)|labels?|masks?|segmentations?|segs?|ground_?truths?|gts?)(?=$|[A-Z0-9_.-])"
)
_LABEL_STEM = re.compile(r"(?i)^(.+?)[._-](?:labels?|labelmap|seg|segmentation|mask|gt)(?:[._-].*)?$")
_IMAGE_STEM = re.compile(r"(?i)(?:_0000|[._-](?:image|img|volume|scan))$")
_ENTITIES = re.compile(r"_(?:space|seg|res|den|desc|label)-[a-zA-Z0-9]+")


@dataclass(frozen=True)
class Hints:
    """What the user says of data that does not say it itself.

    Attributes:
        names: Structure names by label value; they replace those of the data set.
        modality: "CT" or "MR".
        expert: Which expert the cases train, such as "mr_dixon".
    """

    names: Mapping[int, str] = field(default_factory=dict)
    modality: str | None = None
    expert: str | None = None


def entries(folder: Path) -> list[str]:
    """All files below `folder`, with forward slashes, sorted by name.

    A folder that is one thing, because it holds DICOM or PNG slices or masks named by structure, is one entry that
    ends in "/". Hidden files are left out.
    """
    found: list[str] = []
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True):
        path = Path(place).as_posix()
        if _is_one(path, files):
            folders.clear()
            found.append(f"{path}/")
            continue
        known = {name: os.path.realpath(f"{place}/{name}") for name in folders}
        folders[:] = sorted(n for n in folders if n[0] != "." and n != "__MACOSX" and known[n] not in seen)
        seen |= {known[name] for name in folders}  # a link may lead back
        found += [f"{path}/{name}" for name in sorted(files) if name[0] != "."]
    return found


def read_nnunet(folder: Path, hints: Hints) -> DataSet | None:
    """The nnU-Net raw data set (version 2) in `folder`, or None where its dataset.json is none.

    Source: nnU-Net, documentation/dataset_format.md.
    """
    facts = _read_json(folder / "dataset.json")
    if not ({"channel_names", "labels", "file_ending"} <= set(facts)):
        return None
    channels = [str(name) for name in facts["channel_names"].values()]
    labels, findings = labelling(named_values(facts["labels"]), hints)
    splits = _nnunet_splits(folder)
    cases = []
    for name, image, label, split in _nnunet_files(folder, facts):
        case = _case(name, image, label if label.is_file() else None, labels, modality_of(channels[0]), hints)
        cases.append(replace(case, split=splits.get(name, split)))
    findings += _channels(channels)
    findings += [without_label(case) for case in cases if case.label is None and case.split != "test"]
    findings += _announced(facts, sum(case.split != "test" for case in cases))
    findings += _without_image(folder, {case.label for case in cases}, facts["file_ending"])
    name = re.sub(r"^Dataset\d{3}_", "", folder.name)
    return DataSet(name, "nnU-Net", folder, tuple(cases), _licence(facts), tuple(findings))


def read_decathlon(path: Path, hints: Hints) -> DataSet | None:
    """The data set that a decathlon list describes, or None where the file is none.

    Source: MONAI, monai/data/decathlon_datalist.py.
    """
    facts = _read_json(path)
    parts = {"training": "train", "validation": "val", "test": "test", "testing": "test"}
    if not _is_list(facts.get("training")):
        return None
    listed = [(item, split) for part, split in parts.items() for item in facts.get(part) or ()]
    items = [(item if isinstance(item, dict) else {"image": item}, split) for item, split in listed]
    if not all(item.get("image") for item, _ in items):
        return None
    labels, findings = labelling(named_values(facts.get("labels", {})), hints)
    modalities = facts.get("modality") or {}
    channels = [str(name) for name in (modalities.values() if isinstance(modalities, dict) else [modalities])]
    cases = []
    for name, (item, split) in zip(_unique([_first(item["image"]) for item, _ in items]), items, strict=True):
        label = path.parent / _first(item["label"]) if item.get("label") else None
        kind = modality_of(item.get("modality", next(iter(channels), "")))
        case = _case(name, path.parent / _first(item["image"]), label, labels, kind, hints)
        own: Any = {
            "split": split,
            "patient": str(item.get("patient", name)),
            "expert": item.get("expert", case.expert),
        }
        cases.append(replace(case, **own))
    findings += _channels(channels)
    findings += [without_label(case) for case in cases if case.label is None and case.split != "test"]
    findings += _announced(facts, len(facts["training"]))
    return DataSet(path.parent.name, "decathlon", path.parent, tuple(cases), _licence(facts), tuple(findings))


def read_bids(folder: Path, files: Iterable[str], hints: Hints) -> DataSet | None:
    """The label maps (_dseg) of a BIDS derivative with their images, or None where there are none.

    Source: BIDS specification, derivatives of imaging data, segmentations.
    """
    files = list(files)
    cases, findings = [], []
    for mask in (file for file in files if re.search(r"/sub-[^/]*_dseg\.nii(\.gz)?$", file)):
        name = _stem(mask).removesuffix("_dseg")
        source = _ENTITIES.sub("", name)
        images = [file for file in files if _is_bids_image(file, source)]
        if len(images) != 1:
            found = ", ".join(Path(image).name for image in images) or "none"
            findings.append(Finding(name, "error", f"{mask} needs one image named {source}_*, found {found}."))
            continue
        labels, unknown = labelling(_bids_names(Path(mask), folder), hints)
        findings += [finding for finding in unknown if finding not in findings]
        kind = modality_of(_stem(images[0]).rsplit("_", 1)[-1])
        case = _case(name, Path(images[0]), Path(mask), labels, kind, hints)
        cases.append(replace(case, patient=source.split("_")[0]))
    if not (cases or findings):
        return None
    return DataSet(folder.name, "BIDS", folder, tuple(cases), findings=(*findings, *_meaningless(cases)))


def read_pairs(folder: Path, files: Iterable[str], hints: Hints) -> DataSet | None:
    """Images and label maps that are told apart by a suffix (_label, _seg, ...) or lie in folders images and labels.

    What the values mean is said by labels.csv, labels.tsv or labels.json in the folder, or by a table with the name of
    the label map. None where there is no image.
    """
    images, masks, findings = _sorted_pairs(folder, files)
    if not images:
        return None
    shared = labelling(next((names for name in _TABLES if (names := _table(folder / name))), {}), hints)
    cases = []
    for name, (key, image) in zip(_unique(list(images.values())), images.items(), strict=True):
        label = Path(masks[key]) if key in masks else None
        own = _table(label.with_name(f"{_stem(masks[key])}.csv")) if label else {}
        labels, unknown = labelling(own, hints) if own else shared
        findings += [finding for finding in unknown if label and finding not in findings]
        cases.append(_case(name, Path(image), label, labels, (None, None), hints))
    findings += [without_label(case) for case in cases if masks and case.label is None]
    return DataSet(folder.name, "pairs", folder, tuple(cases), findings=(*findings, *_meaningless(cases)))


def labelling(names: Mapping[int, str], hints: Hints) -> tuple[dict[int, str], list[Finding]]:
    """Structure keys by label value, and a warning for every name that means none."""
    known, unknown = keys_of(hints.names or names)
    return known, [
        Finding(
            "",
            "warning",
            f"The label {value} ({name!r}) is no structure that M4oE knows; give an English name, or - for none, in "
            f"the {LABEL_VALUES}.",
        )
        for value, name in unknown.items()
    ]


def without_label(case: CaseFiles) -> Finding:
    """Says that an image has no label where one was expected."""
    return Finding(case.case, "warning", f"{case.image} has no label; it serves pretraining alone.")


def annotated(labels: Mapping[int, str]) -> tuple[str, ...]:
    """Structures of a label map, in the order of their values."""
    return tuple(dict.fromkeys(key for key in labels.values() if key != BACKGROUND))


def modality_of(name: str) -> tuple[str | None, str | None]:
    """Modality and expert that the name of a channel or a BIDS suffix tells."""
    words = set(re.findall(r"[a-z0-9]+", str(name).lower()))
    if words == {"ct"}:
        return "CT", "ct"
    experts = {"mr_t1ce": {"t1ce", "t1gd", "t1c"}, "mr_t1": {"t1", "t1w"}, "mr_t2": {"t2", "t2w", "t2spir"}}
    expert = next((key for key, spellings in experts.items() if words & spellings), None)
    return ("MR", expert) if expert or words & {"mr", "mri", "flair", "adc", "dwi", "pd"} else (None, None)


def _case(
    name: str,
    image: Path,
    label: Path | None,
    labels: Mapping[int, str],
    kind: tuple[str | None, str | None],
    hints: Hints,
) -> CaseFiles:
    """A case whose patient has no other, of a modality and expert that the hints may replace."""
    modality, expert = kind
    return CaseFiles(
        case=name,
        patient=name,
        image=image,
        label=label,
        modality=hints.modality or modality,
        expert=hints.expert or expert,
        labels=labels,
        annotated=annotated(labels),
    )


def _is_list(items: Any) -> bool:
    return isinstance(items, list) and bool(items) and all(isinstance(item, dict) for item in items)


def _channels(names: list[str]) -> list[Finding]:
    if len(names) < 2:
        return []
    return [Finding("", "note", f"Of {len(names)} channels the first is used: {names[0]}.")]


def _meaningless(cases: Iterable[CaseFiles]) -> list[Finding]:
    if not any(case.label and not case.labels for case in cases):
        return []
    return [Finding("", "error", f"What its label values mean is not known; give {LABEL_VALUES}.")]


# nnU-Net


def _nnunet_files(folder: Path, facts: Mapping[str, Any]) -> Iterator[tuple[str, Path, Path, str | None]]:
    """Case, first channel, label and split."""
    ending = str(facts["file_ending"])
    if elsewhere := facts.get("dataset"):
        for name, files in elsewhere.items():
            yield name, folder / files["images"][0], folder / files["label"], None
        return
    for part, split in (("Tr", None), ("Ts", "test")):
        for image in sorted((folder / f"images{part}").glob(f"*_0000{ending}")):
            name = image.name.removesuffix(f"_0000{ending}")
            if name[0] != ".":
                yield name, image, folder / f"labels{part}" / f"{name}{ending}", split


def _nnunet_splits(folder: Path) -> dict[str, str]:
    """Split by case, where splits_final.json holds one fold; several are cross-validation and no split."""
    try:
        folds = json.loads((folder / "splits_final.json").read_text(encoding="utf-8"))
        (fold,) = folds
        return {name: split for split in ("train", "val") for name in fold[split]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _announced(facts: Mapping[str, Any], found: int) -> list[Finding]:
    announced = facts.get("numTraining", found)
    if announced == found:
        return []
    return [Finding("", "warning", f"dataset.json announces {announced} training cases, {found} are listed or there.")]


def _without_image(folder: Path, used: set[Path | None], ending: str) -> list[Finding]:
    labels = (path for part in ("Tr", "Ts") for path in sorted((folder / f"labels{part}").glob(f"*{ending}")))
    unused = [path for path in labels if path not in used and path.name[0] != "."]
    return [Finding(_stem(path.name), "error", f"{path} has no image.") for path in unused]


# BIDS


def _is_bids_image(file: str, source: str) -> bool:
    """Whether a file is an image with the entities of `source`, such as sub-01_ses-1."""
    name = Path(file).name
    if not file.endswith((".nii.gz", ".nii")) or re.search(r"_(dseg|probseg|mask)\.nii", name):
        return False
    return re.fullmatch(re.escape(source) + r"(?:_[A-Za-z0-9]+)", _ENTITIES.sub("", _stem(name))) is not None


def _bids_names(mask: Path, folder: Path) -> dict[int, str]:
    """The table beside the mask, or one above it that holds for all."""
    own = mask.with_name(f"{_stem(mask.name)}.tsv")
    above = [place for place in mask.parents if place == folder or folder in place.parents]
    tables = [own, *(table for place in above for table in sorted(place.glob("*dseg.tsv")) if "sub-" not in table.name)]
    return next((names for table in tables if (names := _table(table))), {})


# Pairs


def _sorted_pairs(folder: Path, files: Iterable[str]) -> tuple[dict[str, str], dict[str, str], list[Finding]]:
    """Images and label maps by what a pair has in common, and what does not fit."""
    images: dict[str, str] = {}
    masks: dict[str, str] = {}
    findings = []
    for file in filter(_is_image, files):
        key, is_label = _pair_key(file, folder)
        first = (masks if is_label else images).setdefault(key, file)
        if first != file:
            findings.append(Finding(_stem(first), "warning", f"{file} is left out, {first} is used."))
    alone = [mask for key, mask in masks.items() if key not in images]
    return images, masks, [*findings, *(Finding(_stem(mask), "error", f"{mask} has no image.") for mask in alone)]


def _is_image(file: str) -> bool:
    if file.endswith("/"):
        return any(path.suffix.lower() in (".dcm", ".ima") for path in Path(file).iterdir())
    return file.endswith(IMAGE_SUFFIXES) and not file.endswith(".seg.nrrd")


def _pair_key(file: str, root: Path) -> tuple[str, bool]:
    """What an image and its label have in common, and whether the file is a label."""
    path = Path(file)
    role = _ROLE.match(path.parent.name) if path.parent != root else None
    place = path.parent.parent / path.parent.name[role.end() :] if role else path.parent
    stem = _IMAGE_STEM.sub("", _stem(file))
    suffixed = _LABEL_STEM.match(stem)
    return f"{place}/{suffixed[1] if suffixed else stem}", bool(suffixed or (role and not role[1]))


# Helpers


def _is_one(path: str, files: list[str]) -> bool:
    suffixes = {Path(name).suffix.lower() for name in files}
    if path.endswith("/segmentations"):
        return any(Path(f"{path}/../{name}.nii.gz").is_file() for name in ("ct", "mri"))
    return bool(suffixes & {".dcm", ".ima"}) or suffixes == {".png"}


def _table(path: Path) -> dict[int, str]:
    return read_label_table(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _licence(facts: Mapping[str, Any]) -> str:
    return str(facts.get("licence") or facts.get("license") or "")


def _first(files: Any) -> str:
    """The first of several channels."""
    return str(files[0] if isinstance(files, list) else files)


def _stem(file: str) -> str:
    name = file.rstrip("/").rsplit("/", 1)[-1]
    return next((name.removesuffix(suffix) for suffix in IMAGE_SUFFIXES if name.endswith(suffix)), name)


def _unique(files: list[str]) -> list[str]:
    """The names of files without suffix, with those of their folders in front as far as they repeat."""
    names = [_stem(file) for file in files]
    for depth in range(2, 9):
        if len(set(names)) == len(names):
            break
        names = ["_".join([*file.rstrip("/").split("/")[-depth:-1], _stem(file)]).lstrip("_.") for file in files]
    return names
