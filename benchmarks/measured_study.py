"""Run a study of ours and note what its rounds take."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed.run import run_study
from fedmed.study import study_from_dict

NEVER = 1_000_000
"""As `every`: only at the end, which is not timed."""

TRANSPORTS: dict[str, dict[str, Any]] = {
    "inprocess": {"name": "inprocess"},
    "workers": {"name": "workers", "num_workers": 4},
    "ray": {"name": "ray", "num_workers": 4},
}


class RoundClock:
    """Notes when rounds start and what they end with."""

    def __init__(self) -> None:
        self.starts_s: list[float] = []
        self.first_exchange_s = 0.0
        self.losses: list[float] = []

    def round_started(self, number: int) -> None:
        """Note the instant."""
        del number
        self.starts_s.append(time.perf_counter())

    def exchanged(
        self, number: int, exchange: int, losses: Mapping[str, float]
    ) -> None:
        """Note the first exchange."""
        del number, exchange, losses
        self.first_exchange_s = self.first_exchange_s or time.perf_counter()

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """Note the mean loss."""
        losses = list(record["loss"].values())
        self.losses.append(sum(losses) / max(1, len(losses)))


def measure_study(content: Mapping[str, Any], *, skip: int = 3) -> dict[str, Any]:
    """Run a study and give the time of its rounds.

    A round lasts from its start to the start of the next one, so everything between
    two rounds counts. The first `skip` rounds and the last one, which evaluates, do
    not.

    Args:
        content: The study; evaluation and checkpoints only at the end.
        skip: Rounds before the steady state.
    """
    quiet = {"evaluate": {"every": NEVER}, "checkpoint": {"every": NEVER}}
    study = study_from_dict({**quiet, "name": "bench", **content})
    logging.disable(logging.WARNING)
    clock = RoundClock()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_study(study, Path(folder) / "run", observer=clock)
    instants = clock.starts_s[skip:]
    took = [b - a for a, b in itertools.pairwise(instants)]
    return {
        **described(took),
        "start_s": clock.starts_s[0] - began,
        "first_exchange_s": clock.first_exchange_s - began,
        "loss": clock.losses[-2],
    }


@dataclass(frozen=True)
class Timed:
    """Seconds and mean loss of every round of a bare loop."""

    took_s: Sequence[float]
    losses: Sequence[float]

    def described(self, skip: int) -> dict[str, Any]:
        """As `described`, of the rounds after the first few."""
        return {**described(self.took_s[skip:]), "loss": self.losses[-1]}


def described(took: Sequence[float]) -> dict[str, Any]:
    """Median, fastest and slowest of rounds."""
    return {
        "seconds": statistics.median(took),
        "fastest": min(took),
        "slowest": max(took),
        "rounds": len(took),
    }


def variant_main(
    measured: Callable[..., Mapping[str, Any]], variants: Sequence[str]
) -> None:
    """Command line of a workload: measure one variant and tell it as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=variants)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    result = measured(arguments.variant, quick=arguments.quick)
    sys.stdout.write(json.dumps(result) + "\n")
