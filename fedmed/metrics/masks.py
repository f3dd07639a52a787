"""Checks and cuts of binary masks that every segmentation metric needs."""

from __future__ import annotations

import numpy as np

from fedmed.errors import DataError


def check_masks(prediction_IJK: np.ndarray, label_IJK: np.ndarray) -> None:
    """Refuse what is not a pair of boolean masks of one shape.

    Raises:
        DataError: If a dtype is not bool (a map of several classes would silently
            become "any class") or the shapes differ.
    """
    if prediction_IJK.shape != label_IJK.shape:
        raise DataError(
            f"The prediction has shape {prediction_IJK.shape}, "
            f"the label {label_IJK.shape}.",
            hint="Put the prediction back on the voxel grid of the label first.",
        )
    for name, mask in (("prediction", prediction_IJK), ("label", label_IJK)):
        if mask.dtype != np.bool_:
            raise DataError(
                f"The {name} is {mask.dtype}; a mask of one class (bool) was expected.",
                hint="Compare with a class first, e.g. `label_IJK == 1`.",
            )


def bounding_box(mask: np.ndarray, *, margin: int = 0) -> tuple[slice, ...]:
    """Find the smallest box that holds every True voxel.

    Args:
        mask: bool, any number of axes, at least one voxel True.
        margin: Voxels to grow the box by on each side, cut at the image's edge.

    Returns:
        One slice per axis.

    Example:
        >>> bounding_box(np.array([False, False, True, False]), margin=1)
        (slice(1, 4, None),)
    """
    box = []
    rest: np.ndarray = mask
    for length in mask.shape:
        occupied = np.flatnonzero(rest.reshape(length, -1).any(axis=1))
        start, stop = int(occupied[0]), int(occupied[-1]) + 1
        box.append(slice(max(start - margin, 0), min(stop + margin, length)))
        # Ever smaller: the whole mask is read only once or twice.
        rest = np.asarray(rest.any(axis=0))
    return tuple(box)
