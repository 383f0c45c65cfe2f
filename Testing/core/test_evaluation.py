from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import surface_distance as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.evaluation import DEFAULT_RULES, Rules, Score, as_annotated, compare, dice_scores, evaluate_case, summarise
from m4oe.files import read_volume
from m4oe.geometry import Grid, Volume
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata

LABELS = st.integers(0, 4)
KEYS = {1: "liver", 2: "aorta", 3: "liver_tumor"}
Array = NDArray[np.uint8]


def a_volume(array: NDArray[np.integer], spacing: tuple[float, float, float] = (1, 1, 1)) -> Volume:
    """With a spacing along (i, j, k), in LPS."""
    i, j, k = spacing
    return Volume(array, Grid(array.shape, np.diag([-i, -j, k, 1])))


def a_box(label: int, *ends: tuple[int, int], onto: Array | None = None) -> Array:
    """A box of a label in a volume of 12 x 12 x 12 voxels."""
    array = np.zeros((12, 12, 12), np.uint8) if onto is None else onto
    array[tuple(slice(*end) for end in ends)] = label
    return array


def blobs(seed: int) -> Array:
    """A map of three labels of which some may lack."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.standard_normal((4, 8, 9, 10)), (0, 1, 1, 1))
    field += rng.uniform(-0.2, 0.2, (4, 1, 1, 1))
    return field.argmax(0).astype(np.uint8)


def the_score(predicted: Array, truth: Array, key: str = "liver", rules: Rules = DEFAULT_RULES) -> Score:
    scores = evaluate_case(a_volume(predicted), a_volume(truth), KEYS, rules=rules)
    return next(score for score in scores if score.structure == key)


def a_score(case: str, dice: float, structure: str = "liver", hd95: float | None = 1.0) -> Score:
    return Score(case, structure, "both", True, dice, dice, hd95, 2.0, 10.0, 10.0, 0.0, 0.0)


def test_a_part_that_nobody_annotated_counts_as_its_whole() -> None:
    found = as_annotated({1: "liver", 2: "aorta", 3: "liver_tumor"}, {"liver"})
    assert found == {1: "liver", 2: "aorta", 3: "liver"}
    assert as_annotated(KEYS, KEYS.values()) == KEYS
    truth = a_box(1, (2, 9), (2, 9), (2, 9))
    predicted = a_box(3, (4, 6), (4, 6), (4, 6), onto=truth.copy())
    (score,) = evaluate_case(a_volume(predicted), a_volume(truth), KEYS, found, ["liver"])
    assert (score.dice, score.nsd, score.hd95_mm, score.volume_error_ml) == (1, 1, 0, 0)


# ---- Dice alone


def voxels(array: np.ndarray, label: int) -> set[tuple[int, ...]]:
    return {index for index, value in np.ndenumerate(array) if value == label}


@given(st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=40), st.sampled_from([np.uint8, np.uint16, np.int64]))
def test_dice_is_that_of_the_sets_of_voxels(pairs: list[tuple[int, int]], kind: type[np.integer]) -> None:
    predicted, truth = (np.array(column, kind)[None] for column in zip(*pairs, strict=True))
    scores = dice_scores(predicted, truth, 4)
    for label in range(1, 5):
        a, b = voxels(predicted, label), voxels(truth, label)
        assert (label in scores) == bool(b)
        if b:
            assert scores[label] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))


def test_equal_maps_have_dice_one_and_disjoint_ones_zero() -> None:
    a = np.array([[0, 1, 1], [2, 0, 0]], np.uint8)
    assert dice_scores(a, a, 3) == {1: 1.0, 2: 1.0}
    assert dice_scores(a, np.roll(a, 1, axis=0), 3) == {1: 0.0, 2: 0.0}


def test_a_label_that_the_truth_lacks_has_no_dice() -> None:
    assert dice_scores(np.array([1, 2, 2], np.uint8), np.array([1, 0, 0], np.uint8), 2) == {1: 1.0}


def test_labels_above_the_highest_are_left_out() -> None:
    a = np.array([1, 7, 7], np.uint8)
    assert dice_scores(a, a, 2) == {1: 1.0}


def test_views_count_like_their_copies() -> None:
    a = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    b = np.random.default_rng(1).integers(0, 3, (6, 5, 4)).astype(np.uint8).transpose(2, 1, 0)[::-1]
    assert dice_scores(a, b, 2) == dice_scores(a, b.copy(), 2)


def test_maps_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        dice_scores(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 1)


# ---- a case


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the reference calls old names of scipy's functions
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.tuples(*[st.floats(0.5, 5)] * 3))
def test_scores_are_those_of_whole_masks_and_the_reference(seed: int, spacing: tuple[float, float, float]) -> None:
    predicted, truth = blobs(seed), blobs(seed + 1)
    scores = evaluate_case(a_volume(predicted, spacing), a_volume(truth, spacing), KEYS, case="x")
    assert [score.structure for score in scores] == ["liver", "aorta", "liver_tumor"]
    for (label, _), tolerance, score in zip(KEYS.items(), (5, 2, 2), scores, strict=True):
        a, b = predicted == label, truth == label
        assert (score.case, score.nsd_tolerance_mm) == ("x", tolerance)
        assert score.predicted_ml == pytest.approx(a.sum() * np.prod(spacing) / 1000)
        assert score.truth_ml == pytest.approx(b.sum() * np.prod(spacing) / 1000)
        if a.any() and b.any():
            distances = reference.compute_surface_distances(b, a, spacing[::-1])
            nsd = reference.compute_surface_dice_at_tolerance(distances, tolerance + 1e-4)
            assert score.dice == pytest.approx(reference.compute_dice_coefficient(b, a))
            assert score.nsd == pytest.approx(nsd)
            assert score.hd95_mm == pytest.approx(reference.compute_robust_hausdorff(distances, 95))


def test_volume_errors_are_predicted_minus_true() -> None:
    truth = a_box(1, (2, 6), (2, 7), (2, 12))
    found = the_score(a_box(1, (2, 6), (2, 7), (2, 10)), truth)
    assert (found.truth_ml, found.predicted_ml) == pytest.approx((0.2, 0.16))
    assert (found.volume_error_ml, found.volume_error_percent) == pytest.approx((-0.04, -20))


def test_what_both_lack_has_no_score() -> None:
    found = the_score(a_box(1, (0, 3), (0, 3), (0, 3)), a_box(1, (0, 3), (0, 3), (0, 3)), "aorta")
    assert (found.outcome, found.counted) == ("absent", False)
    assert (found.dice, found.nsd, found.hd95_mm, found.volume_error_percent) == (None,) * 4
    assert (found.truth_ml, found.predicted_ml, found.volume_error_ml) == (0, 0, 0)


def test_what_only_the_prediction_has_is_a_false_positive_that_no_mean_counts() -> None:
    found = the_score(a_box(1, (0, 5), (0, 5), (0, 4)), np.zeros((12, 12, 12), np.uint8))
    assert (found.outcome, found.counted) == ("false positive", False)
    assert (found.dice, found.nsd, found.hd95_mm, found.volume_error_percent) == (0, 0, None, None)
    assert found.predicted_ml == found.volume_error_ml == pytest.approx(0.1)


def test_what_only_the_truth_has_is_missed_and_counts_as_zero_without_a_distance() -> None:
    found = the_score(np.zeros((12, 12, 12), np.uint8), a_box(1, (0, 5), (0, 5), (0, 4)))
    assert (found.outcome, found.counted) == ("missed", True)
    assert (found.dice, found.nsd, found.hd95_mm, found.volume_error_percent) == (0, 0, None, -100)


def test_maps_in_another_order_of_axes_score_the_same() -> None:
    spacing = (0.7, 1.1, 3.0)
    predicted, truth = a_volume(blobs(1), spacing), a_volume(blobs(2), spacing)
    assert evaluate_case(predicted.to_axes("SAR"), truth, KEYS) == evaluate_case(predicted, truth, KEYS)


def test_maps_on_different_grids_are_refused_with_both_grids() -> None:
    with pytest.raises(ValueError, match="different grids: 10 x 9 x 8 voxels of 1 x 1 x 2 mm, LPS.* of 1 x 1 x 1 mm"):
        evaluate_case(a_volume(blobs(1), (1, 1, 2)), a_volume(blobs(1)), KEYS)


def test_an_image_is_no_label_map() -> None:
    with pytest.raises(ValueError, match="whole numbers, got float32"):
        evaluate_case(a_volume(blobs(1).astype(np.float32)), a_volume(blobs(1)), KEYS)


def test_a_prediction_without_structures_misses_them_all() -> None:
    scores = evaluate_case(a_volume(blobs(3)), a_volume(blobs(3)), KEYS, {})
    assert {score.outcome for score in scores} == {"missed"}


def test_several_values_may_be_parts_of_one_structure() -> None:
    truth = a_box(3, (4, 6), (4, 6), (4, 6), onto=a_box(1, (2, 8), (2, 8), (2, 8)))
    whole = evaluate_case(
        a_volume((truth > 0).astype(np.uint8)), a_volume(truth), {1: "liver", 3: "liver"}, {1: "liver"}
    )
    assert [(score.structure, score.dice) for score in whole] == [("liver", 1.0)]


def test_the_parts_of_a_structure_may_lie_apart() -> None:
    truth = a_box(3, (9, 11), (9, 11), (9, 11), onto=a_box(1, (0, 4), (0, 4), (0, 4)))
    [score] = evaluate_case(a_volume(truth), a_volume(truth), {1: "liver", 3: "liver"})
    assert (score.dice, score.truth_ml) == (1.0, pytest.approx((64 + 8) / 1000))


def test_each_map_may_have_label_values_of_its_own() -> None:
    scores = evaluate_case(
        a_volume(blobs(3) * 50), a_volume(blobs(3)), KEYS, {50: "liver", 100: "aorta", 150: "liver_tumor"}
    )
    assert [score.dice for score in scores] == [1.0, 1.0, 1.0]


def test_what_the_truth_does_not_annotate_is_left_out() -> None:
    scores = evaluate_case(a_volume(blobs(3)), a_volume(blobs(4)), KEYS, annotated=["liver_tumor", "spleen"])
    assert [(score.structure, score.outcome) for score in scores] == [("liver_tumor", "both"), ("spleen", "absent")]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Rules(), [5, 2, 2]),
        (Rules(tolerance_mm=3), [3, 3, 3]),
        (Rules(tolerance_mm=0, tolerances_mm={"aorta": 1.5}), [0, 1.5, 0]),
    ],
)
def test_tolerances_are_the_given_ones_or_the_structures_own(rules: Rules, expected: list[float]) -> None:
    scores = evaluate_case(a_volume(blobs(3)), a_volume(blobs(4)), KEYS, rules=rules)
    assert [score.nsd_tolerance_mm for score in scores] == expected


# ---- the rules of FLARE22


def flare_scores(predicted: Array, truth: Array, label: int, tolerance: float) -> tuple[float | None, float | None]:
    """The challenge's script, in its own words, on arrays [z, y, x]."""
    a, b = predicted == label, truth == label
    if not a.any() or not b.any():
        return (1, 1) if a.any() == b.any() else (0, 0)
    if KEYS[label] == "aorta":
        z = np.where(b)[0]
        if z.min() == z.max():
            return None, None  # the script divides zero by zero
        a, b = a[z.min() : z.max()], b[z.min() : z.max()]
    dice = reference.compute_dice_coefficient(b, a)
    distances = reference.compute_surface_distances(b, a, (2.5, 1, 1))
    return dice, 0 if dice < 0.2 else reference.compute_surface_dice_at_tolerance(distances, tolerance + 1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["LPS", "LAS", "RPI"]))
