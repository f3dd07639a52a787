"""W3, size: 100 MB of parameters, 8 sites, a trivial step.

    python -m benchmarks.size workers

The cost of moving, checking and adding weights, and the memory that it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.floor_rounds import run_floor
from benchmarks.floor_size import make_floor
from benchmarks.harness import Variant, Workload
from benchmarks.measured_study import (
    TRANSPORTS,
    described,
    measure_study,
    variant_main,
)
from benchmarks.scale import study_of

SITES = 8
BLOCK_SIZE = 2_500_000

WORKLOAD = Workload(
    key="W3",
    title="Size: 100 MB of parameters, 8 sites, a trivial step",
    module="benchmarks.size",
    variants=(
        Variant("floor", cores=4),
        Variant("workers", "floor", bar=1.25, cores=4, memory_bar=1.2),
        Variant("ray", "floor", cores=4),
        Variant("inprocess", "floor"),
    ),
    floors=("benchmarks/floor_size.py", "benchmarks/floor_rounds.py"),
    memory=True,
    notes="Memory: largest sum of proportional set sizes over the process tree.",
)


def measured(variant: str, *, quick: bool = False) -> Mapping[str, Any]:
    """Measure one variant."""
    rounds = 7 if quick else 18
    if variant == "floor":
        floor = make_floor(SITES, block_size=BLOCK_SIZE)
        return described(run_floor(floor, rounds=rounds))
    study = study_of(SITES, SITES, rounds=rounds + 1, transport=TRANSPORTS[variant])
    study["model"] = {
        "name": "benchmarks.networks:Ballast",
        "mode": "row",
        "block_size": BLOCK_SIZE,
    }
    return measure_study(study)


if __name__ == "__main__":
    variant_main(measured, [variant.name for variant in WORKLOAD.variants])
