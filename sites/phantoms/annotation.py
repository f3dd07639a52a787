"""Drawing the labels: the truth as the hospital's annotators put it down."""

from __future__ import annotations

import numpy as np
import scipy  # loads its parts when they are first used: half a second

from sites.phantoms.acquisition import box_average
from sites.phantoms.dials import LabelStyle
from sites.phantoms.space import Grid


def annotate(truth: np.ndarray, grid: Grid, style: LabelStyle) -> np.ndarray:
    r"""Draw labels on the scanner's grid in the hospital's style.

    A straight edge blurred by a Gaussian of width $\sigma$ is $\Phi(d / \sigma)$ at
    distance $d$ inside it, so the level $\Phi(-o / \sigma)$ lies $o$ outside. The
    style moves the outer edge of all classes; between classes the larger share wins.

    Args:
        truth: uint8 labels on a whole refinement of `grid`.
        grid: The scanner's voxels.
        style: Systematic offset and smoothness of the outlines.

    Returns:
        uint8 (I, J, K).
    """
    classes = [int(v) for v in np.flatnonzero(np.bincount(truth.ravel())) if v > 0]
    if not classes:
        return np.zeros(grid.size, np.uint8)
    shares = np.stack([box_average(truth == value, grid.size) for value in classes])
    level = 0.5
    if style != LabelStyle():
        sigma_mm = max(style.smooth_mm, abs(style.offset_mm), 0.4 * grid.spacing_mm[0])
        sigma = [0.0, *(sigma_mm / spacing for spacing in grid.spacing_mm)]
        if grid.size[2] == 1:
            sigma[3] = 0.0
        shares = scipy.ndimage.gaussian_filter(shares, sigma, truncate=3)
        level = float(scipy.special.ndtr(-style.offset_mm / sigma_mm))
    winner = np.array(classes, np.uint8)[shares.argmax(axis=0)]
    return np.where(shares.sum(axis=0) > level, winner, 0).astype(np.uint8)
