"""What each stage of a run learns from, and which weights it changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..network.unet import MoESwinUNet
from ..spec import ModelSpec
from .config import Stage
from .data import Batch
from .loss import Sum, gate_loss, reconstruction_loss, segmentation_loss, wholes

Losses = dict[str, Tensor]
_WARM_UP = 0.05
_HIDDEN, _HIDDEN_PIXELS = 0.6, 16  # share of an image that pretraining hides, in squares of this side
_UNSEEN = -1.0  # what a hidden pixel shows; no intensity is below 0
_COLDEST = 0.1  # temperature of the gate at the end of joint training, from 1: nearly the one expert of prediction
_DECISIONS = ("gate", "head", "score")  # linear layers whose rows are choices, each for itself
_GATE_PACE = 20.0  # how much faster a single row of the gate learns than an expert


class Objective:
    """The losses of a stage."""

    def __init__(self, stage: Stage, spec: ModelSpec, device: torch.device, others: bool, add_up: Sum) -> None:
        """Prepares what all batches share.

        Args:
            stage: Which.
            spec: Of the model that is trained.
            device: Where the batches are.
            others: Whether there are images of several experts, from which an added expert's gate can learn.
            add_up: Adds up a tensor over the parts of the batch that other processes hold.
        """
        self.stage, self.spec, self.others, self.add_up = stage, spec, others, add_up
        modalities = [expert.modality for expert in spec.experts]
        self.alike_EE = torch.tensor([[one == other for other in modalities] for one in modalities])
        self.wholes_KD = wholes(spec.structures).to(device)

    def __call__(self, network: MoESwinUNet, batch: Batch, progress: float) -> Losses:
        """The losses of a batch by name, whose sum is to fall.

        Args:
            network: Being trained.
            batch: Of all modalities.
            progress: Part of the stage that is done, in [0, 1).
        """
        match self.stage.name:
            case "pretrain":
                return self._reconstruct(network, batch)
            case "gate":
                return self._gate(network.gate_logits(batch.images_BSHW), batch)
            case "experts" if network.router is not None:
                scores_BHWK, logits_BE = network.forward_gated(batch.images_BSHW, weights_BE=self._own_expert(batch))
                return self._segmentation(scores_BHWK, batch) | self._gate(logits_BE, batch)
            case "joint" if network.router is not None:
                temperature = _COLDEST**progress if network.spec.top_k else 1.0
                scores_BHWK, logits_BE = network.forward_gated(batch.images_BSHW, temperature)
                return self._segmentation(scores_BHWK, batch) | self._gate(logits_BE, batch)
            case "add":
                losses = self._segment(network, batch.of_expert(self.spec.network.experts - 1))
                return losses | (self._gate(network.gate_logits(batch.images_BSHW), batch) if self.others else {})
        return self._segment(network, batch)

    def _reconstruct(self, network: MoESwinUNet, batch: Batch) -> Losses:
        hidden_BHW = _hidden(batch.images_BSHW)
        seen_BSHW = batch.images_BSHW.masked_fill(hidden_BHW[:, None], _UNSEEN)
        return {"reconstruction": reconstruction_loss(network(seen_BSHW), batch.images_BSHW, hidden_BHW, self.add_up)}

    def _segment(self, network: MoESwinUNet, batch: Batch) -> Losses:
        """Each image through its modality's expert."""
        return self._segmentation(network(batch.images_BSHW, self._own_expert(batch)), batch)

    def _own_expert(self, batch: Batch) -> Tensor:
        return F.one_hot(batch.experts_B, self.spec.network.experts).float()

    def _segmentation(self, scores_BHWK: Tensor, batch: Batch) -> Losses:
        given = (batch.labels_BHW, batch.annotated_BK, self.wholes_KD, self.stage.balance, self.add_up)
        return {"segmentation": segmentation_loss(scores_BHWK, *given)}

    def _gate(self, logits_BE: Tensor, batch: Batch) -> Losses:
        possible_BE = self.alike_EE[batch.experts_B] | ~batch.told_B[:, None]
        experts_B, possible_BE = (
            known.to(logits_BE.device, non_blocking=True) for known in (batch.experts_B, possible_BE)
        )
        return {"gate": gate_loss(logits_BE, experts_B, possible_BE, self.add_up)}


def trained_groups(network: MoESwinUNet, stage: Stage, spec: ModelSpec, others: bool) -> list[dict[str, Any]]:
    """Marks what a stage trains, and gives it as groups of `Muon`; "scale" multiplies a group's learning rate.

    Args:
        network: All of it, but for "gate", which trains the gate alone, and "add", see `_added_groups`.
        stage: Which.
        spec: Of the model that is trained.
        others: Whether there are images of several experts.
    """
    if stage.name == "add":
        return _added_groups(network, spec, others)
    network.requires_grad_(stage.name != "gate")
    if network.router is not None:
        network.router.requires_grad_()
    return _groups(network, [parameter for parameter in network.parameters() if parameter.requires_grad])


def _groups(network: MoESwinUNet, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The parameters as groups: the matrices of linear layers, and all else."""
    layers = [layer for name, layer in network.named_modules() if name.rpartition(".")[2] not in _DECISIONS]
    matrices = {id(layer.weight) for layer in layers if isinstance(layer, nn.Linear)}
    parts = [[p for p in parameters if (id(p) in matrices) is matrix] for matrix in (True, False)]
    return [{"params": part, "matrices": part is parts[0]} for part in parts if part]


def _added_groups(network: MoESwinUNet, spec: ModelSpec, others: bool) -> list[dict[str, Any]]:
    """The last expert, its classes, and its row of the gate where other experts' images are at hand.

    A model of one expert had no gate, so of two all of it is new. Rows of what was there before get no gradient and do
    not decay, so they stay as they are to the last bit.
    """
    assert network.router is not None  # it has several experts
    network.requires_grad_(False)
    last = spec.network.experts - 1
    rows: list[tuple[Tensor, int, float]] = [(network.head.weight, len(spec.classes_of(range(last))), 1.0)]
    if others:
        gate, row = (network.router.score, last) if last > 1 else (network.router, 0)
        rows += [(parameter, row, _GATE_PACE) for parameter in gate.parameters()]
    groups = _groups(network, [p.requires_grad_() for p in network.expert_parameters(last)])
    for parameter, first, scale in rows:
        parameter.requires_grad_().register_hook(partial(_from_row, first))
        groups.append({"params": [parameter], "weight_decay": 0.0, "scale": scale})
    return groups


def _from_row(first: int, gradient: Tensor) -> Tensor:
    """The gradient, but for the rows before `first`."""
    return torch.cat([torch.zeros_like(gradient[:first]), gradient[first:]])


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up to the stage's rate, then half a cosine to zero."""
    warm_up = max(1, round(_WARM_UP * stage.steps))
    if step < warm_up:
        return stage.learning_rate * (step + 1) / warm_up
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, stage.steps - warm_up)))


def _hidden(images_BSHW: Tensor) -> Tensor:
    """Squares of each image that are hidden: [B, H, W]."""
    batch, _, height, width = images_BSHW.shape
    squares = [-(-size // _HIDDEN_PIXELS) for size in (height, width)]
    hidden = torch.rand(batch, *squares, device=images_BSHW.device) < _HIDDEN
    return hidden.repeat_interleave(_HIDDEN_PIXELS, 1).repeat_interleave(_HIDDEN_PIXELS, 2)[:, :height, :width]
