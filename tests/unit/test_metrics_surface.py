from __future__ import annotations

import math

import numpy as np
import pytest

from fedmed.errors import DataError
from fedmed.metrics.surface import image_diagonal_mm, surface_distances


def box(shape, *bounds):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*bound) for bound in bounds)] = True
    return mask


def test_equal_masks_are_zero_apart():
    mask = box((6, 7, 5), (1, 4), (2, 5), (1, 3))
    result = surface_distances(mask, mask, spacing_mm=(0.5, 1.0, 3.0))
    assert result.assd_mm == result.hd95_mm == 0
    assert result.asd_mm_pred2gt == result.asd_mm_gt2pred == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_two_voxels_are_as_far_apart_as_their_centres(axis):
    a, b = np.zeros((2, 5, 6, 7), dtype=bool)
    a[1, 1, 1] = True
    b[tuple(1 + 3 * (np.arange(3) == axis))] = True
    result = surface_distances(a, b, spacing_mm=(0.5, 0.7, 3.0))
    expected = 3 * (0.5, 0.7, 3.0)[axis]
    assert result.assd_mm == pytest.approx(expected)
    assert result.hd95_mm == pytest.approx(expected)


def test_directions_differ_and_are_named_rightly():
    # The prediction is a part of the label: from it, the label is near; not back.
    prediction = box((20, 3, 1), (0, 2), (0, 1), (0, 1))
    label = box((20, 3, 1), (0, 11), (0, 1), (0, 1))
    result = surface_distances(prediction, label, spacing_mm=(2.0, 1.0, 1.0))
    assert result.asd_mm_pred2gt == 0
    assert result.asd_mm_gt2pred == pytest.approx(2.0 * sum(range(10)) / 11)
    assert result.assd_mm == pytest.approx(2.0 * sum(range(10)) / 13)
    # numpy's linear 95th percentile of 0, 0, 2, ..., 18
    assert result.hd95_mm == pytest.approx(17.0)


def test_the_inside_of_a_mask_is_no_surface():
    # A cube of 5 against its centre voxel: 98 surface voxels, not 125, look inwards.
    cube, centre = box((7, 7, 7), *[(1, 6)] * 3), box((7, 7, 7), *[(3, 4)] * 3)
    result = surface_distances(cube, centre, spacing_mm=(1.0, 1.0, 1.0))
    grid = np.indices((5, 5, 5)) - 2
    shell = np.abs(grid).max(axis=0) == 2
    expected = np.sqrt((grid**2).sum(axis=0))[shell]
    assert expected.size == 98
    assert result.asd_mm_pred2gt == pytest.approx(expected.mean())


def test_a_2d_image_is_measured_in_its_plane():
    a, b = (
        box((9, 9, 1), (1, 8), (1, 8), (0, 1)),
        box((9, 9, 1), (3, 6), (3, 6), (0, 1)),
    )
    result = surface_distances(a, b, spacing_mm=(1.0, 1.0, 100.0))
    in_plane = surface_distances(a[..., 0], b[..., 0], spacing_mm=(1.0, 1.0))
    assert result == in_plane
    # If K counted, all of b would be surface of a as well, at distance 0.
    assert result.asd_mm_gt2pred == 2.0


def test_a_single_voxel_image_has_a_surface():
    voxel = np.ones((1, 1, 1), dtype=bool)
    assert surface_distances(voxel, voxel, spacing_mm=(1.0, 1.0, 1.0)).assd_mm == 0


def test_the_cut_at_unknown_voxels_is_no_surface():
    # Both fill their rows to the unknown half; the prediction is one row wider.
    known = box((8, 10), (0, 8), (0, 5))
    label, prediction = box((8, 10), (2, 6), (1, 10)), box((8, 10), (1, 7), (1, 10))
    result = surface_distances(
        prediction, label, spacing_mm=(1.0, 1.0), known_IJK=known
    )
    # The label's outline: column 1 (4 voxels, which the prediction's outline shares)
    # and 3 more voxels in each of the rows 2 and 5, one row from the prediction's.
    assert result.asd_mm_gt2pred == pytest.approx((0.0 * 4 + 1.0 * 6) / 10)
    whole = surface_distances(prediction & known, label & known, spacing_mm=(1.0, 1.0))
    assert whole.asd_mm_gt2pred != result.asd_mm_gt2pred


def test_in_sparsely_annotated_volumes_surfaces_are_outlines():
    known = np.zeros((9, 9, 9), dtype=bool)
    known[..., [2, 5]] = True
    a, b = (
        box((9, 9, 9), (1, 8), (1, 8), (0, 9)),
        box((9, 9, 9), (3, 6), (3, 6), (0, 9)),
    )
    result = surface_distances(a, b, spacing_mm=(1.0, 1.0, 1.0), known_IJK=known)
    in_plane = surface_distances(a[..., 2], b[..., 2], spacing_mm=(1.0, 1.0))
    assert result.assd_mm == pytest.approx(in_plane.assd_mm)


def test_a_mask_that_touches_only_unknown_voxels_keeps_its_cut():
    known = box((5, 5), (2, 3), (2, 3))
    mask = np.ones((5, 5), dtype=bool)
    result = surface_distances(mask, mask, spacing_mm=(1.0, 1.0), known_IJK=known)
    assert result.assd_mm == 0


@pytest.mark.parametrize("empty", ["prediction", "label"])
def test_an_empty_mask_has_no_surface(empty):
    mask = np.ones((3, 3, 3), dtype=bool)
    masks = {"prediction": mask, "label": mask, empty: ~mask}
    with pytest.raises(DataError, match=f"{empty} is empty"):
        surface_distances(
            masks["prediction"], masks["label"], spacing_mm=(1.0, 1.0, 1.0)
        )


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, math.nan, 1.0)])
def test_a_voxel_size_that_is_none_is_refused(spacing):
    mask = np.ones((3, 3, 3), dtype=bool)
    with pytest.raises(DataError, match="voxel size"):
        surface_distances(mask, mask, spacing_mm=spacing)


def test_the_diagonal_bounds_every_distance():
    a, b = box((4, 5, 6), *[(0, 1)] * 3), box((4, 5, 6), (3, 4), (4, 5), (5, 6))
    spacing = (0.5, 1.0, 3.0)
    assert surface_distances(a, b, spacing_mm=spacing).hd95_mm < image_diagonal_mm(
        a.shape, spacing
    )
