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
        2 |A and B| / (|A| + |B|) for the labels of the truth from 1 to `labels`. One that the truth lacks has none,
        found or not: a mean over such zeros would measure how often patients lack an organ.

    Raises:
        ValueError: The shapes differ.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"label maps have shapes {predicted.shape} and {truth.shape}; they must lie on one grid")
    count = labels + 1
    sizes = [np.bincount(array.ravel(), minlength=count)[:count] for array in (predicted, truth)]
    both = np.bincount(truth[predicted == truth], minlength=count)[:count]
    totals = sizes[0] + sizes[1]
    return {label: float(2 * both[label] / totals[label]) for label in range(1, count) if sizes[1][label]}
