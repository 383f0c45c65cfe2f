"""Segments volumes with a model: set up once, call many times."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import psutil
import torch

from .cleanup import remove_islands
from .geometry import CANONICAL_AXES, Grid, Volume, label_intensities
from .jobs import Cancelled, Report
from .labels import Structure, structure
from .modality import Evidence, modality_evidence
from .network.moe import keep_top_k
from .network.swin import SwinBlock
from .network.unet import MoESwinUNet
from .package import load_model
from .parts import scores_in_parts
from .resample import CanonicalVolume, FieldPainter, LabelPainter
from .spec import DEFAULT_MODEL, find_model

PRECISIONS = ("auto", "float32", "bfloat16")
QUALITIES = {"standard": 1.0, "fast": 2.0}  # times the slice spacing
_GATE_SLICES = 16
_BATCH = {"cpu": 4, "cuda": 32, "mps": 8}
_SURE = 0.75  # probability of the gate below which the user is warned
_NO_GPU_MEMORY = "the memory of the GPU ran out, so the CPU did it, slowly; close other programs or crop the volume"
_CONFIDENT = 0.6  # mean probability of a structure below which the user is warned


@dataclass(frozen=True)
class _Route:
    weights: tuple[float, ...]
    gate: tuple[float, ...]
    chosen_by: str
    doubts: list[str]


@dataclass
class _Phases:
    """Adds up the time of each phase and watches its memory, a hundred times a second."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    current: str = "prepare"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, self.current = time.perf_counter(), name
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self._look()

    @contextmanager
    def watched(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.01):
                self._look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _look(self) -> None:
        self.memory[self.current] = max(self.memory.get(self.current, 0.0), _memory_mib(self.device))


