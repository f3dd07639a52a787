"""W3, size: 100 MB of parameters, 8 sites, a trivial step.

    python -m benchmarks.size workers

The cost of moving, checking and adding weights, and the memory that it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.floor import Floor, run_floor
from benchmarks.harness import Variant, Workload
from benchmarks.measured_study import (
    TRANSPORTS,
    described,
    measure_study,
    study_of,
    variant_main,
)

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
    floors=("benchmarks/floor.py", "benchmarks/workload.py"),
    memory=True,
)


def measured(variant: str, *, quick: bool = False) -> Mapping[str, Any]:
    """Measure one variant."""
    rounds = 7 if quick else 18
    if variant == "floor":
        return described(run_floor(Floor("W3"), rounds=rounds))
    transport = TRANSPORTS[variant]
    return measure_study(study_of("W3", rounds=rounds + 1, transport=transport))


if __name__ == "__main__":
    variant_main(measured, [variant.name for variant in WORKLOAD.variants])
