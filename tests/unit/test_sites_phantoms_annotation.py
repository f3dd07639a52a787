"""Annotators: offset in millimetres, smoothness."""

import numpy as np
import pytest

from sites.phantoms.annotation import annotate
from sites.phantoms.dials import LabelStyle
from sites.phantoms.space import Grid

GRID = Grid((64, 64, 6), (0.5, 0.5, 3.0))
FINE = GRID.refined((2, 2, 2))


def ball(radius_mm):
    x, y = np.meshgrid(FINE.axis_mm(0), FINE.axis_mm(1), indexing="ij")
    disc = (x**2 + y**2 < radius_mm**2).astype(np.uint8)
    return np.repeat(disc[:, :, None], FINE.size[2], axis=2)


def radius_mm(label):
    return np.sqrt(label[:, :, 3].sum() * 0.25 / np.pi)


def test_no_style_is_the_majority_of_pieces():
    truth = (np.random.default_rng(0).random(FINE.size) < 0.5).astype(np.uint8)
    shares = truth.reshape(64, 2, 64, 2, 6, 2).mean(axis=(1, 3, 5))
    np.testing.assert_array_equal(annotate(truth, GRID, LabelStyle()), shares > 0.5)


@pytest.mark.parametrize("offset_mm", [-1.5, -0.5, 0.0, 0.5, 1.5])
def test_offset_moves_the_outline_by_millimetres(offset_mm):
    label = annotate(ball(10.0), GRID, LabelStyle(offset_mm, 0.5))
    assert radius_mm(label) == pytest.approx(10.0 + offset_mm, abs=0.15)


def test_smoothness_rounds_details_off():
    truth = ball(10.0)
    truth[62:66, :30] = 1  # a spike 2 mm wide
    kept = annotate(truth, GRID, LabelStyle())
    smoothed = annotate(truth, GRID, LabelStyle(0.0, 2.0))
    assert kept[32, 3, 3] == 1
    assert smoothed[32, 3, 3] == 0
    assert smoothed[32, 32, 3] == 1


def test_classes_survive_and_background_stays_empty():
    truth = ball(10.0)
    truth[64:][truth[64:] == 1] = 3
    label = annotate(truth, GRID, LabelStyle(0.5, 0.5))
    assert np.unique(label).tolist() == [0, 1, 3]
    assert (label[20, 32, 3], label[44, 32, 3]) == (1, 3)
    assert not annotate(np.zeros(FINE.size, np.uint8), GRID, LabelStyle(1.0)).any()
