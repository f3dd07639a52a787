"""W2, scale: 10,062 parameters, 1,000 sites, 100 sampled a round, one local step.

    python -m benchmarks.scale workers

What a framework costs per site, when the work costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.floor import Floor, run_floor
from benchmarks.hand_written import hand_written_rounds
from benchmarks.harness import Variant, Workload
from benchmarks.measured_study import (
    TRANSPORTS,
    described,
    measure_study,
    study_of,
    variant_main,
)

WORKLOAD = Workload(
    key="W2",
    title="Scale: 10,062 parameters, 1,000 sites, 100 sampled a round, one local step",
    module="benchmarks.scale",
    variants=(
        Variant("floor", cores=4),
        Variant("workers", "floor", bar=1.25, cores=4),
        Variant("ray", "floor", bar=1.6, cores=4),
        Variant("floor, 1 process"),
        Variant("inprocess", "floor, 1 process"),
        Variant("hand-written arithmetic, 1 process", "floor, 1 process"),
    ),
    floors=("benchmarks/floor.py", "benchmarks/workload.py"),
    memory=True,
    notes="`hand-written arithmetic` is another piece of work, shown for scale: four "
    "matrix products per site on fixed batches, gradients by hand, no module, no "
    "drawing, no autograd.",
)


def measured(variant: str, *, quick: bool = False) -> Mapping[str, Any]:
    """Measure one variant."""
    rounds = 12 if quick else 60
    if variant.startswith("hand"):
        return described(hand_written_rounds(rounds)[3:])
    if variant.startswith("floor"):
        workers = 1 if "1 process" in variant else 4
        return described(run_floor(Floor("W2", workers), rounds=rounds))
    transport = TRANSPORTS[variant]
    return measure_study(study_of("W2", rounds=rounds + 1, transport=transport))


if __name__ == "__main__":
    variant_main(measured, [variant.name for variant in WORKLOAD.variants])
