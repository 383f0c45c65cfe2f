from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.training.loss import gate_loss, known_probabilities, reconstruction_loss, segmentation_loss, wholes
from torch import Tensor


def some(seed: int, classes: int = 4, images: int = 2) -> tuple[Tensor, Tensor]:
    """Scores [B, 3, 5, K] and labels [B, 3, 5]."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(images, 3, 5, classes, generator=generator)
    return scores, torch.randint(classes, (images, 3, 5), generator=generator)


FLAT = torch.tensor([[0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [5, 0]])  # structures that are part of nothing


def loss_of(scores: Tensor, labels: Tensor, annotated: Tensor, balance: float = 0.0) -> Tensor:
    return segmentation_loss(scores, labels, annotated, FLAT[: scores.shape[-1]], balance)


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
    found = float(loss_of(scores, labels, everything(scores), balance))
    assert found == pytest.approx(expected, rel=1e-5)


def test_structures_that_are_absent_add_nothing() -> None:
    scores, labels = some(0)
    labels.clamp_(max=1)
    loss = loss_of(scores, labels, everything(scores))
    assert float(loss) == pytest.approx(
        weighted_entropy(scores, labels, 0.0) + dice_loss(scores.softmax(-1), labels), rel=1e-5
    )


def test_background_alone_is_plain_cross_entropy() -> None:
    scores, labels = some(0)
    loss = loss_of(scores, labels * 0, everything(scores))
    assert float(loss) == pytest.approx(float(F.cross_entropy(scores.permute(0, 3, 1, 2), labels * 0)))


def test_a_perfect_answer_costs_nothing() -> None:
    _, labels = some(0)
    scores = 50.0 * F.one_hot(labels, 4).float()
    assert float(loss_of(scores, labels, everything(scores))) == pytest.approx(0, abs=1e-5)


def test_annotated_scores_are_left_as_they_are() -> None:
    scores, _ = some(0)
    found = known_probabilities(scores, everything(scores), FLAT[:4])
    torch.testing.assert_close(found, scores.softmax(-1))


def test_background_takes_the_probability_of_what_was_not_drawn() -> None:
    scores, _ = some(3)
    annotated = torch.tensor([[True, True, False, False], [False, True, True, True]])
    found, whole = known_probabilities(scores, annotated, FLAT[:4]), scores.softmax(-1)
    torch.testing.assert_close(found[0, ..., 0], whole[0, ..., [0, 2, 3]].sum(-1))
    torch.testing.assert_close(found[0, ..., 1], whole[0, ..., 1])
    assert found[0, ..., 2:].max() < 1e-30
    torch.testing.assert_close(found[1], whole[1])  # the background is always known


def test_parts_lead_to_their_wholes() -> None:
    chains = wholes(["liver", "liver_tumor", "spleen"])
    assert chains[:, :3].tolist() == [[0, 0, 0], [1, 0, 0], [2, 1, 0], [3, 0, 0]]


def test_a_tumour_that_was_not_drawn_counts_as_its_organ_where_that_was() -> None:
    scores, _ = some(3)
    annotated = torch.tensor([[True, True, False, True], [False, False, False, True]])
    found = known_probabilities(scores, annotated, wholes(["liver", "liver_tumor", "spleen"]))
    whole = scores.softmax(-1)
    torch.testing.assert_close(found[0, ..., 1], whole[0, ..., 1] + whole[0, ..., 2])
    torch.testing.assert_close(found[1, ..., 0], whole[1, ..., :3].sum(-1))
    torch.testing.assert_close(found[..., 3], whole[..., 3])


@pytest.mark.parametrize(
    ("annotated", "counts_as"),
    [
        (("liver", "spleen"), [0, 1, 1, 0, 0, 0, 0, 7]),
        (("kidney",), [0, 0, 0, 3, 3, 3, 3, 0]),
        (("kidney_left", "kidney_right"), [0, 0, 0, 0, 4, 5, 4, 0]),
        (("liver", "liver_tumor"), [0, 1, 2, 0, 0, 0, 0, 0]),
    ],
)
def test_what_was_not_looked_for_counts_as_its_whole_or_as_background(
    annotated: tuple[str, ...], counts_as: list[int]
) -> None:
    keys = ("liver", "liver_tumor", "kidney", "kidney_left", "kidney_right", "kidney_cyst_left", "spleen")
    known = torch.tensor([[False, *(key in annotated for key in keys)]])
    for one, expected in enumerate(counts_as):
        scores = torch.full((1, 1, 1, 8), -50.0)
        scores[..., one] = 50.0
        found = known_probabilities(scores, known, wholes(keys))
        assert int(found.argmax()) == expected


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """As several processes do: each has half of the images and the sums of all."""
    scores, labels = some(4, images=4)
    known = everything(scores)
    scores.requires_grad_()
    whole = loss_of(scores, labels, known, 0.5)
    whole.backward()
    expected, scores.grad = scores.grad, None
    sums: list[Tensor] = []
    for half in (slice(0, 2), slice(2, 4)):
        segmentation_loss(scores[half], labels[half], known[half], FLAT[:4], 0.5, lambda t: sums.append(t) or t)
    for half, other in ((slice(0, 2), 1), (slice(2, 4), 0)):
        beside = sums[other].detach()
        loss = segmentation_loss(
            scores[half], labels[half], known[half], FLAT[:4], 0.5, lambda t, beside=beside: t + beside
        )
        torch.testing.assert_close(loss, whole)
        loss.backward()
    torch.testing.assert_close(scores.grad, expected)


def test_only_hidden_pixels_are_reconstructed() -> None:
    images = torch.rand(2, 3, 4, 5)
    hidden = torch.zeros(2, 4, 5, dtype=torch.bool)
    hidden[0, 1, 2] = True
    predicted = images.permute(0, 2, 3, 1).clone()
    predicted[1] += 9
    predicted[0, 1, 2] += torch.tensor([0.1, -0.2, 0.3])
    assert float(reconstruction_loss(predicted, images, hidden)) == pytest.approx(0.2)


def test_an_organ_that_was_not_drawn_is_not_unlearned() -> None:
    """A voxel labelled background may be class 2 as well as background: the gradient moves both alike."""
    scores = torch.tensor([[[[0.5, 0.0, 3.0]]]], requires_grad=True)
    labels = torch.zeros(1, 1, 1, dtype=torch.int64)
    loss_of(scores, labels, torch.tensor([[True, True, False]])).backward()
    assert scores.grad is not None
    background, drawn, undrawn = scores.grad.flatten().tolist()
    assert undrawn < 0 and background < 0 and drawn > 0
    assert background / undrawn == pytest.approx(math.exp(0.5 - 3.0), rel=1e-5)


def test_an_organ_that_was_drawn_is_learned() -> None:
    scores = torch.tensor([[[[0.5, 0.0, 3.0]]]], requires_grad=True)
    loss_of(scores, torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)).backward()
    assert scores.grad is not None and scores.grad[..., 2] > 0


def test_gradients_are_finite_when_classes_are_unknown() -> None:
    scores, labels = some(5)
    annotated = torch.tensor([[True, True, False, False], [True, True, True, True]])
    labels[0].clamp_(max=1)
    scores.requires_grad_()
    loss_of(scores, labels, annotated).backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and scores.grad.abs().sum() > 0


def test_bfloat16_scores_are_summed_in_float32() -> None:
    scores, labels = some(1)
    low = scores.bfloat16()
    loss = loss_of(low, labels, everything(low))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_of(low.float(), labels, everything(low)))


def test_the_gate_learns_the_expert_of_each_image() -> None:
    logits, experts = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
    rows = [math.exp(2) / (math.exp(2) + 1 + math.exp(-1)), 1 / (2 + math.e)]
    expected = -sum(math.log(row) for row in rows) / 2
    assert float(gate_loss(logits, experts, torch.ones(2, 3, dtype=torch.bool))) == pytest.approx(expected)


def test_a_gate_that_is_told_the_modality_chooses_among_its_experts() -> None:
    logits, experts = torch.tensor([[2.0, 5.0, -1.0], [0.0, 7.0, 9.0]]), torch.tensor([0, 1])
    possible = torch.tensor([[True, False, True], [False, True, False]])
    expected = (math.log(1 + math.exp(-3)) + 0) / 2
    assert float(gate_loss(logits, experts, possible)) == pytest.approx(expected)


def test_losses_are_the_same_where_the_network_computes_in_bfloat16() -> None:
    """On more pixels than bfloat16 can count."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, 64, 64, 4, generator=generator)
    labels = torch.randint(4, (2, 64, 64), generator=generator)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    hidden = torch.rand(2, 64, 64, generator=generator) < 0.5
    choices = (torch.tensor([0, 1]), torch.ones(2, 2, dtype=torch.bool))

    def losses() -> list[float]:
        loss = segmentation_loss(scores, labels, everything(scores), FLAT[:4], 0.5)
        gate = gate_loss(scores[:, 0, 0, :2], *choices)
        return [float(loss), float(gate), float(reconstruction_loss(scores[..., :3], images, hidden))]

    expected = losses()
    with torch.autocast("cpu", torch.bfloat16):
        assert losses() == expected
