from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py
Saved = Callable[..., Path]


@pytest.fixture(scope="session")
def saved() -> Saved:
    """Writes a volume of 4 x 4 x 4 voxels (RAS axes, 2 mm), of one value or of those given, and makes its folder."""

    def save(path: Path, values: Any = 0, kind: type = np.uint8, **header: Any) -> Path:
        array = np.broadcast_to(np.asarray(values), (4, 4, 4)) if np.ndim(values) < 3 else np.asarray(values)
        image = sitk.GetImageFromArray(array.astype(kind))
        image.SetSpacing(header.get("spacing", (2.0, 2.0, 2.0)))
        image.SetDirection(header.get("direction", (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)))
        image.SetOrigin(header.get("origin", (0.0, 0.0, 0.0)))
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path))
        return path

    return save


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file with random weights."""
    from tiny import a_model

    return a_model(tmp_path_factory.mktemp("models") / "tiny.safetensors")


@pytest.fixture
def segment(model: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs `m4oe segment` with the tiny model into the folder "out"."""
    from m4oe.__main__ import main

    common = ["-o", str(tmp_path / "out"), "--model", str(model), "--device", "cpu"]
    return lambda *arguments: main(["segment", *map(str, arguments), *common])


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """Within it no file can grow beyond 1000 bytes."""
    resource = pytest.importorskip("resource")  # Windows has none

    @contextmanager
    def full() -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    return full
