from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, TypeVar
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.network.moe import (
    ChannelGateFeedForward,
    Expert,
    MoEFeedForward,
    Router,
    Routing,
    TokenMoEFeedForward,
    keep_top_k,
)
from m4oe.network.swin import (
    MASKED,
    DropPath,
    SwinBlock,
    attention_mask,
    unfold_pixels,
    window_partition,
    window_reverse,
)
from m4oe.network.unet import MoESwinUNet, append_expert, upcycle
from m4oe.spec import NetworkSpec
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

Module = TypeVar("Module", bound=nn.Module)
SMALL = NetworkSpec(embed_dim=8, depths=(2, 2, 2), heads=(1, 2, 4), window=3, patch=2, channels=1)
IMAGE = replace(SMALL, experts=3)
TOKEN = replace(SMALL, experts=3, gate="token")
CHANNEL = replace(SMALL, experts=3, gate="channel")
CPU = torch.device("cpu")
SWIN_UNET_PARAMETERS = 27_169_572
SWIN_UNET_GFLOP = 12.287
# What timm imports from torchvision, which is not needed for a network and loads with its own torch only.
TORCHVISION = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models.feature_extraction",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def lively(module: Module) -> Module:
    """Weights so large that every layer, bias and expert matters to the output."""
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


def a_network(spec: NetworkSpec) -> MoESwinUNet:
    return lively(MoESwinUNet(spec, 4))


def an_image(batch: int = 1, height: int = 19, width: int = 14) -> Tensor:
    return torch.rand(batch, 1, height, width)


def one_hot(index: int, batch: int = 1) -> Tensor:
    return F.one_hot(torch.full((batch,), index), 3).float()


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gradients(network: MoESwinUNet, expert: int) -> list[Tensor]:
    """Gradients of the expert's parameters that have one."""
    return [parameter.grad for parameter in network.expert_parameters(expert) if parameter.grad is not None]


# --- windows and attention


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_window_reverse_undoes_window_partition(window: int, rows: int, columns: int, batch: int) -> None:
    x = torch.rand(batch, rows * window, columns * window, 2)
    windows = window_partition(x, window)
    assert windows.shape == (batch * rows * columns, window**2, 2)
    assert torch.equal(windows[1 if columns > 1 else 0, 0], x[0, 0, window if columns > 1 else 0])
    assert torch.equal(window_reverse(windows, window, *x.shape[1:3]), x)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 4), st.integers(0, 4))
