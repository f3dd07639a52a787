"""Intensity normalisation: statistics of the whole volume, one channel at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

Intensity = Literal[
    "zscore", "zscore_foreground", "percentile", "window", "unit", "none"
]

Normaliser = Callable[[np.ndarray], np.ndarray]


def fit_normaliser(
    channel_IJK: np.ndarray,
    region_IJK: np.ndarray | None,
    *,
    intensity: Intensity,
    percentiles: tuple[int | float, int | float],
    window: tuple[int | float, int | float] | None,
) -> Normaliser:
    """Measure one channel and give the function that normalises it.

    * `zscore`: (x - mean) / standard deviation.
    * `zscore_foreground`: the same, both taken from the voxels brighter than the mean.
    * `percentile`: clipped to two percentiles, then these become 0 and 1.
    * `window`: clipped to two fixed values (`window`), then these become 0 and 1.
    * `unit`: minimum and maximum become 0 and 1.
    * `none`: unchanged.

    Args:
        channel_IJK: The channel as read, on its native grid.
        region_IJK: If given, only voxels where it is 1 are measured.
        intensity: The rule.
        percentiles: For `percentile`, 0 to 100.
        window: For `window`, in the image's unit.

    Returns:
        A function of an array of any shape to a new float32 array. A constant channel
        becomes 0.
    """
    inside = channel_IJK if region_IJK is None else channel_IJK[region_IJK > 0]
    if inside.size == 0:
        inside = channel_IJK
    if intensity == "none":
        return lambda array: array.astype(np.float32)
    if intensity in {"zscore", "zscore_foreground"}:
        mean = inside.mean(dtype=np.float64)
        if intensity == "zscore_foreground" and np.any(inside > mean):
            inside = inside[inside > mean]
            mean = inside.mean(dtype=np.float64)
        return _shift_and_scale(mean, inside.std(dtype=np.float64))
    if intensity == "percentile":
        low, high = np.percentile(inside, percentiles)
    elif intensity == "window" and window is not None:
        low, high = window
    else:
        low, high = inside.min(), inside.max()
    return _clip_to_unit(float(low), float(high))


def _shift_and_scale(shift: float, scale: float) -> Normaliser:
    divisor = scale if scale > 0 else 1.0

    def normalise(array: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.subtract(array, np.float32(shift), dtype=np.float32)
        result /= np.float32(divisor)
        return result

    return normalise


def _clip_to_unit(low: float, high: float) -> Normaliser:
    to_unit = _shift_and_scale(low, high - low)
    return lambda array: to_unit(np.clip(array, np.float32(low), np.float32(high)))
