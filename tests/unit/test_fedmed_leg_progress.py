from __future__ import annotations

from pathlib import Path

import pytest

from fedmed.errors import SiteError
from fedmed.leg_process import Verdict
from fedmed.leg_progress import LegProgress


def test_every_end_is_one_plain_line_with_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with LegProgress(8, jobs=2, rounds=3, quiet=False) as progress:
        for name in "abcd":
            progress.started(Path(name))
        progress.running((Path("a"), Path("b")))
        progress.ended(Path("a[x=1]"), Verdict(True), 60.0)
        progress.ended(Path("b"), Verdict(False, SiteError("it broke")), 10.0)
        progress.ended(Path("c"), Verdict(True), 120.0)
        progress.ended(Path("d"), Verdict(False), 5.0)
    told = capsys.readouterr()
    assert not told.out
    # 8 - 1 = 7 runs left, two at a time, a minute each; and so on.
    assert told.err.splitlines() == [
        "a[x=1]: done in 1 min · 1 of 8 runs done, about 4 min left",
        "b: failed: it broke · 1 of 8 runs done, about 3 min left",
        "c: done in 2 min · 2 of 8 runs done, about 4 min left",
        "d: stopped after a round · 2 of 8 runs done, about 4 min left",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with LegProgress(1, jobs=2, rounds=3, quiet=True) as progress:
        progress.ended(Path("a"), Verdict(True), 60.0)
    assert capsys.readouterr() == ("", "")
