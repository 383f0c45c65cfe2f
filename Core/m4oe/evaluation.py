"""How well label maps agree with the truth: scores per case and structure, summaries, and two models compared."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .geometry import Grid, Volume
from .labels import ancestry, structure
from .surface import surface_distances

METRICS = ("dice", "nsd", "hd95_mm", "volume_error_ml", "volume_error_percent")
COMPARED = METRICS[:3]
DEFAULT_TOLERANCE_MM = 2.0
FEWEST_PAIRS = 6  # below, no two-sided signed-rank test can reach p < 0.05
_FLARE_Z_RANGE = ("aorta", "inferior_vena_cava", "esophagus")
_FLARE_LOWEST_DICE = 0.2
_RESAMPLES = 9999
_SEED = 0
_OUTCOMES = {  # by whether the truth and the prediction have it
    (True, True): "both",
    (True, False): "missed",
    (False, True): "false positive",
    (False, False): "absent",
}
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Rules:
    """How to score.

    Attributes:
        flare: As the FLARE22 challenge does: a structure that neither map has scores 1, one that only the prediction
            has counts as 0, NSD is 0 where Dice is below 0.2, and aorta, inferior vena cava and esophagus are
            compared from the truth's first slice to the one before its last.
        tolerance_mm: Of NSD for every structure; None: each structure's own, or 2 mm.
        tolerances_mm: By structure key, before all others.
    """

    flare: bool = False
    tolerance_mm: float | None = None
    tolerances_mm: Mapping[str, float] = field(default_factory=dict)

    def tolerance(self, key: str) -> float:
        """Tolerance in mm of the normalised surface Dice of a structure."""
        own = structure(key).nsd_tolerance_mm or DEFAULT_TOLERANCE_MM
        return self.tolerances_mm.get(key, own if self.tolerance_mm is None else self.tolerance_mm)


DEFAULT_RULES = Rules()


@dataclass(frozen=True)
class Score:
    """What one structure of one case scored.

    Attributes:
        case: Name of the case.
        structure: Its key.
        outcome: Who has the structure: "both", only the truth ("missed"), only the prediction ("false positive") or
            neither ("absent").
        counted: Whether Dice and NSD enter means: only where the truth has the structure, under FLARE's rules always.
        dice: Dice similarity coefficient, 0 to 1; None where neither map has the structure.
        nsd: Normalised surface Dice, 0 to 1, as Dice.
        hd95_mm: 95th percentile of the Hausdorff distance; None unless both maps have the structure.
        nsd_tolerance_mm: Tolerance that NSD was computed with.
        truth_ml: Volume in the truth.
        predicted_ml: Volume in the prediction.
        volume_error_ml: Predicted minus true volume.
        volume_error_percent: The same in percent of the true volume; None where that is zero.
    """

    case: str
    structure: str
    outcome: str
    counted: bool
    dice: float | None
    nsd: float | None
    hd95_mm: float | None
    nsd_tolerance_mm: float
    truth_ml: float
    predicted_ml: float
    volume_error_ml: float
    volume_error_percent: float | None


def dice_scores(predicted: np.ndarray, truth: np.ndarray, labels: int) -> dict[int, float]:
    """Dice similarity coefficient of every label that the truth has.

    A label that the truth lacks has none, found or not, as a mean over such zeros would measure how often patients
    lack an organ; `evaluate_case` tells false positives apart.

    Args:
        predicted: Label map of any shape.
        truth: Label map of the same shape.
        labels: Highest label value.

    Returns:
        2 |A and B| / (|A| + |B|) for the labels of the truth from 1 to `labels`.

    Raises:
        ValueError: The shapes differ.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"label maps have shapes {predicted.shape} and {truth.shape}; they must lie on one grid")
    counts = np.zeros((3, labels + 1), np.int64)
    for plane, true in zip(predicted, truth, strict=True):  # bincount makes eight bytes of every voxel
        for count, values in zip(counts, (plane, true, true[plane == true]), strict=True):
            count += np.bincount(values.reshape(-1), minlength=labels + 1)[: labels + 1]
    found, true, both = counts.tolist()
    return {label: 2 * both[label] / (found[label] + true[label]) for label in range(1, labels + 1) if true[label]}


def as_annotated(structures: Mapping[int, str], annotated: Container[str]) -> dict[int, str]:
    """What predicted label values count as where only some structures were annotated, as in training.

    A structure that was not counts as the smallest annotated one that it is part of: where the truth of a liver holds
    its tumours, a tumour is liver. One that is part of none stays what it is.

    Args:
        structures: Structure by label value.
        annotated: Keys of the structures that the truth tells apart.
    """
    return {
        value: next((whole for whole in ancestry(key) if whole in annotated), key) for value, key in structures.items()
    }


