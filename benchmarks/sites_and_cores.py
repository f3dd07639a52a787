"""W7: 1 to 1,000 sites on 1 to 4 workers: time and memory of a round.

    python -m benchmarks.sites_and_cores "1000 sites, 4 workers"

The work is that of W2; at most 100 sites are sampled a round.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.floor import Floor, run_floor
from benchmarks.harness import Row, Variant, Verdict, Workload
from benchmarks.measured_study import (
    described,
    measure_study,
    study_of,
    variant_main,
)

SITES = (1, 10, 100, 1000)
WORKERS = (1, 2, 3, 4)
SAMPLED = 100
MOST_BYTES = 4 * 2**30
NOISE = 1.1
"""By how much two equal times may seem to differ."""


def cell(sites: int, workers: int) -> str:
    """Name of a row."""
    return f"{sites} sites, {workers} workers"


def further(rows: Sequence[Row]) -> list[Verdict]:
    """Compare rows that differ in their number of sites only."""
    seconds = {row.variant.name: row.seconds for row in rows}
    found = []
    for workers in WORKERS:
        for few, many in itertools.pairwise(SITES):
            pair = seconds.get(cell(few, workers)), seconds.get(cell(many, workers))
            if pair[0] and pair[1]:
                grown = min(many, SAMPLED) / min(few, SAMPLED)
                what = f"{workers} workers, {few} to {many} sites: time a sampled site"
                found.append(Verdict(what, pair[1] / pair[0] / grown, NOISE))
    return found


def variants() -> tuple[Variant, ...]:
    """Every number of sites with every number of workers; the floor of a thousand."""
    found = []
    for sites in SITES:
        for workers in WORKERS:
            floor = f"floor, {cell(sites, workers)}" if sites == max(SITES) else ""
            most = MOST_BYTES if sites == max(SITES) else None
            found += [Variant(floor, cores=workers)] if floor else []
            found.append(
                Variant(
                    cell(sites, workers), floor, cores=workers, memory_bar_bytes=most
                )
            )
    return tuple(found)


WORKLOAD = Workload(
    key="W7",
    title="Sites and cores: 10,062 parameters, one local step, at most 100 sampled",
    module="benchmarks.sites_and_cores",
    variants=variants(),
    floors=("benchmarks/floor.py", "benchmarks/workload.py"),
    memory=True,
    further=further,
    notes="The time of a sampled site may not grow with the number of sites, but for "
    "10 % of noise.",
)


def measured(variant: str, *, quick: bool = False) -> Mapping[str, Any]:
    """Measure one variant."""
    sites, workers = (int(number) for number in re.findall(r"\d+", variant))
    rounds = 10 if quick else 25
    if variant.startswith("floor"):
        return described(
            run_floor(Floor("W2", workers, num_sites=sites), rounds=rounds)
        )
    transport = {"name": "workers", "num_workers": workers}
    study = study_of("W2", rounds=rounds, transport=transport, num_sites=sites)
    return measure_study(study)


if __name__ == "__main__":
    variant_main(measured, [variant.name for variant in WORKLOAD.variants])
