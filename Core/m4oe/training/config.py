"""What a training run is: network, grid, data and stages, saved as JSON beside the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ..spec import NetworkSpec

STAGES = ("dense", "experts", "gate", "joint")


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: "dense" trains one network for all modalities, of which every expert starts as a copy; "experts"
            routes every image to its modality's expert; "gate" trains the gate alone to tell modalities apart;
            "joint" trains all together, so that the shared first stage serves the gate as well; a last "gate" fits
            the gate to what that has left.
        steps: Optimiser steps.
        learning_rate: Highest learning rate, reached after the warm-up.
        balance: How much more rare classes weigh in the cross-entropy, see `segmentation_loss`: 0.5 to learn fast,
            0 at the end so that small structures are not drawn too large.
    """

    name: str
    steps: int
    learning_rate: float
    balance: float = 0.5

    def __post_init__(self) -> None:
        """Refuses an unknown stage."""
        if self.name not in STAGES:
            raise ValueError(f"stage {self.name!r} is unknown; expected one of {', '.join(STAGES)}")


@dataclass(frozen=True)
class TrainConfig:
    """A run on phantoms.

    Attributes:
        name: Name of the model.
        pixel_mm: In-plane spacing of the canonical grid.
        slice_mm: Its slice spacing; thicker slices stay as they are.
        crop: Rows and columns of a training image.
        phantoms: Training phantoms per modality.
        unseen: Phantoms per modality that only the final score sees.
        images: Training images per modality and step.
    """

    name: str = "m4oe-demo"
    network: NetworkSpec = NetworkSpec(
        experts=4, top_k=1, embed_dim=32, heads=(2, 4, 8, 16), window=5, mlp_ratio=3.0, drop_path=0.05
    )
    pixel_mm: float = 2.5
    slice_mm: float = 3.0
    crop: int = 160
    phantoms: int = 60
    unseen: int = 5
    images: int = 4
    stages: tuple[Stage, ...] = (
        Stage("dense", 2400, 1.5e-3),
        Stage("experts", 1400, 7e-4),
        Stage("gate", 300, 2e-2),
        Stage("joint", 500, 5e-4, balance=0.0),
        Stage("gate", 400, 2e-2),
    )
    weight_decay: float = 0.02
    seed: int = 0

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps(asdict(self), indent=2)


DEMO = TrainConfig()
QUICK = TrainConfig(
    name="m4oe-quick",
    network=NetworkSpec(experts=4, top_k=1, embed_dim=24, depths=(2, 2, 2), heads=(2, 4, 8), window=5, mlp_ratio=2.0),
    pixel_mm=5.0,
    slice_mm=5.0,
    crop=80,
    phantoms=8,
    unseen=2,
    stages=(
        Stage("dense", 320, 2e-3),
        Stage("experts", 140, 1e-3),
        Stage("gate", 100, 2e-2),
        Stage("joint", 120, 1e-3, balance=0.0),
        Stage("gate", 200, 2e-2),
    ),
)
