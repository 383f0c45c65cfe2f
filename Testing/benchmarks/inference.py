"""Slices per second of the predictor against the way of M4oE's released test loop, alternately in one run.

Both segment the same volume with full-size networks of random weights and three experts. The original's way: all
three experts with the channel gate, one slice at a time, cubic zoom to 224 x 224 and nearest neighbour back. Ours: the
expert that the gate chooses, slabs of slices, scores interpolated exactly, islands removed. The scores that are
interpolated are those of a phantom's labels, because random weights give noise and real organs have few boundaries.

    python Testing/benchmarks/inference.py [--slices 64] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from m4oe import predictor
from m4oe.geometry import Grid, Volume
from m4oe.network.unet import MoESwinUNet
from m4oe.package import save_model
from m4oe.predictor import Predictor, Report, bfloat16_is_faster
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from m4oe.training.phantom import STRUCTURES, make_phantom
from scipy.ndimage import zoom
from torch import Tensor

CANONICAL = 224
FULL = 512
MIN_FLOAT32, MIN_BFLOAT16, MAX_REST = 2.0, 3.5, 0.15


class Prior:
    """Gives the scores of a label map in the place of the network's, once the network has done its work."""

    def __init__(self, prior_ZHWK: Tensor) -> None:
        self.prior_ZHWK, self.cursor, self.scores = prior_ZHWK, 0, predictor._scores

    def __call__(self, network: MoESwinUNet, stacks_BSHW: Tensor) -> Tensor:
        count = len(self.scores(network, stacks_BSHW))
        start, self.cursor = self.cursor, (self.cursor + count) % len(self.prior_ZHWK)
        return self.prior_ZHWK[start : start + count]


def released_way(network: MoESwinUNet, volume: np.ndarray) -> np.ndarray:
    """Our own writing of the released loop: each slice zoomed, segmented by all experts, and zoomed back."""
    labels = np.zeros(volume.shape, np.uint8)
    for index, plane in enumerate(volume):
        small = zoom(plane, CANONICAL / FULL, order=3).astype(np.float32)
        scores = network(torch.from_numpy(small)[None, None].repeat(1, 3, 1, 1))
        best = scores.softmax(-1).argmax(-1)[0].numpy().astype(np.uint8)
        labels[index] = zoom(best, FULL / CANONICAL, order=0)
    return labels


def make_predictor(precision: str, pixel_mm: float, slice_mm: float) -> Predictor:
    network = NetworkSpec(experts=3, top_k=1)
    experts = (ExpertSpec("ct", "CT"), ExpertSpec("mr", "MR"), ExpertSpec("ce", "MR"))
    rules = {"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 0.5, 99.5)}
    spec = ModelSpec("benchmark", "0", network, STRUCTURES[:15], experts, rules, pixel_mm, slice_mm)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.safetensors"
        save_model(path, MoESwinUNet(network, 16), spec)
        return Predictor(path, "cpu", precision)


def report_phases(name: str, report: Report) -> float:
    """Prints each phase and returns the share of resampling, upsampling and clean-up."""
    total = sum(report.seconds.values())
    print(f"{name}: " + ", ".join(f"{phase} {part / total:.1%}" for phase, part in report.seconds.items()))
    return sum(report.seconds[phase] for phase in ("resample", "upsample", "cleanup")) / total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    phantom = make_phantom(1, "ct")
    size = (options.slices, CANONICAL, CANONICAL)
    labels = torch.from_numpy(phantom.labels.to_axes("LPS").array.astype(np.float32))
    prior_ZHWK = 10.0 * F.one_hot(F.interpolate(labels[None, None], size, mode="nearest")[0, 0].long() % 16, 16)
    image = torch.from_numpy(phantom.image.to_axes("LPS").array.astype(np.float32))[None, None]
    array = F.interpolate(image, (options.slices, FULL, FULL), mode="trilinear")[0, 0].numpy().astype(np.int16)
    volume = Volume(array, Grid(array.shape, np.diag([-0.8, -0.8, 3.0, 1.0])))

    pixel_mm = 0.8 * FULL / CANONICAL
    predictor._scores = Prior(prior_ZHWK)
    ours = {precision: make_predictor(precision, pixel_mm, 3.0) for precision in ("float32", "bfloat16")}
    if not bfloat16_is_faster(torch.device("cpu")):
        print("bfloat16 is not faster on this processor: left out")
        del ours["bfloat16"]
    released = MoESwinUNet(NetworkSpec(experts=3, gate="channel"), 16).eval()

    seconds: dict[str, list[float]] = {name: [] for name in ("released", *ours)}
    reports: dict[str, Report] = {}
    for name in [name for _ in range(options.rounds + 1) for name in seconds]:
        start = time.perf_counter()
        if name == "released":
            with torch.inference_mode():
                released_way(released, array)
        else:
            reports[name] = ours[name](volume)[1]
        seconds[name].append(time.perf_counter() - start)

    print(f"{options.slices} slices of {FULL} x {FULL}, {torch.get_num_threads()} threads")
    passed = True
    for name, times in seconds.items():
        times = times[1:]  # the first round warms up
        print(f"{name}: {options.slices / statistics.median(times):.2f} slices per second (median)")
        if name != "released":
            pairs = zip(seconds["released"][1:], times, strict=True)
            ratio = statistics.median(theirs / mine for theirs, mine in pairs)
            rest = report_phases(name, reports[name])
            wanted = MIN_BFLOAT16 if name == "bfloat16" else MIN_FLOAT32
            print(
                f"{name}: {ratio:.2f} x the released way (target {wanted}); "
                f"resampling, upsampling and clean-up {rest:.1%} (target {MAX_REST:.0%})"
            )
            passed &= ratio >= wanted and rest <= MAX_REST
    print("all targets met" if passed else "a target was missed")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
