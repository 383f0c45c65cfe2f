"""MoE Swin-UNet: a Swin encoder and decoder whose feed-forward layers are mixtures of modality experts.

Shape suffixes: B image (a slice with its neighbours as channels), S input channel, H and W rows and columns,
C channel, E expert, K class (0 is background).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import NetworkSpec
from .moe import ChannelGateFeedForward, MoEFeedForward, Router, Routing, TokenMoEFeedForward, keep_top_k
from .swin import PatchExpand, PatchMerging, SwinBlock, unfold_pixels

_ROWS = 14  # of tokens at a time through the last layers
_NEGLIGIBLE = 0.01  # weight of an expert in training
AIR = 0.05  # intensity, in [0, 1], up to which a patch shows nothing


class Stage(nn.ModuleList):
    """Swin blocks at one resolution, every second one shifted."""

    def forward(self, x_BHWC: Tensor, routing: Routing | None) -> Tensor:
        """Maps [B, H, W, C] to [B, H, W, C]."""
        for block in self:
            x_BHWC = block(x_BHWC, routing)
        return x_BHWC


class MoESwinUNet(nn.Module):
    """Swin-UNet (Cao et al., 2021) with experts (Jiang and Shen, "M4oE", MICCAI 2024), for input of any size.

    With the image gate the encoder's first stage is shared: the router looks at its output and decides once
    for all later blocks. With the token and the channel gate every block has experts, as in the paper.
    """

    def __init__(self, spec: NetworkSpec, classes: int) -> None:
        """Builds a network with random weights for `classes` classes, background included."""
        super().__init__()
        self.spec = spec
        self.classes = classes
        dims = [spec.embed_dim << stage for stage in range(len(spec.depths))]
        drops = _drop_rates(spec)
        self.patch_embed = nn.Conv2d(spec.channels, dims[0], spec.patch, spec.patch)
        self.patch_norm = nn.LayerNorm(dims[0])
        self.encoder = nn.ModuleList(
            _stage(spec, stage, drops[stage], shared=stage == 0 and spec.gate == "image") for stage in range(len(dims))
        )
        self.merge = nn.ModuleList(PatchMerging(dim) for dim in dims[:-1])
        self.bottleneck_norm = nn.LayerNorm(dims[-1])
        self.router = Router(dims[0], spec.experts) if spec.gate == "image" and spec.experts > 1 else None
        self.expand = nn.ModuleList(PatchExpand(dim) for dim in dims[:0:-1])
        self.skip = nn.ModuleList(nn.Linear(2 * dim, dim) for dim in dims[-2::-1])
        self.decoder = nn.ModuleList(_stage(spec, stage, drops[stage]) for stage in reversed(range(len(dims) - 1)))
        self.decoder_norm = nn.LayerNorm(dims[0])
        self.final_expand = nn.Linear(dims[0], spec.patch**2 * dims[0], bias=False)
        self.final_norm = nn.LayerNorm(dims[0])
        self.head = nn.Linear(dims[0], classes, bias=False)
        self.fixed_weights: tuple[float, ...] | None = None
        self.apply(_initialise)

    def forward(self, x_BSHW: Tensor, weights_BE: Tensor | None = None) -> Tensor:
        """Scores of every class and pixel.

        Args:
            x_BSHW: Slices with their neighbours as channels, intensities in [0, 1].
            weights_BE: Expert weights that overrule the image gate, rows of sum 1; best on the CPU, see `Routing.of`.

        Returns:
            Scores [B, H, W, K] before softmax.
        """
        first_BHWC = self._first_stage(self._embed(x_BSHW))
        return self._segment(x_BSHW, first_BHWC, self._routing(x_BSHW, first_BHWC, weights_BE))

    def forward_gated(
        self, x_BSHW: Tensor, temperature: float = 1.0, weights_BE: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and what the gate says, for training.

        The experts are weighed by the gate itself, from a soft mixture to a sparse one as the temperature falls.

        Source: Nie et al., "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate",
        2021.

        Args:
            x_BSHW: As of `forward`.
            temperature: The gate's logits are divided by it before softmax; weights below 0.01 become 0, so that the
                fewer experts are at work the lower it is.
            weights_BE: Expert weights that overrule the gate's; best on the CPU.

        Returns:
            Scores [B, H, W, K], and the gate's logits [B, E].

        Raises:
            RuntimeError: The network has no image gate.
        """
        first_BHWC = self._first_stage(self._embed(x_BSHW))
        logits_BE = self._gate(x_BSHW, first_BHWC)
        if weights_BE is None:
            soft_BE = (logits_BE / temperature).softmax(-1)
            kept_BE = soft_BE.masked_fill(soft_BE < _NEGLIGIBLE, 0)
            weights_BE = kept_BE / kept_BE.sum(-1, keepdim=True)
        return self._segment(x_BSHW, first_BHWC, Routing.of(weights_BE, x_BSHW.device)), logits_BE

    def _segment(self, x_BSHW: Tensor, first_BHWC: Tensor, routing: Routing | None) -> Tensor:
        """Scores [B, H, W, K] from the first stage on."""
        height, width = x_BSHW.shape[-2:]
        skips = [first_BHWC]
        for merge, stage in zip(self.merge, list(self.encoder)[1:], strict=True):
            skips.append(stage(merge(skips[-1]), routing))
        x_BHWC = self.bottleneck_norm(skips.pop())
        for expand, skip, stage in zip(self.expand, self.skip, self.decoder, strict=True):
            x_BHWC = stage(skip(torch.cat([expand(x_BHWC), skips.pop()], dim=-1)), routing)
        scores_BHWK = self._classify(self.decoder_norm(x_BHWC))
        return unfold_pixels(scores_BHWK, self.spec.patch)[:, :height, :width]

    def _classify(self, x_BHWC: Tensor) -> Tensor:
        """Scores of all pixels of each token, [B, H, W, P * K], some rows at a time: they fit into the cache."""
        rows = [part for image in x_BHWC for part in image.split(_ROWS)] if not torch.is_grad_enabled() else [x_BHWC]
        pixels = (self.final_expand(part).unflatten(-1, (self.spec.patch**2, -1)) for part in rows)
        return torch.cat([self.head(self.final_norm(part)).flatten(-2) for part in pixels]).view(*x_BHWC.shape[:3], -1)

    def gate_logits(self, x_BSHW: Tensor) -> Tensor:
        """The image gate's logits [B, E] before softmax, from the shared first stage alone.

        Raises:
            RuntimeError: The network has no image gate.
        """
        return self._gate(x_BSHW, self._first_stage(self._embed(x_BSHW)))

    def _gate(self, x_BSHW: Tensor, first_BHWC: Tensor) -> Tensor:
        if self.router is None:
            raise RuntimeError("this network has no image gate: it is dense, or gated per token or channel")
        return self.router(first_BHWC, self._seen(x_BSHW))

    def select_experts(self, weights: tuple[float, ...]) -> MoESwinUNet:
        """The network with fixed expert weights, without experts of weight zero; its tensors are shared.

        One remaining expert gives the plain dense network, at its cost.

        Raises:
            ValueError: The weights do not fit the experts, or the channel gate has none to select.
        """
        chosen, total = [index for index, weight in enumerate(weights) if weight > 0], sum(weights)
        if len(weights) != self.spec.experts or min(weights) < 0 or not 0 < total < math.inf:
            raise ValueError(
                f"expected {self.spec.experts} expert weights, none below 0 and their sum above, got {weights}"
            )
        if self.spec.gate == "channel" and self.spec.experts > 1:
            raise ValueError("the channel gate always uses all experts; none can be selected")
        if self.spec.gate == "token" and len(chosen) > 1:
            raise ValueError("a token gate weighs experts per token; exactly one expert can be selected")
        selected = _shallow_copy(self)
        selected.spec = replace(self.spec, experts=len(chosen), top_k=0)
        for block in _blocks(selected):
            if len(block.ffn.experts) > 1:
                block.ffn = _with_experts(block.ffn, chosen)
        selected.router = None
        selected.fixed_weights = tuple(weights[index] / total for index in chosen) if len(chosen) > 1 else None
        return selected

    def with_classes(self, classes: list[int]) -> MoESwinUNet:
        """The network that scores these classes alone; all other tensors are shared."""
        if classes == list(range(self.classes)):
            return self
        reduced = _shallow_copy(self)
        reduced.classes = len(classes)
        reduced.head = nn.Linear(self.head.in_features, len(classes), bias=False, device="meta")
        reduced.head.weight = nn.Parameter(self.head.weight[classes], requires_grad=False)
        return reduced

    def cast(self, dtype: torch.dtype) -> None:
        """Computes in `dtype` from now on, but for the gates: they decide in float32."""
        self.to(dtype)
        for module in self.modules():
            if isinstance(module, Router):
                module.float()
            elif isinstance(module, TokenMoEFeedForward):
                module.gate.float()

    def expert_parameters(self, index: int) -> list[nn.Parameter]:
        """Parameters of the expert `index` in all blocks that have several."""
        mixtures = [block.ffn for block in _blocks(self) if len(block.ffn.experts) > 1]
        return [parameter for ffn in mixtures for parameter in ffn.experts[index].parameters()]

    def _pad(self, x_BSHW: Tensor) -> Tensor:
        multiple = self.spec.patch << (len(self.spec.depths) - 1)
        height, width = x_BSHW.shape[-2:]
        return F.pad(x_BSHW, (0, -width % multiple, 0, -height % multiple))

    def _embed(self, x_BSHW: Tensor) -> Tensor:
        x = self._pad(x_BSHW).to(self.patch_embed.weight.dtype)
        return self.patch_norm(self.patch_embed(x).permute(0, 2, 3, 1))

    def _seen(self, x_BSHW: Tensor) -> Tensor:
        """Whether a patch is brighter than air: [B, H, W] in tokens."""
        return F.avg_pool2d(self._pad(x_BSHW).mean(1, keepdim=True), self.spec.patch)[:, 0] > AIR

    def _first_stage(self, x_BHWC: Tensor) -> Tensor:
        return self.encoder[0](x_BHWC, None)

    def _routing(self, x_BSHW: Tensor, first_BHWC: Tensor, weights_BE: Tensor | None) -> Routing | None:
        if self.spec.experts == 1 or self.spec.gate != "image":
            return None
        if weights_BE is None and self.fixed_weights is not None:
            weights_BE = first_BHWC.new_tensor(self.fixed_weights).expand(len(first_BHWC), -1)
        if weights_BE is None:
            weights_BE = keep_top_k(self._gate(x_BSHW, first_BHWC).softmax(-1), self.spec.top_k)
        return Routing.of(weights_BE, x_BSHW.device)


