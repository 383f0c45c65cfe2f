"""Mixture of modality experts: the router weighs experts, and the feed-forward layer adds up what they say.

Shape suffixes: B image, H and W token rows and columns, C channel, E expert, N selected tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """The feed-forward layer of a Swin block (Liu et al., ICCV 2021, section 3.2): linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        """Builds an expert for tokens of `dim` channels with `hidden` channels inside."""
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., C] to [..., C]."""
        return self.fc2(self.act(self.fc1(x)))


@dataclass(frozen=True)
class Routing:
    """One decision per image.

    Attributes:
        weights_BE: Expert weights, each row sums to 1.
        images: Per expert the indices of the images that use it; the same for every layer, so they are found
            once per forward pass.
        runs: Number of images of each expert where every image has one of fixed weight 1 and they lie in the order of
            the experts, as in training; cutting them apart is cheaper than picking them out.
    """

    weights_BE: Tensor
    images: tuple[Tensor, ...]
    runs: tuple[int, ...] | None = None

    @classmethod
    def of(cls, weights_BE: Tensor, device: torch.device | None = None) -> Routing:
        """Routing by these weights; an expert of weight zero is not evaluated.

        Weights that are known on the CPU let nobody wait for the device, by default that of the weights.
        """
        device = device or weights_BE.device
        known_BE = weights_BE.detach().cpu()
        images = tuple(used.nonzero().squeeze(1) for used in (known_BE > 0).unbind(1))
        counts = tuple(len(indices) for indices in images)
        in_order = torch.cat(images).equal(torch.arange(len(known_BE))) and bool((known_BE.amax(1) == 1).all())
        runs = counts if in_order and not weights_BE.requires_grad else None
        return cls(weights_BE.to(device), tuple(indices.to(device) for indices in images), runs)


def keep_top_k(weights: Tensor, top_k: int) -> Tensor:
    """Keeps the `top_k` largest weights of the last axis, renormalised to sum 1; 0 keeps all.

    Renormalising keeps the output's scale, so identical experts reproduce the dense layer (Komatsuzaki et
    al., "Sparse Upcycling", ICLR 2023, section 3.1).
    """
    if top_k == 0 or top_k == weights.shape[-1]:
        return weights
    kept = weights.topk(top_k, dim=-1)
    sparse = torch.zeros_like(weights).scatter(-1, kept.indices, kept.values)
    return sparse / sparse.sum(dim=-1, keepdim=True)


class Router(nn.Module):
    """Scores experts by what an image's early features show side by side, wherever there is something to see.

    Means of the early features alone tell CT from MR, but not the contrasts of MR: that a bright spot is fluid or a
    vessel, only what lies around it tells. Two strided convolutions look at that.
    """

    def __init__(self, dim: int, experts: int) -> None:
        """Builds a router for features of `dim` channels."""
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.near = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        self.around = nn.Conv2d(2 * dim, 2 * dim, 3, stride=2, padding=1)
        self.pooled_norm = nn.LayerNorm(4 * dim)
        self.score = nn.Linear(4 * dim, experts)

    def forward(self, features_BHWC: Tensor, seen_BHW: Tensor) -> Tensor:
        """Returns the logits [B, E] in float32.

        Args:
            features_BHWC: Early features.
            seen_BHW: Whether a token shows something; the field of view and padding must not sway the decision.
        """
        with torch.autocast(features_BHWC.device.type, enabled=False):
            shown_BCHW = (self.norm(features_BHWC.float()) * seen_BHW[..., None]).permute(0, 3, 1, 2)
            around_BCHW = F.gelu(self.around(F.gelu(self.near(shown_BCHW))))
            share_B1HW = seen_BHW[:, None, ::4, ::4] + 1e-6  # an empty image counts as a whole
            share_B1HW = share_B1HW / share_B1HW.sum(dim=(2, 3), keepdim=True)
            mean_BC = (share_B1HW * around_BCHW).sum(dim=(2, 3))
            variance_BC = (share_B1HW * (around_BCHW - mean_BC[..., None, None]) ** 2).sum(dim=(2, 3))
            return self.score(self.pooled_norm(torch.cat([mean_BC, (variance_BC + 1e-6).sqrt()], dim=1)))


class MoEFeedForward(nn.Module):
    """Experts in the place of a Swin block's feed-forward layer, weighed once per image (`Routing`)."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        """Builds `experts` equal layers; one expert is the dense layer."""
        super().__init__()
        self.experts = nn.ModuleList(Expert(dim, hidden) for _ in range(experts))

    def forward(self, x_BHWC: Tensor, routing: Routing | None) -> Tensor:
        """Adds up weight times expert over the experts that each image uses."""
        if len(self.experts) == 1:
            return self.experts[0](x_BHWC)
        if routing is None:
            raise RuntimeError("several experts need a routing decision; none was given")
        if routing.runs is not None:
            parts = zip(self.experts, x_BHWC.split(routing.runs), strict=True)
            return torch.cat([expert(part) for expert, part in parts if len(part)])
        out_BHWC: Tensor | None = None
        for expert, weights_B, images in zip(self.experts, routing.weights_BE.unbind(1), routing.images, strict=True):
            if len(images) == 0:
                continue
            said = expert(x_BHWC[images]) * weights_B[images, None, None, None].to(x_BHWC.dtype)
            start = x_BHWC.new_zeros(x_BHWC.shape, dtype=said.dtype) if out_BHWC is None else out_BHWC
            out_BHWC = start.index_add(0, images, said.to(start.dtype))
        if out_BHWC is None:
            raise RuntimeError("the routing gives every expert weight zero")
        return out_BHWC


class TokenMoEFeedForward(MoEFeedForward):
    """The gate that the M4oE paper describes (Jiang and Shen, MICCAI 2024), per block and token."""

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int) -> None:
        """Builds the experts and a linear gate over them."""
        super().__init__(dim, hidden, experts)
        self.gate = nn.Linear(dim, experts)
        self.top_k = top_k

    def forward(self, x_BHWC: Tensor, routing: Routing | None) -> Tensor:
        """Adds up weight times expert per token; `routing` is not used."""
        with torch.autocast(x_BHWC.device.type, enabled=False):
            weights_NE = keep_top_k(self.gate(x_BHWC.float()).softmax(-1), self.top_k).flatten(0, 2)
        x_NC = x_BHWC.flatten(0, 2)
        out_NC: Tensor | None = None
        for expert, weights_N in zip(self.experts, weights_NE.unbind(1), strict=True):
            tokens = (weights_N.detach() > 0).nonzero().squeeze(1)
            said = expert(x_NC[tokens]) * weights_N[tokens, None].to(x_NC.dtype)
            start = x_NC.new_zeros(x_NC.shape, dtype=said.dtype) if out_NC is None else out_NC
            out_NC = start.index_add(0, tokens, said.to(start.dtype))
        assert out_NC is not None  # a network has at least one expert
        return out_NC.view_as(x_BHWC)


class ChannelGateFeedForward(MoEFeedForward):
    """The gate of M4oE's released code, for comparison: a softmax over channels times the sum of all experts.

    It selects no expert and shrinks the branch by about 1 / C.
    """

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        """Builds the experts and the channel gate."""
        super().__init__(dim, hidden, experts)
        self.gate = nn.Linear(dim, dim)

    def forward(self, x_BHWC: Tensor, routing: Routing | None) -> Tensor:
        """Multiplies the sum of all experts by the channel weights; `routing` is not used."""
        weights_BHWC = self.gate(x_BHWC).softmax(-1)
        return weights_BHWC * torch.stack([expert(x_BHWC) for expert in self.experts]).sum(0)
