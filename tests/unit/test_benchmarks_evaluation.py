from __future__ import annotations

import numpy as np
import pytest

from benchmarks import evaluation
from benchmarks.evaluation import (
    CLASSES,
    SHAPE,
    Row,
    as_json,
    draw_case,
    monai_hd95_in_float64,
    score_monai,
    score_ours,
)

NAMES = ["fedmed", "monai", "surface-distance"]


def rows_of(**values):
    """Ours in 1 and 2 s, MONAI in 10 and 40 s, surface-distance in 4 and 4 s."""
    good = np.tile([0.9, 1.0, 3.0], (2, len(CLASSES), 1))
    took = {"fedmed": [1.0, 2.0], "monai": [10.0, 40.0], "surface-distance": [4.0, 4.0]}
    return [Row(n, 4, 2, took[n], values.get(n, good)) for n in took]


def test_ratios_are_to_monai_within_each_turn():
    ours, monai, other = as_json(rows_of(), NAMES)["rows"]
    assert ours["ratio"] == pytest.approx((1 / 10 + 2 / 40) / 2)
    assert ours["bar"] == pytest.approx(1 / 3)
    assert monai["ratio"] == other["times_ours"] / 3 == 1.0
    assert monai["times_ours"] == 15.0
    assert other["seconds_a_case"] == 2.0


def test_without_monai_there_is_no_ratio():
    result = as_json(rows_of()[:1], NAMES[:1])
    assert result["rows"][0]["ratio"] is None
    assert result["missing"] == ["monai", "surface-distance"]


class TwoCases:
    """In the place of the volumes in shared memory."""

    arrays = (draw_case(0, 0), draw_case(0, 18))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_percentile_that_float32_cannot_place_is_taken_in_float64():
    pytest.importorskip("monai")
    ours, theirs = (
        score(*TwoCases.arrays[1])[2][2] for score in (score_ours, score_monai)
    )
    assert abs(theirs - ours) > 1e-5 * ours
    precise = monai_hd95_in_float64(*TwoCases.arrays[1], CLASSES[2])
    assert precise == pytest.approx(ours, rel=1e-7)


@pytest.mark.parametrize(("place", "change"), [(0, 1e-5), (1, 1e-4), (2, 1e-4)])
def test_other_values_are_noticed(place, change, monkeypatch):
    monkeypatch.setattr(evaluation, "_CASES", [TwoCases])
    monkeypatch.setattr(evaluation, "monai_hd95_in_float64", lambda *_: 3.0 + change)
    wrong = rows_of()[0].values.copy()
    wrong[1, 2, place] += change
    checks = as_json(rows_of(monai=wrong), NAMES)["checks"].values()
    assert [seen["is_equal"] for seen in checks] == [True, False, True]


def test_cases_are_drawn_again_and_hold_every_organ():
    prediction, label = draw_case(3, 7)
    assert prediction.shape == label.shape == SHAPE
    for first, again in zip((prediction, label), draw_case(3, 7), strict=True):
        np.testing.assert_array_equal(first, again)
        assert set(np.unique(first)) == {0, *CLASSES}
    overlap = 2 * ((prediction == 1) & (label == 1)).sum()
    assert 0.85 < overlap / ((prediction == 1).sum() + (label == 1).sum()) < 0.99
