"""The optimiser: AdamW, with matrices that learn by Muon.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon; Liu et al., "Muon is Scalable for LLM Training", 2025, section 2.2 (steps as
long as those of AdamW, so that both go with one learning rate).

Shape suffixes: M matrix, R and C its rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MOMENTUM = 0.95
_POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of Jordan: the steepest at 0, so that few iterations do
_ITERATIONS = 5
_LENGTH = 0.2  # root mean square of what AdamW changes, per learning rate


class Muon(torch.optim.AdamW):
    """AdamW but for groups with "matrices": True, whose steps have all large singular values alike.

    A gradient has few large singular values, whose directions drown the others. With all of them as long a network
    learns more from a step, which costs some products of matrices. `torch.optim.Muon` multiplies in bfloat16 alone, for
    which a processor without it takes many times as long.
    """

    def __init__(self, groups: list[dict[str, Any]], weight_decay: float, dtype: torch.dtype = torch.float32) -> None:
        """Takes over groups of parameters.

        Args:
            groups: Of parameters; those with "matrices": True of matrices alone.
            weight_decay: Per learning rate and step.
            dtype: In which matrices are multiplied.
        """
        super().__init__(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
        self.dtype = dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; AdamW's own looks for its memory of every parameter."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step; the gradients of matrices are gone behind it."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            if group.get("matrices"):
                self._step_matrices(group)
        super().step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[Tensor]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike.setdefault(matrix.shape, []).append(matrix)
        rate = group["lr"]
        for shape, matrices in alike.items():
            ways_MRC = even(torch.stack([self._way(matrix) for matrix in matrices]).to(self.dtype))
            for matrix, way_RC in zip(matrices, ways_MRC.to(matrices[0].dtype), strict=True):
                matrix.mul_(1 - rate * group["weight_decay"]).sub_(way_RC, alpha=rate * _LENGTH * math.sqrt(max(shape)))
                matrix.grad = None  # AdamW leaves it alone

    def _way(self, matrix: Tensor) -> Tensor:
        """The gradient with momentum, a step ahead (Nesterov); none without a gradient, as its length is lost."""
        assert matrix.grad is not None
        memory = self.state[matrix]
        if not memory:
            memory["momentum"] = torch.zeros_like(matrix)
        ahead = matrix.grad.lerp(memory["momentum"].lerp_(matrix.grad, 1 - _MOMENTUM), _MOMENTUM)
        return ahead * matrix.grad.any()


def even(matrices_MRC: Tensor) -> Tensor:
    """The matrices with singular values of 0.6 to 1.3, by iterations of Newton and Schulz.

    Those below 0.002 of the root of the sum of their squares stay smaller.
    """
    rows, columns = matrices_MRC.shape[1:]
    if rows > columns:
        return even(matrices_MRC.mT).mT
    tiny = torch.finfo(matrices_MRC.dtype).tiny
    x_MRC = matrices_MRC / matrices_MRC.abs().amax(dim=(1, 2), keepdim=True).clamp(min=tiny)  # squares of less are 0
    x_MRC = x_MRC / x_MRC.norm(dim=(1, 2), keepdim=True).clamp(min=tiny)
    first, third, fifth = _POLYNOMIAL
    for _ in range(_ITERATIONS):
        square_MRR = x_MRC @ x_MRC.mT
        x_MRC = first * x_MRC + torch.baddbmm(square_MRR, square_MRR, square_MRR, beta=third, alpha=fifth) @ x_MRC
    return x_MRC
