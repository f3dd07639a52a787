from __future__ import annotations

import numpy as np
import pytest

from fedmed.metrics.largest_component import largest_component


@pytest.mark.parametrize("per_class", [True, False])
def test_an_empty_prediction_stays_empty(per_class):
    empty = np.zeros((4, 4, 4), dtype=np.uint8)
    assert not largest_component(empty, per_class=per_class).any()


@pytest.mark.parametrize("per_class", [True, False])
def test_islands_go_and_the_organ_stays(per_class):
    organ = np.zeros((8, 8, 8), dtype=np.uint8)
    organ[1:4, 1:4, 1:4] = 1
    with_island = organ.copy()
    with_island[6, 6, 5:7] = 1
    before = with_island.copy()
    result = largest_component(with_island, per_class=per_class)
    np.testing.assert_array_equal(result, organ)
    np.testing.assert_array_equal(with_island, before)
    assert result.dtype == organ.dtype


def test_a_diagonal_neighbour_is_not_connected():
    prediction = np.zeros((3, 3, 3), dtype=np.uint8)
    prediction[0, 0, :2] = 1
    prediction[1, 1, 2] = 1
    assert largest_component(prediction).sum() == 2


def test_organs_that_lie_apart_survive_only_class_by_class():
    prediction = np.zeros((9, 1, 1), dtype=np.uint8)
    prediction[:4] = 1
    prediction[6:8] = 2
    np.testing.assert_array_equal(largest_component(prediction), prediction)
    assert set(np.unique(largest_component(prediction, per_class=False))) == {0, 1}


def test_parts_of_one_organ_hold_together_as_foreground():
    # Class 1 on both sides of class 2: one piece of tissue, two pieces of class 1.
    prediction = np.array([1, 1, 2, 2, 1, 0, 1], dtype=np.uint8).reshape(7, 1, 1)
    whole = largest_component(prediction, per_class=False).ravel()
    assert whole.tolist() == [1, 1, 2, 2, 1, 0, 0]
    assert largest_component(prediction).ravel().tolist() == [1, 1, 2, 2, 0, 0, 0]


def test_a_full_prediction_stays():
    full = np.ones((3, 4, 5), dtype=np.int64)
    np.testing.assert_array_equal(largest_component(full), full)
