#!/usr/bin/env python-real
"""Command-line module of Slicer that segments a volume file into a label map."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

NAME = "M4oE Segment"

if importlib.util.find_spec("m4oe") is None:  # Core in the source tree; an extension has it among its scripted modules
    here = Path(__file__).resolve()
    places = (here.parents[1] / "Core", here.parents[1] / "qt-scripted-modules")
    sys.path[:0] = [str(place) for place in places if (place / "m4oe").is_dir()]


def parser() -> argparse.ArgumentParser:
    """The parameters, as M4oESegmentCLI.xml describes them to Slicer."""
    parser = argparse.ArgumentParser(prog="M4oESegmentCLI")
    parser.add_argument("inputVolume")
    parser.add_argument("outputLabelMap")
    parser.add_argument("--color-table", dest="colorTable", default="")
    parser.add_argument("--model", default="m4oe-demo")
    parser.add_argument("--expert", default="auto")
    parser.add_argument("--structures", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quality", choices=("standard", "fast"), default="standard")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Segments, tells Slicer how far it is, and returns the exit code."""
    options = parser().parse_args(arguments)
    print(f"<filter-start><filter-name>{NAME}</filter-name><filter-comment>Segmenting</filter-comment></filter-start>")
    try:
        segment(options)
    except ImportError as error:
        print(f"{error}. Open M4oE Segmentation and press Install under Installation and doctor.", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"<filter-end><filter-name>{NAME}</filter-name><filter-time>0</filter-time></filter-end>", flush=True)
    return 0


def segment(options: argparse.Namespace) -> None:
    """Reads the volume, writes the label map and, where one is wanted, its color table."""
    from m4oe.files import read_volume, write_segmentation
    from m4oe.predictor import Predictor

    predictor = Predictor(options.model, options.device)
    structures = [key.strip() for key in options.structures.split(",") if key.strip()] or None
    labels, report = predictor(
        read_volume(options.inputVolume), options.expert, structures, tell, quality=options.quality
    )
    with tempfile.TemporaryDirectory() as folder:  # the colour table goes where Slicer wants it, if anywhere
        suffix = ".nii.gz" if options.outputLabelMap.endswith(".nii.gz") else Path(options.outputLabelMap).suffix
        image, table = write_segmentation(
            Path(folder) / f"labels{suffix}", labels, predictor.spec.label_keys, report.model
        )
        shutil.move(image, options.outputLabelMap)
        if options.colorTable:
            shutil.move(table, options.colorTable)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def tell(phase: str, fraction: float) -> None:
    """Progress of the phase that takes the time."""
    if phase == "segment":
        print(f"<filter-progress>{fraction:.3f}</filter-progress>", flush=True)


if __name__ == "__main__":
    sys.exit(main())
