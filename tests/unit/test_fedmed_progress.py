"""What reaches the screen, and what it costs when nothing does."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedmed.progress import SHOW_S, TerminalProgress


def record(number: int) -> dict[str, Any]:
    return {
        "round": number, "seconds": 0.5, "loss": {"a": 0.25, "b": 0.75}, "score": 0.875,
        "refused": {}, "failed": {},
    }  # fmt: skip


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def shown(request: pytest.FixtureRequest) -> TerminalProgress:
    progress = TerminalProgress("study", rounds=3)
    progress._console = Console(
        file=io.StringIO(), force_terminal=request.param, width=200
    )
    return progress


def output(progress: TerminalProgress) -> str:
    file = progress._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def state(progress: TerminalProgress) -> str:
    assert progress._progress is not None
    return str(progress._progress.tasks[0].fields["state"])


def test_a_throttled_call_costs_nothing(shown: TerminalProgress) -> None:
    losses = {f"site{number}": 0.5 for number in range(100)}
    with shown:
        shown.exchanged(1, 1, losses)
        times = []
        for _ in range(20):
            start = time.process_time()
            for exchange in range(100):
                shown.exchanged(1, exchange, losses)
            times.append((time.process_time() - start) / 100)
    # Well below 2 microseconds on its own; type checks while testing cost more.
    assert np.min(times) < 2e-5


def test_at_most_ten_changes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("fedmed.progress.time.monotonic", lambda: now_s[0])
    progress = TerminalProgress("study", rounds=3)
    progress._console = Console(file=io.StringIO(), force_terminal=True, width=200)
    seen = set()
    with progress:
        for exchange in range(1000):
            now_s[0] += SHOW_S / 100
            progress.exchanged(1, exchange, {"a": float(exchange)})
            seen.add(state(progress))
    assert 10 <= len(seen) <= 12  # one second, and the first


def test_the_last_round_is_always_shown() -> None:
    progress = TerminalProgress("study", rounds=3)
    progress._console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with progress:
        for number in (1, 2, 3):
            progress.round_started(number)
            progress.round_finished(record(number))
        assert "validation 0.875" in state(progress)
        assert "highest b 0.750" in state(progress)
        assert progress._progress is not None
        assert progress._progress.tasks[0].completed == 3


def test_every_round_is_a_line_of_a_file() -> None:
    progress = TerminalProgress("study", rounds=3)
    progress._console = Console(file=io.StringIO(), force_terminal=False, width=200)
    with progress:
        for number in (1, 2, 3):
            progress.exchanged(number, 1, {"a": 0.5})
            progress.round_finished(record(number))
    lines = output(progress).splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        f"study: round {number}/3" for number in (1, 2, 3)
    ]
