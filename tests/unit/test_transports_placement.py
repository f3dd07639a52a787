"""Placement: every site exactly once, bound sites stay, suspects are found."""

from __future__ import annotations

import pytest

from fedmed.message import Message, SiteFailure
from fedmed.transports.placement import PROBATION, Placement, Wave

DIED = SiteFailure("died", "")


def names(count: int) -> tuple[str, ...]:
    return tuple(f"site{k:03d}" for k in range(count))


def reply(*, keeps: bool = True) -> Message:
    return Message("Weights", {"keeps": keeps})


def flat(waves: list[Wave]) -> list[str]:
    return [site for wave in waves for group in wave.values() for site in group]


def worker_of(waves: list[Wave]) -> dict[str, int]:
    return {s: w for wave in waves for w, group in wave.items() for s in group}


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 100])
def test_runs_of_neighbours_of_even_length(count: int, num_workers: int) -> None:
    sites = names(count)
    waves = Placement(sites[::-1], num_workers).waves(sites)
    assert len(waves) == 1
    assert flat(waves) == list(sites)
    lengths = [len(group) for group in waves[0].values()]
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == min(count, num_workers)


def test_a_draw_of_free_sites_is_shared_out_evenly() -> None:
    sites = names(40)
    placement = Placement(sites, 4)
    for site in sites:
        placement.note(site, reply(keeps=False))
    drawn = sites[:8]  # all of them on the first worker at first
    assert [len(group) for group in placement.waves(drawn)[0].values()] == [2] * 4


def test_no_more_sites_move_than_are_too_many() -> None:
    sites = names(40)
    placement = Placement(sites, 4)
    home = worker_of(placement.waves(sites))
    drawn = [*sites[:6], *sites[10:12], *sites[20:22], *sites[30:32]]
    found = worker_of(placement.waves(drawn))
    assert sorted(found.values()) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    moved = [site for site in drawn if found[site] != home[site]]
    assert moved == list(sites[3:6])


def test_what_is_bound_stays_and_the_others_make_room() -> None:
    sites = names(40)
    placement = Placement(sites, 4)
    for site in sites[4:8]:
        placement.note(site, reply())
    found = worker_of(placement.waves(sites[:8]))
    assert {found[site] for site in sites[4:8]} == {0}
    assert {found[site] for site in sites[:4]} == {1, 2}


def test_a_site_that_keeps_something_stays_where_it_is() -> None:
    sites = names(40)
    placement = Placement(sites, 4)
    first = worker_of(placement.waves(sites))
    for site in sites:
        placement.note(site, reply())
    for drawn in (sites[:8], sites[5:30:5], sites):
        found = worker_of(placement.waves(drawn))
        assert found == {site: first[site] for site in drawn}


def test_one_site_that_keeps_something_is_not_moved_by_the_others() -> None:
    sites = names(12)
    placement = Placement(sites, 3)
    home = worker_of(placement.waves(sites))
    for site in sites:
        placement.note(site, reply(keeps=site == sites[11]))
    placement.waves(sites[:6])  # free sites only: they are spread
    assert worker_of(placement.waves(sites))[sites[11]] == home[sites[11]]


def test_who_says_nothing_of_what_it_keeps_stays() -> None:
    placement = Placement(names(4), 2)
    placement.note("site000", Message("Weights", {}))
    placement.note("site001", reply(keeps=False))
    assert placement._bound == {"site000"}
    placement.note("site000", reply(keeps=False))
    placement.note("site001", DIED)
    assert placement._bound == {"site001"}


def test_suspects_come_last_and_each_alone() -> None:
    sites = names(8)
    placement = Placement(sites, 2)
    placement.suspect(sites[:3])
    placement.suspect(sites[4:5])
    waves = placement.waves(sites)
    assert waves == [
        {0: (sites[3],), 1: sites[5:]},
        {0: (sites[0],), 1: (sites[4],)},
        {0: (sites[1],)},
        {0: (sites[2],)},
    ]


def test_suspects_alone_leave_an_empty_first_wave_that_asks_nobody() -> None:
    placement = Placement(names(2), 1)
    placement.suspect(names(2))
    waves = placement.waves(names(2))
    assert [wave for wave in waves if wave] == [{0: ("site000",)}, {0: ("site001",)}]


def test_answers_clear_a_suspect_and_a_failure_does_not() -> None:
    sites = names(3)
    placement = Placement(sites, 1)
    placement.suspect(sites)
    for number in range(PROBATION):
        assert [w for w in placement.waves(sites) if w] == [{0: (s,)} for s in sites]
        placement.note(sites[0], reply())
        placement.note(sites[1], reply(keeps=bool(number % 2)))
        placement.note(sites[2], DIED)
    assert placement.waves(sites) == [{0: sites[:2]}, {0: sites[2:]}]


def test_a_new_suspicion_starts_the_probation_anew() -> None:
    sites = names(2)
    placement = Placement(sites, 1)
    placement.suspect(sites[:1])
    for _ in range(PROBATION - 1):
        placement.note(sites[0], reply())
    placement.suspect(sites[:1])
    placement.note(sites[0], reply())
    assert placement.waves(sites) == [{0: sites[1:]}, {0: sites[:1]}]


def test_only_the_addressed_are_asked() -> None:
    sites = names(9)
    placement = Placement(sites, 3)
    placement.suspect([sites[8], sites[1]])
    waves = placement.waves([sites[4], sites[8]])
    assert sorted(flat(waves)) == [sites[4], sites[8]]
    assert flat(placement.waves([])) == []
