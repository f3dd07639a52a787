"""Distances in mm between the surfaces of two masks.

The surface of a mask is the set of its voxels that have a neighbour outside it, across
a face (6 neighbours in 3D, 4 in 2D); what lies beyond the image's edge is outside.
Distances are Euclidean between voxel centres, in mm, so voxels may be anisotropic.

With d(p) the distance from a surface voxel p of the prediction P to the nearest surface
voxel of the label G, and d(g) the other way round:

* `asd_mm_pred2gt` = mean of d(p); `asd_mm_gt2pred` = mean of d(g). The two differ, and
  papers report either without saying which.
* `assd_mm` = mean over both surfaces pooled, (sum d(p) + sum d(g)) / (|P| + |G|): the
  definition of Heimann et al. and of MONAI. MedPy instead averages the two means.
* `hd95_mm` = max(95th percentile of d(p), 95th percentile of d(g)), the larger of the
  two directed percentiles, interpolated linearly: the definition of MONAI. DeepMind's
  surface-distance takes the same maximum, but weights each surface element by its area.
  MedPy instead takes the 95th percentile of both surfaces pooled, usually smaller.

An axis of length one carries no surface: a 2D image, stored with K = 1, is measured in
its plane.

Source:
    Heimann et al., Comparison and Evaluation of Methods for Liver Segmentation from CT
    Datasets, IEEE TMI 28(8), 2009. Huttenlocher et al., Comparing Images Using the
    Hausdorff Distance, IEEE TPAMI 15(9), 1993 (directed partial distances, their max).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmed.errors import DataError
from fedmed.metrics.masks import bounding_box, check_masks
from fedmed.metrics.nearest import Surface, nearest_mm, neighbourhood

HAUSDORFF_PERCENTILE = 95.0


@dataclass(frozen=True)
class SurfaceDistances:
    """The surface distances of one pair of masks, in mm; see the module."""

    assd_mm: float
    asd_mm_pred2gt: float
    asd_mm_gt2pred: float
    hd95_mm: float


def surface_distances(
    prediction_IJK: np.ndarray,
    label_IJK: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    known_IJK: np.ndarray | None = None,
) -> SurfaceDistances:
    """Measure how far apart the surfaces of two masks lie.

    Args:
        prediction_IJK: bool, at least one voxel True among the known ones.
        label_IJK: bool, same shape, likewise.
        spacing_mm: Voxel size along each axis of the masks, mm.
        known_IJK: bool, False where nobody annotated; None: all is known. Unknown
            voxels belong to neither mask, and a border that exists only because the
            mask is cut off there is no surface. So in a volume of which only some
            slices are annotated, surfaces are the outlines in those slices.

    Returns:
        Distances in mm.

    Raises:
        DataError: If a mask is empty, is not boolean, or shapes or spacing do not fit.
            What an empty mask should count as is the business of
            `fedmed.metrics.case_scores`.
    """
    check_masks(prediction_IJK, label_IJK)
    check_spacing(spacing_mm, prediction_IJK.ndim)
    if known_IJK is not None:
        prediction_IJK = prediction_IJK & known_IJK
        label_IJK = label_IJK & known_IJK
    for name, mask in (("prediction", prediction_IJK), ("label", label_IJK)):
        if not mask.any():
            raise DataError(
                f"The {name} is empty: it has no surface to measure from.",
                hint="Use fedmed.metrics.case_scores, which says what that counts as.",
            )
    # Grown by one voxel, so that an unknown neighbour is still seen as such.
    box = bounding_box(prediction_IJK | label_IJK, margin=1)
    return distances_in_box(
        prediction_IJK[box],
        label_IJK[box],
        spacing_mm=spacing_mm,
        known=None if known_IJK is None else known_IJK[box],
    )


def distances_in_box(
    prediction: np.ndarray,
    label: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    known: np.ndarray | None = None,
) -> SurfaceDistances:
    """Measure as `surface_distances` does, on masks that are cut out already.

    Args:
        prediction: bool, at least one voxel True, none where it is unknown. Cut out
            with a margin of one voxel around both masks, or up to the image's edge.
        label: bool, likewise, same shape.
        spacing_mm: Voxel size along each axis of the masks, mm.
        known: bool, same box; None: all is known.

    Returns:
        Distances in mm.
    """
    axes = _axes_with_extent(label.shape)
    shape = tuple(label.shape[axis] for axis in axes)
    spacing = [float(spacing_mm[axis]) for axis in axes]
    around = neighbourhood(spacing, shape)
    surfaces = [
        Surface.of(_surface(mask.reshape(shape), known, around.reach))
        for mask in (prediction, label)
    ]
    return _summarise(
        nearest_mm(*surfaces, spacing_mm=spacing, around=around),
        nearest_mm(*surfaces[::-1], spacing_mm=spacing, around=around),
    )


def image_diagonal_mm(shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """Give the length of the image's diagonal, no surface distance being larger.

    Axes of length one do not count, as they carry no surface.

    Example:
        >>> image_diagonal_mm((30, 20, 1), (0.1, 0.2, 7.0))
        5.0
    """
    check_spacing(spacing_mm, len(shape))
    return math.hypot(*(shape[a] * spacing_mm[a] for a in _axes_with_extent(shape)))


def check_spacing(spacing_mm: Sequence[float], num_axes: int) -> None:
    """Refuse a voxel size that is not one positive, finite length per axis.

    Raises:
        DataError: With the spacing that was seen.
    """
    is_usable = all(math.isfinite(length) and length > 0 for length in spacing_mm)
    if len(spacing_mm) != num_axes or not is_usable:
        raise DataError(
            f"The voxel size is {tuple(spacing_mm)} mm; "
            f"{num_axes} positive lengths were expected.",
            hint="Images without a physical scale have (1, 1, 1).",
        )


def _axes_with_extent(shape: Sequence[int]) -> list[int]:
    """Give the axes longer than one voxel; the first axis if there are none."""
    return [axis for axis, length in enumerate(shape) if length > 1] or [0]


def _surface(
    mask: np.ndarray, known: np.ndarray | None, margin: tuple[int, ...]
) -> np.ndarray:
    """Mark the voxels of a mask that touch known background or the image's edge.

    Returns:
        bool, grown by `margin` False voxels on each side of each axis.
    """
    framed = _framed(mask, margin)
    # The mask may touch nothing but unknown voxels: then their cut is all it has.
    cut: np.ndarray = framed & ~_inner(framed)
    if known is None:
        return cut
    filled = _framed(mask | ~known.reshape(mask.shape), margin)
    surface: np.ndarray = framed & ~_inner(filled)
    return surface if surface.any() else cut


def _framed(mask: np.ndarray, margin: tuple[int, ...]) -> np.ndarray:
    """Put a frame of False voxels around a mask."""
    shape = [n + 2 * m for n, m in zip(mask.shape, margin, strict=True)]
    framed = np.zeros(shape, dtype=np.bool_)
    ends = zip(margin, mask.shape, strict=True)
    framed[tuple(slice(m, m + n) for m, n in ends)] = mask
    return framed


def _inner(framed: np.ndarray) -> np.ndarray:
    """Mark the voxels whose neighbours across a face are all in the framed mask.

    In C order a step along an axis is a shift of the whole array; the frame keeps it
    from running into the next row.
    """
    flat = framed.ravel()
    inner = np.zeros_like(flat)
    steps = [stride // framed.itemsize for stride in framed.strides]
    first, last = max(steps), flat.size - max(steps)
    within = inner[first:last]
    within[:] = True
    for step in steps:
        within &= flat[first + step : last + step]
        within &= flat[first - step : last - step]
    return inner.reshape(framed.shape)


def _summarise(pred2gt_mm: np.ndarray, gt2pred_mm: np.ndarray) -> SurfaceDistances:
    count = pred2gt_mm.size + gt2pred_mm.size
    return SurfaceDistances(
        assd_mm=float((pred2gt_mm.sum() + gt2pred_mm.sum()) / count),
        asd_mm_pred2gt=float(pred2gt_mm.mean()),
        asd_mm_gt2pred=float(gt2pred_mm.mean()),
        hd95_mm=float(
            max(
                np.percentile(pred2gt_mm, HAUSDORFF_PERCENTILE),
                np.percentile(gt2pred_mm, HAUSDORFF_PERCENTILE),
            )
        ),
    )
