"""Keep the largest connected piece of a prediction, drop the islands."""

from __future__ import annotations

import numpy as np
import scipy  # loads its parts when they are first used: half a second


def largest_component(
    prediction_IJK: np.ndarray, *, per_class: bool = True
) -> np.ndarray:
    """Set to background every foreground voxel outside the largest component.

    Voxels are connected across a face: 6 neighbours in 3D, 4 in a 2D image (K = 1). Of
    components of equal size the first in index order stays. A prediction without
    foreground is returned as it is.

    Args:
        prediction_IJK: Class indices, integer or bool, 0 = background.
        per_class: Whether each class keeps a largest component of its own, which suits
            organs that lie apart. False: all foreground counts as one piece of tissue,
            which suits an organ and its parts.

    Returns:
        A new array, same shape and dtype.

    Differs from the source:
        Published evaluation scripts keep the largest component of the prediction's
        *complement* if the prediction is empty, and so label the whole image.

    Example:
        >>> largest_component(np.array([[[1], [0], [1], [1], [0], [2]]]))[0, :, 0]
        array([0, 0, 1, 1, 0, 2])
    """
    kept = np.zeros_like(prediction_IJK)
    if per_class:
        classes = np.unique(prediction_IJK)
        masks = [prediction_IJK == value for value in classes if value != 0]
    else:
        masks = [prediction_IJK != 0]
    for mask in masks:
        inside = _largest_piece(mask)
        kept[inside] = prediction_IJK[inside]
    return kept


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    """Mark the largest connected piece of a mask; all False if the mask is empty."""
    pieces, num_pieces = scipy.ndimage.label(mask)
    if num_pieces <= 1:
        return mask
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0  # the background is no piece, however large it is
    largest: np.ndarray = pieces == np.argmax(sizes)
    return largest
