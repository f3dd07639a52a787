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
from pathlib import Path
from typing import Any

from benchmarks import workload
from fedmed.run import run_study
from fedmed.study import study_from_dict

NEVER = 1_000_000
"""As `every`: only at the end, which is not timed."""

TRANSPORTS: dict[str, dict[str, Any]] = {
    "inprocess": {"name": "inprocess"},
    "workers": {"name": "workers", "num_workers": 4},
    "ray": {"name": "ray", "num_workers": 4},
}


def study_of(
    name: str,
    *,
    rounds: int,
    transport: Mapping[str, Any],
    num_sites: int | None = None,
    precision: str = "float32",
) -> dict[str, Any]:
    """W1, W2 or W3 as a study: the sites, network and step of `workload`.

    Args:
        name: The workload.
        rounds: Of the study; the last one evaluates.
        transport: The section.
        num_sites: All sites; None = the workload's.
        precision: Of the forward passes.
    """
    work = workload.WORKLOADS[name]
    num_sites = num_sites or work.num_sites
    is_image = name == "W1"
    sampled = min(num_sites, work.num_sampled)
    return {
        "rounds": rounds,
        "sites": {
            "dataset": "benchmarks.workload_sites",
            "workload": name,
            "num_sites": num_sites,
        },
        "sites_per_round": sampled if sampled < num_sites else None,
        "split": {"train": 1.0, "validation": 0.0, "test": 0.0},
        "preprocess": {"intensity": "none"} if is_image else {},
        "model": {
            "name": f"benchmarks.workload:{workload.NETWORKS[name].__name__}",
            "mode": "slice" if is_image else "row",
        },
        "train": {
            "batch_size": work.batch_size,
            "local_steps": work.num_steps,
            "loss": "cross_entropy",
            "optimizer": {"name": "sgd", "lr": work.learning_rate},
            "precision": precision,
        },
        "strategy": {"name": "fedavg"},
        "transport": transport,
    }


class RoundClock:
    """Notes when rounds start and what they end with.

    Args:
        between: Called after each round; the time that it takes is not the study's.
    """

    def __init__(self, between: Callable[[], None] | None = None) -> None:
        self.starts_s: list[float] = []
        self.first_exchange_s = 0.0
        self.losses: list[float] = []
        self._between = between
        self._paused_s = 0.0

    def now(self) -> float:
        """Seconds of the study's own time."""
        return time.perf_counter() - self._paused_s

    def round_started(self, number: int) -> None:
        """Note the instant."""
        del number
        self.starts_s.append(self.now())

    def exchanged(
        self, number: int, exchange: int, losses: Mapping[str, float]
    ) -> None:
        """Note the first exchange."""
        del number, exchange, losses
        self.first_exchange_s = self.first_exchange_s or self.now()

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """Note the mean loss."""
        losses = list(record["loss"].values())
        self.losses.append(sum(losses) / max(1, len(losses)))
        if self._between is not None:
            before_s = time.perf_counter()
            self._between()
            self._paused_s += time.perf_counter() - before_s


def measure_study(
    content: Mapping[str, Any],
    *,
    skip: int = 3,
    between: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run a study and give the time of its rounds.

    A round lasts from its start to the start of the next one, so everything between
    two rounds counts. The first `skip` rounds and the last one, which evaluates, do
    not.

    Args:
        content: The study; evaluation and checkpoints only at the end.
        skip: Rounds before the steady state.
        between: Called after each round, and not timed.
    """
    quiet = {"evaluate": {"every": NEVER}, "checkpoint": {"every": NEVER}}
    study = study_from_dict({**quiet, "name": "bench", **content})
    logging.disable(logging.WARNING)
    clock = RoundClock(between)
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
