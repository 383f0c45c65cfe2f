from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from m4oe import package
from m4oe.files import read_volume
from m4oe.geometry import Grid, Volume
from m4oe.resample import CanonicalVolume
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from m4oe.training import cache
from m4oe.training.cache import CaseSource, Failure, build_cache
from m4oe.training.data import Case, Sampler, make_case

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
VERSION, CT_VOXELS, MR_VOXELS, LABELS = (  # what becomes of the volume of the test of the version, times 10,000
    1,
    "5090 6008 4846 4009 4102 4640 5925 3744 4996 6809 4855 4861 4004 3407 2877 6753 3979 3164",
    "5075 6152 4827 3919 3952 4596 5901 3491 4977 7011 4795 4819 3772 3072 2449 6998 3742 2787",
    "44 94 39 0 28 63 98 12 91 93 86 53 35 15 26 69 27 27",
)


@dataclass
class Loader:
    """Reads a made-up case and counts how often."""

    seed: int = 0
    labelled: bool = True
    calls: int = 0

    def __call__(self) -> tuple[Volume, Volume | None]:
        self.calls += 1
        return a_pair(self.seed, self.labelled)


def a_pair(seed: int = 0, labelled: bool = True) -> tuple[Volume, Volume | None]:
    rng = np.random.default_rng(seed)
    grid = Grid((6, 20, 22), np.diag([-1.0, -1.0, 3.0, 1.0]))
    labels = np.zeros(grid.shape, np.uint8)
    labels[1:3, 4:9, 5:12], labels[4, 10:16, 8:14] = 1, 2
    image = Volume(rng.integers(-50, 150, grid.shape).astype(np.int16), grid)
    return image, Volume(labels, grid) if labelled else None


def fail() -> tuple[Volume, Volume | None]:
    raise ValueError("the image is damaged")


def die() -> tuple[Volume, Volume | None]:
    os._exit(1)


def a_source(
    load: Callable[[], tuple[Volume, Volume | None]] | None = None,
    *content: Path | str,
    name: str = "case",
    expert: int = 0,
    annotated: tuple[str, ...] = SPEC.structures,
) -> CaseSource:
    return CaseSource(name, expert, annotated, content or (name,), load or Loader())


def built(folder: Path, *sources: CaseSource, spec: ModelSpec = SPEC) -> list[Case]:
    cases, failures = build_cache(sources, spec, folder, 1)
    assert failures == []
    return cases


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def assert_alike(found: Case, expected: Case) -> None:
    assert np.array_equal(found.image_ZHW, expected.image_ZHW) and found.image_ZHW.dtype == np.float16
    assert np.array_equal(found.annotated_K, expected.annotated_K) and found.expert == expected.expert
    assert {label: slices.tolist() for label, slices in found.slices_of.items()} == {
        label: slices.tolist() for label, slices in expected.slices_of.items()
    }
    if expected.labels_ZHW is None:
        assert found.labels_ZHW is None
    else:
        assert np.array_equal(found.labels_ZHW, expected.labels_ZHW) and found.labels_ZHW.dtype == np.uint8


@pytest.mark.parametrize("expert", [0, 1])
def test_a_cached_case_is_the_case_itself(tmp_path: Path, expert: int) -> None:
    for _ in range(2):
        (case,) = built(tmp_path, a_source(expert=expert, name="case 3"))
        assert_alike(case, make_case(*a_pair(), SPEC.structures, SPEC, expert))
        assert case.name == "case 3"


def test_the_canonical_grid_is_that_of_this_version() -> None:
    """Where this fails the voxels of all caches are outdated: raise CANONICAL_VERSION, then write the new values."""
    assert cache.CANONICAL_VERSION == VERSION
    array = (np.arange(60) ** 2 * 7 % 101).astype(np.int16).reshape(5, 3, 4)
    image = Volume(array, Grid(array.shape, np.diag([-1.5, 1.5, 2.0, 1.0])))
    for rule, voxels in (("window", 0, 100), CT_VOXELS), (("percentile", 5, 95), MR_VOXELS):
        canonical = CanonicalVolume(image, 2.0, 3.0, IntensityRule(*rule))
        expected = np.array(voxels.split(), float).reshape(3, 2, 3) / 1e4
        np.testing.assert_allclose(canonical.slices(0, 3), expected, atol=1e-4)
        assert canonical.labels(image).ravel().tolist() == [int(label) for label in LABELS.split()]


def test_an_image_without_labels_is_cached_as_well(tmp_path: Path) -> None:
    for _ in range(2):
        (case,) = built(tmp_path, a_source(Loader(labelled=False), annotated=()))
        assert_alike(case, make_case(*a_pair(labelled=False), (), SPEC, 0))


def test_labels_without_any_structure_are_cached(tmp_path: Path) -> None:
    image, labels = a_pair()
    assert labels is not None
    empty = partial(tuple, (image, replace(labels, array=np.zeros_like(labels.array))))
    (case,) = built(tmp_path, a_source(empty))
    assert case.labels_ZHW is not None and not case.labels_ZHW.any() and case.slices_of == {}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_cases_are_mapped_and_hold_no_file_open(tmp_path: Path) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    cases = built(tmp_path, *(a_source(Loader(n), name=f"case {n}") for n in range(8)))
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len(cases) == 8 and all(str(path) in maps for path in entries(tmp_path))


