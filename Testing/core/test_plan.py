from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m4oe.files import read_volume
from m4oe.labels import catalogue
from m4oe.training.cases import CaseFiles, DataSet, load_case
from m4oe.training.check import CaseReport, Finding
from m4oe.training.plan import SPLITS, Plan, draw_split, make_plan, read_plan, write_plan

Saved = Callable[..., Path]
NAMES = st.text("abcdefg0123456789_", min_size=1, max_size=6)
PATIENTS = st.dictionaries(NAMES, st.integers(1, 3), min_size=1, max_size=30)


def a_case(name: str, patient: str = "", **facts: object) -> CaseFiles:
    files = (Path(f"/d/{name}.nii.gz"), Path(f"/d/{name}_label.nii.gz"))
    case = CaseFiles(name, patient or name, *files, "CT", "ct", {1: "liver"}, ("liver",))
    return replace(case, **facts)  # type: ignore[arg-type]


def a_set(name: str, *cases: CaseFiles) -> DataSet:
    return DataSet(name, "pairs", Path("/d"), cases or tuple(a_case(f"c{n}") for n in range(40)))


def of_patients(name: str, patients: dict[str, int]) -> DataSet:
    return a_set(
        name, *(a_case(f"{patient}.{n}", patient) for patient, count in patients.items() for n in range(count))
    )


def planned(*datasets: DataSet, old: Plan | None = None, **options: object) -> Plan:
    reports = {dataset.name: [CaseReport(case.case) for case in dataset.cases] for dataset in datasets}
    return make_plan(datasets, reports, old, **options)[0]  # type: ignore[arg-type]


def remarks(*datasets: DataSet, **options: object) -> str:
    reports = {dataset.name: [CaseReport(case.case) for case in dataset.cases] for dataset in datasets}
    return " ".join(finding.sentence for finding in make_plan(datasets, reports, **options)[1])  # type: ignore[arg-type]


# ---- splits


@given(PATIENTS, st.integers(0, 9), st.randoms())
def test_a_patient_is_in_one_split_whatever_the_order(patients: dict[str, int], seed: int, random: Random) -> None:
    cases = [*of_patients("s", patients).cases, *(a_case(f"more{n}") for n in range(40))]
    plan = planned(a_set("s", *cases), seed=seed)
    random.shuffle(cases)
    assert planned(a_set("s", *cases), seed=seed).splits == plan.splits
    held = {split: {case.patient for case in plan.cases(split)} for split in SPLITS}
    assert sum(map(len, held.values())) == len({case.patient for case in cases})
    assert sum(len(plan.cases(split)) for split in SPLITS) == len(cases)


@given(PATIENTS, PATIENTS, st.integers(0, 9))
def test_new_cases_do_not_move_old_ones(old: dict[str, int], new: dict[str, int], seed: int) -> None:
    always = of_patients("always", {f"p{n}": 1 for n in range(40)})
    before = planned(of_patients("s", old), always, seed=seed)
    grown = of_patients("s", old | new)
    from_file = planned(grown, always, old=before)
    from_nothing = planned(grown, always, seed=seed)
    for after in (from_file, from_nothing):
        assert before.splits.items() <= after.splits.items()
        found: dict[str, set[str]] = {}
        for split in SPLITS:
            for case in after.cases(split):
                found.setdefault(case.patient, set()).add(split)
        assert all(len(splits) == 1 for splits in found.values())


def test_an_older_plan_wins_over_everything() -> None:
    dataset = a_set("s")
    before = planned(dataset, seed=1)
    turned = {"train": "test", "val": "train", "test": "train"}
    old = replace(before, splits={**{key: turned[split] for key, split in before.splits.items()}, "s/gone": "test"})
    after = planned(a_set("s", *(replace(case, split="val") for case in dataset.cases)), old=old, seed=5, test=0.9)
    assert after.splits == old.splits and (after.seed, after.test) == (1, 0.2)


