from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from m4oe.files import write_volume
from m4oe.geometry import Grid, Volume
from m4oe.preview import write_synthesis
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from m4oe.training import synthesis
from m4oe.training.atlas import Atlas, load_atlas, make_atlas, negative_atlas, tissues_of
from m4oe.training.body import CODES, TISSUES
from m4oe.training.cases import CaseFiles
from m4oe.training.data import Case, Sampler
from m4oe.training.phantom import MODALITIES, tissue_signal
from m4oe.training.synthesis import Synthesiser
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

STRUCTURES = ("liver", "urinary_bladder", "spleen", "liver_tumor")
SPEC = ModelSpec(
    name="tiny",
    version="1",
    network=NetworkSpec(experts=4),
    structures=STRUCTURES,
    experts=tuple(ExpertSpec(name, "CT" if name == "ct" else "MR") for name in MODALITIES),
    intensity={"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 0.5, 99.5)},
    pixel_mm=5.0,
    slice_mm=5.0,
)
SHAPE = (12, 44, 44)
GRID = Grid(SHAPE, np.diag([-5.0, -5.0, 5.0, 1.0]))
MEANINGS = {1: "liver", 2: "urinary_bladder", 3: "vertebrae_l3", 4: "colon"}
ANNOTATED = ("liver", "urinary_bladder", "liver_tumor")
CT, T1, T2, T1CE = range(4)


def a_person() -> tuple[Volume, Volume]:
    """A CT of a body of fat around muscle, with a liver, a bladder, a bone, and a colon that holds gas and faeces."""
    radius = from_the_middle()
    labels = np.zeros(SHAPE, np.uint8)
    labels[:, 12:24, 10:20], labels[:, 12:20, 24:32] = 1, 2
    labels[:, 28:34, 19:25], labels[:, 22:27, 24:32] = 3, 4
    hu = np.where(radius > 20, -1000.0, np.where(radius > 15, -100, 55))
    for label, value in ((1, 60), (2, 5), (3, 500), (4, -900)):
        hu[labels == label] = value
    hu[:, 25:27, 24:32] = 0
    return Volume(hu.astype(np.int16), GRID, "person", "CT"), Volume(labels, GRID)


def from_the_middle() -> np.ndarray:
    """Voxels from the axis of the body."""
    return np.hypot(*(np.indices(SHAPE)[1:] - SHAPE[1] // 2))


@cache
def an_atlas() -> Atlas:
    image, labels = a_person()
    return make_atlas(labels, MEANINGS, ANNOTATED, SPEC, image, "person")


def a_synthesiser(*atlases: Atlas, seed: int = 0, images: int = 2, **options: object) -> Synthesiser:
    return Synthesiser(SPEC, atlases or (an_atlas(),), images, 40, seed, **options)  # type: ignore[arg-type]


def tissues_at(atlas: Atlas, mask: np.ndarray) -> set[str]:
    """The tissues of more than a tenth of these voxels."""
    counts = np.bincount(atlas.classes_ZHW[mask], minlength=len(atlas.tissues))
    return {name for name, count in zip(atlas.tissues, counts, strict=True) if count > 0.1 * mask.sum()}


# ---- atlases


def test_unlabelled_tissue_of_a_ct_is_split_by_its_hu() -> None:
    image, labels = a_person()
    atlas = an_atlas()
    fat = (image.array == -100) & (labels.array == 0) & (from_the_middle() < 19)
    assert tissues_at(atlas, fat) == {"visceral_fat"}
    assert tissues_at(atlas, (image.array == 55) & (labels.array == 0)) <= {"muscle", "bowel_wall"}
    assert tissues_at(atlas, image.array == -1000) == {"air"}


def test_a_structure_with_contents_is_split_and_a_bone_has_marrow() -> None:
    _, labels = a_person()
    atlas = an_atlas()
    assert {"gas", "faeces"} <= tissues_at(atlas, labels.array == 4)
    assert tissues_at(atlas, labels.array == 3) == {"bone", "marrow"}


def test_the_canal_of_the_spine_holds_the_cord_and_fluid_around_it() -> None:
    image, labels = a_person()
    labels.array[:, 28:34, 19:25] = 5
    atlas = make_atlas(labels, {**MEANINGS, 5: "spinal_cord"}, ANNOTATED, SPEC, image)
    assert tissues_at(atlas, labels.array == 5) == {"cord", "csf"}
    labels.array[:, 29:33, 20:24] = 0
    assert tissues_at(atlas, labels.array == 5) == {"csf"}


def test_only_annotated_structures_keep_their_labels() -> None:
    atlas = an_atlas()
    _, labels = a_person()
    shown = atlas.labels_C[atlas.classes_ZHW]
    assert np.array_equal(shown, np.where(labels.array <= 2, labels.array, 0))
    assert atlas.annotated_K.tolist() == [True, True, True, False, True]
    assert list(atlas.slices_of) == [1, 2]


def test_a_label_map_without_an_image_gets_fat_below_the_skin_and_a_mixture_within() -> None:
    image, labels = a_person()
    labels.array[(labels.array == 0) & (image.array > -1000)] = 5
    atlas = make_atlas(labels, {**MEANINGS, 5: "body"}, ANNOTATED, SPEC)
    assert atlas.texture_ZHW is None
    assert len(tissues_at(atlas, labels.array == 5)) >= 2
    edge = (from_the_middle() > 19) & (labels.array == 5)
    assert tissues_at(atlas, edge) == {"visceral_fat"}


def test_a_case_whose_image_is_its_label_map_is_drawn_from_that_alone(
    tmp_path: Path, saved: Callable[..., Path]
) -> None:
    path = saved(tmp_path / "a.nii.gz", np.tile(np.arange(4).reshape(1, 4, 1), (4, 1, 4)), spacing=(5.0, 5.0, 5.0))
    atlas = load_atlas(CaseFiles("a", "a", path, path, labels={1: "liver", 2: "spleen", 3: "fat"}), SPEC)
    assert atlas.texture_ZHW is None and {"liver", "spleen", "fat"} <= set(atlas.tissues)


def a_chest(*, lungs: bool, dome: bool) -> Volume:
    """A body with bones at its back, the liver up to the last slice or with a dome, and lungs around that or not."""
    labels = np.where(np.broadcast_to(from_the_middle() < 20, SHAPE), 9, 0).astype(np.uint8)
    labels[:, 31:35, 20:24] = 3
    for plane, size in enumerate((9, 9, 9, 9, 9, 9, 9, 9, 7, 5, 2, 0) if dome else 12 * (9,)):
        if lungs and size < 9:
            labels[plane, 12:30, 8:36] = 8
        labels[plane, 20 - size : 20 + size, 17 - size : 17 + size] = 1
    return Volume(labels, GRID)


CHEST = {1: "liver", 3: "vertebrae_t10", 8: "lung_right", 9: "muscle"}


def test_a_liver_that_was_cut_off_gets_a_dome_between_lungs_below_a_heart() -> None:
    labels = a_chest(lungs=False, dome=False)
    atlas = make_atlas(labels, CHEST, ANNOTATED, SPEC)
    liver = atlas.labels_C[atlas.classes_ZHW] == 1
    areas = liver.sum((1, 2))
    assert np.array_equal(liver[:12], labels.array == 1)
    assert (np.diff(areas[11:]) <= 0).all() and areas[-1] == 0 and 0 < areas[14] < areas[11]
    above = {atlas.tissues[code] for code in np.unique(atlas.classes_ZHW[-1])}
    assert {"lung", "myocardium", "blood", "bone", "muscle", "air"} <= above
    last = np.flatnonzero(areas)[-1]
    around = atlas.classes_ZHW[last][ndimage.binary_dilation(liver[last]) & ~liver[last]]
    assert {atlas.tissues[code] for code in around} <= {"lung", "myocardium", "blood"}
    assert max(atlas.slices_of[1]) == last


def test_a_dome_with_lungs_stays_and_one_without_is_made_anew() -> None:
    shown = a_chest(lungs=True, dome=True)
    liver = make_atlas(shown, CHEST, ANNOTATED, SPEC)
    assert np.array_equal(liver.labels_C[liver.classes_ZHW], shown.array == 1)
    bare = a_chest(lungs=False, dome=True)
    atlas = make_atlas(bare, CHEST, ANNOTATED, SPEC)
    assert np.array_equal(atlas.labels_C[atlas.classes_ZHW][:8], bare.array[:8] == 1)
    assert "lung" in atlas.tissues and (np.array(atlas.tissues)[atlas.classes_ZHW[9]] == "lung").any()


@pytest.mark.parametrize("annotated", [("liver", "lung_right"), ("liver", "vertebrae_t10")])
def test_nothing_is_made_up_of_what_the_model_is_to_learn(annotated: tuple[str, ...]) -> None:
    spec = replace(SPEC, structures=("liver", "lung_right", "vertebrae_t10"))
    labels = a_chest(lungs=False, dome=False)
    atlas = make_atlas(labels, CHEST, annotated, spec)
    assert len(atlas.classes_ZHW) == len(labels.array) and "lung" not in atlas.tissues


def test_an_atlas_of_nothing_is_refused() -> None:
    _, labels = a_person()
    with pytest.raises(ValueError, match="person: the label map shows none of spleen"):
        make_atlas(labels, {9: "spleen"}, ("spleen",), SPEC, name="person")


@pytest.mark.parametrize("seed", range(6))
def test_a_body_without_structures_has_tissues_and_no_labels(seed: int) -> None:
    atlas = negative_atlas(seed, SPEC)
    assert atlas.annotated_K.all() and not atlas.labels_C.any()
    assert 0.02 < (atlas.classes_ZHW > 0).mean() < 0.9 and len(np.unique(atlas.classes_ZHW)) >= 5


def test_a_head_has_its_face_in_front_and_below_the_brain() -> None:
    heads = [atlas for seed in range(4) if "cord" in (atlas := negative_atlas(seed, SPEC)).tissues]
    assert heads
    for head in heads:
        brain_ZHW = np.isin(head.classes_ZHW, [head.tissues.index("cord"), head.tissues.index("spleen")])
        rows = np.flatnonzero(brain_ZHW.any((0, 2)))
        lowest = brain_ZHW.any(2).argmax(0)[rows]
        assert lowest[: len(rows) // 3].mean() > lowest[-len(rows) // 3 :].mean() + 3


@pytest.mark.parametrize(
    ("key", "expected"),
    [("liver", "liver"), ("rib_left_7", "bone"), ("iliac_vena_left", "vein"), ("autochthon_left", "muscle")],
)
def test_every_structure_has_tissues(key: str, expected: str) -> None:
    assert tissues_of(key)[0] == expected and set(tissues_of(key)) <= set(TISSUES)


# ---- images


def test_a_step_gives_the_same_images_whenever_it_is_asked_for() -> None:
    first, second = a_synthesiser(), a_synthesiser()
    second.crops_at(1)
    one, other = first.crops_at(5), second.crops_at(5)
    assert torch.equal(one.images_BSHW, other.images_BSHW) and torch.equal(one.labels_BHW, other.labels_BHW)
    assert one.seeds == other.seeds
    assert not torch.equal(one.images_BSHW, a_synthesiser(seed=1).crops_at(5).images_BSHW)


def test_a_batch_has_as_many_images_of_each_expert_in_order() -> None:
    crops = a_synthesiser().crops_at(0)
    assert crops.experts_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert crops.images_BSHW.dtype == torch.float16 and crops.labels_BHW.dtype == torch.uint8
    assert float(crops.images_BSHW.min()) >= 0 and float(crops.images_BSHW.max()) <= 1
    assert crops.annotated_BK.tolist() == [[True, True, True, False, True]] * 8


def test_ranks_share_the_images_of_a_step() -> None:
    whole = a_synthesiser().crops_at(3)
    parts = [a_synthesiser(rank=rank, world=2).crops_at(3) for rank in range(2)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.images_BSHW, whole.images_BSHW[rank::2])


def drawn(synthesiser: Synthesiser, expert: int, label: int, count: int = 16) -> tuple[list[float], list[float]]:
    """Median intensity of a label and of all else in the body, in each image that shows enough of it."""
    inside, outside = [], []
    for seed in range(count):
        crops = synthesiser.draw(expert, np.random.default_rng(seed))
        image, labels = crops.images_BSHW[0, 1].float(), crops.labels_BHW[0]
        if (labels == label).sum() > 20:
            inside.append(float(image[labels == label].median()))
            outside.append(float(image[(labels == 0) & (image > 0.05)].median()))
    return inside, outside


def test_labels_lie_where_their_structures_are_drawn() -> None:
    """The bladder is what is bright in T2, and so are the pixels with its label."""
    inside, outside = drawn(a_synthesiser(), T2, 2)
    assert len(inside) > 5
    assert np.mean(np.array(inside) > np.array(outside)) > 0.7


def test_urine_is_bright_in_t2_and_dark_in_t1() -> None:
    synthesiser = a_synthesiser()
    bright, dark = (np.median(drawn(synthesiser, expert, 2)[0]) for expert in (T2, T1))
    assert bright > dark + 0.2


@pytest.mark.parametrize("tissue", ["muscle", "visceral_fat"])
def test_what_surrounds_the_liver_is_brighter_in_some_t2_and_darker_in_others(tissue: str) -> None:
    signals = np.stack([tissue_signal(np.random.default_rng(seed), "mr_t2", varied=True) for seed in range(99)])
    assert 0.05 < np.mean(signals[:, CODES[tissue]] > signals[:, CODES["liver"]]) < 0.95


def test_iron_darkens_livers_of_t2_and_no_muscle(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [CODES["air"], CODES["liver"], CODES["muscle"]]

    def mean(share: float) -> torch.Tensor:
        monkeypatch.setattr(synthesis, "_IRON", share)
        drawn = [synthesis._signals(codes, "mr_t2", np.random.default_rng(seed), 0.0)[0] for seed in range(99)]
        return torch.stack(drawn).mean(0)

    without, with_iron = mean(0.0), mean(1.0)
    assert with_iron[1] < 0.8 * without[1]
    assert torch.allclose(with_iron[2], without[2])


def test_contrast_medium_brightens_the_liver_in_some_cts() -> None:
    inside, _ = drawn(a_synthesiser(), CT, 1)
    native = (60 + 160) / 400
    assert min(inside) < native + 0.05 < max(inside)


@pytest.mark.parametrize(("contrast", "bright"), [("mr_t2", True), ("mr_t1", False)])
def test_a_cyst_is_drawn_beside_the_structures_alone(contrast: str, bright: bool) -> None:
    image, free = torch.full((3, 40, 40), 0.4), torch.zeros(40, 40, dtype=torch.bool)
    free[:, 20:] = True
    synthesis._add_cyst(image, free, contrast, 2.5, np.random.default_rng(0))
    changed = image != 0.4
    assert changed.any() and not changed[:, :, :20].any()
    assert bool((image[changed] > 0.4).all()) is bright


def test_shape_size_and_place_change_from_image_to_image() -> None:
    synthesiser = a_synthesiser()
    areas = [int((synthesiser.draw(CT, np.random.default_rng(seed)).labels_BHW == 1).sum()) for seed in range(12)]
    assert np.std([area for area in areas if area]) > 0.1 * np.mean(areas)


def test_lesions_are_drawn_in_the_liver_alone_and_only_where_they_are_known() -> None:
    known, unknown = a_synthesiser(), a_synthesiser(replace(an_atlas(), annotated_K=np.array([1, 1, 1, 0, 0], bool)))
    counts = [
        sum(int((s.draw(CT, np.random.default_rng(seed)).labels_BHW == 4).sum()) for seed in range(60))
        for s in (known, unknown)
    ]
    assert counts[0] > 0 and counts[1] == 0


def test_real_images_are_mixed_in_for_the_expert_that_has_them() -> None:
    labels = np.ones((3, 44, 44), np.uint8)
    case = Case(np.full(labels.shape, 0.25, np.float16), labels, np.ones(5, bool), T1, {1: np.arange(3)}, "real")
    synthesiser = a_synthesiser(images=2, real=Sampler([case], 2, 40, 3, 0, margin=4))
    names = [name for step in range(24) for name in synthesiser.crops_at(step).names]
    real = [index % 8 for index, name in enumerate(names) if name == "real"]
    assert set(real) == {2, 3}
    assert 5 < len(real) < 40


def test_slices_of_bodies_without_structures_are_dark_and_bright_too() -> None:
    crops = a_synthesiser(negative_atlas(0, SPEC)).crops_at(0)
    assert not crops.labels_BHW.any() and float(crops.images_BSHW.max()) > 0.2


def test_an_expert_of_another_name_sees_every_contrast_of_its_modality() -> None:
    experts = (ExpertSpec("ct", "CT"), ExpertSpec("mr", "MR"))
    spec = replace(SPEC, network=NetworkSpec(experts=2), experts=experts)
    synthesiser = Synthesiser(spec, [an_atlas()], 2, 40, 0)
    names = {synthesiser.draw(1, np.random.default_rng(seed)).names[0] for seed in range(30)}
    assert names == {"person as mr_t1", "person as mr_t2", "person as mr_t1ce"}


def test_the_picture_shows_each_expert_with_and_without_labels(tmp_path: Path) -> None:
    synthesiser = a_synthesiser()
    write_synthesis(tmp_path / "synthesis.png", synthesiser)
    picture = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "synthesis.png"))).astype(int)
    blocks = np.split(picture, len(SPEC.experts))
    for expert, block in enumerate(blocks):
        colourful = np.ptp(block, axis=-1) > 40
        plain, labelled = (colourful[first : first + 200, 12:].mean() for first in (54, 266))
        shown = [(example.labels > 0).mean() for example in synthesiser.examples(expert, 8)]
        assert plain == 0
        assert labelled == pytest.approx(200 / 212 * np.mean(shown), rel=0.15)


def test_both_kidneys_and_all_fat_of_a_body_look_alike() -> None:
    codes = [CODES[name] for name in ("air", "cortex_right", "cortex_left", "fat", "visceral_fat")]
    for seed in range(30):
        for contrast in MODALITIES:
            _, right, left, *fat = synthesis._signals(codes, contrast, np.random.default_rng(seed), wild=0)[0].tolist()
            allowed = {"abs": 40} if contrast == "ct" else {"rel": 0.25}
            assert [right, fat[0]] == pytest.approx([left, fat[1]], **allowed)


@pytest.mark.parametrize("slices", [1.0, 1.7, 2.8])
def test_thick_slices_average_over_their_thickness(slices: float) -> None:
    edge = torch.zeros(12, 2, 2)
    edge[6:] = 1

    class Highest:
        def uniform(self, low: float, high: float) -> float:
            return high

    thick = synthesis._thick(edge, slices, Highest())  # type: ignore[arg-type]
    profile = thick[:, 0, 0].diff()
    width = 1.1 * slices
    assert float(profile.sum()) == pytest.approx(1, abs=1e-5)
    assert float((profile > 1e-6).sum()) == 1 + 2 * np.ceil((width - 1) / 2)
    assert float(profile.max()) == pytest.approx(min(1, 1 / width), abs=1e-5)


def test_large_bodies_have_grain_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def spread(bank: int) -> float:
        monkeypatch.setattr(synthesis, "_BANK", bank)
        synthesiser = a_synthesiser(an_atlas())
        synthesiser.textures = [None]
        classes = torch.ones((4, 44, 44), dtype=torch.long)
        return float(synthesiser._paint(an_atlas(), 0, classes, 0, "mr_t2", np.random.default_rng(3)).std())

    assert spread(1 << 10) == pytest.approx(spread(1 << 21), rel=0.2) and spread(1 << 10) > 0


def test_the_dome_of_a_ct_whose_lungs_have_no_label_stays() -> None:
    image, labels = a_person()
    image, labels = replace(image, array=image.array.copy()), replace(labels, array=labels.array.copy())
    for slice_, size in zip(range(6, 12), (9, 7, 5, 3, 0, 0), strict=True):
        liver = labels.array[slice_] == 1
        rows, columns = np.nonzero(liver)
        gone = liver & (
            np.hypot(*(np.indices(liver.shape) - np.array([rows.mean(), columns.mean()])[:, None, None])) >= size
        )
        labels.array[slice_][gone], image.array[slice_][gone] = 0, -850
    atlas = make_atlas(labels, MEANINGS, ANNOTATED, SPEC, image)
    shown = (atlas.labels_C[atlas.classes_ZHW] == 1).sum((1, 2))
    assert len(shown) == SHAPE[0]
    assert shown.tolist() == (labels.array == 1).sum((1, 2)).tolist()
    assert "lung" in atlas.tissues


def test_little_of_an_mr_body_is_bone() -> None:
    image, labels = a_person()
    mr = Volume(np.random.default_rng(0).gamma(4, 50, image.array.shape).astype(np.int16), image.grid, modality="MR")
    atlas = make_atlas(labels, MEANINGS, ANNOTATED, SPEC, mr)
    rest = (atlas.labels_C[atlas.classes_ZHW] == 0) & (atlas.classes_ZHW > 0)
    bone = np.isin(atlas.classes_ZHW, [n for n, name in enumerate(atlas.tissues) if name == "bone"])
    assert 0.02 < (bone & rest).sum() / rest.sum() < 0.15


def test_an_mr_body_is_drawn_in_the_contrast_of_its_own_image_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its liver is far darker than all else, as in no T1 of the literature."""
    image, labels = a_person()
    signal = np.where(image.array > -1000, 400, 0)
    signal[labels.array == 1], signal[labels.array == 2] = 120, 20
    mr = replace(image, array=signal.astype(np.int16), modality="MR")
    atlas = replace(make_atlas(labels, MEANINGS, ANNOTATED, SPEC, mr), expert="mr_t1")

    def darker(share: float, expert: int) -> float:
        monkeypatch.setattr(synthesis, "_AGAIN", share)
        inside, outside = drawn(a_synthesiser(atlas), expert, 1)
        return float(np.mean(np.array(inside) < 0.5 * np.array(outside)))

    assert darker(1.0, T1) > 0.8 > 0.5 > darker(0.0, T1)
    assert darker(1.0, T1CE) == darker(0.0, T1CE)


def test_what_an_image_lacks_is_drawn_in_proportion() -> None:
    drawn_C = torch.tensor([0.0, 0.2, 0.1, 0.3])
    found_C = synthesis._own_signals(np.array([0.0, 0.8, 0.4, np.nan]), drawn_C, np.random.default_rng(0))
    assert found_C.tolist() == pytest.approx([0, 0.8, 0.4, 1.2], rel=0.6)
    assert float(found_C[0]) == 0


def a_picture() -> tuple[torch.Tensor, torch.Tensor]:
    """Three slices [3, 60, 60] of a square body, and where it is."""
    body = torch.zeros(60, 60, dtype=torch.bool)
    body[15:40, 20:40] = True
    return 0.5 * body.float().repeat(3, 1, 1), body


@pytest.mark.parametrize("add", [synthesis._add_table, synthesis._add_arms])
def test_table_and_arms_lie_beside_the_body(add: Callable[..., None]) -> None:
    image, body = a_picture()
    before = image.clone()
    add(image, body, 5.0, np.random.default_rng(1))
    changed = (image != before).any(0)
    assert changed.any() and not changed[body].any()
    if add is synthesis._add_table:
        assert not changed[:40].any()
    else:
        assert changed[:, :20].any() and changed[:, 40:].any()


def test_beyond_a_truncated_field_of_view_nothing_is_labelled() -> None:
    image, labels = torch.ones(3, 60, 60), torch.ones(60, 60, dtype=torch.long)
    synthesis._truncate(image, labels, 40, np.random.default_rng(0))
    assert ((image > 0).all(0) == (labels > 0)).all()
    rows, columns = (int((labels > 0).any(axis).sum()) for axis in (0, 1))
    assert 0.6 * 40 < rows <= 40 and 0.6 * 40 < columns <= 40


def test_half_of_mr_images_are_shaded_smoothly() -> None:
    flat = torch.ones(3, 60, 60)
    shades = [synthesis._shaded(flat, np.random.default_rng(seed)) for seed in range(60)]
    varied = [shade for shade in shades if float(shade.std()) > 1e-3]
    assert 15 < len(varied) < 45
    assert all(float(shade.diff(dim=-1).abs().max()) < 0.25 * float(shade.max()) for shade in varied)


def test_softened_edges_keep_their_place_and_mean() -> None:
    image, body = a_picture()
    softened = synthesis._softened(image, np.random.default_rng(0))
    assert float(softened.sum()) == pytest.approx(float(image.sum()), rel=1e-4)
    assert float((softened != image).float().mean()) > 0 and ((softened > 0.25) == body).all()


def test_ghosts_of_motion_are_faint_and_moved_along_the_rows() -> None:
    moved = 0
    for seed in range(60):
        image, body = a_picture()
        synthesis._add_artefacts(image, np.random.default_rng(seed))
        ghost = image[0][~body] - image[0][0, 0]
        moved += bool((ghost > 1e-4).any())
        assert float(image[0][~body].max()) < 0.2
    assert 2 < moved < 20


class _Devices(TorchDispatchMode):
    """Notes where tensors of more than a few numbers are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() > 1000:
            self.found.add(result.device.type)
        return result


def test_where_pixels_come_from_is_computed_on_the_device() -> None:
    synthesiser = a_synthesiser()
    synthesiser.device = torch.device("meta")
    with _Devices() as devices:
        synthesiser._places(an_atlas(), 48, 4.0, np.random.default_rng(0))
    assert devices.found == {"meta"}


def test_kidneys_and_bladder_excrete_contrast_medium_on_mr_too() -> None:
    codes = [CODES["air"], CODES["bladder"], CODES["medulla_left"], CODES["liver"]]
    drawn = [synthesis._signals(codes, "mr_t1ce", np.random.default_rng(seed), 0.0)[0] for seed in range(100)]
    bright = [float(bladder) > 0.7 * float(liver) for _, bladder, _, liver in drawn]
    alike = [float(bladder) == float(medulla) for _, bladder, medulla, _ in drawn]  # dark ones too
    assert 4 < sum(bright) < sum(alike) < 40


def test_organs_change_size_and_place() -> None:
    grid = torch.stack(torch.meshgrid(torch.zeros(3), *2 * [torch.arange(-40.0, 41, 4)], indexing="ij"))
    organ = np.array([[0.0, 0.0, 0.0, 15.0]], np.float32)
    how = synthesis._ORGANS
    moved = [synthesis._organs_changed(grid, organ, how, np.random.default_rng(seed)) - grid for seed in range(40)]
    centre = torch.stack([change[:, 0, 10, 10] for change in moved])
    assert (centre.abs() <= torch.tensor(how[1]) + 1e-4).all()
    assert (centre.std(0) > 1).all()
    assert max(float(change[:, 0, 0, 0].abs().max()) for change in moved) < 1  # far away nothing moves


def test_large_organs_alone_have_parts_that_change_by_themselves() -> None:
    organs = np.array([[5.0, 50.0, 60.0, 70.0], [0.0, 0.0, 0.0, 20.0]], np.float32)
    parts = np.concatenate([synthesis._lobes(organs, np.random.default_rng(seed)) for seed in range(40)])
    away = np.linalg.norm(parts[:, :3] - organs[0, :3], axis=1)
    assert parts.shape == (40, 4) and np.allclose(parts[:, 3], 42)
    assert away.min() > 25 and away.max() < 95 and np.std(parts[:, 2]) > 15
    assert synthesis._lobes(organs[1:], np.random.default_rng(0)).shape == (0, 4)


def test_an_mr_case_without_an_expert_belongs_to_that_of_its_modality(tmp_path: Path) -> None:
    image, labels = a_person()
    write_volume(tmp_path / "image.nii.gz", replace(image, array=np.maximum(image.array, 0), modality="MR"))
    write_volume(tmp_path / "label.nii.gz", labels)
    case = CaseFiles(
        "a", "a", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", "MR", None, dict(MEANINGS), ANNOTATED
    )
    assert load_atlas(case, SPEC).expert == "mr"
    assert load_atlas(replace(case, expert="mr_dixon"), SPEC).expert == "mr_dixon"
    assert load_atlas(replace(case, image=case.label), SPEC).expert == ""
