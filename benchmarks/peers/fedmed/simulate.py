"""The same work as a study of fedmed, with four local workers."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks import workload
from benchmarks.measured_study import NEVER, TRANSPORTS, study_of
from fedmed.run import Silence, run_study
from fedmed.runfolder import Observer
from fedmed.study import study_from_dict


class Clock:
    """An observer that marks the end of each round."""

    def __init__(self) -> None:
        self.rounds: workload.Rounds | None = None

    def round_started(self, number: int) -> None:
        """A round ends where the next one starts: what lies between counts."""
        del number
        if self.rounds is None:
            self.rounds = workload.Rounds()
        else:
            self.rounds.done()

    def exchanged(
        self, number: int, exchange: int, losses: Mapping[str, float]
    ) -> None:
        """Nothing."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """Nothing."""


def simulate(name: str, num_rounds: int, folder: Path, *, precision: str) -> None:
    """Mark the rounds of one study, and tell the loss of a second one.

    A study ends with an evaluation, which is not compared: the first has a round more,
    which is not marked. The second, on no clock, ends where all others end.
    """
    clock = Clock()
    run(name, num_rounds + 1, folder / "timed", precision=precision, observer=clock)
    run(name, num_rounds, folder / "whole", precision=precision, observer=Silence())
    model = workload.build_model(name)
    model.load_state_dict(load_file(folder / "whole" / "model.safetensors"))
    assert clock.rounds is not None
    clock.rounds.end(workload.probe_loss(name, model))


def run(
    name: str, rounds: int, folder: Path, *, precision: str, observer: Observer
) -> None:
    """Run a workload as a study."""
    content = study_of(
        name, rounds=rounds, transport=TRANSPORTS["workers"], precision=precision
    )
    quiet = {"evaluate": {"every": NEVER}, "checkpoint": {"every": NEVER}}
    study = study_from_dict({**quiet, "name": "bench", **content})
    run_study(study, folder, observer=observer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=workload.WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bfloat16", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        simulate(
            arguments.workload,
            arguments.rounds,
            Path(scratch),
            precision="bfloat16" if arguments.bfloat16 else "float32",
        )
