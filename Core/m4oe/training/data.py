"""Training images: cases on the canonical grid, and modality-balanced crops that seed and step alone decide.

Shape suffixes: Z slice, H and W row and column, B image, S slice channel (a slice and its neighbours), K class.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..geometry import Volume
from ..modality import modality_evidence
from ..resample import CanonicalVolume
from ..spec import ModelSpec

_SLAB = 16
_ANY_SLICE = 0.5  # share of the images that need not show a structure
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Case:
    """A volume and its labels on the canonical grid, in memory or mapped from a file.

    Attributes:
        image_ZHW: Intensities in [0, 1], float16.
        labels_ZHW: Label map, uint8; None where nobody drew anything.
        annotated_K: Which classes its annotators drew; the others are unknown, not background.
        expert: Index of the expert of its modality.
        slices_of: Slices that show a structure, by label.
        name: For messages.
    """

    image_ZHW: np.ndarray
    labels_ZHW: np.ndarray | None
    annotated_K: np.ndarray
    expert: int
    slices_of: dict[int, np.ndarray]
    name: str = ""


@dataclass(frozen=True, eq=False)
class Crops:
    """Crops as they lie in their cases, on the CPU, with a margin around them that augmentation may move into view.

    Attributes:
        images_BSHW: Intensities in [0, 1], float16; 0 beyond the image.
        labels_BHW: Labels of the middle slices, uint8.
        annotated_BK: Which classes are known in each image.
        experts_B: The expert of each image's modality.
        names: The cases they are from.
        seeds: Each image's own seed, for its augmentation.
    """

    images_BSHW: Tensor
    labels_BHW: Tensor
    annotated_BK: Tensor
    experts_B: Tensor
    names: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images as the network sees them.

    Attributes:
        images_BSHW: Intensities in [0, 1].
        labels_BHW: Labels of the middle slices, int64.
        annotated_BK: Which classes are known in each image.
        experts_B: The expert of each image's modality; on the CPU, where images are sent to their experts.
        told_B: Whether the gate is told the modality, as by a header; on the CPU.
        names: The cases they are from.
    """

    images_BSHW: Tensor
    labels_BHW: Tensor
    annotated_BK: Tensor
    experts_B: Tensor
    told_B: Tensor
    names: tuple[str, ...] = ()

    def every(self, first: int, step: int) -> Batch:
        """Every `step`-th image from `first` on, so that each part holds all modalities."""
        part = slice(first, None, step)
        return Batch(*(getattr(self, field.name)[part] for field in fields(self)))

    def of_expert(self, expert: int) -> Batch:
        """The images of one expert's modality, without their names."""
        part = (self.experts_B == expert).nonzero()[:, 0]
        there = part.to(self.images_BSHW.device, non_blocking=True)
        images, labels, annotated = self.images_BSHW[there], self.labels_BHW[there], self.annotated_BK[there]
        return Batch(images, labels, annotated, self.experts_B[part], self.told_B[part])


def make_case(image: Volume, labels: Volume | None, annotated: Sequence[str], spec: ModelSpec, expert: int) -> Case:
    """Brings a volume to the canonical grid, in the way prediction does.

    Args:
        image: CT in HU or MR.
        labels: Label map on the image's grid, in the spec's label values; None where there is none.
        annotated: Keys of the structures that were looked for, found or not.
        spec: The model that is trained.
        expert: Index of the expert of the image's modality.

    Raises:
        ValueError: The label map lies on another grid, or holds a value that is no structure or not an annotated one.
    """
    if labels is None and annotated:
        raise ValueError(f"{image.name}: there is no label map, but structures are said to be annotated")
    rule = spec.intensity[spec.experts[expert].modality]
    offset = modality_evidence(image).offset
    canonical = CanonicalVolume(image, spec.pixel_mm, spec.slice_mm, rule, offset)
    image_ZHW = np.empty(canonical.shape, np.float16)
    for start in range(0, len(image_ZHW), _SLAB):
        stop = min(start + _SLAB, len(image_ZHW))
        image_ZHW[start:stop] = canonical.slices(start, stop).numpy()
    annotated_K = annotated_classes(annotated, spec)
    if labels is None:
        return Case(image_ZHW, None, annotated_K, expert, {}, image.name)
    found_ZHW = canonical.labels(labels)
    labels_ZHW = found_ZHW.astype(np.uint8)
    slices_of = _slices_of(labels_ZHW)
    known = np.flatnonzero(annotated_K)
    if not set(slices_of) <= set(known.tolist()) or not np.array_equal(labels_ZHW, found_ZHW):
        wrong = ", ".join(f"{value:g}" for value in np.setdiff1d(found_ZHW, known)[:10])
        raise ValueError(f"{image.name}: the label map holds {wrong}; expected the annotated {known.tolist()} alone")
    return Case(image_ZHW, labels_ZHW, annotated_K, expert, slices_of, image.name)


def annotated_classes(annotated: Sequence[str], spec: ModelSpec) -> np.ndarray:
    """Which classes [K] are known where the structures `annotated` were looked for; the background always is."""
    return np.isin(np.arange(len(spec.structures) + 1), [0, *spec.labels_of(annotated)])


def _slices_of(labels_ZHW: np.ndarray) -> dict[int, np.ndarray]:
    shown_ZK = np.array([np.bincount(plane.ravel(), minlength=256) > 0 for plane in labels_ZHW])
    return {int(label): np.flatnonzero(shown_ZK[:, label]) for label in np.flatnonzero(shown_ZK.any(0)) if label}


