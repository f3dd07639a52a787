from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedmed.report.judges import EPISODIC, FEW_SITES, judges_notes
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


@pytest.mark.parametrize(
    ("comparison", "is_told"),
    [
        (compared("mldg", 6, num_meta_test=1), True),
        (compared("mldg", 6, num_meta_test=2), False),
        (compared("mldg", 6, held_out=1), False),
        (compared("saml", 4, held_out=1), True),
        (compared("fedavg", 2), False),
        (compared("masf", 0), False),
    ],
)
def test_a_single_judge_is_told(comparison: Comparison, is_told: bool) -> None:
    notes = judges_notes(comparison)
    assert bool(notes) == is_told
    assert all("strategy.num_meta_test" in note for note in notes)


def test_the_rule_is_that_of_episodes() -> None:
    from fedmed.episodes import default_meta_test

    assert [n < FEW_SITES for n in range(2, 9)] == [
        default_meta_test(n) == 1 for n in range(2, 9)
    ]


def test_no_strategy_with_episodes_is_forgotten() -> None:
    found = (Path(__file__).parents[2] / "strategies").glob("*.py")
    named = {path.stem for path in found if "num_meta_test: int" in path.read_text()}
    assert named == set(EPISODIC)