class Predictor:
    """A loaded model on its device."""

    def __init__(self, model: Path | str = DEFAULT_MODEL, device: str = "auto", precision: str = "auto") -> None:
        """Loads a model.

        Args:
            model: Path of a model file or name of an installed model.
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            precision: "float32", "bfloat16", or "auto": bfloat16 where a trial shows that it is faster.

        Raises:
            ValueError: The model, device or precision does not exist or cannot be used.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is unknown; expected one of {', '.join(PRECISIONS)}")
        self._asked, self._may_leave_gpu = (model, precision), device == "auto"
        self._notes: tuple[str, ...] = ()  # said in every report
        self.device = find_device(device)
        try:
            self._load(model, precision)
        except RuntimeError as error:
            if not self._may_leave_gpu or not _is_no_memory(error):
                raise
            self.device, self._notes = torch.device("cpu"), (_NO_GPU_MEMORY,)
            self._load(model, precision)

    def _load(self, model: Path | str, precision: str) -> None:
        self.network, self.spec = load_model(find_model(model), self.device)
        for key in self.spec.structures:
            structure(key)  # cleanup and warnings need it: better refused now than after the work
        if precision == "auto":
            precision = "bfloat16" if bfloat16_is_faster(self.device) else "float32"
        self.precision = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.network.cast(self.precision)

    def __call__(
        self,
        volume: Volume,
        expert: str = "auto",
        structures: Sequence[str] | None = None,
        progress: Callable[[str, float], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        quality: str = "standard",
        uncertainty: np.ndarray | None = None,
    ) -> tuple[Volume, Report]:
        """Segments a volume: where the memory of a GPU runs out, in smaller parts, and then on the CPU if "auto" chose.

        Args:
            volume: CT in HU or MR, any type, orientation and size.
            expert: "auto" lets the gate decide once for the whole volume; a name overrules it.
            structures: Keys of the structures to keep; None keeps all.
            progress: Called between slabs with the phase and the fraction done in [0, 1].
            cancelled: Asked between layers of the network; True stops.
            quality: "fast" looks at half as many slices, at half the time.
            uncertainty: uint8 of the volume's shape; receives percents, 0 where the network is sure and 100
                where all classes are as likely (the entropy of their probabilities).

        Returns:
            Labels (unsigned; `spec.label_keys` tells which is which) on the volume's own grid, and a report.

        Raises:
            ValueError: The expert or a structure is unknown to the model, or its gate lets no expert be chosen; or
                the quality is unknown.
            Cancelled: `cancelled` said so.
            RuntimeError: The memory of the GPU ran out, and it was named.
        """
        given = (volume, expert, structures, progress, cancelled, quality, uncertainty)
        for batch in (_BATCH[self.device.type], 1):
            self._batch = batch
            try:
                return self._segment(*given)
            except RuntimeError as error:
                if not _is_no_memory(error) or (batch == 1 and not self._may_leave_gpu):
                    raise
        return self._on_cpu(*given)

    @property
    def left_gpu(self) -> bool:
        """Whether it is on the CPU because the memory of the GPU did not even hold the model."""
        return bool(self._notes)

    @cached_property
    def _on_cpu(self) -> Predictor:
        model, precision = self._asked
        on_cpu = Predictor(model, "cpu", precision)
        on_cpu._notes = (_NO_GPU_MEMORY,)
        return on_cpu

    @torch.inference_mode()
    def _segment(
        self,
        volume: Volume,
        expert: str,
        structures: Sequence[str] | None,
        progress: Callable[[str, float], None] | None,
        cancelled: Callable[[], bool] | None,
        quality: str,
        uncertainty: np.ndarray | None,
    ) -> tuple[Volume, Report]:
        keep = self.spec.labels_of(structures) if structures is not None else list(self.spec.label_keys)
        forced = None if expert == "auto" else self.spec.expert_index(expert)
        if quality not in QUALITIES:
            raise ValueError(f"quality {quality!r} is unknown; expected one of {', '.join(QUALITIES)}")
        phases = _Phases(self.device)
        progress = progress or (lambda phase, fraction: None)
        progress("prepare", 0.0)
        with phases.watched(), ExitStack() as stack:
            stack.enter_context(_stoppable(self.network, cancelled))
            with phases("prepare"):
                evidence = modality_evidence(volume)
                canonical = self._canonical(volume, evidence, forced, QUALITIES[quality])
            with phases("route"):
                route = self._route(canonical, evidence, forced)
                canonical = self._canonical_of_chosen(canonical, volume, evidence, route, QUALITIES[quality])
                network, classes = self._select(route.weights, forced)
            found = np.zeros(volume.array.shape, np.uint8)
            labels = Volume(found, volume.grid).to_axes(CANONICAL_AXES).array
            probabilities = _Probabilities(canonical, volume.grid, len(classes), uncertainty)
            for fraction in self._paint(network, canonical, labels, phases, probabilities):
                progress("segment", fraction)
                _stop_if(cancelled)
            with phases("cleanup"):
                counts = self._clean(labels, classes, keep, volume.grid.voxel_ml)
                intensities = label_intensities(found, volume.array)
        asked = [label for label in sorted(classes) if label in keep]
        volumes = {self.spec.label_keys[label]: counts.get(label, 0) * volume.grid.voxel_ml for label in asked}
        cut = [self.spec.label_keys[label] for label in _labels_at_border(labels)]
        sure = {self.spec.label_keys.get(classes[number]): value for number, value in probabilities.by_class().items()}
        confidence = {key: sure[key] for key, found_ml in volumes.items() if found_ml and key in sure}
        warnings = (
            *self._notes,
            *volume.warnings,
            *route.doubts,
            *_volume_warnings(volumes, cut, volume.grid),
            *_confidence_warnings(confidence),
        )
        report = Report(
            model=f"{self.spec.name} {self.spec.version}",
            device=str(self.device),
            precision=str(self.precision).removeprefix("torch."),
            expert_weights=dict(zip(self.spec.expert_names, route.weights, strict=True)),
            gate=dict(zip(self.spec.expert_names, route.gate, strict=False)),
            chosen_by=route.chosen_by,
            seconds=dict(phases.seconds),
            peak_memory_mib=dict(phases.memory),
            volumes_ml=volumes,
            warnings=warnings,
            confidence=confidence,
            intensities={
                self.spec.label_keys[label]: (mean + evidence.offset, deviation)
                for label, (mean, deviation) in intensities.items()
            },
            flags=_flags(volumes, cut, confidence, volume.grid),
        )
        return Volume(found, volume.grid, volume.name), report

    def _canonical(
        self, volume: Volume, evidence: Evidence, forced: int | None, coarser: float = 1.0
    ) -> CanonicalVolume:
        """The volume under the intensity rule of the forced expert, or else of what the volume seems to be."""
        modality = self.spec.experts[forced].modality if forced is not None else evidence.modality
        rule = self.spec.intensity.get(modality) or next(iter(self.spec.intensity.values()))
        slice_mm = max(self.spec.slice_mm, volume.to_axes(CANONICAL_AXES).grid.spacing[2]) * coarser
        return CanonicalVolume(volume, self.spec.pixel_mm, slice_mm, rule, evidence.offset, self.device)

    def _canonical_of_chosen(
        self, canonical: CanonicalVolume, volume: Volume, evidence: Evidence, route: _Route, coarser: float
    ) -> CanonicalVolume:
        """The volume as the expert learned it, where the gate chose one of another modality than it was asked with."""
        chosen = int(np.argmax(route.weights))
        if not route.gate or self.spec.experts[chosen].modality == evidence.modality:
            return canonical
        return self._canonical(volume, evidence, chosen, coarser)

    def _route(self, canonical: CanonicalVolume, evidence: Evidence, forced: int | None) -> _Route:
        """Expert weights for the whole volume, and what the user should know about the choice.

        A modality that the header or HU prove restricts the gate to its experts.
        """
        names, experts = self.spec.expert_names, self.spec.experts
        doubts = [evidence.doubt] if evidence.doubt else []
        says = f"{'its header or HU say' if evidence.certain else 'its intensities suggest'} {evidence.modality}"
        if forced is not None:
            if experts[forced].modality != evidence.modality:
                doubts.insert(0, f"modality in doubt: {says}, the expert {names[forced]} that you named is for another")
            return _Route(tuple(float(index == forced) for index in range(len(names))), (), "user", doubts)
        if self.network.router is None:
            known = sorted({expert.modality for expert in experts})
            if evidence.certain and evidence.modality not in known:
                trained = f"{self.spec.name} was trained for {' and '.join(known)} alone"
                doubts.insert(0, f"modality in doubt: {says}, but {trained}")
            return _Route((1 / len(names),) * len(names), (), "model", doubts)
        logits_E = self._gate_logits(canonical)
        free_E = logits_E.softmax(-1)
        fits = [expert.modality == evidence.modality for expert in experts]
        restricted = evidence.certain and any(fits)
        if restricted:
            logits_E = logits_E.masked_fill(~torch.tensor(fits, device=logits_E.device), float("-inf"))
        weights_E = logits_E.softmax(-1)
        best, free = int(weights_E.argmax()), int(free_E.argmax())
        against = sum(float(share) for share, fit in zip(free_E, fits, strict=True) if not fit)
        if experts[free].modality != evidence.modality and (not restricted or against >= _SURE):
            used = f"{names[best]} was used: name another expert if that is wrong"
            doubts.insert(0, f"modality in doubt: {says}, the gate says {names[free]}; {used}")
        elif float(weights_E[best]) < _SURE:
            doubts.insert(0, f"modality in doubt: the gate gives {names[best]} only {float(weights_E[best]):.0%}")
        chosen_by = "modality" if restricted and (sum(fits) == 1 or best != free) else "gate"
        weights = tuple(keep_top_k(weights_E, self.spec.network.top_k).tolist())
        return _Route(weights, tuple(free_E.tolist()), chosen_by, doubts)

    def _gate_logits(self, canonical: CanonicalVolume) -> torch.Tensor:
        """The gate's mean logits [E] over slices from end to end."""
        chosen = np.linspace(0, canonical.shape[0] - 1, _GATE_SLICES).round().astype(int)
        channels, batch = self.spec.network.channels, self._batch
        stacks = [canonical.stacks(index, index + 1, channels) for index in np.unique(chosen).tolist()]
        logits = [self.network.gate_logits(torch.cat(stacks[i : i + batch])) for i in range(0, len(stacks), batch)]
        return torch.cat(logits).mean(0)

    def _select(self, weights: tuple[float, ...], forced: int | None) -> tuple[MoESwinUNet, list[int]]:
        """The network reduced to the experts in use and to the classes that they know, which come with it.

        Unless an expert is forced, token and channel gates keep deciding inside the network.
        """
        if forced is None and self.network.router is None:
            return self.network, [0, *self.spec.label_keys]
        classes = self.spec.classes_of([index for index, weight in enumerate(weights) if weight > 0])
        return self.network.select_experts(weights).with_classes(classes), classes

    def _paint(
        self,
        network: MoESwinUNet,
        canonical: CanonicalVolume,
        labels: np.ndarray,
        phases: _Phases,
        probabilities: _Probabilities,
    ) -> Iterator[float]:
        """Fills `labels` slab by slab; yields the fraction done before each slab and at the end."""
        count, batch = canonical.shape[0], self._batch
        painter = LabelPainter(canonical.source.grid.shape, canonical.shape, labels)
        for start in range(0, count, batch):
            yield start / count
            stop = min(start + batch, count)
            with phases("resample"):
                stacks = canonical.stacks(start, stop, self.spec.network.channels)
            with phases("network"):
                scores = scores_in_parts(partial(_scores, network), stacks, self.spec.crop)
            with phases("upsample"):
                painter.add(scores)
                probabilities.add(scores)
        yield 1.0

    def _clean(self, labels: np.ndarray, classes: list[int], keep: list[int], voxel_ml: float) -> dict[int, int]:
        """Turns classes into label values, of those to keep, and removes islands."""
        values = [label if label in keep else 0 for label in classes]
        if values != list(range(len(values))):
            labels[...] = np.array(values, labels.dtype)[labels]
        return remove_islands(labels, self.spec.label_keys, voxel_ml)