def evaluate_case(
    predicted: Volume,
    truth: Volume,
    structures: Mapping[int, str],
    predicted_structures: Mapping[int, str] | None = None,
    annotated: Iterable[str] | None = None,
    rules: Rules = DEFAULT_RULES,
    case: str = "",
) -> list[Score]:
    """Scores a label map structure by structure.

    Args:
        predicted: Label map on the truth's grid, in any order of axes.
        truth: Label map of whole numbers.
        structures: Structure by label value of the truth; several values may be parts of one structure.
        predicted_structures: The same of the prediction, see `as_annotated`; None: as the truth's.
        annotated: Keys of the structures to score, which the truth must annotate; None: all of `structures`.
        rules: How to score.
        case: For the scores.

    Raises:
        ValueError: The maps lie on different grids.
    """
    predicted = _on_grid(predicted, truth.grid)
    found = structures if predicted_structures is None else predicted_structures
    maps = (_Boxed(predicted.array, found), _Boxed(truth.array, structures))
    keys = dict.fromkeys(structures.values() if annotated is None else annotated)
    return [_score(case, key, maps, truth.grid, rules) for key in keys]


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """Counts, means and quantiles by structure, and the means of the structures' means.

    Dice, NSD and HD95 are those of the scores that count, volume errors those of the cases whose truth has the
    structure.
    """
    keys = dict.fromkeys(score.structure for score in scores)
    by_structure = {key: _summary([score for score in scores if score.structure == key]) for key in keys}
    means = {metric: [entry[metric]["mean"] for entry in by_structure.values() if entry[metric]] for metric in COMPARED}
    overall = {metric: float(np.mean(values)) if values else None for metric, values in means.items()}
    return {"structures": by_structure, "mean_of_structures": overall}


def compare(first: Sequence[Score], second: Sequence[Score]) -> dict[str, Any]:
    """Compares two models on the cases and structures that both have scores of; differences are first minus second.

    By metric: every structure over its cases, with p values corrected for the number of structures (Holm), and
    "overall" over the cases' means of their structures. A pair of which one has no value, as HD95 of a structure that
    one model missed, is left out and counted.
    """
    return {metric: _compare_metric(first, second, metric) for metric in COMPARED}


# One case


class _Boxed:
    """A label map with the box and the label values of every structure that has voxels."""

    def __init__(self, array: NDArray[Any], structures: Mapping[int, str]) -> None:
        if array.dtype.kind not in "iu":
            raise ValueError(f"a label map must be of whole numbers, got {array.dtype}")
        self.array = array
        self.boxes: dict[str, Box] = {}
        self.values: dict[str, list[int]] = {}
        boxes = dict(enumerate(ndimage.find_objects(array), start=1))
        for value, key in structures.items():
            if box := boxes.get(value):
                self.values.setdefault(key, []).append(value)
                self.boxes[key] = _union(self.boxes.get(key), box)

    def mask(self, key: str, box: Box) -> NDArray[np.bool_]:
        """Where the structure is inside a box."""
        inside = self.array[box]
        values = self.values.get(key, [])
        return inside == values[0] if len(values) == 1 else np.isin(inside, values)


def _on_grid(volume: Volume, grid: Grid) -> Volume:
    moved = volume.to_axes(grid.axes)
    if not moved.grid.is_close(grid):
        raise ValueError(
            f"prediction and truth lie on different grids: {_described(volume.grid)} against {_described(grid)}; "
            "resample the prediction (nearest neighbour) or segment the truth's own image"
        )
    return moved


def _described(grid: Grid) -> str:
    size, spacing = (" x ".join(f"{value:g}" for value in values) for values in (grid.shape[::-1], grid.spacing))
    origin = ", ".join(f"{value:.1f}" for value in grid.affine[:3, 3])
    return f"{size} voxels of {spacing} mm, {grid.axes}, from RAS ({origin})"


def _score(case: str, key: str, maps: tuple[_Boxed, _Boxed], grid: Grid, rules: Rules) -> Score:
    box = _union(*(labels.boxes.get(key) for labels in maps))
    predicted, truth = (labels.mask(key, box) for labels in maps)
    predicted_ml, truth_ml = (int(np.count_nonzero(mask)) * grid.voxel_ml for mask in (predicted, truth))
    tolerance, error = rules.tolerance(key), predicted_ml - truth_ml
    outcome = _OUTCOMES[truth_ml > 0, predicted_ml > 0]
    if rules.flare and key in _FLARE_Z_RANGE and outcome == "both":
        predicted, truth = _flare_slices(predicted, truth, grid)
    dice, nsd, hd95 = _agreement(predicted, truth, grid, tolerance)
    if rules.flare and outcome == "absent":
        dice, nsd = 1.0, 1.0
    elif rules.flare and dice is not None and dice < _FLARE_LOWEST_DICE:
        nsd = 0.0
    return Score(
        case=case,
        structure=key,
        outcome=outcome,
        counted=dice is not None and (rules.flare or truth_ml > 0),
        dice=dice,
        nsd=nsd,
        hd95_mm=hd95,
        nsd_tolerance_mm=tolerance,
        truth_ml=truth_ml,
        predicted_ml=predicted_ml,
        volume_error_ml=error,
        volume_error_percent=100 * error / truth_ml if truth_ml else None,
    )


