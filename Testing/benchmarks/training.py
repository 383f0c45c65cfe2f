"""A training step against that of M4oE's released trainer, on the same images, alternately in one run.

Both networks are full-size with three experts. The original's way, written anew: all experts under the channel gate,
one head per data set that is picked sample by sample, scores padded with zeros, cross-entropy and Dice sample by sample
and class by class with a question to the device for each, SGD in float32. Ours: each image through its own expert, one
head, one loss for the batch, clipped gradients, fused AdamW, the moving average of the weights; on a GPU in bfloat16.

    python Testing/benchmarks/training.py [--images 4] [--rounds 3] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from m4oe.network.unet import MoESwinUNet
from m4oe.spec import NetworkSpec
from m4oe.training.data import Batch
from m4oe.training.loss import segmentation_loss
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

CROP = 224
HEADS = (14, 3, 16)  # classes of FLARE22, ATLAS23 and AMOS22 in the original
CLASSES = 17
MIN_RATIO = 2.0


@dataclass
class Clock:
    """Adds up the seconds of each part of a step."""

    device: torch.device
    parts: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, part: str, work: Callable[[], Tensor | None]) -> Tensor | None:
        start = time.perf_counter()
        result = work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.parts.setdefault(part, []).append(time.perf_counter() - start)
        return result


def some_batch(images: int, device: torch.device) -> Batch:
    """Noise with a few squares of each class, of three modalities."""
    generator = torch.Generator().manual_seed(0)
    count = images * len(HEADS)
    experts_B = torch.arange(len(HEADS)).repeat_interleave(images)
    coarse = torch.stack([torch.randint(HEADS[e], (14, 14), generator=generator) for e in experts_B.tolist()])
    labels = coarse.repeat_interleave(CROP // 14, 1).repeat_interleave(CROP // 14, 2)
    images_BSHW = torch.rand(count, 3, CROP, CROP, generator=generator)
    known = torch.ones(count, CLASSES, dtype=torch.bool)
    told = torch.zeros(count, dtype=torch.bool)
    return Batch(*(tensor.to(device) for tensor in (images_BSHW, labels, known)), experts_B, told)


def released_loss(scores_BHWK: Tensor, batch: Batch) -> Tensor:
    """Our own writing of the original's heads and losses: a loop over samples, in it one over classes."""
    starts = [sum(HEADS[:number]) for number in range(len(HEADS))]
    padded = []
    for scores_HWK, expert in zip(scores_BHWK, batch.experts_B, strict=True):
        number = int(expert.item())
        own = scores_HWK[..., starts[number] : starts[number] + HEADS[number]]
        padded.append(F.pad(own, (0, max(HEADS) - HEADS[number])))
    total = scores_BHWK.new_zeros(())
    for scores_HWK, labels_HW, expert in zip(torch.stack(padded), batch.labels_BHW, batch.experts_B, strict=True):
        classes = HEADS[int(expert.item())]
        scores_1KHW = scores_HWK[..., :classes].permute(2, 0, 1)[None]
        entropy = F.cross_entropy(scores_1KHW, labels_HW[None])
        probability_1KHW, dice = scores_1KHW.softmax(1), scores_BHWK.new_zeros(())
        for label in range(classes):
            found, true = probability_1KHW[:, label], (labels_HW[None] == label).float()
            loss = 1 - (2 * (found * true).sum() + 1e-5) / ((found * found).sum() + (true * true).sum() + 1e-5)
            loss.item()  # the original keeps a list of them
            dice = dice + loss
        total = total + 0.4 * entropy + 0.7 * dice / classes
    return total / len(scores_BHWK)


def released_step(device: torch.device) -> Callable[[Batch], None]:
    network = MoESwinUNet(NetworkSpec(experts=3, gate="channel", drop_path=0.2), sum(HEADS)).to(device).train()
    optimiser = torch.optim.SGD(network.parameters(), 0.015, momentum=0.9, weight_decay=1e-4)

    def step(batch: Batch) -> None:
        optimiser.zero_grad()
        released_loss(network(batch.images_BSHW), batch).backward()
        optimiser.step()

    return step


def our_step(device: torch.device, clock: Clock) -> Callable[[Batch], None]:
    """The step of `m4oe.training.loop`, part by part."""
    network = MoESwinUNet(NetworkSpec(experts=3, top_k=1, drop_path=0.2), CLASSES).to(device).train()
    parameters = list(network.parameters())
    optimiser = torch.optim.AdamW(parameters, 5e-4, (0.9, 0.95), weight_decay=0.05, fused=True)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=False)
    wholes_KD = torch.stack([torch.arange(CLASSES), torch.zeros(CLASSES, dtype=torch.long)], 1).to(device)

    def forward(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return network(batch.images_BSHW, F.one_hot(batch.experts_B, 3).float())

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        average.update_parameters(network)

    def step(batch: Batch) -> None:
        optimiser.zero_grad(set_to_none=True)
        scores = clock("forward", lambda: forward(batch))
        given = (batch.labels_BHW, batch.annotated_BK, wholes_KD, 0.5)
        loss = clock("loss", lambda: segmentation_loss(scores, *given))
        clock("backward", lambda: loss.backward())
        clock("optimiser", update)

    return step


def seconds(step: Callable[[Batch], None], batch: Batch) -> float:
    start = time.perf_counter()
    step(batch)
    if batch.images_BSHW.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_gflops(device: torch.device) -> Iterator[float]:
    """Billions of operations per second in a product of matrices, for as long as it is asked."""
    one = torch.rand(1024, 1024, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    while True:
        start = time.perf_counter()
        for _ in range(5):
            torch.mm(one, one)
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield 5 * 2 * 1024**3 / (time.perf_counter() - start) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="per modality")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default="cpu")
    options = parser.parse_args()
    batch, clock = some_batch(options.images, options.device), Clock(options.device)
    theirs, ours, peak = released_step(options.device), our_step(options.device, clock), matmul_gflops(options.device)
    flops: list[float] = []
    for step in (theirs, ours):  # which also warms up
        with FlopCounterMode(display=False) as counter:
            step(batch)
        flops.append(counter.get_total_flops() / 1e9)
    clock.parts.clear()
    times = [(seconds(theirs, batch), seconds(ours, batch), next(peak)) for _ in range(options.rounds)]
    ratio = statistics.median(row[0] / row[1] for row in times)
    share = statistics.median(flops[1] / row[1] / row[2] for row in times)
    spent = {part: statistics.median(values) for part, values in clock.parts.items()}
    print(f"{len(batch.experts_B)} images of {CROP} x {CROP} on {options.device}, {torch.get_num_threads()} threads")
    print(f"released way: {statistics.median(row[0] for row in times):.3f} s per step, {flops[0]:.0f} GFLOP")
    print(f"ours: {statistics.median(row[1] for row in times):.3f} s per step, {flops[1]:.0f} GFLOP")
    print("ours: " + ", ".join(f"{part} {value / sum(spent.values()):.1%}" for part, value in spent.items()))
    print(f"ours runs at {share:.0%} of the speed of a large product of matrices")
    print(f"ours is {ratio:.2f} x as fast as the released way (target {MIN_RATIO})")
    return 0 if ratio >= MIN_RATIO else 1


if __name__ == "__main__":
    raise SystemExit(main())
