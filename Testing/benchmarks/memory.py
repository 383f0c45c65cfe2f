"""Peak memory of a prediction over its input volume: 512 x 512 x 300 with all structures of the shipped model.

python Testing/benchmarks/memory.py [--slices 300]
"""

from __future__ import annotations

import argparse
import threading

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from m4oe.geometry import Grid, Volume
from m4oe.predictor import Predictor
from m4oe.training.phantom import make_phantom

MAX_GIB = 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    slices = parser.parse_args().slices
    phantom = torch.from_numpy(make_phantom(1, "ct").image.to_axes("LPS").array.astype(np.float32))
    array = np.empty((slices, 512, 512), np.int16)
    for index in range(slices):
        plane = phantom[index * len(phantom) // slices][None, None]
        array[index] = F.interpolate(plane, (512, 512), mode="bilinear")[0, 0].numpy()
    volume = Volume(array, Grid(array.shape, np.diag([-0.8, -0.8, 1.5, 1.0])))
    predictor = Predictor(device="cpu", precision="float32")

    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.01):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, report = predictor(volume)
    done.set()
    watcher.join()
    used = (highest - before) / 2**30
    print(f"{slices} slices of 512 x 512, {len(predictor.spec.structures)} structures, {report.seconds}")
    print(f"peak over the loaded volume and model {used:.2f} GiB (target {MAX_GIB})")
    return 0 if used <= MAX_GIB else 1


if __name__ == "__main__":
    raise SystemExit(main())
