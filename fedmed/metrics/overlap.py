"""Dice: how much of two masks overlaps."""

from __future__ import annotations

import numpy as np

from fedmed.metrics.masks import check_masks


def dice_coefficient(prediction_IJK: np.ndarray, label_IJK: np.ndarray) -> float:
    r"""Measure the overlap of two masks, $2|A \cap B| / (|A| + |B|)$.

    Args:
        prediction_IJK: bool, any number of axes.
        label_IJK: bool, same shape.

    Returns:
        A proportion in [0, 1]; 0 if exactly one mask is empty; NaN if both are,
        because the class is then in neither and there is nothing to measure.

    Raises:
        DataError: If a mask is not boolean or the shapes differ.

    Source:
        Dice, Measures of the Amount of Ecologic Association Between Species,
        Ecology 26(3), 1945.

    Example:
        >>> a = np.array([True, True, False])
        >>> dice_coefficient(a, ~a), dice_coefficient(a, np.array([True, False, False]))
        (0.0, 0.6666666666666666)
    """
    check_masks(prediction_IJK, label_IJK)
    total = np.count_nonzero(prediction_IJK) + np.count_nonzero(label_IJK)
    if total == 0:
        return float("nan")
    return float(2 * np.count_nonzero(prediction_IJK & label_IJK) / total)