class _Probabilities:
    """What the network thinks of its own result: a mean probability per class, and a map where it is wanted."""

    def __init__(self, canonical: CanonicalVolume, grid: Grid, classes: int, uncertainty: np.ndarray | None) -> None:
        exact = torch.float32 if canonical.device.type == "mps" else torch.float64  # MPS has no other
        self._sums_2K = torch.zeros(2, classes, dtype=exact, device=canonical.device)  # voxels, their probabilities
        self._painter = None
        if uncertainty is not None:
            array = Volume(uncertainty, grid).to_axes(CANONICAL_AXES).array
            self._painter = FieldPainter(canonical.source.grid.shape, canonical.shape, array)

    def add(self, scores_ZHWK: torch.Tensor) -> None:
        """Takes the scores of the next canonical slices."""
        p_ZHWK = scores_ZHWK.softmax(-1)
        best = p_ZHWK.max(-1)
        for row, values in zip(self._sums_2K, (torch.ones_like(best.values), best.values), strict=True):
            row.index_add_(0, best.indices.flatten(), values.flatten().to(row.dtype))
        if self._painter is not None:
            entropy_ZHW = torch.special.entr(p_ZHWK).sum(-1) / math.log(p_ZHWK.shape[-1])
            self._painter.add(entropy_ZHW[..., None].clamp(0, 1) * 100)

    def by_class(self) -> dict[int, float]:
        """Mean probability of each class where it was the best; of none that was so nowhere on the canonical grid."""
        return {number: total / count for number, (count, total) in enumerate(self._sums_2K.T.tolist()) if count}