def test_a_case_cannot_be_written_to(tmp_path: Path) -> None:
    (case,) = built(tmp_path, a_source())
    with pytest.raises(ValueError, match="read-only"):
        case.image_ZHW[0] = 0


def test_a_volume_is_read_once(tmp_path: Path) -> None:
    load = Loader()
    for _ in range(3):
        built(tmp_path, a_source(load))
    assert load.calls == 1 and len(entries(tmp_path)) == 1


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, pixel_mm=1.5),
        replace(SPEC, slice_mm=4.0),
        replace(SPEC, intensity=SPEC.intensity | {"CT": IntensityRule("window", 0, 120)}),
        replace(SPEC, structures=("spleen", "liver")),
    ],
    ids=["pixel", "slice", "intensity", "structures"],
)
def test_another_spec_has_entries_of_its_own(tmp_path: Path, other: ModelSpec) -> None:
    load = Loader()
    built(tmp_path, a_source(load))
    (case,) = built(tmp_path, a_source(load), spec=other)
    assert load.calls == 2 and len(entries(tmp_path)) == 2
    assert_alike(case, make_case(*a_pair(), SPEC.structures, other, 0))


def test_what_leaves_the_voxels_as_they_are_leaves_the_cache(tmp_path: Path) -> None:
    """A new modality appends an expert and structures; a model gets another name."""
    load = Loader()
    built(tmp_path, a_source(load))
    experts = (ExpertSpec("mr", "MR"), ExpertSpec("x", "CT"), ExpertSpec("ct", "CT"))
    grown = replace(SPEC, name="grown", structures=(*SPEC.structures, "aorta"), experts=experts, network=NetworkSpec(3))
    source = replace(a_source(load), expert=2)
    (case,) = built(tmp_path, source, spec=grown)
    assert load.calls == 1
    assert case.expert == 2
    assert case.annotated_K.tolist() == [True, True, True, False]


def test_other_content_has_another_entry(tmp_path: Path) -> None:
    file, folder = tmp_path / "CT.nii", tmp_path / "dicom"
    folder.mkdir()
    load = Loader()

    def contents() -> int:
        built(tmp_path / "cache", a_source(load, file, folder, "labels: 1 liver"))
        return load.calls

    file.write_bytes(b"one")
    (folder / "1.dcm").write_bytes(b"one")
    assert contents() == 1
    file.write_bytes(b"two")
    assert contents() == 2
    (folder / "1.dcm").write_bytes(b"two")
    assert contents() == 3
    (folder / "2.dcm").write_bytes(b"")
    assert contents() == 4
    built(tmp_path / "cache", a_source(load, file, folder, "labels: 2 liver"))
    assert load.calls == 5
    assert contents() == 5


def test_the_voxels_beside_a_header_count(tmp_path: Path) -> None:
    load = Loader()
    (tmp_path / "a.mhd").write_bytes(b"header")
    for voxels in (b"one", b"two"):
        (tmp_path / "a.raw").write_bytes(voxels)
        built(tmp_path / "cache", a_source(load, tmp_path / "a.mhd"))
    assert load.calls == 2


def test_a_file_that_moved_is_the_same_case(tmp_path: Path) -> None:
    load = Loader()
    for name in ("a.nii", "b.nii"):
        (tmp_path / name).write_bytes(b"voxels")
        built(tmp_path / "cache", a_source(load, tmp_path / name))
    assert load.calls == 1


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, hashed = tmp_path / "CT.nii", []
    original = cache._file_digest
    monkeypatch.setattr(cache, "_file_digest", lambda path: hashed.append(path) or original(path))
    for content, seconds in ((b"one", 1000), (b"one", 1000), (b"two", 2000), (b"two", 2000)):
        file.write_bytes(content)
        os.utime(file, (seconds, seconds))
        built(tmp_path / "cache", a_source(None, file))
    assert len(hashed) == 2
    assert len(entries(tmp_path / "cache")) == 2


def test_a_file_that_was_written_just_now_is_hashed_each_time(tmp_path: Path) -> None:
    """It may change once more without a change of its time."""
    file = tmp_path / "CT.nii"
    for content in (b"one", b"two"):
        file.write_bytes(content)
        os.utime(file, ns=(time := 10**18 * 4, time))
        built(tmp_path / "cache", a_source(None, file))
    assert len(entries(tmp_path / "cache")) == 2


def test_two_cases_of_the_same_content_share_an_entry(tmp_path: Path) -> None:
    load = Loader()
    cases = built(tmp_path, *(a_source(load, "same", name=name) for name in "ab"))
    assert load.calls == 1 and [case.name for case in cases] == ["a", "b"]


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def blank(path: Path) -> None:
    """As after a power failure: the right size, but a run of the file never reached the disk."""
    data = bytearray(path.read_bytes())
    data[-4096:] = bytes(4096)
    path.write_bytes(data)