def test_flare_scores_are_those_of_the_challenges_script(seed: int, axes: str) -> None:
    predicted = np.where(np.random.default_rng(seed).random() < 0.5, blobs(seed), blobs(seed) % 2).astype(np.uint8)
    truth = np.where(np.random.default_rng(seed).random((8, 9, 10)) < 0.3, predicted, blobs(seed + 1)).astype(np.uint8)
    maps = (Volume(array, Grid(array.shape, np.diag([1, 1, 2.5, 1])).to_axes(axes)) for array in (predicted, truth))
    scores = evaluate_case(*maps, KEYS, rules=Rules(flare=True))
    for label, score in zip(KEYS, scores, strict=True):
        dice, nsd = flare_scores(predicted, truth, label, score.nsd_tolerance_mm)
        assert score.counted == (dice is not None)
        assert dice is nsd is score.dice is score.nsd or (score.dice, score.nsd) == pytest.approx((dice, nsd))


def test_flare_leaves_out_the_last_slice_and_all_beyond_the_truth() -> None:
    truth = a_box(2, (3, 7), (2, 6), (2, 6))
    predicted = a_box(2, (0, 12), (2, 6), (2, 6))
    predicted[6] = 0
    found = the_score(predicted, truth, "aorta", Rules(flare=True))
    assert (found.dice, found.nsd, found.hd95_mm) == (1.0, 1.0, 0.0)
    assert found.truth_ml == pytest.approx(4 * 16 / 1000) and found.predicted_ml == pytest.approx(11 * 16 / 1000)


