from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from m4oe.labels import structure
from m4oe.training.phantom import MODALITIES, STRUCTURES, Phantom, make_phantom
from scipy.spatial import ConvexHull, Delaunay

SEEDS = range(5)


@cache
def phantom(seed: int, modality: str) -> Phantom:
    return make_phantom(seed, modality)


def positions(case: Phantom, key: str) -> np.ndarray:
    """RAS positions [n, 3] of a structure's voxels in mm."""
    voxels = np.argwhere(case.labels.array == STRUCTURES.index(key) + 1)[:, ::-1]
    affine = case.labels.grid.affine
    return voxels @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_same_seed_gives_the_same_bytes(modality):
    first, second = phantom(2, modality), make_phantom(2, modality)
    assert first.image.array.tobytes() == second.image.array.tobytes()
    assert first.labels.array.tobytes() == second.labels.array.tobytes()
    assert np.array_equal(first.image.grid.affine, second.image.grid.affine)


def test_another_seed_gives_another_torso():
    first, second = phantom(0, "ct"), phantom(1, "ct")
    assert first.image.array.shape != second.image.array.shape or (first.image.array != second.image.array).any()


def test_an_unknown_modality_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'pet'.*mr_t1ce"):
        make_phantom(0, "pet")


@pytest.mark.parametrize("modality", MODALITIES)
def test_image_and_labels_have_the_promised_types_on_one_grid(modality):
    case = phantom(2, modality)
    assert (case.image.array.dtype, case.labels.array.dtype) == (np.int16, np.uint8)
    assert case.image.grid.is_close(case.labels.grid)
    assert case.image.modality == ("CT" if modality == "ct" else "MR")
    assert case.labels.array.max() <= len(STRUCTURES)
    assert np.all(np.array(sorted(case.image.array.shape)) <= (120, 180, 200))


def test_every_structure_occurs_within_a_few_seeds():
    seen = {int(value) for seed in SEEDS for value in np.unique(phantom(seed, "ct").labels.array)}
    assert seen == set(range(len(STRUCTURES) + 1))


@pytest.mark.parametrize("modality", MODALITIES)
def test_paired_organs_lie_on_the_patients_own_sides(modality):
    case = phantom(2, modality)
    for right, left in (("kidney_right", "kidney_left"), ("liver", "spleen"), ("inferior_vena_cava", "aorta")):
        assert positions(case, right)[:, 0].mean() > positions(case, left)[:, 0].mean() + 10


def test_the_same_seed_is_the_same_body_in_every_modality():
    apart = [
        np.subtract(positions(phantom(2, m), "kidney_left").mean(0), positions(phantom(2, m), "kidney_right").mean(0))
        for m in MODALITIES
    ]
    assert np.allclose([np.linalg.norm(a) for a in apart], np.linalg.norm(apart[0]), atol=8)


def test_tumours_lie_within_the_convex_hull_of_the_liver():
    cases = [phantom(seed, "ct") for seed in SEEDS]
    cases = [case for case in cases if (case.labels.array == STRUCTURES.index("liver_tumor") + 1).any()]
    assert cases
    for case in cases:
        liver, tumor = positions(case, "liver"), positions(case, "liver_tumor")
        hull = Delaunay(liver[ConvexHull(liver).vertices])
        assert (hull.find_simplex(tumor) >= 0).mean() > 0.7  # one at the edge takes the hull's own voxels away


def test_most_volumes_lie_between_the_extremes_of_the_catalogue():
    inside = []
    for seed in SEEDS:
        case = phantom(seed, "ct")
        counts = np.bincount(case.labels.array.ravel(), minlength=17)[1:] * case.labels.grid.voxel_ml
        for key, volume in zip(STRUCTURES[:-1], counts[:-1], strict=True):
            organ = structure(key)
            if volume and organ.volume_ml and not organ.volume_depends_on_fov:
                low, _, high = organ.volume_ml
                inside.append(0.8 * low <= volume <= 1.2 * high)
    assert np.mean(inside) > 0.85  # the field of view cuts some organs


def test_ct_is_in_hounsfield_units():
    case = phantom(0, "ct")
    image, liver = case.image.array, case.image.array[case.labels.array == STRUCTURES.index("liver") + 1]
    assert image.min() >= -1024
    assert image.max() <= 3071
    assert np.percentile(image, 1) < -900
    assert 20 < np.median(liver) < 140


@pytest.mark.parametrize("modality", MODALITIES[1:])
def test_mr_is_not_negative_and_bright_in_the_body_alone(modality):
    case = phantom(2, modality)
    image = case.image.array
    assert image.min() >= 0
    assert np.percentile(image, 2) < 0.3 * np.median(image[case.labels.array == STRUCTURES.index("liver") + 1])


def test_fluid_is_bright_in_t2_and_dark_in_t1():
    def ratio(modality: str) -> float:
        seen = [phantom(seed, modality) for seed in (0, 2)]
        pairs = [
            [np.median(c.image.array[c.labels.array == STRUCTURES.index(k) + 1]) for k in ("gallbladder", "liver")]
            for c in seen
            if (c.labels.array == STRUCTURES.index("gallbladder") + 1).any()
        ]
        return float(np.median([bile / liver for bile, liver in pairs]))

    assert ratio("mr_t2") > 1.5
    assert ratio("mr_t1") < 0.8