def test_the_attention_mask_separates_what_the_unrolled_windows_separate(
    height: int, width: int, window: int, down: int, right: int
) -> None:
    size = (height, width)
    shift = (min(down, window - 1) * (height > window), min(right, window - 1) * (width > window))
    padded = [-(-length // window) * window for length in size]
    rows, columns = torch.meshgrid(*map(torch.arange, padded), indexing="ij")
    coordinates = torch.stack([rows, columns], -1).roll((-shift[0], -shift[1]), (0, 1))
    windows = window_partition(coordinates[None], window)
    real = (windows < torch.tensor(size)).all(-1)
    home = (windows - torch.tensor(shift)).div(window, rounding_mode="floor")
    together = (home[:, :, None] == home[:, None, :]).all(-1) & real[:, :, None] & real[:, None, :]
    mask = attention_mask(size, window, shift, CPU, torch.float32)
    mask = torch.zeros(together.shape) if mask is None else mask
    assert torch.equal((mask == 0)[real], together[real])
    assert torch.equal((mask == MASKED)[real], ~together[real])


def test_undivided_maps_need_no_mask() -> None:
    assert attention_mask((6, 9), 3, (0, 0), CPU, torch.float32) is None


def brute_force_block(block: SwinBlock, x_HWC: Tensor) -> Tensor:
    """The block by the definition: each pair of tokens of the map attends if the shifted tiling joins the two."""
    height, width, channels = x_HWC.shape
    window, heads, attn = block.window, block.attn.heads, block.attn
    at = torch.tensor(list(product(range(height), range(width))))
    shift = torch.tensor([window // 2 if block.shifted and size > window else 0 for size in (height, width)])
    tile = (at - shift).div(window, rounding_mode="floor")
    apart = (tile[:, None] != tile[None]).any(-1)
    step = (at[:, None] - at[None] + window - 1).clamp(0, 2 * window - 2)
    bias = attn.relative_position_bias_table[step[..., 0] * (2 * window - 1) + step[..., 1]].permute(2, 0, 1)
    tokens = x_HWC.reshape(-1, channels)
    query, key, value = attn.qkv(block.norm1(tokens)).view(-1, 3, heads, channels // heads).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (channels // heads) ** -0.5 + bias
    weights = scores.masked_fill(apart, -torch.inf).softmax(-1)
    tokens = tokens + attn.proj(torch.einsum("hqk,khd->qhd", weights, value).flatten(1))
    return (tokens + block.ffn.experts[0](block.norm2(tokens))).view_as(x_HWC)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(6, 9), (7, 5), (10, 8), (3, 3), (2, 8), (1, 1)])
def test_a_block_equals_brute_force_attention_at_any_size(size: tuple[int, int], shifted: bool) -> None:
    block = lively(SwinBlock(8, 2, 3, shifted, MoEFeedForward(8, 16, 1), 0))
    x = torch.randn(2, *size, 8)
    assert_close(block(x), torch.stack([brute_force_block(block, image) for image in x]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [56, 64])
def test_the_first_row_does_not_reach_the_opposite_border(size: int) -> None:
    block = lively(SwinBlock(8, 2, 7, True, MoEFeedForward(8, 16, 1), 0))
    x = torch.randn(1, size, 16, 8)
    changed = x.clone()
    changed[:, 0] += 1
    differs = (block(x) != block(changed)).any(-1).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [0, 1, 2]


def test_unfold_pixels_moves_channels_into_space() -> None:
    x = torch.arange(8).view(1, 1, 2, 4)
    assert unfold_pixels(x, 2)[0, :, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_drop_path_drops_whole_images_in_training_only_and_keeps_the_mean() -> None:
    layer, x = DropPath(0.25), torch.ones(4000, 2, 2)
    kept = layer(x)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(kept.amin((1, 2)), kept.amax((1, 2)))
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert layer.eval()(x) is x


# --- one expert more


def test_one_expert_more_leaves_the_others_as_they_were_bit_for_bit() -> None:
    network, images = a_network(replace(IMAGE, top_k=1)), an_image(2)
    extended = append_expert(network, like=1, classes=6).eval().requires_grad_(False)
    for index in range(IMAGE.experts):
        weights = tuple(float(other == index) for other in range(IMAGE.experts))
        before = network.select_experts(weights)(images)
        after = extended.select_experts((*weights, 0.0)).with_classes(list(range(network.classes)))(images)
        assert torch.equal(before, after)
    new = extended.select_experts((0.0,) * IMAGE.experts + (1.0,))(images)
    assert_close(new[..., : network.classes], network.select_experts((0.0, 1.0, 0.0)[: IMAGE.experts])(images))
    assert not new[..., network.classes :].any()


def test_classes_can_be_left_out() -> None:
    network, images = a_network(IMAGE), an_image(2)
    assert_close(network.with_classes([0, 2])(images), network(images)[..., [0, 2]])


def test_a_dense_network_becomes_a_mixture_that_computes_the_same() -> None:
    network, images = a_network(SMALL), an_image(2)
    extended = append_expert(network, 0, 4, handicap=5.0).eval().requires_grad_(False)
    for chosen in ((1.0, 0.0), (0.0, 1.0)):
        assert torch.equal(extended.select_experts(chosen)(images), network(images))
    assert extended.gate_logits(images).tolist() == [[0, -5]] * 2


@pytest.mark.parametrize("spec", [CHANNEL, TOKEN, IMAGE])
def test_a_network_without_a_gate_that_chooses_takes_no_expert(spec: NetworkSpec) -> None:
    with pytest.raises(ValueError, match="where an image gate keeps one expert"):
        append_expert(a_network(spec), 0, 4)


# --- the encoder against timm


@pytest.fixture
def timm_swin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    for name in TORCHVISION:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    return pytest.importorskip("timm.models.swin_transformer").SwinTransformer


def our_key(timm_key: str) -> str:
    names = timm_key.replace("patch_embed.proj", "patch_embed").replace("patch_embed.norm", "patch_norm")
    names = names.replace("mlp.", "ffn.experts.0.").replace("layers.", "encoder.").replace("blocks.", "")
    if "downsample" in names:  # timm has it at the start of the next stage
        return f"merge.{int(names[8]) - 1}{names[20:]}"
    return f"bottleneck_{names}" if names.startswith("norm.") else names


@pytest.mark.parametrize("size", [(224, 224), (224, 448)])
def test_the_encoder_equals_timms_swin_t(timm_swin: Callable[..., Any], size: tuple[int, int]) -> None:
    """At sizes that 7 * 32 does not divide timm lets opposite borders attend to each other (its issue 2438)."""
    depths = (2, 2, 6, 2)
    theirs = timm_swin(img_size=size, window_size=7, depths=depths, num_classes=0).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    ours = MoESwinUNet(NetworkSpec(depths=depths), 2).eval().requires_grad_(False)
    weights = {our_key(key): value for key, value in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [key for key in missing if key.startswith(("patch", "encoder", "merge", "bottleneck"))]
    found: list[Tensor] = []
    for layer in [*ours.encoder, ours.bottleneck_norm]:
        layer.register_forward_hook(lambda _layer, _inputs, output: found.append(output))
    x = torch.rand(1, 3, *size)
    ours(x)
    last, expected = theirs.forward_intermediates(x)
    expected = [*(feature.permute(0, 2, 3, 1) for feature in expected), last]
    for feature, reference in zip(found, expected, strict=True):
        assert_close(feature, reference, atol=1e-4, rtol=1e-5)


# --- size and cost


def gflop(network: nn.Module) -> float:
    """Per slice of 224 x 224; the counter does not see the fused attention of the CPU, so it is taken apart."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 3, 224, 224))
    return counter.get_total_flops() / 1e9


def test_one_expert_has_the_size_and_cost_of_swin_unet() -> None:
    network = MoESwinUNet(NetworkSpec(), 16)
    assert parameters_of(network) == SWIN_UNET_PARAMETERS
    assert gflop(network) == pytest.approx(SWIN_UNET_GFLOP, rel=1e-4)


def test_the_best_of_three_experts_costs_what_one_does() -> None:
    network = MoESwinUNet(NetworkSpec(experts=3, top_k=1), 16)
    assert parameters_of(network) == 58_675_815
    assert gflop(network.select_experts((0, 1, 0))) == pytest.approx(SWIN_UNET_GFLOP, rel=1e-4)


def test_the_gate_costs_a_few_per_cent_of_what_it_decides() -> None:
    network = MoESwinUNet(NetworkSpec(experts=3, top_k=1), 16)
    assert SWIN_UNET_GFLOP < gflop(network) < 1.04 * SWIN_UNET_GFLOP


def test_the_channel_gate_has_the_size_and_twice_the_cost_of_the_original() -> None:
    network = MoESwinUNet(NetworkSpec(experts=3, gate="channel"), 16)
    assert parameters_of(network) == 60_430_500
    assert gflop(network) / SWIN_UNET_GFLOP == pytest.approx(2.12, abs=0.01)


def test_prediction_by_rows_scores_what_training_scores() -> None:
    network, images = a_network(SMALL), torch.rand(2, 1, 70, 24)  # 35 rows of tokens
    with torch.no_grad():
        by_rows = network(images)
    assert_close(by_rows, network(images))


@pytest.mark.parametrize("spec", [SMALL, IMAGE, replace(IMAGE, top_k=1), TOKEN, CHANNEL])
@pytest.mark.parametrize("size", [(1, 1), (31, 33), (37, 50), (224, 224)])
def test_any_input_size_gives_scores_of_that_size(spec: NetworkSpec, size: tuple[int, int]) -> None:
    scores = a_network(spec)(an_image(2, *size))
    assert scores.shape == (2, *size, 4)
    assert scores.isfinite().all()


@pytest.mark.parametrize("spec", [SMALL, IMAGE, replace(IMAGE, top_k=1), TOKEN, replace(TOKEN, top_k=2), CHANNEL])
def test_a_batch_gives_what_its_images_give_one_by_one(spec: NetworkSpec) -> None:
    network, images = a_network(spec), an_image(5)
    alone = torch.cat([network(image[None]) for image in images])
    assert_close(network(images), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", [SMALL, IMAGE, replace(TOKEN, top_k=1), CHANNEL])
def test_autocast_to_bfloat16_stays_close_and_keeps_the_gate_in_float32(spec: NetworkSpec) -> None:
    network, images = MoESwinUNet(spec, 4), an_image(2)
    with torch.autocast("cpu", torch.bfloat16):
        scores = network(images)
        assert network.router is None or network.gate_logits(images).dtype == torch.float32
    scores.float().sum().backward()
    exact = network(images)
    allowed = 0.2 if spec.gate == "token" else 0.05  # 8 bits route some tokens elsewhere
    assert (scores.float() - exact).norm() < allowed * exact.norm()


@pytest.mark.parametrize("spec", [SMALL, IMAGE, TOKEN, CHANNEL])
def test_a_network_cast_to_bfloat16_stays_close_and_its_gates_in_float32(spec: NetworkSpec) -> None:
    network, images = a_network(spec), an_image(2)
    exact = network(images)
    network.cast(torch.bfloat16)
    scores = network(images)
    assert scores.dtype == torch.bfloat16
    assert network.router is None or network.gate_logits(images).dtype == torch.float32
    assert (scores.float() - exact).norm() < 0.1 * exact.norm()


def test_a_network_can_be_trained_after_it_has_predicted() -> None:
    network = MoESwinUNet(replace(IMAGE, window=5), 4)  # no other test has cached anything for this window
    with torch.inference_mode():
        network(an_image())
    network(an_image()).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- routing


@given(st.lists(st.floats(0.01, 1), min_size=4, max_size=4, unique=True), st.integers(0, 4))
def test_top_k_keeps_the_k_largest_weights_in_proportion(values: list[float], top_k: int) -> None:
    weights = torch.tensor([values], dtype=torch.float64)
    weights /= weights.sum()
    kept = keep_top_k(weights, top_k)
    chosen = sorted(range(4), key=values.__getitem__)[-top_k:]
    expected = torch.tensor([[values[index] if index in chosen else 0 for index in range(4)]]).double()
    assert_close(kept, expected / expected.sum())


def test_the_router_weighs_experts_by_mean_and_spread_of_what_it_sees_around() -> None:
    router, features, seen = lively(Router(4, 3)), torch.randn(2, 9, 6, 4), torch.rand(2, 9, 6) > 0.5
    shown = router.norm(features) * seen[..., None]
    near = F.gelu(router.near(shown.permute(0, 3, 1, 2)))
    around = F.gelu(router.around(near)).permute(0, 2, 3, 1)
    kept = [image[mask] for image, mask in zip(around, seen[:, ::4, ::4], strict=True)]
    pooled = torch.stack([torch.cat([cells.mean(0), cells.std(0, correction=0)]) for cells in kept])
    assert_close(router(features, seen), router.score(router.pooled_norm(pooled)), rtol=1e-3, atol=1e-3)


def test_what_shows_nothing_does_not_sway_the_gate() -> None:
    router, features, seen = lively(Router(4, 3)), torch.randn(2, 5, 6, 4), torch.rand(2, 5, 6) > 0.5
    other = torch.where(seen[..., None], features, torch.randn(2, 5, 6, 4))
    assert_close(router(features, seen), router(other, seen), rtol=1e-3, atol=1e-3)


def recorded_weights(network: MoESwinUNet, x: Tensor, **forced: Tensor) -> Tensor:
    """Expert weights [B, E] that the first routed block was given."""
    seen: list[Tensor] = []
    ffn = next(module for module in network.encoder[1].modules() if isinstance(module, MoEFeedForward))
    hook = ffn.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[1].weights_BE))
    network(x, **forced)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_the_image_gates_weights_are_over_experts_and_sum_to_one(top_k: int) -> None:
    network, images = a_network(replace(IMAGE, top_k=top_k)), an_image(4)
    weights = recorded_weights(network, images)
    assert weights.shape == (4, 3)
    assert_close(weights.sum(-1), torch.ones(4))
    assert (weights > 0).sum(-1).tolist() == [top_k or 3] * 4
    assert_close(weights, keep_top_k(network.gate_logits(images).softmax(-1), top_k))


def test_given_weights_overrule_the_gate() -> None:
    assert torch.equal(recorded_weights(a_network(IMAGE), an_image(), weights_BE=one_hot(2)), one_hot(2))


def test_the_image_gate_needs_the_first_stage_alone() -> None:
    network = a_network(IMAGE)
    for stage in [*network.encoder[1:], *network.decoder]:
        stage.register_forward_pre_hook(lambda *_: pytest.fail("a later stage was computed"))
    assert network.gate_logits(an_image(2)).shape == (2, 3)


def test_images_in_the_order_of_their_experts_give_what_they_give_in_any_order() -> None:
    network, images = a_network(IMAGE), an_image(4)
    weights = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]])
    order = torch.tensor([2, 0, 3, 1])
    assert Routing.of(weights).runs == (2, 0, 2) and Routing.of(weights[order]).runs is None
    assert torch.equal(network(images, weights)[order], network(images[order], weights[order]))


def test_what_is_no_single_fixed_choice_has_no_runs() -> None:
    half, learned = torch.tensor([[0.5, 0.5], [0, 1]]), torch.eye(2, requires_grad=True)
    assert Routing.of(half).runs is None and Routing.of(learned).runs is None


@pytest.mark.parametrize("spec", [SMALL, TOKEN, CHANNEL])
def test_a_network_without_an_image_gate_has_no_logits(spec: NetworkSpec) -> None:
    with pytest.raises(RuntimeError, match="no image gate"):
        a_network(spec).gate_logits(an_image())


def test_a_cold_gate_uses_the_expert_that_prediction_uses() -> None:
    network, x = a_network(replace(IMAGE, top_k=1)), an_image(3)
    scores, logits = network.forward_gated(x, 1e-4)
    torch.testing.assert_close(scores, network(x))
    torch.testing.assert_close(logits, network.gate_logits(x))


def test_a_warm_gate_mixes_all_experts_that_weigh_something() -> None:
    network, x = a_network(IMAGE), an_image(3)
    weights = network.gate_logits(x).softmax(-1)
    assert float(weights.min()) > 0.01
    torch.testing.assert_close(network.forward_gated(x, 1.0)[0], network(x, weights))


def test_each_image_gets_the_weighted_sum_of_its_experts() -> None:
    ffn, x = lively(MoEFeedForward(4, 8, 3)), torch.randn(2, 3, 2, 4)
    weights = torch.tensor([[0.2, 0.0, 0.8], [0.5, 0.3, 0.2]])
    said = torch.stack([expert(x) for expert in ffn.experts])
    assert_close(ffn(x, Routing.of(weights)), torch.einsum("be,ebhwc->bhwc", weights, said))
    with pytest.raises(RuntimeError, match="need a routing decision"):
        ffn(x, None)


@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_each_token_gets_the_weighted_sum_of_its_experts(top_k: int) -> None:
    ffn, x = lively(TokenMoEFeedForward(4, 8, 3, top_k)), torch.randn(2, 3, 2, 4)
    weights = keep_top_k(ffn.gate(x).softmax(-1), top_k)
    said = torch.stack([expert(x) for expert in ffn.experts])
    assert_close(ffn(x, None), torch.einsum("bhwe,ebhwc->bhwc", weights, said))


def test_the_token_gate_decides_in_float32_under_autocast() -> None:
    ffn, logits = TokenMoEFeedForward(4, 8, 3, 1), []
    ffn.gate.register_forward_hook(lambda _layer, _inputs, output: logits.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        ffn(torch.randn(1, 2, 2, 4, dtype=torch.bfloat16), None)
    assert logits[0].dtype == torch.float32


# --- upcycling


@pytest.mark.parametrize("spec", [IMAGE, replace(IMAGE, top_k=1), TOKEN, replace(TOKEN, top_k=2)])
def test_upcycled_experts_reproduce_the_dense_network(spec: NetworkSpec) -> None:
    dense, images = a_network(SMALL), an_image(3)
    assert_close(upcycle(dense, spec).eval()(images), dense(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", [IMAGE, TOKEN])
def test_upcycled_experts_learn_different_things(spec: NetworkSpec) -> None:
    network = upcycle(a_network(SMALL), spec)
    network(an_image(3)).square().sum().backward()
    first, second, third = (gradients(network, index)[0] for index in range(3))
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)


def test_an_expert_that_an_image_does_not_use_learns_nothing_from_it() -> None:
    network = MoESwinUNet(IMAGE, 4)
    network(an_image(), one_hot(1)).square().sum().backward()
    assert gradients(network, 0) == gradients(network, 2) == []
    assert len(gradients(network, 1)) == 8 * 4


@pytest.mark.parametrize(
    ("dense", "spec", "complaint"),
    [
        (IMAGE, IMAGE, "expected a dense network"),
        (SMALL, replace(IMAGE, window=4), "expected a dense network"),
        (SMALL, CHANNEL, "channel gate cannot reproduce"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(dense: NetworkSpec, spec: NetworkSpec, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        upcycle(MoESwinUNet(dense, 4), spec)


# --- selecting experts


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_selected_expert_is_the_full_network_forced_to_it(index: int) -> None:
    network, images = a_network(IMAGE), an_image(2)
    selected = network.select_experts(tuple(one_hot(index)[0].tolist()))
    assert_close(selected(images), network(images, one_hot(index, 2)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(selected(images), network(images, one_hot((index + 1) % 3, 2)), atol=0.1)


def test_a_selected_expert_is_a_dense_network_that_shares_memory() -> None:
    network = a_network(IMAGE)
    before = {parameter.data_ptr() for parameter in network.parameters()}
    selected = network.select_experts((0, 1, 0))
    assert {parameter.data_ptr() for parameter in selected.parameters()} < before
    assert selected.spec == replace(SMALL, gate="image")
    MoESwinUNet(selected.spec, 4).load_state_dict(selected.state_dict())
    assert {parameter.data_ptr() for parameter in network.parameters()} == before
    assert network.router is not None


@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (0.0, 0.25, 0.75), (3.0, 1.0, 0.0)])
def test_a_selected_mixture_is_the_full_network_forced_to_those_weights(weights: tuple[float, ...]) -> None:
    network, images = a_network(IMAGE), an_image(2)
    forced = torch.tensor([weights, weights]) / sum(weights)
    selected = network.select_experts(weights)
    assert selected.spec.experts == 3 - weights.count(0)
    assert_close(selected(images), network(images, forced), atol=1e-5, rtol=1e-5)


def test_a_selected_expert_of_a_token_gate_is_that_expert_alone() -> None:
    network, images = a_network(TOKEN), an_image(2)
    gates = [module.gate for module in network.modules() if isinstance(module, TokenMoEFeedForward)]
    for gate in gates:
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([0, 0, 1000]))
    selected = network.select_experts((0, 0, 1))
    assert len(gates) == 10
    assert not any(isinstance(module, TokenMoEFeedForward) for module in selected.modules())
    assert_close(selected(images), network(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "weights", "complaint"),
    [
        (IMAGE, (1.0, 0.0), "expected 3 expert weights"),
        (IMAGE, (0.0, 0.0, 0.0), "expected 3 expert weights"),
        (IMAGE, (2.0, -1.0, 0.0), "none below 0"),
        (IMAGE, (float("nan"), 1.0, 1.0), "expected 3 expert weights"),
        (TOKEN, (0.5, 0.5, 0.0), "exactly one expert"),
        (CHANNEL, (1.0, 0.0, 0.0), "always uses all experts"),
    ],
)
def test_experts_that_cannot_be_selected_are_refused(
    spec: NetworkSpec, weights: tuple[float, ...], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        a_network(spec).select_experts(weights)


# --- the channel gate of the original code: why it is a baseline only


def test_the_channel_gate_is_one_wide_layer_times_channel_weights() -> None:
    ffn, x = lively(ChannelGateFeedForward(4, 8, 3)), torch.randn(2, 3, 2, 4)
    parts = [expert.state_dict() for expert in ffn.experts]
    weights = {key: torch.cat([part[key] for part in parts]) for key in ("fc1.weight", "fc1.bias")}
    weights["fc2.weight"] = torch.cat([part["fc2.weight"] for part in parts], 1)
    weights["fc2.bias"] = torch.stack([part["fc2.bias"] for part in parts]).sum(0)
    wide = Expert(4, 3 * 8)
    wide.load_state_dict(weights)
    assert_close(ffn(x, None), wide(x) * ffn.gate(x).softmax(-1))


def test_equal_experts_under_the_channel_gate_never_part() -> None:
    network = MoESwinUNet(CHANNEL, 4)
    for parameters in zip(*(network.expert_parameters(index) for index in range(3)), strict=True):
        for parameter in parameters[1:]:
            parameter.data.copy_(parameters[0])
    network(an_image(3)).square().sum().backward()
    first, second, third = (gradients(network, index) for index in range(3))
    assert len(first) == 10 * 4
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, third))
