"""Losses for partly annotated cases and for the gate.

Shape suffixes: B image, H and W row and column, P pixel, K class (0 is background), D step up from part to whole,
E expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..labels import ancestry

Sum = Callable[[Tensor], Tensor]
P = ParamSpec("P")


def in_float32(loss: Callable[Concatenate[Tensor, P], Tensor]) -> Callable[Concatenate[Tensor, P], Tensor]:
    """A loss that computes in float32 whatever the network does.

    Under autocast its products would be in bfloat16, and so would its sums over pixels: 256 + 1 is 256 there.
    """

    @wraps(loss)
    def computed(predicted: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.autocast(predicted.device.type, enabled=False):
            return loss(predicted.float(), *args, **kwargs)

    return computed


def wholes(structures: Sequence[str]) -> Tensor:
    """What each class is part of: [K, D] with the class itself, what it is part of, and so on, then background.

    Args:
        structures: Keys of classes 1, 2 and so on.
    """
    values = {key: value for value, key in enumerate(structures, start=1)}
    chains = [[0], *([*(values[whole] for whole in ancestry(key) if whole in values), 0] for key in structures)]
    longest = max(map(len, chains))
    return torch.tensor([chain + [0] * (longest - len(chain)) for chain in chains])


def known_probabilities(scores_BHWK: Tensor, annotated_BK: Tensor, wholes_KD: Tensor) -> Tensor:
    """Probabilities over what each image's annotators drew.

    A structure that they did not draw counts as the one it is part of (a tumour as liver), or as background: that one
    takes its probability, and it gets none (the marginal loss of Shi et al., Medical Image Analysis 70, 2021).

    Args:
        scores_BHWK: Scores before softmax.
        annotated_BK: Whether class k is annotated in image b; the background is not asked.
        wholes_KD: See `wholes`.
    """
    known_BKD = annotated_BK[:, wholes_KD] | (wholes_KD == 0)
    first_BK1 = known_BKD.int().argmax(-1, keepdim=True)
    target_BK = wholes_KD.expand_as(known_BKD).gather(-1, first_BK1)[..., 0]
    counts_as_BKK = F.one_hot(target_BK, len(wholes_KD)).to(scores_BHWK.dtype)
    return (scores_BHWK.softmax(-1).flatten(1, 2) @ counts_as_BKK).view(scores_BHWK.shape)


@in_float32
def segmentation_loss(
    scores_BHWK: Tensor,
    labels_BHW: Tensor,
    annotated_BK: Tensor,
    wholes_KD: Tensor,
    balance: float = 0.0,
    add_up: Sum = lambda tensor: tensor,
) -> Tensor:
    """Cross-entropy plus one minus the Dice of the batch, over the structures that are in it.

    Dice is summed over the batch, so that a structure that most slices lack does not add a constant.

    Args:
        scores_BHWK: Scores before softmax.
        labels_BHW: Class of each pixel (int64).
        annotated_BK: Whether class k is annotated in image b.
        wholes_KD: See `wholes`.
        balance: A pixel's weight in the cross-entropy is its class's number of pixels to the power of minus this.
            At 0 the background is 95 % of it, and a new network learns nothing else for hundreds of steps.
        add_up: Adds up a tensor over the parts of the batch that other processes hold.
    """
    known_PK = known_probabilities(scores_BHWK, annotated_BK, wholes_KD).flatten(0, 2)
    truth_P = labels_BHW.flatten()
    hit_P = known_PK.gather(1, truth_P[:, None])[:, 0]
    surprise_P = -hit_P.clamp(min=torch.finfo(hit_P.dtype).tiny).log()
    by_class = known_PK.new_zeros(known_PK.shape[1])
    pixels_K = by_class.index_add(0, truth_P, torch.ones_like(hit_P))
    hit_K = by_class.index_add(0, truth_P, hit_P)
    surprise_K = by_class.index_add(0, truth_P, surprise_P)
    pixels_K, hit_K, surprise_K, found_K = add_up(torch.stack([pixels_K, hit_K, surprise_K, known_PK.sum(0)])).unbind()
    weight_K = pixels_K.clamp(min=1).pow(-balance)
    cross_entropy = (weight_K * surprise_K).sum() / (weight_K * pixels_K).sum()
    dice_K = (2 * hit_K + 1) / (found_K + pixels_K + 1)
    present_K = pixels_K > 0
    present_K[0] = False
    share_K = present_K / present_K.sum().clamp(min=1)
    return cross_entropy + ((1 - dice_K) * share_K).sum()


@in_float32
def gate_loss(logits_BE: Tensor, experts_B: Tensor, possible_BE: Tensor, add_up: Sum = lambda tensor: tensor) -> Tensor:
    """Mean cross-entropy of the gate against each image's own expert.

    No loss balances the experts: the batches hold as many images of each already, and pushing images to another
    expert than their modality's would be wrong.

    Args:
        logits_BE: Of the gate.
        experts_B: The expert of each image's modality.
        possible_BE: The experts among which the gate has to choose, as by a header that tells the modality.
        add_up: Adds up a tensor over the parts of the batch that other processes hold.
    """
    logits_BE = logits_BE.masked_fill(~possible_BE, float("-inf"))
    total = F.cross_entropy(logits_BE, experts_B, reduction="sum")
    total, count = add_up(torch.stack([total, total.new_tensor(len(experts_B))])).unbind()
    return total / count


@in_float32
def reconstruction_loss(
    predicted_BHWS: Tensor, images_BSHW: Tensor, hidden_BHW: Tensor, add_up: Sum = lambda tensor: tensor
) -> Tensor:
    """Mean absolute error over hidden pixels (Xie et al., "SimMIM", CVPR 2022, section 3.4)."""
    error_BHW = (predicted_BHWS - images_BSHW.permute(0, 2, 3, 1)).abs().mean(-1)
    total, count = add_up(torch.stack([(error_BHW * hidden_BHW).sum(), hidden_BHW.sum().float()])).unbind()
    return total / count.clamp(min=1)