def _agreement(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], grid: Grid, tolerance_mm: float
) -> tuple[float | None, float | None, float | None]:
    """Dice, NSD and HD95 of two masks of any size."""
    sizes = np.count_nonzero(predicted), np.count_nonzero(truth)
    if not any(sizes):
        return None, None, None
    if not all(sizes):
        return 0.0, 0.0, None
    distances = surface_distances(predicted, truth, grid.affine[:3, :3])
    dice = 2 * np.count_nonzero(predicted & truth) / sum(sizes)
    return dice, distances.dice(tolerance_mm), distances.hausdorff()


def _flare_slices(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], grid: Grid
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The slices that the challenge compares: its script takes [first:last], which leaves the last one out."""
    axis = next(2 - n for n, letter in enumerate(grid.axes) if letter in "SI")
    slices = np.flatnonzero(truth.any(axis=tuple({0, 1, 2} - {axis})))
    kept = tuple(slice(slices[0], slices[-1]) if n == axis else slice(None) for n in range(3))
    return predicted[kept], truth[kept]


def _union(*boxes: Box | None) -> Box:
    """The smallest box around all boxes; an empty one where there are none."""
    given = [box for box in boxes if box]
    k, j, i = (
        slice(min((part.start for part in parts), default=0), max((part.stop for part in parts), default=0))
        for parts in ([box[axis] for box in given] for axis in range(3))
    )
    return k, j, i


# Many cases


def _summary(scores: list[Score]) -> dict[str, Any]:
    outcomes = [score.outcome for score in scores]
    in_truth = [score for score in scores if score.truth_ml]
    false_ml = [score.predicted_ml for score in scores if score.outcome == "false positive"]
    counts: dict[str, Any] = {
        "cases": len(scores),
        "in_truth": len(in_truth),
        "missed": outcomes.count("missed"),
        "absent": outcomes.count("absent"),
        "false_positives": len(false_ml),
        "false_positive_ml": sum(false_ml),
        "nsd_tolerance_mm": scores[0].nsd_tolerance_mm,
    }
    counted = [score for score in scores if score.counted]
    chosen = {metric: counted if metric in COMPARED else in_truth for metric in METRICS}
    return counts | {metric: _distribution([getattr(score, metric) for score in chosen[metric]]) for metric in METRICS}


def _distribution(values: Iterable[float | None]) -> dict[str, Any] | None:
    numbers = np.array([value for value in values if value is not None])
    if not numbers.size:
        return None
    lowest, q1, median, q3, highest = np.percentile(numbers, (0, 25, 50, 75, 100)).tolist()
    return {
        "n": numbers.size,
        "mean": float(numbers.mean()),
        "sd": float(numbers.std(ddof=1)) if numbers.size > 1 else None,
        "median": median,
        "q1": q1,
        "q3": q3,
        "min": lowest,
        "max": highest,
    }


def _compare_metric(first: Sequence[Score], second: Sequence[Score], metric: str) -> dict[str, Any]:
    others = {(score.case, score.structure): score for score in second}
    found: dict[str, dict[str, float | None]] = {}
    for score in first:
        other = others.get((score.case, score.structure))
        if other and score.counted and other.counted:
            a, b = getattr(score, metric), getattr(other, metric)
            found.setdefault(score.structure, {})[score.case] = None if a is None or b is None else a - b
    structures = {key: _paired(differences.values()) for key, differences in found.items()}
    for key, p in _holm({key: entry["p"] for key, entry in structures.items() if entry["p"] is not None}).items():
        structures[key]["p_holm"] = p
    by_case: dict[str, list[float]] = {}
    for differences in found.values():
        for case, difference in differences.items():
            if difference is not None:
                by_case.setdefault(case, []).append(difference)
    return {"structures": structures, "overall": _paired(float(np.mean(values)) for values in by_case.values())}


def _paired(differences: Iterable[float | None]) -> dict[str, Any]:
    """Mean difference, its bootstrap interval and the p value of the signed-rank test, where the cases suffice."""
    from scipy import stats

    given = list(differences)
    d = np.round([value for value in given if value is not None], 9)  # the same mask twice differs by rounding at most
    return {
        "n": d.size,
        "left_out": len(given) - d.size,
        "higher": int((d > 0).sum()),
        "equal": int((d == 0).sum()),
        "lower": int((d < 0).sum()),
        "mean_difference": float(d.mean()) if d.size else None,
        "interval": _interval(d) if d.size >= FEWEST_PAIRS else None,
        "p": float(stats.wilcoxon(d[d != 0]).pvalue) if np.count_nonzero(d) >= FEWEST_PAIRS else None,
        "p_holm": None,
    }


def _interval(d: NDArray[np.float64]) -> list[float]:
    """95 % bootstrap interval of the mean (bias-corrected and accelerated)."""
    from scipy import stats

    if np.ptp(d) == 0:
        return [float(d[0])] * 2
    found = stats.bootstrap((d,), np.mean, n_resamples=_RESAMPLES, batch=1000, rng=_SEED).confidence_interval
    return [float(found.low), float(found.high)]


def _holm(p: Mapping[str, float]) -> dict[str, float]:
    """The p values corrected for their number, step down (Holm, 1979)."""
    corrected, highest = {}, 0.0
    for rank, key in enumerate(sorted(p, key=lambda key: p[key])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[key]))
        corrected[key] = highest
    return corrected
