from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.geometry import Grid, Volume
from m4oe.resample import CanonicalVolume
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from m4oe.training.data import Case, Crops, Sampler, make_case, prefetched
from numpy.typing import NDArray

SPEC = ModelSpec(
    name="tiny",
    version="1",
    network=NetworkSpec(experts=2),
    structures=("liver", "spleen"),
    experts=(ExpertSpec("ct", "CT"), ExpertSpec("mr", "MR")),
    intensity={"CT": IntensityRule("window", 0, 100), "MR": IntensityRule("percentile", 1, 99)},
    pixel_mm=2.0,
    slice_mm=3.0,
)


def a_volume(array: NDArray[np.generic], spacing: float = 1.0) -> Volume:
    return Volume(array, Grid(array.shape, np.diag([-spacing, -spacing, 3.0, 1.0])), "ours")


def a_case(labels: NDArray[np.uint8], expert: int = 0, name: str = "") -> Case:
    """A case whose image is a tenth of the label."""
    slices_of = {int(n): np.flatnonzero((labels == n).any(axis=(1, 2))) for n in np.unique(labels) if n}
    image = (labels / 10).astype(np.float16)
    return Case(image, labels, np.ones(4, bool), expert, slices_of, name)


def blocks(slices: int = 4) -> NDArray[np.uint8]:
    labels = np.zeros((slices, 40, 48), np.uint8)
    labels[:, 8:25, 6:22], labels[:, 22:36, 28:44] = 1, 2
    return labels


def numbered(shape: tuple[int, int, int]) -> Case:
    """A case whose image says slice, row and column."""
    image = (np.indices(shape) * np.array([100, 1, 0.01])[:, None, None, None]).sum(0)
    return Case(image, None, np.ones(1, bool), 0, {})


def a_sampler(cases: list[Case], images: int = 2, crop: int = 32, seed: int = 0, **options: int) -> Sampler:
    return Sampler(cases, images, crop, 3, seed, **options)


def stream(cases: list[Case], images: int = 2, crop: int = 32, seed: int = 0) -> Iterator[Crops]:
    return map(a_sampler(cases, images, crop, seed).crops_at, count())


def test_a_case_is_what_prediction_sees() -> None:
    rng = np.random.default_rng(0)
    image = a_volume(rng.uniform(0, 100, (40, 12, 14)))
    labels = a_volume(rng.integers(0, 3, (40, 12, 14)).astype(np.uint8))
    for expert, modality in enumerate(("CT", "MR")):
        case = make_case(image, labels, SPEC.structures, SPEC, expert)
        canonical = CanonicalVolume(image, 2.0, 3.0, SPEC.intensity[modality])
        assert case.expert == expert and case.image_ZHW.dtype == np.float16 and case.name == "ours"
        assert np.array_equal(case.image_ZHW, canonical.slices(0, 40).half().numpy())
        assert case.annotated_K.all()
        assert np.array_equal(case.labels_ZHW, canonical.labels(labels))


def test_hu_that_were_stored_with_an_offset_are_seen_as_prediction_sees_them() -> None:
    rng = np.random.default_rng(0)
    hu = np.where(rng.random((6, 20, 20)) < 0.4, -1000, rng.normal(40, 20, (6, 20, 20))).astype(np.int16)
    plain, offset = (make_case(a_volume(hu + added, 2.0), None, (), SPEC, 0) for added in (0, 1024))
    np.testing.assert_array_equal(plain.image_ZHW, offset.image_ZHW)
    assert plain.image_ZHW.max() > 0.5


def test_a_case_knows_which_slices_show_a_structure() -> None:
    labels = np.zeros((5, 4, 4), np.uint8)
    labels[1:3, 1, 1], labels[3, 2:, 2:] = 2, 1
    case = make_case(a_volume(labels.astype(np.int16), 2.0), a_volume(labels, 2.0), SPEC.structures, SPEC, 0)
    assert {key: value.tolist() for key, value in case.slices_of.items()} == {1: [3], 2: [1, 2]}


def test_crops_say_which_classes_each_image_knows() -> None:
    labels = np.zeros((5, 4, 4), np.uint8)
    image = a_volume(labels.astype(np.int16), 2.0)
    case = make_case(image, a_volume(labels, 2.0), SPEC.structures[1:], SPEC, 0)
    assert next(stream([case])).annotated_BK.tolist() == 2 * [[True, False, True]]


