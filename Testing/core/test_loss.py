from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.training.loss import gate_loss, known_scores, segmentation_loss
from torch import Tensor


def some(seed: int, classes: int = 4, images: int = 2) -> tuple[Tensor, Tensor]:
    """Scores [B, 3, 5, K] and labels [B, 3, 5]."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(images, 3, 5, classes, generator=generator)
    return scores, torch.randint(classes, (images, 3, 5), generator=generator)


def everything(scores: Tensor) -> Tensor:
    return torch.ones(len(scores), scores.shape[-1], dtype=torch.bool)


def dice_loss(probability: Tensor, labels: Tensor) -> float:
    """One minus the mean Dice of the structures that are there, voxel by voxel."""
    losses = []
    for label in sorted(set(labels.flatten().tolist()) - {0}):
        p = [float(value) for value in probability[..., label].flatten()]
        t = [float(value == label) for value in labels.flatten()]
        both = sum(a * b for a, b in zip(p, t, strict=True))
        losses.append(1 - (2 * both + 1) / (sum(p) + sum(t) + 1))
    return sum(losses) / len(losses) if losses else 0.0


def weighted_entropy(scores: Tensor, labels: Tensor, balance: float) -> float:
    """Mean surprise, in which a pixel weighs by the number of its class to the power of minus `balance`."""
    sizes = {label: int((labels == label).sum()) for label in labels.flatten().tolist()}
    weights = torch.tensor([sizes[label] ** -balance for label in labels.flatten().tolist()])
    surprise = F.cross_entropy(scores.flatten(0, 2), labels.flatten(), reduction="none")
    return float((weights * surprise).sum() / weights.sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9999), st.integers(2, 6), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_loss_is_cross_entropy_plus_dice(seed: int, classes: int, balance: float) -> None:
    scores, labels = some(seed, classes)
    expected = weighted_entropy(scores, labels, balance) + dice_loss(scores.softmax(-1), labels)
    found = float(segmentation_loss(scores, labels, everything(scores), balance))
    assert found == pytest.approx(expected, rel=1e-5)


def test_structures_that_are_absent_add_nothing() -> None:
    scores, labels = some(0)
    labels.clamp_(max=1)
    loss = segmentation_loss(scores, labels, everything(scores))
    assert float(loss) == pytest.approx(
        weighted_entropy(scores, labels, 0.0) + dice_loss(scores.softmax(-1), labels), rel=1e-5
    )


def test_background_alone_is_plain_cross_entropy() -> None:
    scores, labels = some(0)
    loss = segmentation_loss(scores, labels * 0, everything(scores))
    assert float(loss) == pytest.approx(float(F.cross_entropy(scores.permute(0, 3, 1, 2), labels * 0)))


def test_a_perfect_answer_costs_nothing() -> None:
    _, labels = some(0)
    scores = 50.0 * F.one_hot(labels, 4).float()
    assert float(segmentation_loss(scores, labels, everything(scores))) == pytest.approx(0, abs=1e-5)


def test_annotated_scores_are_left_as_they_are() -> None:
    scores, _ = some(0)
    assert torch.equal(known_scores(scores, everything(scores)), scores)


def test_background_takes_the_probability_of_what_was_not_drawn() -> None:
    scores, _ = some(3)
    annotated = torch.tensor([[True, True, False, False], [False, True, True, True]])
    found, whole = known_scores(scores, annotated).softmax(-1), scores.softmax(-1)
    torch.testing.assert_close(found[0, ..., 0], whole[0, ..., [0, 2, 3]].sum(-1))
    torch.testing.assert_close(found[0, ..., 1], whole[0, ..., 1])
    assert not found[0, ..., 2:].any()
    torch.testing.assert_close(found[1], whole[1])  # the background is always known


def test_an_organ_that_was_not_drawn_is_not_unlearned() -> None:
    """A voxel labelled background may be class 2 as well as background: the gradient moves both alike."""
    scores = torch.tensor([[[[0.5, 0.0, 3.0]]]], requires_grad=True)
    labels = torch.zeros(1, 1, 1, dtype=torch.int64)
    segmentation_loss(scores, labels, torch.tensor([[True, True, False]])).backward()
    assert scores.grad is not None
    background, drawn, undrawn = scores.grad.flatten().tolist()
    assert undrawn < 0 and background < 0 and drawn > 0
    assert background / undrawn == pytest.approx(math.exp(0.5 - 3.0), rel=1e-5)


def test_an_organ_that_was_drawn_is_learned() -> None:
    scores = torch.tensor([[[[0.5, 0.0, 3.0]]]], requires_grad=True)
    segmentation_loss(scores, torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)).backward()
    assert scores.grad is not None and scores.grad[..., 2] > 0


def test_gradients_are_finite_when_classes_are_unknown() -> None:
    scores, labels = some(5)
    annotated = torch.tensor([[True, True, False, False], [True, True, True, True]])
    labels[0].clamp_(max=1)
    scores.requires_grad_()
    segmentation_loss(scores, labels, annotated).backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and scores.grad.abs().sum() > 0


def test_bfloat16_scores_are_summed_in_float32() -> None:
    scores, labels = some(1)
    low = scores.bfloat16()
    loss = segmentation_loss(low, labels, everything(low))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, segmentation_loss(low.float(), labels, everything(low)))


def test_the_gate_learns_the_expert_of_each_image() -> None:
    logits, experts = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
    rows = [math.exp(2) / (math.exp(2) + 1 + math.exp(-1)), 1 / (2 + math.e)]
    expected = -sum(math.log(row) for row in rows) / 2
    assert float(gate_loss(logits, experts)) == pytest.approx(expected)
