from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedmed.errors import DataError
from fedmed.metrics.masks import bounding_box
from fedmed.metrics.overlap import dice_coefficient

shapes = array_shapes(min_dims=1, max_dims=3, max_side=5)


@settings(max_examples=60, deadline=None)
@given(shapes.flatmap(lambda s: st.tuples(arrays(bool, s), arrays(bool, s))))
def test_dice_is_symmetric_bounded_and_one_for_equal_masks(masks):
    a, b = masks
    dice = dice_coefficient(a, b)
    if not (a.any() or b.any()):
        assert math.isnan(dice)
        return
    assert dice == dice_coefficient(b, a)
    assert 0 <= dice <= 1
    assert (dice == 1) == np.array_equal(a, b)
    assert (dice == 0) == (not (a & b).any())


def test_dice_by_hand():
    a = np.array([1, 1, 1, 0], dtype=bool)
    b = np.array([0, 1, 1, 1], dtype=bool)
    assert dice_coefficient(a, b) == pytest.approx(4 / 6)


def test_one_empty_mask_gives_zero():
    full = np.ones((2, 3), dtype=bool)
    assert dice_coefficient(full, ~full) == 0
    assert dice_coefficient(~full, full) == 0


def test_a_map_of_classes_is_refused():
    labels = np.array([0, 1, 2])
    with pytest.raises(DataError, match="int64"):
        dice_coefficient(labels, labels)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(DataError, match="shape"):
        dice_coefficient(np.ones((3, 1), dtype=bool), np.ones((3, 3), dtype=bool))


@settings(max_examples=60, deadline=None)
@given(shapes.flatmap(lambda s: arrays(bool, s)), st.integers(0, 2))
def test_bounding_box_holds_all_and_no_slice_too_many(mask, margin):
    if not mask.any():
        return
    assert mask[bounding_box(mask)].sum() == mask.sum()
    where = np.argwhere(mask)
    for axis, piece in enumerate(bounding_box(mask, margin=margin)):
        assert piece.start == max(where[:, axis].min() - margin, 0)
        assert piece.stop == min(where[:, axis].max() + 1 + margin, mask.shape[axis])
