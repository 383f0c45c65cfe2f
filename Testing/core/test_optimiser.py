"""Matrices learn by Muon, all else by AdamW."""

from __future__ import annotations

from dataclasses import replace
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-37, 1e-24, 1e30])
def test_the_size_of_a_matrix_makes_no_difference(size: float, dtype: torch.dtype) -> None:
    given = matrices(2, 4, 6).to(dtype)
    torch.testing.assert_close(even(given * size), even(given), atol=0.05, rtol=0)


def test_a_matrix_of_zeros_stays() -> None:
    assert even(torch.zeros(2, 3, 4)).eq(0).all()


def test_a_matrix_whose_gradient_is_zero_only_decays() -> None:
    matrix, _ = copies(4, 3)
    muon = optimiser(matrix, matrices=True)
    before = after_steps(muon, matrix).clone()
    matrix.grad = torch.zeros(4, 3)
    muon.step()
    torch.testing.assert_close(matrix.detach(), before * (1 - 0.1 * 0.02))


def test_a_closure_is_asked_first() -> None:
    matrix, _ = copies(4, 3)

    def loss() -> Tensor:
        matrix.grad = None
        value = matrix.square().sum()
        value.backward()
        return value

    muon = optimiser(matrix, matrices=True)
    assert muon.step(loss) == 12
    assert muon.step(loss) < 12


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_a_step_is_that_of_torch(shape: tuple[int, int]) -> None:
    ours, theirs = copies(*shape)
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    moved = after_steps(optimiser(ours, matrices=True), ours)
    torch.testing.assert_close(moved, after_steps(other, theirs), atol=0.002, rtol=0)  # which computes in bfloat16
    assert (moved - 1).abs().max() > 0.05


def test_what_is_no_matrix_learns_by_adamw() -> None:
    ours, theirs = copies(5, 3)
    other = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.02)
    torch.testing.assert_close(after_steps(optimiser(ours), ours), after_steps(other, theirs))


@pytest.mark.parametrize("gate", ["image", "token", "channel"])
def test_matrices_are_the_weights_of_layers_but_for_those_that_decide(gate: str) -> None:
    network = MoESwinUNet(replace(DEMO.network, gate=gate), 3)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    matrix, rest = trained_groups(network, Stage("experts", 1, 1e-3), SPEC, True)
    assert (matrix["matrices"], rest["matrices"]) == (True, False)
    learned, other = ({names[id(parameter)] for parameter in group["params"]} for group in (matrix, rest))
    assert {"encoder.0.0.attn.qkv.weight", "decoder.0.0.ffn.experts.3.fc1.weight", "final_expand.weight"} <= learned
    assert {"head.weight", "encoder.0.0.attn.relative_position_bias_table", "encoder.0.0.attn.qkv.bias"} <= other
    assert {"router.score.weight" if gate == "image" else "encoder.0.0.ffn.gate.weight", "patch_embed.weight"} <= other
    assert learned | other == {name for name, _ in network.named_parameters()} and not learned & other


def test_of_an_added_expert_the_matrices_are_its_own() -> None:
    network = MoESwinUNet(SPEC.network, 4)
    groups = trained_groups(network, Stage("add", 1, 1e-3), SPEC, False)
    last = {id(parameter) for parameter in network.expert_parameters(1) if parameter.ndim == 2}
    assert [{id(p) for p in group["params"]} for group in groups if group.get("matrices")] == [last]


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(ValueError, match="'sgd' is unknown; expected one of muon, adamw"):
        replace(DEMO, optimiser="sgd")
