from __future__ import annotations

from collections.abc import Callable
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