@contextmanager
def _stoppable(network: MoESwinUNet, cancelled: Callable[[], bool] | None) -> Iterator[None]:
    """Asks `cancelled` before every block of the network and of its copies, as a whole slab may take seconds."""
    with ExitStack() as hooks:
        for block in network.modules() if cancelled is not None else ():
            if isinstance(block, SwinBlock):
                hook = block.register_forward_pre_hook(lambda *call: _stop_if(cancelled))
                hooks.callback(hook.remove)
        yield


def _stop_if(cancelled: Callable[[], bool] | None) -> None:
    if cancelled is not None and cancelled():
        raise Cancelled("segmentation was cancelled; nothing was written")


def available_devices() -> list[str]:
    """Names of the devices of this machine, the best first: "cuda:0", "cuda:1", "mps", "cpu"."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def why_cpu() -> str:
    """Why "auto" means the CPU on this machine; empty where it means a GPU."""
    if available_devices()[0] != "cpu":
        return ""
    is_for_gpus = torch.backends.cuda.is_built() or torch.backends.mps.is_built()
    return "torch finds no GPU" if is_for_gpus else "this torch is built for CPUs alone"


def _is_no_memory(error: RuntimeError) -> bool:
    """Whether it is the GPU's; Apple's and those of CUDA's libraries come without a type of their own."""
    return any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is the first of CUDA, Apple's MPS and the CPU that is there.

    Raises:
        ValueError: There is no such device on this machine.
    """
    available = available_devices()
    if available[0] == "cuda:0":
        available.insert(0, "cuda")
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise ValueError(f"device {name!r} is not available; this machine has: {', '.join(available)}")
    return torch.device(name)


def _scores(network: MoESwinUNet, stacks_BSHW: torch.Tensor) -> torch.Tensor:
    return network(stacks_BSHW).float()


@cache
def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether a product of matrices takes clearly less time in bfloat16 than in float32 on this device.

    Measured, not assumed: on a processor without its instructions bfloat16 is several times slower. The median of
    alternating trials leaves little to chance, so that a machine computes in the same precision every time.
    """
    single = torch.ones(512, 512, device=device)
    half = single.bfloat16()
    ratios = sorted(_seconds(lambda: half @ half, device) / _seconds(lambda: single @ single, device) for _ in range(9))
    return ratios[4] < 0.8


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def _memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _labels_at_border(labels: np.ndarray) -> list[int]:
    """Labels that touch a face of the volume; faces of an axis with one voxel do not count."""
    faces = [
        face
        for axis, size in enumerate(labels.shape)
        if size > 1
        for face in np.take(labels, (0, -1), axis).swapaxes(0, axis)
    ]
    found = {int(label) for face in faces for label in np.unique(face)}
    return sorted(found - {0})


