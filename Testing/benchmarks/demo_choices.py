"""One network for all contrasts, a mixture of experts, and a mixture that knows one body: equal steps, then scores.

    python Testing/benchmarks/demo_choices.py DATA -o OUT --init PHANTOMS/model.safetensors:mr_t1ce

DATA is that of demo_model.py, whose label maps, images and score these are.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from demo_model import SOURCES, demo_config, demo_data, say, score_table
from m4oe.training.config import Stage
from m4oe.training.loop import train
from m4oe.training.phantom import STRUCTURES
from m4oe.training.start import start_network

_RATE, _BALANCE = 7e-4, 0.1


def main() -> None:
    """Trains and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder of the runs")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--init", required=True, metavar="MODEL:EXPERT", help="of m4oe train --phantoms")
    options = parser.parse_args()
    torch.set_num_threads(1)
    full = replace(demo_config(1.0, mixture=False), optimiser="adamw")
    data = demo_data(options.data, full)
    bodies, rest = data.atlases[: len(SOURCES)], data.atlases[len(SOURCES) :]
    one_body = [replace(bodies[0], weight=sum(body.weight for body in bodies)), *rest]
    runs = (("dense", "dense", data.atlases), ("mixture", "experts", data.atlases), ("one_body", "experts", one_body))
    models = []
    for name, stage, atlases in runs:
        config = replace(full, name=name, stages=(Stage(stage, options.steps, _RATE, _BALANCE),))
        start = start_network(options.init, config, STRUCTURES)
        models.append(
            train(config, replace(data, atlases=atlases), options.output / name, say, device="cpu", start=start)
        )
    print(score_table(options.data, [str(model) for model in models]))


if __name__ == "__main__":
    main()