def test_shares_are_about_what_was_asked_for() -> None:
    counts = Counter(draw_split(f"s/{n}", 0, 0.1, 0.2) for n in range(20_000))
    assert [round(counts[split] / 20_000, 2) for split in SPLITS] == pytest.approx([0.7, 0.1, 0.2], abs=0.011)


@given(NAMES, st.floats(0, 0.5), st.floats(0, 0.4))
def test_larger_shares_only_take_from_training(patient: str, val: float, test: float) -> None:
    before, after = draw_split(patient, 0, val, test), draw_split(patient, 0, val + 0.05, test + 0.04)
    assert before in (after, "train")


def test_the_split_of_the_data_set_itself_is_kept() -> None:
    cases = [a_case(f"c{n}", split=("test" if n == 3 else "val" if n == 5 else None)) for n in range(20)]
    plan = planned(a_set("s", *cases))
    assert [case.case for case in plan.cases("test")] == ["c3"]
    assert [case.case for case in plan.cases("val")] == ["c5"]
    assert len(plan.cases("train")) == 18


def test_a_case_that_is_to_train_is_not_drawn_into_another_split() -> None:
    cases = [a_case(f"c{n}", split="train" if n < 30 else None) for n in range(60)]
    plan = planned(a_set("s", *cases), val=0.3, test=0.3)
    assert {f"c{n}" for n in range(30)} < {case.case for case in plan.cases("train")}
    assert plan.cases("val") and plan.cases("test")


def test_a_split_that_the_data_set_lacks_is_drawn_from_the_others() -> None:
    cases = [a_case(f"c{n:02}", split="val" if n < 10 else None) for n in range(60)]
    plan = planned(a_set("s", *cases))
    assert [case.case for case in plan.cases("val")] == [f"c{n:02}" for n in range(10)]
    assert {case.case for case in plan.cases("test")} == {
        f"c{n}" for n in range(10, 60) if draw_split(f"s/c{n}", 0, 0, 0.2) == "test"
    }


def test_a_patient_with_cases_in_several_official_splits_is_held_back() -> None:
    cases = [a_case("a1", "a", split="train"), a_case("a2", "a", split="test"), a_case("b", split="train")]
    plan = planned(a_set("s", *cases), val=0.0)
    assert plan.splits == {"s/a": "test", "s/b": "train"}


def test_unlabelled_images_serve_pretraining_unless_their_patient_is_held_back() -> None:
    cases = [a_case("a1", "a", split="test"), a_case("a2", "a", label=None), a_case("b"), a_case("c", label=None)]
    plan = planned(a_set("s", *cases), val=0.0)
    assert [case.case for case in plan.unlabelled()] == ["c"]


def test_an_empty_split_and_impossible_shares_are_told() -> None:
    few = a_set("s", a_case("a"), a_case("b"))
    assert "No case is in test" in remarks(few, test=0.001)
    with pytest.raises(ValueError, match="shares are 0.5 and 0.5"):
        planned(few, val=0.5, test=0.5)


# ---- joining


def test_structures_are_the_union_and_keep_their_values() -> None:
    first = a_set("a", *(a_case(f"c{n}", annotated=("spleen", "liver")) for n in range(40)))
    second = a_set("b", a_case("x", annotated=("kidney_right", "liver")))
    before = planned(first)
    assert before.structures == ("liver", "spleen")
    assert planned(first, second).structures == ("liver", "kidney_right", "spleen")
    assert planned(first, second, old=before).structures == ("liver", "spleen", "kidney_right")
    assert planned(second, first, val=0.0, test=0.0).structures == planned(first, second).structures


def test_cases_with_errors_are_left_out_and_named() -> None:
    dataset = a_set("s")
    wrong = (Finding("c1", "warning", "odd"), Finding("c1", "error", "broken"))
    reports = [CaseReport(case.case, findings=wrong if case.case == "c1" else ()) for case in dataset.cases]
    plan, _ = make_plan([dataset], {"s": reports})
    assert plan.left_out == {"s/c1": "broken"} and len(plan.datasets[0].cases) == 39
    with pytest.raises(ValueError, match="1 has errors, .*; s/c1: broken"):
        make_plan([a_set("s", a_case("c1"))], {"s": [CaseReport("c1", findings=wrong)]})


