"""Progress for people: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOW_S = 0.1
"""Shortest time between two changes of the live line, seconds."""


class TerminalProgress:
    """Shows round, step, loss and remaining time on standard error.

    A run may have a thousand exchanges a second: what comes sooner than `SHOW_S` after
    the last change is not shown. Ends of rounds always are, each once, where they are
    plain lines.

    Args:
        title: What is running.
        rounds: Rounds in all.
        first: Rounds already done.
    """

    def __init__(self, title: str, rounds: int, first: int = 0) -> None:
        self._console = Console(file=sys.stderr)
        self._rounds = rounds
        self._title = title
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._first = first
        self._next_s = 0.0

    def __enter__(self) -> TerminalProgress:
        """Start showing."""
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._bar = self._progress.add_task(
                self._title, total=self._rounds, completed=self._first, state="joining"
            )
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop showing."""
        if self._progress is not None:
            self._progress.stop()

    def round_started(self, number: int) -> None:
        """A round begins."""
        if self._is_due():
            self._show(f"round {number} training")

    def exchanged(
        self, number: int, exchange: int, losses: Mapping[str, float]
    ) -> None:
        """An exchange is over."""
        del number
        if self._is_due():
            self._show(f"exchange {exchange} · {_losses(losses)}")

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """A round is over."""
        number = int(record["round"])
        if self._progress is not None and number < self._rounds and not self._is_due():
            return
        text = _losses(record["loss"])
        if record["score"] is not None:
            text += f" · validation {record['score']:.3f}"
        for kind in ("refused", "failed"):
            if record[kind]:
                text += f" · {kind}: {', '.join(record[kind])}"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=number, state=text)
            return
        # The first round also opens the data, so it tells little about the others.
        left = record["seconds"] * (self._rounds - number)
        self._console.print(
            f"{self._title}: round {number}/{self._rounds} · {text} · "
            f"{record['seconds']:.1f} s · {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )

    def _is_due(self) -> bool:
        """Whether the live line may change again; notes the change."""
        if self._progress is None:
            return False
        now_s = time.monotonic()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + SHOW_S
        return True

    def _show(self, state: str) -> None:
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, state=state)


def _losses(losses: Mapping[str, float]) -> str:
    if not losses:
        return "no losses yet"
    values = list(losses.values())
    mean = sum(values) / len(values)
    worst = max(losses, key=lambda site: losses[site])
    return f"loss {mean:.3f} (highest {worst} {losses[worst]:.3f})"
