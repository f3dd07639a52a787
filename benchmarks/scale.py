"""W2, scale: 10,062 parameters, 1,000 sites, 100 sampled a round, one local step.

    python -m benchmarks.scale workers

What a framework costs per site, when the work costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.floor_rounds import run_floor
from benchmarks.floor_scale import BATCH_SIZE, NUM_ROWS, WIDTHS, make_floor
from benchmarks.harness import Variant, Workload
from benchmarks.measured_study import (
    TRANSPORTS,
    described,
    measure_study,
    variant_main,
)

SITES, SAMPLED = 1000, 100

WORKLOAD = Workload(
    key="W2",
    title="Scale: 10,062 parameters, 1,000 sites, 100 sampled a round, one local step",
    module="benchmarks.scale",
    variants=(
        Variant("floor", cores=4),
        Variant("workers", "floor", bar=1.25, cores=4),
        Variant("ray", "floor", bar=1.6, cores=4),
        Variant("floor-1-process"),
        Variant("inprocess", "floor-1-process"),
    ),
    floors=("benchmarks/floor_scale.py", "benchmarks/floor_rounds.py"),
    memory=True,
)


def study_of(
    num_sites: int, sampled: int, *, rounds: int, transport: Mapping[str, Any]
) -> dict[str, Any]:
    """The study that the floor does by hand."""
    return {
        "rounds": rounds,
        "sites": {
            "dataset": "benchmarks.synthetic_sites",
            "num_sites": num_sites,
            "num_rows": NUM_ROWS,
            "num_features": WIDTHS[0],
            "num_classes": WIDTHS[-1],
        },
        "sites_per_round": sampled if sampled < num_sites else None,
        "split": {"train": 0.8, "validation": 0.2, "test": 0.0},
        "model": {
            "name": "mlp",
            "mode": "row",
            "widths": WIDTHS[1:-1],
            "norm": "none",
            "missing_indicator": False,
        },
        "train": {
            "batch_size": BATCH_SIZE,
            "local_steps": 1,
            "loss": "cross_entropy",
            "optimizer": {"name": "sgd", "lr": 0.01},
        },
        "strategy": {"name": "fedavg"},
        "transport": transport,
    }


def measured(variant: str, *, quick: bool = False) -> Mapping[str, Any]:
    """Measure one variant."""
    rounds = 12 if quick else 60
    if variant.startswith("floor"):
        workers = 1 if variant == "floor-1-process" else 4
        floor = make_floor(SITES, SAMPLED, num_workers=workers)
        return described(run_floor(floor, rounds=rounds))
    transport = TRANSPORTS[variant]
    return measure_study(
        study_of(SITES, SAMPLED, rounds=rounds + 1, transport=transport)
    )


if __name__ == "__main__":
    variant_main(measured, [variant.name for variant in WORKLOAD.variants])
