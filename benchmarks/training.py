"""W1, training: one local epoch at eight sites, beside a bare PyTorch loop.

A 2D U-Net of base 16 and 4 levels with batch normalisation; 8 sites of 32 slices of
96x96; batches of 8, SGD, FedAvg; 4 processes with one thread each. A round of the
study is followed by one of every floor, in turns, in the same minutes on the same
cores. The first round of each and the study's last one, which evaluates, do not count.

    python benchmarks/training.py [--rounds 6] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.floor_training import Floor, Slices
from benchmarks.synthetic_slices import open_sites
from fedmed.networks.build import build_network
from fedmed.run import run_study
from fedmed.study import Study, study_from_dict

MODEL = {"base_width": 16, "levels": 4, "norm": "batch"}
NUM_WORKERS = 4
BATCH_SIZE = 8
LR = 0.01
PRECISIONS = ("float32", "bfloat16")


def make_study(precision: str, rounds: int, transport: str) -> Study:
    """Describe W1 as a study, evaluated and written down at the end only."""
    options = {} if transport == "inprocess" else {"num_workers": NUM_WORKERS}
    return study_from_dict(
        {
            "name": "w1",
            "rounds": rounds,
            "sites": {"dataset": "benchmarks.synthetic_slices"},
            "split": {"train": 0.5, "validation": 0.0, "test": 0.5},
            "preprocess": {"intensity": "none"},
            "model": {"name": "unet", **MODEL},
            "train": {
                "batch_size": BATCH_SIZE,
                "local_epochs": 1,
                "loss": "cross_entropy",
                "optimizer": {"name": "sgd", "lr": LR},
                "precision": precision,
            },
            "strategy": {"name": "fedavg", "sync": "round"},
            "evaluate": {"every": rounds, "overlays": 0},
            "checkpoint": {"every": rounds},
            "transport": {"name": transport, **options},
        }
    )


def make_network() -> torch.nn.Module:
    """The study's network."""
    network = build_network(
        "unet", in_channels=1, num_classes=2, spatial_dims=2, seed=0, **MODEL
    )
    return network.to(memory_format=torch.channels_last).train()


def all_slices() -> list[Slices]:
    """The sites' training slices as tensors."""
    found = []
    for site in open_sites():
        (case,) = (ref.read() for ref in site.cases if ref.case_id == "train")
        images = torch.from_numpy(case.image).permute(3, 0, 1, 2)
        labels = torch.from_numpy(case.label).permute(2, 0, 1).long()
        layout = torch.channels_last
        found.append((images.contiguous(memory_format=layout), labels.contiguous()))
    return found


class Turns:
    """An observer that lets every floor do a round after each of the study's.

    Attributes:
        times_s: Of the study's rounds, first and last included.
        floor_times_s: The same for each floor.
    """

    def __init__(self, floors: Mapping[str, Floor]) -> None:
        self.floors = floors
        self.times_s: list[float] = []
        self.floor_times_s: dict[str, list[float]] = {name: [] for name in floors}
        self._since = time.perf_counter()

    def round_started(self, number: int) -> None:
        """Nothing: what lies between rounds counts too."""

    def exchanged(
        self, number: int, exchange: int, losses: Mapping[str, float]
    ) -> None:
        """Nothing."""

    def round_finished(self, record: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Note the round's time; let the floors take their turn."""
        self.times_s.append(time.perf_counter() - self._since)
        for name, floor in self.floors.items():
            before = time.perf_counter()
            floor.round()
            self.floor_times_s[name].append(time.perf_counter() - before)
        self._since = time.perf_counter()


def measure(
    rounds: int,
    repeats: int,
    transport: str,
    *,
    precisions: tuple[str, ...] = PRECISIONS,
) -> dict[str, list[float]]:
    """Run everything in turns; gives the seconds of every counted round."""
    torch.set_num_threads(1)
    slices = all_slices()
    times_s: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        floors = {
            f"floor {precision}": stack.enter_context(
                Floor(
                    make_network,
                    slices,
                    num_workers=NUM_WORKERS,
                    batch_size=BATCH_SIZE,
                    lr=LR,
                    bfloat16=precision == "bfloat16",
                )
            )
            for precision in precisions
        }
        for precision in precisions * repeats:
            turns = Turns(floors)
            study = make_study(precision, rounds + 2, transport)
            with tempfile.TemporaryDirectory() as folder:
                run_study(study, Path(folder) / "run", observer=turns)
            found = {f"fedmed {precision}": turns.times_s, **turns.floor_times_s}
            for name, seconds in found.items():
                times_s.setdefault(name, []).extend(seconds[1:-1])
    return times_s


def rows_of(times_s: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Median, spread and the ratio to the faster floor, for every row."""
    medians = {name: statistics.median(seen) for name, seen in times_s.items()}
    floor_s = min(m for name, m in medians.items() if name.startswith("floor"))
    return [
        {
            "name": name,
            "median_s": medians[name],
            "spread": [min(times_s[name]), max(times_s[name])],
            "ratio": medians[name] / floor_s,
        }
        for name in sorted(times_s)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--transport", default="workers")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    times_s = measure(
        asked.rounds,
        asked.repeats,
        asked.transport,
        precisions=tuple(asked.precisions),
    )
    content = json.dumps({"name": "W1", "rows": rows_of(times_s)}, indent=1)
    if asked.json:
        asked.json.write_text(content + "\n", encoding="utf-8")
    sys.stdout.write(content + "\n")


if __name__ == "__main__":
    main()
