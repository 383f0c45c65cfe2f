"""A model with random weights, small volumes for it, and what `m4oe segment` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from m4oe.network.unet import MoESwinUNet
from m4oe.package import save_model
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from scipy.ndimage import gaussian_filter

SPEC = ModelSpec(
    name="tiny",
    version="1",
    network=NetworkSpec(experts=2, embed_dim=8, depths=(1, 1), heads=(1, 2), window=3, mlp_ratio=1.0, top_k=1),
    structures=("liver", "spleen", "liver_tumor"),
    experts=(ExpertSpec("ct", "CT"), ExpertSpec("mr", "MR")),
    intensity={"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 1, 99)},
    pixel_mm=2.0,
    slice_mm=3.0,
    limits="Knows nothing.",
    training={
        "data": "3 dreams",
        "stages": [["dense", 2400, 0.0015], ["gate", 1, 1e-4]],
        "seed": 0,
        "sites": ["A", [1]],
    },
    scores={"ct": {"liver": 0.9}},
)


def a_network(spec: ModelSpec = SPEC, seed: int = 0) -> MoESwinUNet:
    """Weights large enough that the labels differ from place to place and the experts from each other."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = MoESwinUNet(spec.network, len(spec.structures) + 1)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return network


def a_model(path: Path, spec: ModelSpec = SPEC, seed: int = 0) -> Path:
    save_model(path, a_network(spec, seed), spec)
    return path


def an_image(seed: int = 0) -> sitk.Image:
    field = gaussian_filter(np.random.default_rng(seed).standard_normal((8, 16, 20)), 1.5)
    image = sitk.GetImageFromArray((4000 * field).astype(np.int16))
    image.SetSpacing([1.5, 1.5, 2.0])
    return image


def saved(path: Path, image: sitk.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image or an_image(), str(path))
    return path


def a_series(folder: Path, uid: str = "1.2.3", seed: int = 0) -> Path:
    """A CT with all tags that DICOM SEG needs; gives back a file from its middle."""
    image = an_image(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(image.GetSize()[2]):
        plane = image[:, :, index]
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{index + 1}",
            "0008|0020": "20200101",
            "0008|0030": "120000",
            "0008|0060": "CT",
            "0010|0010": "Doe^J",
            "0010|0020": "7",
            "0018|0050": "2",
            "0020|000d": "1.2",
            "0020|000e": uid,
            "0020|0011": "1",
            "0020|0013": str(index + 1),
            "0020|0032": f"0\\0\\{2 * index}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0052": "1.2.9",
        }
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{uid}-{index}.dcm"))
        writer.Execute(plane)
    return folder / f"{uid}-4.dcm"


def reports(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "volumes.json").read_text(encoding="utf-8"))
