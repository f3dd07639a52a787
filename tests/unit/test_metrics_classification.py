from __future__ import annotations

import math

import numpy as np
import pytest

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import DataError
from fedmed.metrics.classification import score_classification

NAMES = {0: "healthy", 1: "diseased"}


def two_columns(*probability_of_1):
    p = np.array(probability_of_1, dtype=np.float64)
    return np.stack([1 - p, p], axis=1)


def test_by_hand():
    scores = score_classification(
        two_columns(0.1, 0.6, 0.4, 0.9, 0.8),
        np.array([0, 0, 1, 1, 1]),
        class_names=NAMES,
    )
    assert scores.num_cases == 5
    assert scores.num_cases_per_class == (2, 3)
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.balanced_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    # Of the 6 pairs (healthy, diseased) only (0.6, 0.4) is in the wrong order.
    assert scores.roc_auc == pytest.approx(5 / 6)
    assert scores.roc_auc_reason == ""


@pytest.mark.parametrize(("label", "missing"), [(0, "diseased"), (1, "healthy")])
def test_a_site_with_one_class_has_no_roc_area_and_says_why(label, missing):
    scores = score_classification(
        two_columns(0.1, 0.6), np.array([label, label]), class_names=NAMES
    )
    assert math.isnan(scores.roc_auc)
    assert missing in scores.roc_auc_reason
    assert scores.accuracy == scores.balanced_accuracy == 0.5


def test_a_class_missing_among_three_is_not_averaged_away():
    names = {0: "low", 1: "middle", 2: "high"}
    rng = np.random.default_rng(0)
    scores = score_classification(
        rng.dirichlet([1, 1, 1], 6), np.array([0, 0, 0, 2, 2, 2]), class_names=names
    )
    assert math.isnan(scores.roc_auc)
    assert scores.roc_auc_reason == "no case of class 1 (middle)"


def test_unlabelled_cases_take_no_part():
    labels = np.array([0, UNKNOWN_LABEL, 1])
    scores = score_classification(two_columns(0.1, 0.2, 0.9), labels, class_names=NAMES)
    assert scores.num_cases == 2
    assert scores.accuracy == 1


def test_no_case_at_all():
    scores = score_classification(
        np.zeros((0, 2)), np.zeros(0, dtype=np.int64), class_names=NAMES
    )
    assert scores.num_cases == 0
    assert math.isnan(scores.accuracy)
    assert math.isnan(scores.balanced_accuracy)
    assert math.isnan(scores.roc_auc)


@pytest.mark.parametrize(
    ("probabilities", "labels", "match"),
    [
        (two_columns(0.1, 0.2), np.array([0]), "shape"),
        (two_columns(0.1, math.nan), np.array([0, 1]), "finite"),
        (two_columns(0.1, 0.2), np.array([0, 2]), r"\[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(probabilities, labels, match):
    with pytest.raises(DataError, match=match):
        score_classification(probabilities, labels, class_names=NAMES)
