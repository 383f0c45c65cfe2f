#!/usr/bin/env python-real
"""Command-line module of Slicer that segments a volume file into a label map, or a folder or table of volumes."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TextIO

NAME = "M4oE Segment"

if importlib.util.find_spec("m4oe") is None:  # Core in the source tree; an extension has it among its scripted modules
    here = Path(__file__).resolve()
    places = (here.parents[1] / "Core", here.parents[1] / "qt-scripted-modules")
    sys.path[:0] = [str(place) for place in places if (place / "m4oe").is_dir()]


def parser() -> argparse.ArgumentParser:
    """The parameters, as M4oESegmentCLI.xml describes them to Slicer."""
    parser = argparse.ArgumentParser(prog="M4oESegmentCLI")
    parser.add_argument("--input-volume", dest="inputVolume", default="")
    parser.add_argument("--output-label-map", dest="outputLabelMap", default="")
    for name in ("inputVolume", "outputLabelMap"):  # or by their places; only what has a flag may be left out in Slicer
        parser.add_argument(name, nargs="?", default=argparse.SUPPRESS)
    parser.add_argument("--color-table", dest="colorTable", default="")
    parser.add_argument("--batch", action="store_true")
    parser.add_argument("--input-folder", dest="inputFolder", default="")
    parser.add_argument("--input-table", dest="inputTable", default="")
    parser.add_argument("--output-folder", dest="outputFolder", default="")
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
        code = segment_batch(options) if options.batch else segment(options)
    except ImportError as error:
        print(f"{error}. Open M4oE Segmentation and press Install under Installation and doctor.", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        from m4oe.terminal import one_line

        print(one_line(error), file=sys.stderr)
        return 1
    if code == 0:
        print(f"<filter-end><filter-name>{NAME}</filter-name><filter-time>0</filter-time></filter-end>", flush=True)
    return code


def segment_batch(options: argparse.Namespace) -> int:
    """Segments a folder or table as `m4oe segment` does, and goes on where an earlier run ended."""
    from m4oe.__main__ import main

    source = options.inputTable or options.inputFolder  # Slicer's panel always names some folder
    if not (source and options.outputFolder):
        raise ValueError("a batch needs an input folder (or table) and an output folder: choose both")
    words = ["segment", source, "-o", options.outputFolder, "--resume", "--preview", "--json"]
    words += ["--model", options.model, "--expert", options.expert]
    words += ["--device", options.device, "--quality", options.quality]
    with redirect_stdout(BatchProgress(sys.stdout)):
        return main([*words, *(["--structures", options.structures] if options.structures else [])])


class BatchProgress(io.TextIOBase):
    """Turns the events of `m4oe segment --json` into Slicer's progress; other lines go on as they are."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.begun, self.number, self.cases = stream, "", 1, 1

    def write(self, text: str) -> int:
        """Takes text, and from it the lines that are whole by now."""
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def _take(self, line: str) -> None:
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, TypeError, LookupError):
            print(line, file=self.stream, flush=True)
            return
        match kind:
            case "case":
                self.number, self.cases = event["number"], event["of"]
                self._show(0)
            case "progress" if event["phase"] == "segment":
                self._show(event["fraction"])
            case "done" | "skipped":
                print(f"{event['case']}: {kind}", file=self.stream, flush=True)
            case "end":
                tell("segment", 1, self.stream)
                print("{done} done, {skipped} skipped, {failed} failed".format(**event), file=self.stream, flush=True)

    def _show(self, fraction: float) -> None:
        tell("segment", (self.number - 1 + fraction) / self.cases, self.stream)


def segment(options: argparse.Namespace) -> int:
    """Reads the volume, writes the label map and, where one is wanted, its color table."""
    if not (options.inputVolume and options.outputLabelMap):
        raise ValueError("choose an input volume and an output label map, or switch on Batch and choose folders")
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
    return 0


def tell(phase: str, fraction: float, stream: TextIO | None = None) -> None:
    """Progress of the phase that takes the time."""
    if phase == "segment":
        print(f"<filter-progress>{fraction:.3f}</filter-progress>", file=stream, flush=True)


if __name__ == "__main__":
    sys.exit(main())
