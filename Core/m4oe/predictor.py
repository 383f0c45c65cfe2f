"""Segments volumes with a model: set up once, call many times."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch

from .cleanup import remove_islands
from .geometry import Volume
from .labels import structure
from .network.moe import keep_top_k
from .network.unet import MoESwinUNet
from .package import load_model
from .resample import CANONICAL_AXES, CanonicalVolume, Evidence, LabelPainter, modality_evidence
from .spec import DEFAULT_MODEL, find_model

PRECISIONS = ("auto", "float32", "bfloat16")
_GATE_SLICES = 16
_BATCH = {"cpu": 4, "cuda": 32, "mps": 8}
_SURE = 0.6


class Cancelled(RuntimeError):
    """The user asked to stop; nothing was changed."""


@dataclass(frozen=True)
class Report:
    """What a prediction did and what to watch for.

    Attributes:
        expert_weights: Weights that were used, by expert; equal where the gate decides per token or channel.
        seconds: Wall time by phase.
        peak_memory_mib: Highest memory of the process (on a GPU: of its allocations) seen in each phase.
        volumes_ml: Volume of each structure that was found.
        warnings: Sentences for the user.
    """

    model: str
    device: str
    precision: str
    expert_weights: dict[str, float]
    seconds: dict[str, float]
    peak_memory_mib: dict[str, float]
    volumes_ml: dict[str, float]
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(asdict(self), indent=2)


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
            precision: "float32", "bfloat16", or "auto": bfloat16 where a trial run shows that it is faster.

        Raises:
            ValueError: The model, device or precision does not exist or cannot be used.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is unknown; expected one of {', '.join(PRECISIONS)}")
        self.device = find_device(device)
        self.network, self.spec = load_model(find_model(model), self.device)
        for key in self.spec.structures:
            structure(key)  # cleanup and warnings need it: better refused now than after the work
        self.precision = precision

    @torch.inference_mode()
    def __call__(
        self,
        volume: Volume,
        expert: str = "auto",
        structures: Sequence[str] | None = None,
        progress: Callable[[str, float], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> tuple[Volume, Report]:
        """Segments a volume.

        Args:
            volume: CT in HU or MR, any type, orientation and size.
            expert: "auto" lets the gate decide once for the whole volume; a name overrules it.
            structures: Keys of the structures to keep; None keeps all.
            progress: Called between slabs with the phase and the fraction done in [0, 1].
            cancelled: Asked between slabs; True stops.

        Returns:
            Labels (unsigned; `spec.label_keys` tells which is which) on the volume's own grid, and a report.

        Raises:
            ValueError: The expert or a structure is unknown to the model, or its gate lets no expert be chosen.
            Cancelled: `cancelled` said so.
        """
        keep = self.spec.labels_of(structures) if structures is not None else list(self.spec.label_keys)
        forced = None if expert == "auto" else self.spec.expert_index(expert)
        phases = _Phases(self.device)
        progress = progress or (lambda phase, fraction: None)
        progress("prepare", 0.0)
        with phases.watched():
            with phases("prepare"):
                evidence = modality_evidence(volume)
                canonical = self._canonical(volume, evidence, forced)
            with phases("route"):
                weights, doubts = self._route(canonical, evidence, forced)
                network = self._select(weights, forced)
                precision = self._choose_precision(network, canonical)
            found = np.zeros(volume.array.shape, np.uint8 if len(self.spec.structures) < 256 else np.uint16)
            labels = Volume(found, volume.grid).to_axes(CANONICAL_AXES).array
            for fraction in self._paint(network, precision, canonical, labels, phases):
                progress("segment", fraction)
                if cancelled is not None and cancelled():
                    raise Cancelled("segmentation was cancelled; nothing was written")
            with phases("cleanup"):
                counts = self._clean(labels, keep, volume.grid.voxel_ml)
        volumes = {self.spec.label_keys[label]: count * volume.grid.voxel_ml for label, count in counts.items()}
        cut = [self.spec.label_keys[label] for label in _labels_at_border(labels)]
        warnings = (*volume.warnings, *doubts, *_volume_warnings(volumes, cut))
        return Volume(found, volume.grid, volume.name), self._report(phases, precision, weights, volumes, warnings)

    def _report(
        self,
        phases: _Phases,
        precision: torch.dtype,
        weights: tuple[float, ...],
        volumes_ml: dict[str, float],
        warnings: tuple[str, ...],
    ) -> Report:
        return Report(
            model=f"{self.spec.name} {self.spec.version}",
            device=str(self.device),
            precision=str(precision).removeprefix("torch."),
            expert_weights=dict(zip(self.spec.expert_names, weights, strict=True)),
            seconds=dict(phases.seconds),
            peak_memory_mib=dict(phases.memory),
            volumes_ml=volumes_ml,
            warnings=warnings,
        )

    def _canonical(self, volume: Volume, evidence: Evidence, forced: int | None) -> CanonicalVolume:
        """The volume under the intensity rule of the forced expert, or else of what the volume seems to be."""
        modality = self.spec.experts[forced].modality if forced is not None else evidence.modality
        rule = self.spec.intensity.get(modality) or next(iter(self.spec.intensity.values()))
        return CanonicalVolume(volume, self.spec.pixel_mm, self.spec.slice_mm, rule, evidence.offset, self.device)

    def _route(
        self, canonical: CanonicalVolume, evidence: Evidence, forced: int | None
    ) -> tuple[tuple[float, ...], list[str]]:
        """Expert weights for the whole volume, and what the user should know about the choice.

        A modality that the header or HU prove restricts the gate to its experts.
        """
        names, doubts = self.spec.expert_names, [evidence.doubt] if evidence.doubt else []
        if forced is not None:
            return tuple(float(index == forced) for index in range(len(names))), doubts
        if self.network.router is None:
            known = sorted({expert.modality for expert in self.spec.experts})
            if evidence.certain and evidence.modality not in known:
                doubts.append(
                    f"modality in doubt: its header or HU say {evidence.modality}, "
                    f"but {self.spec.name} was trained for {' and '.join(known)} alone"
                )
            return (1 / len(names),) * len(names), doubts
        count = canonical.shape[0]
        stacks = [
            canonical.stacks(index, index + 1, self.spec.network.channels)
            for index in np.unique(np.linspace(0, count - 1, _GATE_SLICES).round().astype(int)).tolist()
        ]
        logits_E = self.network.gate_logits(torch.cat(stacks)).mean(0)
        free_E = logits_E.softmax(-1)
        fits = [expert.modality == evidence.modality for expert in self.spec.experts]
        if evidence.certain and any(fits):
            logits_E = logits_E.masked_fill(~torch.tensor(fits, device=logits_E.device), float("-inf"))
        weights_E = logits_E.softmax(-1)
        best, free = int(weights_E.argmax()), int(free_E.argmax())
        if self.spec.experts[free].modality != evidence.modality:
            seems = "its header or HU say" if evidence.certain else "its intensities suggest"
            doubts.append(
                f"modality in doubt: {seems} {evidence.modality}, the gate says {names[free]}; "
                f"{names[best]} was used, name another expert if that is wrong"
            )
        elif float(weights_E[best]) < _SURE:
            doubts.append(f"modality in doubt: the gate gives {names[best]} only {float(weights_E[best]):.0%}")
        return tuple(keep_top_k(weights_E, self.spec.network.top_k).tolist()), doubts

    def _select(self, weights: tuple[float, ...], forced: int | None) -> MoESwinUNet:
        """The network reduced to the experts in use; unless forced, token and channel gates keep deciding inside it."""
        if forced is None and self.network.router is None:
            return self.network
        return self.network.select_experts(weights)

    def _choose_precision(self, network: MoESwinUNet, canonical: CanonicalVolume) -> torch.dtype:
        if self.precision == "auto":
            stack = canonical.stacks(0, 1, self.spec.network.channels)
            faster = bfloat16_is_faster(lambda: network(stack), self.device)
            self.precision = "bfloat16" if faster else "float32"
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def _paint(
        self,
        network: MoESwinUNet,
        precision: torch.dtype,
        canonical: CanonicalVolume,
        labels: np.ndarray,
        phases: _Phases,
    ) -> Iterator[float]:
        """Fills `labels` slab by slab; yields the fraction done before each slab and at the end."""
        count, batch = canonical.shape[0], _BATCH[self.device.type]
        painter = LabelPainter(canonical.source.grid.shape, canonical.shape, labels)
        for start in range(0, count, batch):
            yield start / count
            stop = min(start + batch, count)
            with phases("resample"):
                stacks = canonical.stacks(start, stop, self.spec.network.channels)
            with phases("network"):
                scores = _scores(network, stacks, precision)
            with phases("upsample"):
                painter.add(scores)
        yield 1.0

    def _clean(self, labels: np.ndarray, keep: list[int], voxel_ml: float) -> dict[int, int]:
        if len(keep) < len(self.spec.structures):
            kept = np.zeros(len(self.spec.structures) + 1, labels.dtype)
            kept[keep] = keep
            labels[...] = kept[labels]
        return remove_islands(labels, self.spec.label_keys, voxel_ml)


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is the first of CUDA, Apple's MPS and the CPU that is there.

    Raises:
        ValueError: There is no such device on this machine.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise ValueError(f"device {name!r} is not available; this machine has: {', '.join(available)}")
    return torch.device(name)


def _scores(network: MoESwinUNet, stacks_BSHW: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    with torch.autocast(stacks_BSHW.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        return network(stacks_BSHW).float()


def bfloat16_is_faster(run: Callable[[], object], device: torch.device) -> bool:
    """Whether `run` is at least a tenth faster under bfloat16 autocast, from the better of two timed runs each.

    Measured, not assumed: on a processor without its instructions bfloat16 is several times slower.
    """
    seconds = {}
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            run()
            seconds[enabled] = min(_seconds(run, device) for _ in range(2))
    return seconds[True] < 0.9 * seconds[False]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
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


def _volume_warnings(volumes_ml: dict[str, float], cut: list[str]) -> list[str]:
    if not volumes_ml:
        return ["nothing was found: check the field of view, the modality and the model's structures"]
    named = {key: structure(key) for key in volumes_ml}
    warnings = [
        f"{named[key].name} is cut by the field of view; its volume is a lower bound" for key in cut if key in named
    ]
    for key, found in named.items():
        if found.volume_ml is None:
            continue
        low, _, high = found.volume_ml
        may_be_small = key in cut or found.volume_depends_on_fov
        if volumes_ml[key] > high or (volumes_ml[key] < low and not may_be_small):
            warnings.append(
                f"{found.name} has {volumes_ml[key]:.1f} mL, "
                f"outside the {low:g} to {high:g} mL seen in patients: check it"
            )
    return warnings