class Sampler:
    """Crops of any step, with as many images of each expert: a run that resumes at a step sees what it would have seen.

    Half of the images show any slice; the others show a structure drawn at random, so that small ones come up as often.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        images: int,
        crop: int,
        channels: int,
        seed: int,
        margin: int = 0,
        rank: int = 0,
        world: int = 1,
        pinned: bool = False,
    ) -> None:
        """Sorts the cases by expert.

        Args:
            cases: What to draw from.
            images: Images of each expert in the batch of all ranks.
            crop: Rows and columns that the network sees.
            channels: A slice and its neighbours.
            seed: Of the run.
            margin: Pixels around a crop that augmentation may reach.
            rank: Which part of the batch is wanted, below `world`.
            world: Number of parts; the batch is the same however many there are.
            pinned: Whether to use page-locked memory, from which a GPU copies while the program goes on.

        Raises:
            ValueError: There is no case, or the images cannot be shared out evenly.
        """
        if not cases:
            raise ValueError("there is no case to train on")
        if images % world:
            raise ValueError(f"{images} images per expert cannot be shared among {world} processes; take a multiple")
        experts = sorted({case.expert for case in cases})
        self.groups = [[case for case in cases if case.expert == expert] for expert in experts]
        self.places = [slice(first + rank, first + images, world) for first in range(0, images * len(experts), images)]
        self.images, self.crop, self.channels, self.seed = images, crop, channels, seed
        self.pinned = pinned
        beyond = (size - crop for case in cases for size in case.image_ZHW.shape[1:])
        self.margin = min(margin, max(size if size > 0 else -(-size // 2) for size in beyond))

    def crops_at(self, step: int) -> Crops:
        """This rank's crops of a step, in the order of the experts.

        Raises:
            RuntimeError: A case cannot be read.
        """
        drawn = np.random.SeedSequence([self.seed, step]).generate_state(self.images * len(self.groups), np.uint64)
        seeds = [[int(seed >> 2) for seed in drawn[places]] for places in self.places]
        count, size = sum(len(part) for part in seeds), self.crop + 2 * self.margin
        images = torch.zeros((count, self.channels, size, size), dtype=torch.float16, pin_memory=self.pinned)
        labels = torch.zeros((count, size, size), dtype=torch.uint8, pin_memory=self.pinned)
        targets = zip(images.numpy(), labels.numpy(), strict=True)
        cases = []
        for group, part in zip(self.groups, seeds, strict=True):
            for seed in part:
                rng = np.random.default_rng(seed)
                cases.append(group[int(rng.random() * len(group))])
                self._cut(cases[-1], *next(targets), rng)
        return Crops(
            images,
            labels,
            torch.from_numpy(np.stack([case.annotated_K for case in cases])),
            torch.tensor([case.expert for case in cases]),
            tuple(case.name for case in cases),
            tuple(seed for part in seeds for seed in part),
        )

    def _cut(self, case: Case, image_SHW: np.ndarray, labels_HW: np.ndarray, rng: np.random.Generator) -> None:
        """Copies a crop with its margin."""
        try:
            index, near = _pick_slice(case, rng)
            height, width = case.image_ZHW.shape[1:]
            top, left = (_start(size, self.crop, pixel, rng) for size, pixel in zip((height, width), near, strict=True))
            top, left = top - self.margin, left - self.margin
            for channel, target_HW in enumerate(image_SHW, start=-(self.channels // 2)):
                plane = min(max(index + channel, 0), len(case.image_ZHW) - 1)
                _copy_window(case.image_ZHW[plane], target_HW, top, left)
            if case.labels_ZHW is not None:
                _copy_window(case.labels_ZHW[index], labels_HW, top, left)
        except (OSError, ValueError, IndexError) as error:
            raise RuntimeError(f"case {case.name} cannot be read: {error}; build the cache again") from error


def _pick_slice(case: Case, rng: np.random.Generator) -> tuple[int, tuple[int | None, int | None]]:
    """A slice, and row and column of a pixel that the crop should show."""
    if case.labels_ZHW is None or not case.slices_of or rng.random() < _ANY_SLICE:
        return int(rng.integers(len(case.image_ZHW))), (None, None)
    label = int(rng.choice(list(case.slices_of)))
    index = int(rng.choice(case.slices_of[label]))
    pixel = int(rng.choice(np.flatnonzero(case.labels_ZHW[index] == label)))
    return index, divmod(pixel, case.labels_ZHW.shape[2])


def _start(size: int, crop: int, near: int | None, rng: np.random.Generator) -> int:
    """First row of a crop inside the image, with `near` in its middle half; a smaller image lies in the middle."""
    last = size - crop
    if last <= 0:
        return last // 2
    if near is None:
        return int(rng.integers(last + 1))
    return min(max(near - int(rng.integers(crop // 4, crop - crop // 4)), 0), last)


def _copy_window(source_HW: np.ndarray, target_HW: np.ndarray, top: int, left: int) -> None:
    """Copies what lies under a window whose corner may be outside; there the target stays as it is."""
    rows, columns = (
        slice(max(first, 0), min(first + target, source))
        for first, target, source in zip((top, left), target_HW.shape, source_HW.shape, strict=True)
    )
    target_HW[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = source_HW[rows, columns]


def prefetched(make: Callable[[int], _T], steps: Iterable[int], ahead: int = 2) -> Generator[_T, None, None]:
    """What `make` gives for each step, in order, made in a thread up to `ahead` steps before it is asked for.

    An exception of `make` is raised when its step is due. Closing the iterator ends the thread.
    """
    with ThreadPoolExecutor(1, "prefetch") as pool:
        waiting: deque[Future[_T]] = deque()
        try:
            for step in steps:
                waiting.append(pool.submit(make, step))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
