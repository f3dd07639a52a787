"""W1, training: one local epoch at eight sites, beside a bare PyTorch loop.

    python -m benchmarks.training bfloat16

A 2D U-Net of base 16 and 4 levels with batch normalisation; 8 sites of 32 slices of
96x96; batches of 8, SGD, FedAvg; 4 processes with one thread each. Each round of the
study is followed by one of the floor, on the same cores in the same minute.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.floor import Floor
from benchmarks.harness import Variant, Workload
from benchmarks.measured_study import (
    TRANSPORTS,
    measure_study,
    study_of,
    variant_main,
)

SKIP = 1
"""First rounds that do not count."""

WORKLOAD = Workload(
    key="W1",
    title="Training: 2D U-Net, 8 sites x 32 slices of 96x96, one local epoch",
    module="benchmarks.training",
    variants=(
        Variant("bfloat16", "its floor", bar=1.05, cores=4),
        Variant("float32", "its floor", cores=4),
    ),
    floors=("benchmarks/floor.py", "benchmarks/workload.py"),
    notes="Every row is divided by the floor in the same precision, whose rounds and "
    "ours took turns.",
)


def measured(variant: str, *, quick: bool = False) -> Mapping[str, Any]:
    """Measure one precision, study and floor in turns."""
    rounds = 2 if quick else 5
    took: list[float] = []
    with Floor("W1", bfloat16=variant == "bfloat16") as floor:

        def turn() -> None:
            began = time.perf_counter()
            floor.round()
            took.append(time.perf_counter() - began)

        content = study_of(
            "W1",
            rounds=SKIP + rounds + 1,
            transport=TRANSPORTS["workers"],
            precision=variant,
        )
        found = measure_study(content, skip=SKIP, between=turn)
    return {**found, "reference_seconds": statistics.median(took[SKIP:-1])}


if __name__ == "__main__":
    variant_main(measured, [variant.name for variant in WORKLOAD.variants])
