"""Grids, smooth fields and deformations."""

import numpy as np
import pytest
from scipy.interpolate import BSpline

from sites.phantoms.space import LATTICE_POINTS, Grid, deform, smooth_noise


def test_grid_is_centred_and_refinement_keeps_the_field():
    grid = Grid((4, 6, 3), (0.5, 0.5, 3.0))
    assert grid.axis_mm(0).tolist() == [-0.75, -0.25, 0.25, 0.75]
    fine = grid.refined((2, 2, 3))
    assert fine.size == (8, 12, 9)
    assert fine.field_mm == pytest.approx(grid.field_mm)
    assert fine.axis_mm(2).reshape(3, 3).mean(axis=1) == pytest.approx(grid.axis_mm(2))


def test_noise_does_not_depend_on_the_grid():
    coarse = Grid((5, 5, 5), (3.0, 3.0, 3.0))
    fine = coarse.refined((3, 3, 3))
    on_coarse, on_fine = (
        smooth_noise(grid, np.random.default_rng(0), scale_mm=7.0)
        for grid in (coarse, fine)
    )
    ratio = on_fine[1::3, 1::3, 1::3] / on_coarse
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)


def test_noise_is_a_cubic_spline_of_unit_variance():
    grid = Grid((60, 60, 60), (1.7, 1.7, 1.7))
    field = smooth_noise(grid, np.random.default_rng(1), scale_mm=6.0)
    assert abs(field.std() - 1) < 0.1
    assert abs(field.mean()) < 0.1
    # one line against SciPy's spline, up to the common scale
    deviates = np.random.default_rng(1).standard_normal(
        (LATTICE_POINTS,) * 3, dtype=np.float32
    )
    bump = BSpline.basis_element(np.arange(-2, 3), extrapolate=False)
    weights = np.zeros((60, LATTICE_POINTS))
    for n in range(60):
        place = grid.axis_mm(0)[n] / 6.0
        for m in range(-40, 40):
            weights[n, m % LATTICE_POINTS] += np.nan_to_num(bump(place - m))
    expected = np.einsum("ia,jb,kc,abc->ijk", *[weights] * 3, deviates, optimize=True)
    assert np.corrcoef(expected.ravel(), field.ravel())[0, 1] > 0.9999


def test_deformation_stays_within_its_reach():
    grid = Grid((20, 20, 10), (2.0, 2.0, 4.0))
    space = deform(
        grid, np.random.default_rng(3), amplitude_mm=2.0, scale_mm=30, position_mm=3.0
    )
    for axis, moved in enumerate((space.x, space.y, space.z)):
        shape = [1, 1, 1]
        shape[axis] = -1
        shift = moved - grid.axis_mm(axis).reshape(shape)
        assert np.abs(shift).max() <= space.reach_mm
        assert np.diff(moved, axis=axis).min() > 0  # nothing folds over itself