def _volume_warnings(volumes_ml: dict[str, float], cut: list[str], grid: Grid) -> list[str]:
    found = {key: structure(key) for key, found_ml in volumes_ml.items() if found_ml}
    if not found:
        return ["nothing was found: check the field of view, the modality and the model's structures"]
    if _is_single_slice(grid):
        thickness = grid.spacing[2 - grid.shape.index(1)]
        return [f"a single slice: volumes are areas times {thickness:g} mm, and no patient's were compared with them"]
    warnings = [
        f"{item.name} has {_ml(volumes_ml[key])} mL, outside the {item.volume_ml[0]:g} to {item.volume_ml[2]:g} mL "
        "seen in patients: check it"
        for key, item in found.items()
        if item.volume_ml and not _is_plausible(item, volumes_ml[key], key in cut)
    ]
    if names := [found[key].name for key in cut if key in found]:
        warnings.append(f"at the edge of the field of view, so perhaps cut: {', '.join(names)}")
    return warnings


def _is_single_slice(grid: Grid) -> bool:
    return min(grid.shape) == 1


def _flags(
    volumes_ml: dict[str, float], cut: list[str], confidence: dict[str, float], grid: Grid
) -> dict[str, tuple[str, ...]]:
    is_slice = _is_single_slice(grid)
    checks = {
        "implausible": lambda key: not is_slice and not _is_plausible(structure(key), volumes_ml[key], key in cut),
        "cut": lambda key: key in cut,
        "low confidence": lambda key: confidence.get(key, 1.0) < _CONFIDENT,
    }
    found = [key for key, found_ml in volumes_ml.items() if found_ml]
    flags = {key: tuple(flag for flag, applies in checks.items() if applies(key)) for key in found}
    return {key: words for key, words in flags.items() if words}


def _confidence_warnings(confidence: dict[str, float]) -> list[str]:
    unsure = [f"{structure(key).name} ({value:.0%})" for key, value in confidence.items() if value < _CONFIDENT]
    return [f"low confidence: {', '.join(unsure)}"] if unsure else []


def _is_plausible(item: Structure, found_ml: float, cut: bool) -> bool:
    low, _, high = item.volume_ml or (0.0, 0.0, math.inf)
    return found_ml <= high and (found_ml >= low or cut or item.volume_depends_on_fov or item.kind == "lesion")


def _ml(volume: float) -> str:
    return f"{volume:.1f}" if volume >= 10 else f"{volume:.2g}"
