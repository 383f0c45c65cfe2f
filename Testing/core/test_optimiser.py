"""Matrices learn by Muon, all else by AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from m4oe.network.unet import MoESwinUNet
from m4oe.training.config import DEMO, Stage
from m4oe.training.optimiser import Muon, even
from m4oe.training.stages import trained_groups
from tiny import SPEC
from torch import Tensor, nn


def matrices(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def after_steps(optimiser: torch.optim.Optimizer, parameter: nn.Parameter, steps: int = 3) -> Tensor:
    for number in range(steps):
        parameter.grad = matrices(*parameter.shape).roll(number, 0)
        optimiser.step()
    return parameter.detach()


def copies(*shape: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))


def optimiser(parameter: nn.Parameter, **group: Any) -> Muon:
    return Muon([{"params": [parameter], "lr": 0.1, **group}], weight_decay=0.02)


@pytest.mark.parametrize("shape", [(2, 6, 6), (1, 4, 9), (3, 9, 4)])
def test_singular_values_become_alike_and_singular_vectors_stay(shape: tuple[int, ...]) -> None:
    given = matrices(*shape)
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    spread = left.mT @ even(given) @ right.mT
    found = spread.diagonal(dim1=1, dim2=2)
    assert found.min() > 0.6 and found.max() < 1.3
    assert values.max() / values.min() > found.max() / found.min()
    torch.testing.assert_close(spread, torch.diag_embed(found), atol=1e-4, rtol=0)


def test_a_matrix_of_zeros_stays() -> None:
    assert even(torch.zeros(2, 3, 4)).eq(0).all()


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_a_step_is_that_of_torch(shape: tuple[int, int]) -> None:
    ours, theirs = copies(*shape)
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    moved = after_steps(optimiser(ours, matrices=True), ours)
    torch.testing.assert_close(moved, after_steps(other, theirs), atol=0.01, rtol=0)  # which computes in bfloat16
    assert (moved - 1).abs().max() > 0.05


def test_what_is_no_matrix_learns_by_adamw() -> None:
    ours, theirs = copies(5, 3)
    other = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.02)
    torch.testing.assert_close(after_steps(optimiser(ours), ours), after_steps(other, theirs))


def test_matrices_are_the_weights_of_layers_but_for_those_that_decide() -> None:
    network = MoESwinUNet(DEMO.network, 3)
    matrix, rest = trained_groups(network, Stage("experts", 1, 1e-3), SPEC, True)
    assert (matrix["matrices"], rest["matrices"]) == (True, False)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    learned, other = ({names[id(parameter)] for parameter in group["params"]} for group in (matrix, rest))
    assert {"encoder.0.0.attn.qkv.weight", "decoder.0.0.ffn.experts.3.fc1.weight", "final_expand.weight"} <= learned
    assert {"head.weight", "router.score.weight", "encoder.0.0.attn.relative_position_bias_table"} <= other
    assert {"encoder.0.0.attn.qkv.bias", "patch_embed.weight"} <= other
    assert learned | other == set(names.values()) and not learned & other