def upcycle(dense: MoESwinUNet, spec: NetworkSpec) -> MoESwinUNet:
    """A mixture whose experts all start as copies of the dense network's layers, so it computes the same.

    Source: Komatsuzaki et al., "Sparse Upcycling", ICLR 2023.

    Raises:
        ValueError: `dense` has several experts, or the specs differ in more than experts and gate.
    """
    expected = replace(spec, experts=1, gate=dense.spec.gate, top_k=0)
    if replace(dense.spec, top_k=0) != expected:
        raise ValueError(f"expected a dense network like {expected}, got {dense.spec}")
    if spec.gate == "channel":
        raise ValueError("the channel gate cannot reproduce a dense network: it has no weights over experts")
    network = MoESwinUNet(spec, dense.classes)
    network.load_state_dict(
        {key: value for key, value in dense.state_dict().items() if ".experts." not in key}, strict=False
    )
    for block, source in zip(_blocks(network), _blocks(dense), strict=True):
        for expert in block.ffn.experts:
            expert.load_state_dict(source.ffn.experts[0].state_dict())
    return network


def append_expert(network: MoESwinUNet, like: int, classes: int, handicap: float = 0.0) -> MoESwinUNet:
    """A top-1 mixture with one expert more and `classes` classes in all; what it had computes the same, bit for bit.

    The new expert and its row of the gate start as copies of those of expert `like`, new classes at zero. The row's
    bias is less by `handicap`, so that a gate that will not be trained never prefers the new expert.

    Raises:
        ValueError: The network has several experts without a top-1 image gate, or would lose classes.
    """
    spec, experts = network.spec, network.spec.experts
    if spec.gate != "image" or (experts > 1 and spec.top_k != 1) or classes < network.classes:
        raise ValueError("an expert can be added where an image gate keeps one expert or there is one, and classes too")
    extended = MoESwinUNet(replace(spec, experts=experts + 1, top_k=1), classes)
    old, new = network.state_dict(), extended.state_dict()
    if network.router is None:
        new["router.score.weight"].zero_()
        new["router.score.bias"].zero_()[-1] = -handicap
    for key in new if network.router else [key for key in new if not key.startswith("router.")]:
        source = old[key.replace(f".experts.{experts}.", f".experts.{like}.")]
        if key.startswith("router.score."):
            source = torch.cat([source, source[like : like + 1] - (handicap if key.endswith("bias") else 0.0)])
        if key.startswith("head."):
            source = torch.cat([source, source.new_zeros(classes - network.classes, source.shape[1])])
        new[key].copy_(source)
    return extended


