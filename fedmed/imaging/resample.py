"""Linear resampling along axes, anti-aliased, for images, labels and probabilities.

Old and new grid share the centre of their field of view. Beyond the outermost voxel
centres the outermost value holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def resample_linear(
    array_IJK: np.ndarray, shape: Sequence[int], steps: Sequence[float]
) -> np.ndarray:
    """Resample to a grid of other voxel size.

    Weights fall linearly to zero at one voxel's distance: an input voxel's where the
    grid becomes finer, an output voxel's where it becomes coarser (which then averages
    instead of skipping voxels).

    Args:
        array_IJK: Any shape; the LAST `len(shape)` axes are resampled.
        shape: Output size of these axes.
        steps: Output voxel size / input voxel size.

    Returns:
        float32 or, for float64 input, float64; the input itself where nothing changes.
    """
    lead = array_IJK.ndim - len(shape)
    result = array_IJK if array_IJK.dtype.kind == "f" else array_IJK.astype(np.float32)
    for axis, (size, step) in enumerate(zip(shape, steps, strict=True)):
        result = _resample_axis(result, lead + axis, size, step)
    return result


def resample_labels(
    labels_IJK: np.ndarray, shape: Sequence[int], steps: Sequence[float]
) -> np.ndarray:
    """Resample class numbers: linear one-hot maps, of which the largest wins.

    No label appears that was not there before; "unknown" is one label among the others.
    Ties go to the smaller number.

    Args:
        labels_IJK: uint8.
        shape: Output size.
        steps: Output voxel size / input voxel size.

    Returns:
        uint8 of `shape`.
    """
    if tuple(shape) == labels_IJK.shape and all(step == 1.0 for step in steps):
        return labels_IJK
    values = np.flatnonzero(np.bincount(labels_IJK.ravel(order="K"), minlength=256))
    winner = np.full(tuple(shape), values[0], np.uint8)
    if len(values) == 1:
        return winner
    best = np.full(tuple(shape), -1.0, np.float32)
    for value in values:
        share = resample_linear((labels_IJK == value).astype(np.float32), shape, steps)
        winner[share > best] = value
        np.maximum(best, share, out=best)
    return winner


def _resample_axis(array: np.ndarray, axis: int, size: int, step: float) -> np.ndarray:
    old_size = array.shape[axis]
    if size == old_size and step == 1.0:
        return array
    indices, weights = _taps(old_size, size, step)
    spread = [1] * array.ndim
    spread[axis] = size
    result: np.ndarray | None = None
    for index, weight in zip(indices, weights, strict=True):
        term = np.take(array, index, axis=axis)
        term *= weight.reshape(spread).astype(array.dtype)
        result = term if result is None else np.add(result, term, out=result)
    assert result is not None  # there are at least two taps
    return result


def _taps(old_size: int, size: int, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Give indices and weights (tap, output index), weights of an output sum to 1."""
    reach = max(1.0, step)
    centres = (np.arange(size) - (size - 1) / 2) * step + (old_size - 1) / 2
    centres = np.clip(centres, 0, old_size - 1)
    first = np.floor(centres - reach).astype(np.int64) + 1
    indices = first + np.arange(math.ceil(2 * reach))[:, None]
    weights = np.maximum(0.0, 1.0 - np.abs(indices - centres) / reach)
    weights /= weights.sum(axis=0)
    return np.clip(indices, 0, old_size - 1), weights
