"""What a profile of evaluation changes inside a hospital; see `fedmed.profile`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import nn

from fedmed.case import UNKNOWN_LABEL
from fedmed.profile import Profile


@contextmanager
def own_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch normalisation use the statistics of each batch; nothing is learned.

    Args:
        model: In evaluation mode. Its running statistics are put back afterwards.
    """
    batch_norm = nn.modules.batchnorm._BatchNorm
    layers = [m for m in model.modules() if isinstance(m, batch_norm)]
    kept = [(layer.running_mean, layer.running_var) for layer in layers]
    for layer in layers:
        layer.running_mean = layer.running_var = None
    try:
        yield
    finally:
        for layer, (mean, variance) in zip(layers, kept, strict=True):
            layer.running_mean, layer.running_var = mean, variance


def counted_slices(label_IJK: np.ndarray, profile: Profile) -> slice:
    """Give the slices on which a prediction counts.

    The range of the label comes first: the publications' code cut scans to it, and
    then left out the two ends of what remained.

    Args:
        label_IJK: The label on the scan's own grid.
        profile: What is left out.

    Returns:
        A range of K; empty if a label shows nothing and its range is asked for.
    """
    first, end = 0, label_IJK.shape[2]
    if profile.oracle_slice_range:
        shown_IJK = (label_IJK != 0) & (label_IJK != UNKNOWN_LABEL)
        shown = np.flatnonzero(shown_IJK.any(axis=(0, 1)))
        first, end = (int(shown[0]), int(shown[-1]) + 1) if len(shown) else (0, 0)
    if profile.skip_end_slices:
        first, end = first + 1, end - 1
    return slice(first, max(first, end))


def cut(
    prediction_IJK: np.ndarray, label_IJK: np.ndarray, profile: Profile
) -> np.ndarray:
    """Make background of what a prediction says on slices that do not count.

    Args:
        prediction_IJK: Class numbers on the scan's own grid.
        label_IJK: Likewise.
        profile: What is left out.

    Returns:
        The prediction itself if everything counts, else a changed copy.
    """
    if not profile.cuts:
        return prediction_IJK
    counted = counted_slices(label_IJK, profile)
    kept = np.zeros_like(prediction_IJK)
    kept[..., counted] = prediction_IJK[..., counted]
    return kept
