from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

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
