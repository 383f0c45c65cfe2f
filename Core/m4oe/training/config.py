"""What a training run is: network, grid, data and stages, saved as JSON beside the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from ..spec import NetworkSpec

OPTIMISERS = ("muon", "adamw")
STAGES = ("pretrain", "dense", "experts", "gate", "joint", "add")


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: "pretrain" fills in hidden parts of images, which needs no labels; "dense" trains one network for all
            modalities, of which every expert starts as a copy; "experts" routes every image to its modality's expert,
            and the gate learns beside them to tell modalities apart; "gate" trains the gate alone; "joint" trains all
            together, the experts weighed by the gate itself, at first softly and at the end nearly as sparsely as
            prediction does; a last "gate" fits the gate to what that has left. Without "pretrain" and "dense" the
            experts start at random. "add" trains the last expert of a model alone, with its row of the gate and the
            classes that no other expert knows.
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
        if self.steps < 1 or self.learning_rate <= 0:
            raise ValueError(f"expected steps and a learning rate above 0, got {self}")


def addition_stages(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages that add an expert to a model: as many steps as a new model's experts learn."""
    return tuple(replace(stage, name="add") for stage in stages if stage.name in ("experts", "joint"))


def pretrained_stages(stages: tuple[Stage, ...], steps: int) -> tuple[Stage, ...]:
    """The stages with so many steps of pretraining before them."""
    return (
        Stage("pretrain", steps, stages[0].learning_rate),
        *(stage for stage in stages if stage.name != "pretrain"),
    )


@dataclass(frozen=True)
class TrainConfig:
    """A run, whatever its data.

    Attributes:
        name: Name of the model.
        pixel_mm: In-plane spacing of the canonical grid.
        slice_mm: Its slice spacing; thicker slices stay as they are.
        crop: Rows and columns of a training image.
        images: Training images per modality and step, of all processes together.
        optimiser: "muon" or "adamw", see `Muon`: fewer steps to the same loss, or cheaper ones.
        validate_every: Steps between validations on whole volumes; 0 validates never.
        patience: Validations without a better score after which a stage ends; 0 for never.
        checkpoint_every: Steps between checkpoints.
    """

    name: str = "m4oe-demo"
    network: NetworkSpec = NetworkSpec(
        experts=4, top_k=1, embed_dim=32, heads=(2, 4, 8, 16), window=5, mlp_ratio=3.0, drop_path=0.05
    )
    pixel_mm: float = 2.5
    slice_mm: float = 3.0
    crop: int = 160
    images: int = 4
    stages: tuple[Stage, ...] = (
        Stage("dense", 2400, 1.5e-3),
        Stage("experts", 1400, 7e-4),
        Stage("gate", 300, 2e-3),
        Stage("joint", 500, 5e-4, balance=0.0),
        Stage("gate", 400, 2e-3),
    )
    optimiser: str = "muon"
    weight_decay: float = 0.02
    seed: int = 0
    validate_every: int = 0
    patience: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Refuses an unknown optimiser, and an order of stages that would throw away what was learned."""
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser {self.optimiser!r} is unknown; expected one of {', '.join(OPTIMISERS)}")
        names = [stage.name for stage in self.stages]
        order = [min(STAGES.index(name), 2) for name in names]
        if not names or order != sorted(order):
            raise ValueError(f"stages {names} are out of order; pretrain comes first, dense before the experts")
        if "add" in names and set(names) != {"add"}:
            raise ValueError(f"stages {names} would train what an added expert must leave as it is; use add alone")
        if self.network.gate != "image" and "gate" in names:
            raise ValueError(f"a {self.network.gate} gate is trained with the experts; leave out the stage gate")
        if self.network.gate == "channel" and order[0] < 2:
            raise ValueError("a channel gate cannot start from a dense network; begin with the stage experts or joint")

    def steps_before(self, number: int) -> int:
        """Steps of the stages before this one."""
        return sum(stage.steps for stage in self.stages[:number])

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
    validate_every=100,
    stages=(
        Stage("dense", 320, 2e-3),
        Stage("experts", 140, 1e-3),
        Stage("gate", 100, 3e-3),
        Stage("joint", 120, 1e-3, balance=0.0),
        Stage("gate", 300, 3e-3),
    ),
)
# For data sets; the number of experts is that of the data.
SMALL = replace(DEMO, name="m4oe", images=4, validate_every=400, checkpoint_every=100)
FULL = TrainConfig(
    name="m4oe",
    network=NetworkSpec(experts=1, top_k=1, drop_path=0.2),
    pixel_mm=1.5,
    slice_mm=3.0,
    crop=224,
    images=12,
    stages=(
        Stage("dense", 40_000, 5e-4),
        Stage("experts", 20_000, 3e-4),
        Stage("gate", 1000, 1e-3),
        Stage("joint", 10_000, 1e-4, balance=0.0),
        Stage("gate", 1000, 1e-3),
    ),
    optimiser="adamw",
    weight_decay=0.05,
    validate_every=2000,
    patience=8,
    checkpoint_every=500,
)
# What the paper describes: pretraining by reconstruction, an expert for each modality in every block, a gate per block
# and token that weighs all of them. It does not tell the steps: there are as many as of `FULL`.
PAPER = replace(
    FULL,
    network=replace(FULL.network, gate="token", top_k=0),
    stages=(
        Stage("pretrain", 40_000, 5e-4),
        Stage("experts", 20_000, 3e-4),
        Stage("joint", 12_000, 1e-4, balance=0.0),
    ),
)
PRESETS = {"quick": QUICK, "small": SMALL, "paper": PAPER, "full": FULL}