def test_an_image_and_labels_of_two_grids_are_no_case() -> None:
    with pytest.raises(ValueError, match="another grid"):
        make_case(a_volume(np.zeros((5, 4, 4))), a_volume(np.zeros((4, 4, 4), np.uint8)), SPEC.structures, SPEC, 0)


@pytest.mark.parametrize("wrong", [1, 3, 258, -2, 2.5])
def test_labels_that_nobody_annotated_are_refused(wrong: float) -> None:
    labels = np.full((2, 4, 4), 2.0)
    labels[0, 0, 0] = wrong
    with pytest.raises(ValueError, match=rf"ours: the label map holds {wrong:g}; expected the annotated \[0, 2\]"):
        make_case(a_volume(np.zeros((2, 4, 4)), 2.0), a_volume(labels, 2.0), ("spleen",), SPEC, 0)


def test_annotated_structures_without_a_label_map_are_refused() -> None:
    with pytest.raises(ValueError, match="no label map"):
        make_case(a_volume(np.zeros((2, 4, 4))), None, ("spleen",), SPEC, 0)


def test_an_image_without_labels_is_a_case_of_which_nothing_is_known() -> None:
    case = make_case(a_volume(np.ones((3, 40, 40)), 2.0), None, (), SPEC, 1)
    crops = next(stream([case]))
    assert crops.annotated_BK.tolist() == 2 * [[True, False, False]]
    assert not crops.labels_BHW.any()


def test_crops_hold_as_many_images_of_each_expert_in_their_order() -> None:
    cases = [a_case(blocks(), expert) for expert in (2, 0, 2, 2, 1)]
    for crops in islice(stream(cases, images=3), 3):
        assert crops.experts_B.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert crops.images_BSHW.shape == (9, 3, 32, 32) and crops.images_BSHW.dtype == torch.float16
        assert crops.labels_BHW.shape == (9, 32, 32) and crops.labels_BHW.dtype == torch.uint8


def test_crops_name_their_cases() -> None:
    cases = [a_case(np.full((2, 32, 32), n, np.uint8), name=f"case {n}") for n in range(1, 4)]
    for crops in islice(stream(cases), 5):
        assert crops.names == tuple(f"case {image[0, 0]}" for image in crops.labels_BHW)


def test_all_cases_of_an_expert_come_up_as_often() -> None:
    cases = [a_case(blocks(), name=name) for name in "abc"]
    names = Counter(name for crops in islice(stream(cases, images=100), 6) for name in crops.names)
    assert set(names) == {"a", "b", "c"} and all(150 < count < 250 for count in names.values())


def test_seed_and_step_alone_decide_the_crops() -> None:
    cases = [a_case(np.random.default_rng(n).integers(0, 3, (9, 40, 48)).astype(np.uint8), n) for n in (0, 1)]
    walked = list(islice(stream(cases, seed=7), 4))
    jumped = a_sampler(cases, seed=7).crops_at(3)
    assert torch.equal(jumped.images_BSHW, walked[3].images_BSHW) and jumped.seeds == walked[3].seeds
    assert torch.equal(jumped.labels_BHW, walked[3].labels_BHW)
    assert not torch.equal(jumped.images_BSHW, walked[2].images_BSHW)
    assert not torch.equal(jumped.images_BSHW, a_sampler(cases, seed=8).crops_at(3).images_BSHW)


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_share_out_the_batch_that_one_would_have_had(world: int) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (9, 40, 48)).astype(np.uint8)
    cases = [a_case(labels, expert, f"{expert}") for expert in (0, 1)]
    whole = a_sampler(cases, images=4).crops_at(5)
    parts = [a_sampler(cases, images=4, rank=rank, world=world).crops_at(5) for rank in range(world)]
    assert all(part.experts_B.tolist() == sorted(4 // world * [0, 1]) for part in parts)
    rows = {seed: image for part in parts for seed, image in zip(part.seeds, part.images_BSHW, strict=True)}
    assert len(rows) == 8
    assert torch.equal(torch.stack([rows[seed] for seed in whole.seeds]), whole.images_BSHW)


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match="3 images per expert cannot be shared among 2"):
        a_sampler([a_case(blocks())], images=3, world=2)


def test_no_case_is_refused() -> None:
    with pytest.raises(ValueError, match="no case"):
        a_sampler([])


def test_neighbours_are_the_channels_as_in_prediction() -> None:
    seen = set()
    for crops in islice(map(a_sampler([numbered((4, 8, 8))], crop=8).crops_at, count()), 20):
        for image in crops.images_BSHW:
            below, slice_, above = (image[:, 0, 0] / 100).int().tolist()
            assert (below, above) == (max(slice_ - 1, 0), min(slice_ + 1, 3))
            seen.add(slice_)
    assert seen == {0, 1, 2, 3}


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(2, 24), st.integers(0, 20), st.integers(0, 99))
def test_crops_are_windows_of_their_image_and_zero_beyond(
    size: tuple[int, int], crop: int, margin: int, seed: int
) -> None:
    image = np.random.default_rng(seed).uniform(0.1, 1, (1, *size)).astype(np.float16)
    sampler = Sampler([Case(image, None, np.ones(1, bool), 0, {})], 1, crop, 1, seed, margin)
    found = sampler.crops_at(0).images_BSHW[0, 0].numpy()
    assert len(found) == crop + 2 * sampler.margin and sampler.margin <= margin
    padded = np.pad(image[0], crop + margin)
    windows = np.lib.stride_tricks.sliding_window_view(padded, found.shape)
    assert (windows == found).all(axis=(2, 3)).any()
    if sampler.margin < margin:  # then all of the image is in view
        assert np.count_nonzero(found) == image.size