def test_without_a_case_for_training_it_is_said_where_they_went() -> None:
    with pytest.raises(ValueError, match=r"hold back 1 for val and 2 for test: write train .* column split of cases"):
        planned(a_set("s", a_case("a", split="val"), a_case("b", split="test"), a_case("c", split="test")))
    with pytest.raises(ValueError, match=r"none has a label, see the check of the data \(m4oe data scan\)"):
        planned(a_set("s", a_case("a", label=None)))


def test_data_sets_that_share_patients_are_refused_or_all_train() -> None:
    pair = (a_set("flare22"), a_set("msd_pancreas"), a_set("other"))
    with pytest.raises(ValueError, match="50 labelled scans of FLARE22"):
        planned(*pair)
    plan = planned(*pair, share=True)
    assert {key.split("/")[0] for key, split in plan.splits.items() if split != "train"} == {"other"}


def test_an_older_plan_that_holds_shared_patients_back_is_not_broken() -> None:
    old = planned(a_set("flare22"))
    with pytest.raises(ValueError, match="older plan holds flare22/c"):
        planned(a_set("flare22"), a_set("msd_pancreas"), old=old, share=True)


def test_possible_overlaps_are_warned_of() -> None:
    assert "word and msd_liver may share patients" in remarks(a_set("word"), a_set("msd_liver"))


def test_the_same_image_in_two_data_sets_is_refused(saved: Saved, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 99, (2, 4, 4, 4))
    files = [saved(tmp_path / f"{n}.nii", values, np.int16) for n, values in enumerate((one, other, one))]
    sets = [a_set(f"s{n}", a_case("c", image=file)) for n, file in enumerate(files)]
    assert planned(sets[0], sets[1], val=0.0, test=0.0)
    with pytest.raises(ValueError, match="s0 and s2 share images, such as c of the one and c of the other"):
        planned(*sets)
    twice = a_set("t", a_case("a", image=files[0]), a_case("b", image=files[2]), a_case("c", "b", image=files[2]))
    assert "t: a and b have the same image." in remarks(twice, val=0.0, test=0.0)


def test_two_data_sets_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two data sets are called s"):
        planned(a_set("s"), a_set("s"))


def test_a_part_and_its_whole_are_told() -> None:
    dataset = a_set("s", a_case("a", annotated=("kidney",)), a_case("b", annotated=("kidney_left", "kidney_tumor")))
    text = remarks(dataset, val=0.0, test=0.0)
    assert "kidney_left as kidney" in text and "kidney_tumor as kidney" in text


# ---- the file