def test_flare_has_no_score_where_its_slices_hold_nothing() -> None:
    one_slice = a_box(2, (3, 4), (2, 6), (2, 6))
    found = the_score(one_slice, one_slice, "aorta", Rules(flare=True))
    assert (found.outcome, found.counted, found.dice, found.nsd) == ("both", False, None, None)


# ---- summaries


def test_means_are_of_the_cases_whose_truth_has_the_structure() -> None:
    box, nothing = a_box(1, (2, 6), (2, 6), (2, 6)), np.zeros((12, 12, 12), np.uint8)
    half = a_box(1, (2, 4), (2, 6), (2, 6))
    pairs = {
        "hit": (box, box),
        "half": (half, box),
        "miss": (nothing, box),
        "false": (half, nothing),
        "none": (nothing,) * 2,
    }
    scores = [
        score
        for case, (predicted, truth) in pairs.items()
        for score in evaluate_case(a_volume(predicted), a_volume(truth), {1: "liver"}, case=case)
    ]
    liver = summarise(scores)["structures"]["liver"]
    counts = ("cases", "in_truth", "missed", "absent", "false_positives")
    assert [liver[name] for name in counts] == [5, 3, 1, 1, 1]
    assert liver["false_positive_ml"] == pytest.approx(0.032)
    assert liver["dice"] == pytest.approx(
        {"n": 3, "mean": 5 / 9, "sd": np.std([1, 2 / 3, 0], ddof=1), "median": 2 / 3, "q1": 1 / 3, "q3": 5 / 6}
        | {"min": 0, "max": 1}
    )
    assert liver["hd95_mm"]["n"] == 2 and liver["volume_error_ml"]["n"] == 3
    assert liver["volume_error_percent"]["mean"] == pytest.approx((0 - 50 - 100) / 3)
    flare = [
        score
        for predicted, truth in pairs.values()
        for score in evaluate_case(a_volume(predicted), a_volume(truth), {1: "liver"}, rules=Rules(flare=True))
    ]
    liver = summarise(flare)["structures"]["liver"]
    assert liver["dice"]["mean"] == pytest.approx((1 + 2 / 3 + 0 + 0 + 1) / 5) and liver["volume_error_ml"]["n"] == 3