def test_an_image_smaller_than_the_crop_lies_in_its_middle() -> None:
    small, large = (
        Case(np.ones((1, *size), np.float16), None, np.ones(1, bool), 0, {}) for size in ((10, 13), (50, 50))
    )
    drawn = [image[1] > 0 for crops in islice(stream([small, large], 8, 20), 2) for image in crops.images_BSHW]
    smaller = [image for image in drawn if not image.all()]
    assert 0 < len(smaller) < len(drawn)
    for image in smaller:
        assert image.nonzero().min(0).values.tolist() == [5, 4]
        assert image.nonzero().max(0).values.tolist() == [14, 16]


def test_small_structures_come_up_as_often_as_large_ones() -> None:
    labels = np.zeros((100, 40, 40), np.uint8)
    labels[:, 4:36, 4:18] = 1
    labels[50, 18:22, 20:24] = 2  # one slice in a hundred
    found = [2 in image for crops in islice(stream([a_case(labels)], images=10), 20) for image in crops.labels_BHW]
    assert 0.15 < np.mean(found) < 0.4


def test_a_crop_shows_the_structure_that_it_was_drawn_for() -> None:
    labels = np.zeros((1, 200, 200), np.uint8)
    labels[0, 3, 190], labels[0, 100, 100] = 1, 2
    found = [image.max() > 0 for crops in islice(stream([a_case(labels)], 10), 10) for image in crops.labels_BHW]
    assert 0.4 < np.mean(found) < 0.65  # half of them are drawn for one


def test_a_case_that_cannot_be_read_is_named() -> None:
    broken = replace(a_case(blocks(), name="case 7"), labels_ZHW=blocks()[:0])
    with pytest.raises(RuntimeError, match="case 7 cannot be read"):
        a_sampler([broken]).crops_at(0)


def test_what_is_fetched_ahead_comes_in_order() -> None:
    assert list(prefetched(lambda step: 2 * step, range(3, 50))) == list(range(6, 100, 2))


def test_fetching_goes_on_while_the_last_is_in_use_but_not_further_than_asked() -> None:
    begun: list[int] = []
    third = threading.Event()

    def make(step: int) -> int:
        begun.append(step)
        if step == 2:
            third.set()
        return step

    steps = prefetched(make, count(), ahead=2)
    assert next(steps) == 0
    assert third.wait(10)
    assert begun == [0, 1, 2]
    steps.close()


def test_an_error_comes_when_its_step_is_due() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise RuntimeError("case 5 cannot be read")
        return step

    steps = prefetched(make, count())
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(RuntimeError, match="case 5"):
        next(steps)


def test_closing_ends_the_thread() -> None:
    steps = prefetched(lambda step: step, count())
    next(steps)
    assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    steps.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
