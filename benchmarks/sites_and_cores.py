"""W7: 1 to 1,000 sites on 1 to 4 workers: time and memory of a round.

    python -m benchmarks.sites_and_cores "1000 sites, 4 workers"

The study is that of W2; at most 100 sites are sampled a round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import Variant, Workload
from benchmarks.measured_study import measure_study, variant_main
from benchmarks.scale import study_of

SITES = (1, 10, 100, 1000)
WORKERS = (1, 2, 3, 4)
SAMPLED = 100

WORKLOAD = Workload(
    key="W7",
    title="Sites and cores: 10,062 parameters, one local step, at most 100 sampled",
    module="benchmarks.sites_and_cores",
    variants=tuple(
        Variant(f"{sites} sites, {workers} workers", cores=workers)
        for sites in SITES
        for workers in WORKERS
    ),
    memory=True,
    repetitions=5,
    notes="Ten times the sampled sites may take at most ten times as long, and 1,000 "
    "sites at most 4 GB.",
)


def measured(variant: str, *, quick: bool = False) -> Mapping[str, Any]:
    """Measure one variant."""
    sites, workers = (int(number) for number in re.findall(r"\d+", variant))
    rounds = 10 if quick else 30
    transport = {"name": "workers", "num_workers": workers}
    study = study_of(sites, min(sites, SAMPLED), rounds=rounds, transport=transport)
    return {**measure_study(study), "sampled": min(sites, SAMPLED)}


if __name__ == "__main__":
    variant_main(measured, [variant.name for variant in WORKLOAD.variants])