def _stage(spec: NetworkSpec, stage: int, drops: list[float], shared: bool = False) -> Stage:
    dim = spec.embed_dim << stage
    return Stage(
        SwinBlock(dim, spec.heads[stage], spec.window, bool(index % 2), _feed_forward(spec, dim, shared), drop)
        for index, drop in enumerate(drops)
    )


def _feed_forward(spec: NetworkSpec, dim: int, shared: bool) -> MoEFeedForward:
    hidden = int(dim * spec.mlp_ratio)
    if spec.experts == 1 or shared:
        return MoEFeedForward(dim, hidden, 1)
    if spec.gate == "token":
        return TokenMoEFeedForward(dim, hidden, spec.experts, spec.top_k)
    if spec.gate == "channel":
        return ChannelGateFeedForward(dim, hidden, spec.experts)
    return MoEFeedForward(dim, hidden, spec.experts)


def _drop_rates(spec: NetworkSpec) -> list[list[float]]:
    """Stochastic depth rises linearly with depth, as in Swin."""
    last = max(1, sum(spec.depths) - 1)
    starts = [sum(spec.depths[:stage]) for stage in range(len(spec.depths))]
    return [
        [spec.drop_path * (start + index) / last for index in range(depth)]
        for start, depth in zip(starts, spec.depths, strict=True)
    ]


def _initialise(module: nn.Module) -> None:
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # a file gives the weights; drawing them there imports torch's compiler, which makes a folder in /tmp
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        # With a bias as large as the weighted input, the norm that follows keeps the patch's brightness.
        nn.init.normal_(module.bias, std=0.5)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _blocks(network: MoESwinUNet) -> list[SwinBlock]:
    return [module for module in network.modules() if isinstance(module, SwinBlock)]


def _with_experts(ffn: MoEFeedForward, chosen: list[int]) -> MoEFeedForward:
    experts = [ffn.experts[index] for index in chosen]
    kept = MoEFeedForward(1, 1, 0)
    kept.experts = nn.ModuleList(experts)
    return kept


def _shallow_copy(network: MoESwinUNet) -> MoESwinUNet:
    """Copies the tree of modules but shares every tensor."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in network.parameters()})