def misname(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"check"', b'"chick"'))


@pytest.mark.parametrize("damage", [cut, empty, blank, misname])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    load = Loader()
    built(tmp_path, a_source(load))
    (path,) = entries(tmp_path)
    damage(path)
    with pytest.warns(UserWarning, match="is damaged and is made again"):
        (case,) = built(tmp_path, a_source(load))
    assert load.calls == 2
    assert_alike(case, make_case(*a_pair(), SPEC.structures, SPEC, 0))
    built(tmp_path, a_source(load))
    assert load.calls == 2


def test_a_run_of_lost_pages_is_noticed_wherever_it_is() -> None:
    array = np.random.default_rng(0).integers(1, 255, 3_000_000).astype(np.uint8)
    whole, run = cache._check({"image": array}), array.size // 15
    for start in range(0, array.size - run, run // 3):
        damaged = array.copy()
        damaged[start : start + run] = 0
        assert cache._check({"image": damaged}) != whole


def test_a_build_that_was_stopped_leaves_no_entry_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [Loader(n) for n in range(3)]
    sources = [a_source(load, name=str(n)) for n, load in enumerate(loads)]
    original = package.save_file

    def interrupted(arrays: object, path: Path, about: dict[str, str]) -> None:
        original(arrays, path, about)
        if about["name"] == "1":
            raise KeyboardInterrupt

    monkeypatch.setattr(package, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_cache(sources, SPEC, tmp_path, 1)
    assert len(entries(tmp_path)) == 1 and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(package, "save_file", original)
    built(tmp_path, *sources)
    assert [load.calls for load in loads] == [1, 2, 1]


def test_bad_cases_are_told_and_the_others_made(tmp_path: Path) -> None:
    sources = (
        a_source(name="a"),
        a_source(fail, name="b"),
        a_source(None, tmp_path / "none.nii", name="c"),
        a_source(Loader(1), name="d", annotated=("liver",)),
        a_source(Loader(2), name="e"),
    )
    cases, failures = build_cache(sources, SPEC, tmp_path / "cache", 1)
    assert [case.name for case in cases] == ["a", "e"]
    assert [failure.name for failure in failures] == ["b", "c", "d"]
    assert failures[0] == Failure("b", "the image is damaged")
    assert "none.nii" in failures[1].reason and "the label map holds 2" in failures[2].reason
    assert len(entries(tmp_path / "cache")) == 2


def test_a_full_disk_fails_the_case_alone(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    with full_disk():
        cases, ((name, reason),) = build_cache([a_source()], SPEC, tmp_path, 1)
    assert cases == [] and name == "case" and "make room" in reason and not entries(tmp_path)


# Processes


def test_processes_make_the_same_cases_in_the_same_order(tmp_path: Path) -> None:
    sources = [a_source(partial(a_pair, n), name=f"case {n}") for n in range(4)]
    sources.insert(2, a_source(fail, name="bad"))
    cases, failures = build_cache(sources, SPEC, tmp_path, 2)
    assert failures == [Failure("bad", "the image is damaged")]
    assert [case.name for case in cases] == [f"case {n}" for n in range(4)]
    for n, case in enumerate(cases):
        assert_alike(case, make_case(*a_pair(n), SPEC.structures, SPEC, 0))


def test_a_process_that_is_killed_says_so(tmp_path: Path) -> None:
    sources = [a_source(die, name="a"), a_source(partial(a_pair, 1), name="b")]
    with pytest.raises(RuntimeError, match="fewer than 2"):
        build_cache(sources, SPEC, tmp_path, 2)


def test_an_entry_that_another_process_replaces_stays_readable(tmp_path: Path) -> None:
    (case,) = built(tmp_path, a_source())
    before = case.image_ZHW.copy()
    (path,) = entries(tmp_path)
    path.unlink()
    built(tmp_path, a_source())
    assert np.array_equal(case.image_ZHW, before)


def test_a_sampler_reads_cached_cases(tmp_path: Path) -> None:
    cached = built(tmp_path, a_source())
    direct = [make_case(*a_pair(), SPEC.structures, SPEC, 0)]
    found, expected = (Sampler(cases, 4, 8, 3, 0).crops_at(2) for cases in (cached, direct))
    assert np.array_equal(found.images_BSHW, expected.images_BSHW)
    assert np.array_equal(found.labels_BHW, expected.labels_BHW)


def test_a_real_volume_is_cached(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "ct" / "ts_ct_3mm_small.nii.gz"
    shutil.copy(file, tmp_path / "copy.nii.gz")
    load = partial(read_pair, file)
    (case,) = built(tmp_path / "cache", a_source(load, file, annotated=()))
    rule = SPEC.intensity["CT"]
    canonical = CanonicalVolume(read_volume(file), SPEC.pixel_mm, SPEC.slice_mm, rule)
    assert np.array_equal(case.image_ZHW, canonical.slices(0, canonical.shape[0]).half().numpy())
    built(tmp_path / "cache", a_source(load, tmp_path / "copy.nii.gz", annotated=()))
    assert len(entries(tmp_path / "cache")) == 1


def read_pair(path: Path) -> tuple[Volume, Volume | None]:
    return read_volume(path), None
