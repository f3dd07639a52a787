from __future__ import annotations

import math

import numpy as np
import pytest

from fedmed.errors import DataError
from fedmed.metrics.case_scores import ClassScore, score_case
from fedmed.metrics.summary import (
    HIGHER_IS_BETTER,
    gain_over,
    summarise_all_classes,
    summarise_class,
    summarise_site,
    summarise_sites,
)

NAN = float("nan")


def study(higher_is_better=True, **means):
    sites = {site: summarise_site(values) for site, values in means.items()}
    return summarise_sites(sites, higher_is_better=higher_is_better)


def class_score(index, dice, status="ok"):
    return ClassScore(index, f"class {index}", dice, *[1.0] * 6, status)


def test_every_metric_has_a_direction_and_is_a_field():
    score = class_score(1, 0.5)
    assert all(hasattr(score, metric) for metric in HIGHER_IS_BETTER)


def test_site_mean_and_std_are_over_present_cases():
    row = summarise_site([0.6, NAN, 0.8, 1.0])
    assert (row.num_cases, row.num_absent) == (3, 1)
    assert row.mean == pytest.approx(0.8)
    assert row.std == pytest.approx(math.sqrt(0.08 / 3))


def test_one_case_shows_no_spread_and_none_no_mean():
    assert summarise_site([0.5]).mean == 0.5
    assert math.isnan(summarise_site([0.5]).std)
    assert math.isnan(summarise_site([]).mean)


def test_infinite_values_are_refused():
    with pytest.raises(DataError, match="infinite"):
        summarise_site([0.5, math.inf])


def test_sites_count_once_whatever_their_size():
    summary = study(big=[1.0] * 100, small=[0.0])
    assert summary.mean_over_sites == 0.5


def test_sites_are_sorted_and_the_worst_is_named():
    summary = study(c=[0.7], a=[0.9], b=[0.7])
    assert list(summary.sites) == ["a", "b", "c"]
    assert (summary.worst_site, summary.worst_mean) == ("b", 0.7)
    distances = study(False, c=[0.7], a=[0.9], b=[0.7])
    assert distances.worst_site == "a"


def test_a_site_without_cases_is_listed_not_lost():
    summary = study(a=[0.9], b=[NAN, NAN])
    assert summary.mean_over_sites == pytest.approx(0.9)
    assert summary.sites_without_cases == ("b",)
    assert summary.sites["b"].num_absent == 2
    nothing = study(b=[NAN])
    assert nothing.worst_site is None
    assert math.isnan(nothing.mean_over_sites)


def test_gain_is_positive_for_better_whatever_the_direction():
    dice = gain_over(study(a=[0.9], b=[0.6]), study(a=[0.8], b=[0.7]))
    assert dice.per_site == pytest.approx({"a": 0.1, "b": -0.1})
    assert dice.mean_over_sites == pytest.approx(0)
    assert (dice.worst_site, dice.num_sites_better) == ("b", 1)
    assert dice.worst_gain == pytest.approx(-0.1)
    distance = gain_over(study(False, a=[1.0]), study(False, a=[3.0]))
    assert distance.per_site == {"a": 2.0}


def test_gain_refuses_what_cannot_be_compared():
    with pytest.raises(DataError, match="cannot be compared"):
        gain_over(study(a=[1.0]), study(b=[1.0]))
    with pytest.raises(DataError, match="cannot be compared"):
        gain_over(study(a=[1.0]), study(False, a=[1.0]))


def test_missed_and_false_alarms_are_in_the_mean_and_counted():
    cases = [
        [class_score(1, 0.9)],
        [class_score(1, 0.0, "missed")],
        [class_score(1, 0.0, "false_alarm")],
        [class_score(1, NAN, "absent")],
    ]
    row = summarise_class(cases, metric="dice", class_index=1)
    assert row.mean == pytest.approx(0.3)
    assert (row.num_cases, row.num_absent) == (3, 1)
    assert (row.num_missed, row.num_false_alarms) == (1, 1)


def test_a_class_without_a_score_is_an_error():
    with pytest.raises(DataError, match="class 2"):
        summarise_class([[class_score(1, 0.9)]], metric="dice", class_index=2)


def test_all_classes_are_averaged_within_a_case_first():
    cases = [
        [class_score(1, 0.8), class_score(2, NAN, "absent")],
        [class_score(1, 0.6), class_score(2, 0.0, "missed")],
    ]
    row = summarise_all_classes(iter(cases), metric="dice")
    assert row.mean == pytest.approx((0.8 + 0.3) / 2)
    assert (row.num_missed, row.num_false_alarms) == (1, 0)


def test_from_voxels_to_a_row():
    label = np.zeros((4, 4, 1), dtype=np.uint8)
    label[1:3, 1:3] = 1
    cases = [
        score_case(p, label, spacing_mm=(1.0, 1.0, 1.0), class_names={1: "disc"})
        for p in (label, 0 * label)
    ]
    assert summarise_class(cases, metric="dice", class_index=1).mean == 0.5
