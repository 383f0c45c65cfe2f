"""What a model is: network, input grid, experts, structures and provenance, as JSON in the model's header.

Reading needs the standard library alone, so a panel or `m4oe models` lists models before torch is loaded.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .labels import did_you_mean

FORMAT_VERSION = 1
METADATA_KEY = "m4oe"
DEFAULT_MODEL = "m4oe-demo"
GATES = ("image", "token", "channel")
INTENSITY_KINDS = ("window", "percentile")
_SMALLEST_CROP = 4
_MOST_STRUCTURES = 255  # as labels are bytes and 0 is the background
_HEADER_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True)
class NetworkSpec:
    """Sizes of a `MoESwinUNet`; the defaults are those of Swin-UNet (Swin-T widths, two blocks per stage).

    Attributes:
        gate: "image" weighs the experts once per image after the shared first stage; "token" is the
            per-block, per-token gate of the M4oE paper; "channel" is the gate of the paper's released code, a
            softmax over channels that selects no expert, kept as a baseline. One expert makes the dense
            Swin-UNet.
        top_k: Experts kept per decision, their weights renormalised; 0 keeps all (a soft mixture).
    """

    experts: int = 1
    gate: str = "image"
    top_k: int = 0
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    mlp_ratio: float = 4.0
    patch: int = 4
    channels: int = 3
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        """Refuses sizes that no network can have."""
        sizes = (self.experts, self.embed_dim, self.window, self.patch, self.channels, len(self.depths))
        if min(*sizes, *self.depths, *self.heads) < 1 or self.mlp_ratio <= 0 or not 0 <= self.drop_path < 1:
            raise ValueError(f"expected sizes above 0 and a drop_path from 0 to below 1, got {self}")
        if self.gate not in GATES:
            raise ValueError(f"gate is {self.gate!r}; expected one of {', '.join(GATES)}")
        if not 0 <= self.top_k <= self.experts:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (soft) to {self.experts} (the number of experts)")
        if len(self.depths) != len(self.heads):
            raise ValueError(f"depths {self.depths} and heads {self.heads} must name the same number of stages")
        if any((self.embed_dim << stage) % heads for stage, heads in enumerate(self.heads)):
            raise ValueError(f"heads {self.heads} must divide the widths {self.embed_dim} * 2^stage")


@dataclass(frozen=True)
class IntensityRule:
    """How intensities become the network's input in [0, 1].

    Attributes:
        kind: "window" clips to [low, high] (HU); "percentile" clips to these percentiles of the volume's
            non-zero voxels.
        low: Lower bound, HU or percent.
        high: Upper bound, HU or percent.
    """

    kind: str
    low: float
    high: float

    def __post_init__(self) -> None:
        """Refuses an unknown kind or an empty range."""
        if self.kind not in INTENSITY_KINDS:
            raise ValueError(f"intensity kind is {self.kind!r}; expected one of {', '.join(INTENSITY_KINDS)}")
        lowest, highest = (0, 100) if self.kind == "percentile" else (-math.inf, math.inf)
        if not (lowest <= self.low < self.high <= highest) or math.isinf(self.high - self.low):
            raise ValueError(
                f"{self.kind} range is {self.low} to {self.high}; expected low < high, percentiles 0 to 100"
            )


@dataclass(frozen=True)
class ExpertSpec:
    """One expert.

    Attributes:
        name: To choose it by.
        modality: "CT" or "MR": whose intensity rule it needs.
        structures: Keys that it learned to find; none for all of the model's.
    """

    name: str
    modality: str
    description: str = ""
    structures: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """Everything that is needed to rebuild a model and to judge whether to trust it.

    Attributes:
        structures: Canonical keys; the label value of `structures[n]` is n + 1.
        pixel_mm: In-plane spacing of the canonical grid.
        slice_mm: Slice spacing of the canonical grid; thicker slices stay as they are.
        crop: Pixels along a side of a training image; larger slices are segmented in parts of it. 0: always whole.
        intensity: Rule per modality.
        training: What is known of it; "scored_cases" is how many cases of each expert the scores come from.
        scores: Dice per expert and structure on cases that training never saw.
    """

    name: str
    version: str
    network: NetworkSpec
    structures: tuple[str, ...]
    experts: tuple[ExpertSpec, ...]
    intensity: Mapping[str, IntensityRule]
    pixel_mm: float
    slice_mm: float
    crop: int = 0
    description: str = ""
    limits: str = ""
    licence: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuses a spec whose parts contradict each other."""
        if len(self.experts) != self.network.experts:
            raise ValueError(f"{len(self.experts)} experts are named but the network has {self.network.experts}")
        if len({expert.name for expert in self.experts}) < len(self.experts):
            raise ValueError(f"expert names repeat: {', '.join(self.expert_names)}")
        if not self.structures or len(set(self.structures)) < len(self.structures):
            raise ValueError(f"structures must be non-empty and distinct, not {self.structures}")
        if len(self.structures) > _MOST_STRUCTURES:
            raise ValueError(f"{len(self.structures)} structures are named; a model has at most {_MOST_STRUCTURES}")
        for expert in self.experts:
            self.labels_of(expert.structures)
        missing = sorted({expert.modality for expert in self.experts} - set(self.intensity))
        if missing:
            raise ValueError(f"no intensity rule for the modality {', '.join(missing)} of an expert")
        if not (0 < self.pixel_mm < math.inf and 0 < self.slice_mm < math.inf):
            raise ValueError(f"spacing {self.pixel_mm} x {self.slice_mm} mm must be positive")
        if self.crop and self.crop < _SMALLEST_CROP:
            raise ValueError(f"training images of {self.crop} pixels are too small; expected {_SMALLEST_CROP} or more")

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names in the order of the gate's weights."""
        return tuple(expert.name for expert in self.experts)

    @property
    def label_keys(self) -> dict[int, str]:
        """Structure key by label value."""
        return dict(enumerate(self.structures, start=1))

    def expert_index(self, name: str) -> int:
        """Position of the expert called `name`, in letters of any case.

        Raises:
            ValueError: No expert has that name.
        """
        names = [other.lower() for other in self.expert_names]
        if name not in self.expert_names and name.lower() not in names:
            hint = did_you_mean(name, self.expert_names)
            raise ValueError(f"expert {name!r} is unknown{hint}; {self.name} has: {', '.join(self.expert_names)}")
        return self.expert_names.index(name) if name in self.expert_names else names.index(name.lower())

    def labels_of(self, keys: Sequence[str]) -> list[int]:
        """Label values of the structures `keys`.

        Raises:
            ValueError: A key is not one of this model's structures.
        """
        unknown = [key for key in keys if key not in self.structures]
        if unknown:
            hinted = ", ".join(f"{key}{did_you_mean(key, self.structures)}" for key in unknown)
            raise ValueError(f"structure {hinted} is unknown; {self.name} has: {', '.join(self.structures)}")
        return [self.structures.index(key) + 1 for key in keys]

    def classes_of(self, experts: Iterable[int]) -> list[int]:
        """Label values that any of these experts, by position, learned to find, and 0 for the background."""
        known = [set(self.labels_of(self.experts[index].structures or self.structures)) for index in experts]
        return sorted({0}.union(*known))

    def to_json(self) -> str:
        """The spec as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """The spec that `to_json` wrote.

        Raises:
            ValueError: The text is not such a spec, or of a newer format.
        """
        values = json.loads(text)
        found = values.get("format_version") if isinstance(values, dict) else None
        if not isinstance(found, int):
            raise ValueError("the model description has no format version")
        if found > FORMAT_VERSION:
            raise ValueError(f"format {found} is newer than {FORMAT_VERSION}, the newest this m4oe reads; update M4oE")
        try:
            values["network"] = NetworkSpec(**_tupled(values["network"]))
            values["experts"] = tuple(ExpertSpec(**_tupled(expert)) for expert in values["experts"])
            values["intensity"] = {key: IntensityRule(**rule) for key, rule in values["intensity"].items()}
            return cls(**_tupled(values))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the model description is incomplete or has unknown fields ({error})") from error


def read_spec(path: Path | str) -> ModelSpec:
    """Reads a model file's description without its tensors.

    The file is safetensors: 8 bytes with the header's length, the header as JSON, then the tensors
    (https://huggingface.co/docs/safetensors).

    Raises:
        ValueError: The file is missing, truncated, not a model, or of a newer format.
    """
    path = Path(path)
    header = _read_header(path)
    metadata = header.get("__metadata__")
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{path} is a safetensors file but not an M4oE model: its header has no model description")
    try:
        return ModelSpec.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def _read_header(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(size - 8, _HEADER_LIMIT) else b""
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; expected a model file (.safetensors)") from error
    try:
        header = json.loads(text)
        tensors = [entry for key, entry in header.items() if key != "__metadata__"]
        announced = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} is not a model file, or is truncated ({size} bytes); expected safetensors with an M4oE description"
        ) from error
    if size != announced:
        raise ValueError(f"{path} is truncated or damaged: it has {size} bytes, its header announces {announced}")
    return header


def _tupled(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def model_folders() -> list[Path]:
    """Where models are looked for: `M4OE_MODELS` (or ~/.m4oe/models), then those that ship with M4oE."""
    own = os.environ.get("M4OE_MODELS")
    return [Path(own) if own else Path.home() / ".m4oe" / "models", Path(__file__).parent / "models"]


def installed_models() -> list[Path]:
    """Model files in the model folders; of two with the same name the user's comes first and is used."""
    return [path for folder in model_folders() for path in sorted(folder.glob("*.safetensors"))]


def find_model(name: Path | str) -> Path:
    """The model file of this path, or the installed model of this name.

    Raises:
        ValueError: There is no such file or installed model.
    """
    path = Path(name)
    if path.suffix == ".safetensors" or path.is_file():
        return path
    models = {found.stem: found for found in reversed(installed_models())}
    if str(name) not in models:
        hint = did_you_mean(str(name), models)
        raise ValueError(
            f"model {str(name)!r} is not installed{hint}; installed: {', '.join(sorted(models)) or 'none'}"
        )
    return models[str(name)]
