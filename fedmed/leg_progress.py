"""Progress of a comparison whose legs run side by side."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedmed.leg_process import Verdict
from fedmed.report.wording import count, duration

MAX_SHOWN = 6
"""Legs under way that the live line names."""


class LegProgress:
    """Shows ended legs as lines, and those under way as a live line in a terminal.

    Args:
        total: Legs to run.
        jobs: Legs at a time.
        rounds: Rounds of a leg.
        quiet: Show nothing.
    """

    def __init__(self, total: int, *, jobs: int, rounds: int, quiet: bool) -> None:
        self._console = Console(file=sys.stderr, quiet=quiet)
        self._total = total
        self._jobs = jobs
        self._rounds = rounds
        self._seconds: list[float] = []
        self._failed = 0
        self._live: Live | None = None

    def __enter__(self) -> LegProgress:
        """Start showing."""
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop showing."""
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()

    def started(self, folder: Path) -> None:
        """A leg begins: the live line will tell."""

    def running(self, folders: tuple[Path, ...]) -> None:
        """Show how far the legs under way are."""
        if self._live is None:
            return
        shown = [
            f"{folder.name} {_rounds_done(folder)}/{self._rounds}"
            for folder in folders[:MAX_SHOWN]
        ]
        more = len(folders) - len(shown)
        words = ", ".join(shown) + (f" and {more} more" if more else "")
        self._live.update(Text(f"{self._state()} · {words}"))

    def ended(self, folder: Path, verdict: Verdict, seconds: float) -> None:
        """Show how a leg ended."""
        if verdict.error is not None:
            self._failed += 1
            how = f"failed: {verdict.error.message}"
        elif verdict.finished:
            self._seconds.append(seconds)
            how = f"done in {duration(seconds)}"
        else:
            how = "stopped after a round"
        line = f"{folder.name}: {how} · {self._state()}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _state(self) -> str:
        done, seconds = len(self._seconds), self._seconds
        left = self._total - done - self._failed
        text = f"{done} of {count(self._total, 'run')} done"
        if seconds and left:
            waves = max(1.0, left / self._jobs)
            text += f", about {duration(waves * sum(seconds) / done)} left"
        return text


def _rounds_done(folder: Path) -> int:
    rounds = folder / "rounds.jsonl"
    return rounds.read_bytes().count(b"\n") if rounds.is_file() else 0
