from __future__ import annotations

import pytest

from fedmed.leg_process import Verdict
from fedmed.leg_speed import speed_of


def test_share_of_the_ideal_is_of_what_there_was_to_run() -> None:
    spent = [Verdict(True, None, 6.0), Verdict(True, None, 3.0)]
    speed = speed_of(spent, jobs=4, wall_s=6.0)
    assert speed.factor == pytest.approx(1.5)
    assert speed.share == pytest.approx(0.75)  # two runs cannot fill four places
    assert speed.as_dict()["share_of_ideal"] == pytest.approx(0.75)


def test_it_is_told_in_one_line() -> None:
    speed = speed_of([Verdict(True, None, 30.0)] * 12, jobs=4, wall_s=100.0)
    told = str(speed)
    assert told == (
        "12 runs with --jobs 4: 6 min of processor time in 2 min, 3.60 times, "
        "90 % of the ideal 4"
    )
