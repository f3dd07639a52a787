from __future__ import annotations

import pytest

from fedmed.episodes import default_meta_test, draw_episode
from fedmed.errors import ConfigError
from fedmed.strategy import Cohort, Member


def cohort_of(number, seed=0):
    names = [f"site_{position}" for position in range(number)]
    members = tuple(Member(name, 10) for name in sorted(names))
    return Cohort(members, steps=1, round=1, rng_seed=seed)


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 12])
def test_the_groups_are_disjoint_and_sorted_and_use_every_site(number):
    episode = draw_episode(cohort_of(number), 0)
    train, test = episode.meta_train.site_ids, episode.meta_test.site_ids
    assert not set(train) & set(test)
    assert episode.both.site_ids == cohort_of(number).site_ids
    assert sorted({*train, *test}) == list(cohort_of(number).site_ids)
    assert list(train) == sorted(train)
    assert list(test) == sorted(test)
    assert len(test) == default_meta_test(number)


def test_no_gradient_is_alone_where_four_sites_train():
    for number in range(4, 30):
        episode = draw_episode(cohort_of(number), 3)
        assert min(len(episode.meta_train.members), len(episode.meta_test.members)) > 1


def test_each_step_draws_anew_and_the_same_again():
    drawn = [draw_episode(cohort_of(6), index).meta_test.site_ids for index in range(9)]
    again = [draw_episode(cohort_of(6), index).meta_test.site_ids for index in range(9)]
    assert drawn == again
    assert len(set(drawn)) > 3
    other = [
        draw_episode(cohort_of(6, seed=1), index).meta_test.site_ids
        for index in range(9)
    ]
    assert drawn != other


def test_sites_may_stand_idle():
    episode = draw_episode(cohort_of(6), 0, num_meta_train=2, num_meta_test=1)
    assert len(episode.meta_train.members) == 2
    assert len(episode.meta_test.members) == 1


@pytest.mark.parametrize(
    ("number", "train", "test"), [(1, None, None), (3, None, 3), (3, 3, 1), (2, 2, 1)]
)
def test_too_few_sites_are_an_error_that_says_what_to_lower(number, train, test):
    with pytest.raises(ConfigError, match="num_meta_test"):
        draw_episode(cohort_of(number), 0, num_meta_train=train, num_meta_test=test)


def test_too_few_sites_of_a_round_are_said_to_be_drawn():
    drawn = cohort_of(3).select(("site_0",))
    with pytest.raises(ConfigError, match=r"raise sites_per_round \(3 sites train\)"):
        draw_episode(drawn, 0)