def test_structures_weigh_the_same_in_their_mean() -> None:
    scores = [a_score("a", 1.0), a_score("b", 1.0), a_score("a", 0.5, "spleen", None)]
    summary = summarise(scores)
    assert summary["mean_of_structures"] == {"dice": 0.75, "nsd": 0.75, "hd95_mm": 1.0}
    assert summary["structures"]["spleen"]["hd95_mm"] is None and summary["structures"]["spleen"]["dice"]["sd"] is None


def test_nothing_has_a_summary() -> None:
    assert summarise([])["mean_of_structures"] == {"dice": None, "nsd": None, "hd95_mm": None}


# ---- two models


def two_models(differences: list[float], structure: str = "liver") -> tuple[list[Score], list[Score]]:
    first = [a_score(f"case {n}", 0.5 + d, structure) for n, d in enumerate(differences)]
    return first, [a_score(f"case {n}", 0.5, structure) for n in range(len(differences))]


def signed_rank_p(differences: list[float]) -> float:
    """Two-sided, from all choices of signs."""
    d = np.array([value for value in differences if value])
    ranks = rankdata(np.round(np.abs(d), 9))
    sums = [abs(np.dot(ranks, signs)) for signs in product((-1, 1), repeat=len(d))]
    return float(np.mean(np.array(sums) >= abs(np.dot(ranks, np.sign(d))) - 1e-9))


@pytest.mark.parametrize(
    "differences",
    [
        [0.1, 0.2, 0.15, -0.03, 0.3, 0.07],
        [0.1, 0.1, 0.1, -0.1, 0.2, 0.2, 0.05],  # ties
        [0.1, 0, 0.15, -0.03, 0, 0.3, 0.07, 0.01],  # cases without difference
        [0, 0, *(0.01 * n * (-1) ** (n % 4 == 0) for n in range(1, 15))],  # enough for a normal approximation
    ],
)
def test_p_values_are_those_of_all_signs(differences: list[float]) -> None:
    found = compare(*two_models(differences))["dice"]["structures"]["liver"]
    assert found["p"] == pytest.approx(signed_rank_p(differences))
    assert found["p_holm"] == found["p"]  # a single structure
    assert found["mean_difference"] == pytest.approx(np.mean(differences))
    tally = [sum(np.sign(d) == sign for d in differences) for sign in (1, 0, -1)]
    assert [found["higher"], found["equal"], found["lower"]] == tally
    assert found["interval"][0] < found["mean_difference"] < found["interval"][1]


