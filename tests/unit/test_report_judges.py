from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fedmed.report.judges import EPISODIC, judges_notes
from fedmed.report.run_folder import Comparison, Entry, Run


def compared(
    name: str, num_sites: int, held_out: int = 0, **options: Any
) -> Comparison:
    study = {
        "strategy": {"name": name, **options},
        "data": {str(number): {} for number in range(num_sites)},
        "held_out": [str(number) for number in range(held_out)],
    }
    return Comparison("x", (Entry(name, 0, None, Run("x", study)),))


JUDGES, TEACHES = "strategy.num_meta_test", "strategy.num_meta_train"
HEAD = "teaches the head"


@pytest.mark.parametrize(
    ("comparison", "told"),
    [
        (compared("mldg", 6, num_meta_test=1), {JUDGES}),
        (compared("mldg", 6, num_meta_test=2), set()),
        (compared("mldg", 6, held_out=1), set()),
        (compared("saml", 4, held_out=1), {JUDGES}),
        (compared("saml", 4, held_out=1, num_meta_test=2), {TEACHES}),
        (compared("saml", 6, num_meta_train=1), {TEACHES}),
        (compared("masf", 2), {JUDGES, TEACHES}),
        (compared("meta_reg", 6), {HEAD}),
        (compared("meta_reg", 2, num_meta_test=2), {JUDGES, HEAD}),
        (compared("fedavg", 2), set()),
        (compared("masf", 0), set()),
    ],
)
def test_who_plays_a_part_alone_is_told(comparison: Comparison, told: set[str]) -> None:
    notes = judges_notes(comparison)
    assert {
        key for note in notes for key in (JUDGES, TEACHES, HEAD) if key in note
    } == told
    assert len(notes) == len(told)


def test_of_sites_that_take_turns_only_those_of_a_round_count() -> None:
    many = compared("mldg", 6)
    drawn = dataclasses.replace(
        many.entries[0].run, study={**many.entries[0].run.study, "sites_per_round": 3}
    )
    entry = dataclasses.replace(many.entries[0], run=drawn)
    assert judges_notes(many) == ()
    assert len(judges_notes(Comparison("x", (entry,)))) == 1


def test_no_strategy_with_episodes_is_forgotten() -> None:
    found = (Path(__file__).parents[2] / "strategies").glob("*.py")
    named = {path.stem for path in found if "num_meta_test: int" in path.read_text()}
    assert named == set(EPISODIC)
