"""How well a label map agrees with the truth."""

from __future__ import annotations

import numpy as np


def dice_scores(predicted: np.ndarray, truth: np.ndarray, labels: int) -> dict[int, float]:
    """Dice similarity coefficient by label.

    Args:
        predicted: Label map of any shape.
        truth: Label map of the same shape.
        labels: Highest label value.

    Returns:
        2 |A and B| / (|A| + |B|) for labels 1 to `labels` that either map has; a label that both lack has no Dice and
        is left out, one that only one has scores 0.

    Raises:
        ValueError: The shapes differ.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"label maps have shapes {predicted.shape} and {truth.shape}; they must lie on one grid")
    count = labels + 1
    sizes = [np.bincount(array.ravel(), minlength=count)[:count] for array in (predicted, truth)]
    both = np.bincount(truth[predicted == truth], minlength=count)[:count]
    totals = sizes[0] + sizes[1]
    return {label: float(2 * both[label] / totals[label]) for label in range(1, count) if totals[label]}
