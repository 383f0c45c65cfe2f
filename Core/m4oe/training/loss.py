"""Losses for partly annotated cases and for the gate.

Shape suffixes: B image, H and W row and column, K class (0 is background), E expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def known_scores(scores_BHWK: Tensor, annotated_BK: Tensor) -> Tensor:
    """Scores over what each image's annotators drew: what they did not draw counts as background.

    The background takes the summed probability of all unannotated classes, which get none (the marginal loss of
    Shi et al., Medical Image Analysis 70, 2021).

    Args:
        scores_BHWK: Scores before softmax.
        annotated_BK: Whether class k is annotated in image b; the background is not asked.
    """
    if bool(annotated_BK.all()):
        return scores_BHWK
    annotated_B11K = annotated_BK[:, None, None, :].clone()
    annotated_B11K[..., 0] = False
    background_BHW1 = scores_BHWK.masked_fill(annotated_B11K, float("-inf")).logsumexp(-1, keepdim=True)
    structures = scores_BHWK[..., 1:].masked_fill(~annotated_B11K[..., 1:], float("-inf"))
    return torch.cat([background_BHW1, structures], dim=-1)


def segmentation_loss(scores_BHWK: Tensor, labels_BHW: Tensor, annotated_BK: Tensor, balance: float = 0.0) -> Tensor:
    """Cross-entropy plus one minus the Dice of the batch, over the structures that are in it.

    Dice is summed over the batch, so that a structure that most slices lack does not add a constant.

    Args:
        scores_BHWK: Scores before softmax.
        labels_BHW: Class of each pixel (int64).
        annotated_BK: Whether class k is annotated in image b.
        balance: A pixel's weight in the cross-entropy is its class's number of pixels to the power of minus this.
            At 0 the background is 95 % of it, and a new network learns nothing else for hundreds of steps.
    """
    log_PK = known_scores(scores_BHWK.float(), annotated_BK).log_softmax(-1).flatten(0, 2)
    probability_PK = log_PK.exp()
    truth_P1 = labels_BHW.flatten()[:, None]
    classes = scores_BHWK.shape[-1]
    hit_P = probability_PK.gather(1, truth_P1)[:, 0]
    both_K = hit_P.new_zeros(classes).index_add(0, truth_P1[:, 0], hit_P)
    truth_K = torch.bincount(truth_P1[:, 0], minlength=classes).to(hit_P)
    cross_entropy = F.nll_loss(log_PK, truth_P1[:, 0], truth_K.clamp(min=1).pow(-balance))
    dice_K = (2 * both_K + 1) / (probability_PK.sum(0) + truth_K + 1)
    present_K = truth_K > 0
    present_K[0] = False
    share = present_K / present_K.sum().clamp(min=1)
    return cross_entropy + ((1 - dice_K) * share).sum()


def gate_loss(logits_BE: Tensor, experts_B: Tensor) -> Tensor:
    """Cross-entropy of the gate against each image's own expert."""
    return F.cross_entropy(logits_BE, experts_B)