@given(patients=PATIENTS, keys=st.lists(st.sampled_from(sorted(catalogue())), unique=True, max_size=4))
def test_a_plan_survives_its_file(
    patients: dict[str, int], keys: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    odd = a_case("odd", labels=dict(enumerate(keys)), annotated=tuple(keys), image=Path("/far/x"), split="val")
    plan = planned(of_patients("s", patients), a_set("t", a_case("x", split="train"), odd), val=0.0, test=0.0)
    write_plan(path, plan)
    assert read_plan(path) == plan


def test_moved_data_needs_one_change(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", planned(a_set("s")))
    text = (tmp_path / "plan.json").read_text(encoding="utf-8").replace('"folder": "/d"', '"folder": "/e"')
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    case = read_plan(tmp_path / "plan.json").datasets[0].cases[0]
    assert (case.image, case.label) == (Path("/e/c0.nii.gz"), Path("/e/c0_label.nii.gz"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"m4oe_plan": 99}', '{"m4oe_plan": 1, "structures": []}'])
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"plan.json is no training plan"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="none.json cannot be read"):
        read_plan(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("old", "new", "split"), [('"name": "s"', '"name": "r"', "None"), ('": "train"', '": "Train"', "'Train'")]
)
def test_a_patient_in_no_known_split_is_told(old: str, new: str, split: str, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", planned(a_set("s")))
    text = (tmp_path / "plan.json").read_text(encoding="utf-8").replace(old, new)
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"/c\d the split {split}; expected one of train, val, test"):
        read_plan(tmp_path / "plan.json")


# ---- what training gets


def test_a_case_is_loaded_with_the_values_of_the_model(saved: Saved, tmp_path: Path) -> None:
    values = np.random.default_rng(0).choice([0, 63, 64, 126, 7], (4, 4, 4))
    image = saved(tmp_path / "a.nii.gz", np.arange(64).reshape(4, 4, 4), np.int16)
    label = saved(tmp_path / "b.nii.gz", values, np.float64)
    meaning = {63: "liver", 64: "liver", 126: "spleen", 7: "urinary_bladder"}
    case = CaseFiles("a", "a", image, label, "MR", None, meaning, ("liver", "spleen"))
    volume, labels = load_case(case, ("kidney_left", "spleen", "liver"))
    expected = np.select([np.isin(values, (63, 64)), values == 126], [3, 2], 0)  # the bladder was not looked for
    assert labels.array.dtype == np.uint8 and np.array_equal(labels.array, expected)
    assert labels.grid.is_close(volume.grid) and (volume.modality, volume.name) == ("MR", "a")
    assert np.array_equal(volume.array, read_volume(image).array)


def test_meanings_beyond_the_type_of_the_file_do_no_harm(saved: Saved, tmp_path: Path) -> None:
    files = {"image": saved(tmp_path / "a.nii.gz"), "label": saved(tmp_path / "b.nii.gz", 7)}
    _, labels = load_case(a_case("a", **files, labels={7: "liver", 300: "spleen"}), ("liver", "spleen"))
    assert (labels.array == 1).all()


@pytest.mark.parametrize("value", [5, -1, 300, 1.2, float("nan")])
def test_a_value_without_meaning_is_never_trained_on(value: float, saved: Saved, tmp_path: Path) -> None:
    values = np.zeros((4, 4, 4))
    values[2, 1, 1] = value
    label = saved(tmp_path / "b.nii.gz", values, np.float32)
    case = a_case("a", image=saved(tmp_path / "a.nii.gz"), label=label, labels={1: "liver", 9: "spleen"})
    with pytest.raises(ValueError, match=r"b.nii.gz holds|no whole numbers"):
        load_case(case, ("liver", "spleen"))


def test_a_model_without_an_annotated_structure_is_refused(saved: Saved, tmp_path: Path) -> None:
    case = a_case("a", image=saved(tmp_path / "a.nii.gz"), label=saved(tmp_path / "b.nii.gz"))
    with pytest.raises(ValueError, match="The model has no liver"):
        load_case(case, ("spleen",))


def test_a_plan_tells_its_format(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", planned(a_set("s")))
    values = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert values["m4oe_plan"] == 1 and len(values["labellings"]) == 1


# ---- experts


def test_an_expert_that_nothing_trains_or_scores_is_told() -> None:
    cases = [a_case(f"c{split}", split=split) for split in SPLITS]
    scan = a_case("mr", split="test", modality="MR", expert=None)
    text = remarks(a_set("s", *cases, scan))
    assert text == (
        "All cases of mr are in validation or test, so no expert learns from them: add patients, or divide them in the "
        "column split of cases.csv."
    )
    assert "so its expert learns from synthetic images alone: add" in remarks(a_set("s", *cases, scan), drawn=["mr"])
    text = remarks(a_set("s", *cases, replace(scan, split="train")))
    assert "No case of mr is in val:" in text and "No case of mr is in test:" in text


def test_ct_and_mr_do_not_share_an_expert_and_names_are_plain() -> None:
    cases = [a_case("a", expert="one"), a_case("b", expert="one", modality="MR")]
    with pytest.raises(ValueError, match="would train the one expert one; name none"):
        planned(a_set("s", *cases), val=0.0, test=0.0)
    with pytest.raises(ValueError, match="cannot be called 'my CT'; take letters"):
        planned(a_set("s", a_case("a", expert="my CT")), val=0.0, test=0.0)
