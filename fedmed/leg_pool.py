"""Legs of a comparison side by side: as many processes as asked for, each one leg."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedmed.errors import FedMedError, SiteError
from fedmed.leg_process import PRELOADED, Verdict, run_leg_process
from fedmed.study import Study

POLL_S = 0.2
"""How often progress is looked at."""


@runtime_checkable
class LegObserver(Protocol):
    """Who wants to see the progress of legs that run side by side."""

    def started(self, folder: Path) -> None:
        """A leg begins."""

    def running(self, folders: tuple[Path, ...]) -> None:
        """These legs are under way."""

    def ended(self, folder: Path, verdict: Verdict, seconds: float) -> None:
        """A leg is over."""


@dataclass
class _Runner:
    folder: Path
    process: Any
    pipe: Connection
    began_s: float


@dataclass
class LegPool:
    """Runs legs in parallel processes.

    The processes are forked from one that has imported torch and computed nothing, so
    that a leg starts in a blink and threads are never copied.

    Attributes:
        jobs: Legs at a time.
        observer: Sees progress.
        should_stop: Asked all the time; when true, running legs finish their round.
    """

    jobs: int
    observer: LegObserver
    should_stop: Callable[[], bool]
    _runners: list[_Runner] = field(default_factory=list)

    def run(self, legs: Mapping[Path, Study]) -> dict[Path, Verdict]:
        """Run legs to their ends, or to the end of a round if asked to stop.

        Args:
            legs: Run folder -> resolved study. An unfinished run is gone on with.

        Returns:
            How each leg that was started ended.
        """
        waiting = deque(legs.items())
        verdicts: dict[Path, Verdict] = {}
        told = False
        try:
            while self._runners or (waiting and not self.should_stop()):
                while waiting and len(self._runners) < self.jobs and not told:
                    self._start(*waiting.popleft())
                if self.should_stop() and not told:
                    told = True
                    self._end(gently=True)
                self.observer.running(tuple(r.folder for r in self._runners))
                verdicts.update(self._collect())
        finally:
            self._end(gently=False)
            for runner in self._runners:
                runner.process.join()
        return verdicts

    def _start(self, folder: Path, study: Study) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        ours, theirs = context.Pipe(duplex=False)
        verbose = logging.getLogger().isEnabledFor(logging.INFO)
        process = context.Process(
            target=run_leg_process,
            args=(theirs, study.to_dict(), folder, verbose),
            name="fedmed-leg",
        )
        process.start()
        theirs.close()
        self._runners.append(_Runner(folder, process, ours, time.monotonic()))
        self.observer.started(folder)

    def _collect(self) -> dict[Path, Verdict]:
        """Wait a moment for ends, and take note of them."""
        ready = set(wait([runner.pipe for runner in self._runners], timeout=POLL_S))
        ended = [runner for runner in self._runners if runner.pipe in ready]
        verdicts = {}
        for runner in ended:
            verdict = _receive(runner)
            self._runners.remove(runner)
            seconds = time.monotonic() - runner.began_s
            self.observer.ended(runner.folder, verdict, seconds)
            verdicts[runner.folder] = verdict
        return verdicts

    def _end(self, *, gently: bool) -> None:
        for runner in self._runners:
            process = runner.process
            with suppress(ProcessLookupError):
                process.terminate() if gently else process.kill()


def _receive(runner: _Runner) -> Verdict:
    try:
        verdict: Verdict = runner.pipe.recv()
    except (EOFError, ConnectionError):
        runner.process.join()
        code = runner.process.exitcode
        how = f"died with exit code {code}"
        if code is not None and code < 0:
            how = f"was ended by signal {-code}"
        return Verdict(False, _death(how))
    runner.pipe.close()
    runner.process.join()
    return verdict


def _death(how: str) -> FedMedError:
    return SiteError(
        f"the process of it {how}",
        hint="If memory ran out, lower --jobs; the same command goes on from here.",
    )