def test_the_bootstrap_interval_is_near_that_of_students_t_and_always_the_same() -> None:
    differences = np.random.default_rng(0).normal(0.02, 0.05, 60).tolist()
    [low, high] = compare(*two_models(differences))["nsd"]["structures"]["liver"]["interval"]
    reach = 2.0 * np.std(differences, ddof=1) / np.sqrt(60)
    assert (low, high) == pytest.approx((np.mean(differences) - reach, np.mean(differences) + reach), abs=0.2 * reach)
    assert compare(*two_models(differences))["nsd"]["structures"]["liver"]["interval"] == [low, high]


@pytest.mark.parametrize("differences", [[], [0.1], [0.1, 0.2, 0.3, 0.4, 0.5]])
def test_few_cases_have_neither_p_value_nor_interval(differences: list[float]) -> None:
    found = compare(*two_models(differences))["dice"]["overall"]
    assert (found["n"], found["p"], found["interval"]) == (len(differences), None, None)


def test_models_that_never_differ_have_no_p_value() -> None:
    found = compare(*two_models([0.0] * 8))["dice"]["structures"]["liver"]
    assert (found["p"], found["interval"], found["equal"]) == (None, [0.0, 0.0], 8)


def test_p_values_are_corrected_for_the_number_of_structures() -> None:
    runs = {
        "liver": [0.1, 0.2, 0.3, 0.4, 0.5, 0.11, 0.21],  # 2 / 128
        "spleen": [0.1, 0.2, 0.3, 0.4, 0.5, 0.45],  # 2 / 64
        "aorta": [0.1, -0.2, 0.3, -0.4, 0.5, -0.45],
        "stomach": [0.1, 0.2],  # too few, and no test to correct for
    }
    first, second = ([score for key in runs for score in two_models(runs[key], key)[n]] for n in (0, 1))
    found = compare(first, second)["dice"]["structures"]
    p = {key: found[key]["p"] for key in runs}
    assert p["liver"] == pytest.approx(2 / 128) and p["spleen"] == pytest.approx(2 / 64)
    expected = [3 * p["liver"], 2 * p["spleen"], max(2 * p["spleen"], p["aorta"]), None]
    assert [found[key]["p_holm"] for key in runs] == [None if e is None else pytest.approx(e) for e in expected]


def test_all_structures_are_compared_by_the_means_of_cases() -> None:
    livers, spleens = two_models([0.1] * 6), two_models([0.3] * 3, "spleen")
    found = compare(livers[0] + spleens[0], livers[1] + spleens[1])["dice"]["overall"]
    assert found["n"] == 6 and found["mean_difference"] == pytest.approx((3 * 0.2 + 3 * 0.1) / 6)


def test_pairs_without_a_value_and_cases_of_one_model_are_left_out() -> None:
    first = [a_score("a", 0.5), a_score("b", 0.5, hd95=None), a_score("only first", 0.5)]
    second = [a_score("b", 0.4), a_score("a", 0.4), a_score("only second", 0.5)]
    found = compare(first, second)
    assert [found["hd95_mm"]["structures"]["liver"][name] for name in ("n", "left_out")] == [1, 1]
    assert [found["dice"]["structures"]["liver"][name] for name in ("n", "left_out")] == [2, 0]


# ---- real masks


def test_a_real_truth_against_itself_is_perfect_and_shifted_is_as_far_as_the_shift(shared_data: Path) -> None:
    truth = read_volume(shared_data / "ct" / "ts_ct_3mm_label_flare13.nii.gz")
    keys = {1: "liver", 5: "aorta", 10: "esophagus", 13: "kidney_left"}
    same = evaluate_case(truth, truth, keys)
    assert [(score.dice, score.nsd, score.hd95_mm) for score in same if score.structure != "esophagus"] == [
        (1, 1, 0)
    ] * 3
    shifted = evaluate_case(Volume(np.roll(truth.array, 1, axis=2), truth.grid), truth, keys)
    liver, aorta, esophagus, kidney = shifted
    assert esophagus.outcome == "absent"
    for score in (liver, aorta, kidney):
        assert score.hd95_mm == pytest.approx(3, abs=1e-3)
    assert (liver.nsd, kidney.nsd) == (1, 1) and 0.2 < (aorta.nsd or 0) < 0.9  # 5, 3 and 2 mm
