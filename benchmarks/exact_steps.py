"""W4, exact steps: `sync: step` on six phantom hospitals against pooled training.

    python -m benchmarks.exact_steps fedbn/workers

One exchange per optimisation step: the engine's whole cost falls on every batch. Each
round of the study is followed by one of the floor, in the same process.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.floor_exact_steps import PooledFloor
from benchmarks.harness import Variant, Workload
from benchmarks.measured_study import TRANSPORTS, measure_study, variant_main
from fedmed.resolve import load_strategy
from fedmed.run import cache_folder, transport_sites
from fedmed.study import study_from_dict

STRATEGIES = ("fedavg", "fedbn")
CORES = 3
"""Two sites each: a fourth worker would not shorten a round."""

WORKLOAD = Workload(
    key="W4",
    title="Exact steps: six phantom prostate sites, `sync: step`",
    module="benchmarks.exact_steps",
    variants=tuple(
        variant
        for name in STRATEGIES
        for variant in (
            Variant(f"{name}/inprocess", "its floor", bar=1.10),
            Variant(
                f"{name}/workers", "its floor", bar=1.3, cores=CORES, per_core=True
            ),
        )
    ),
    floors=("benchmarks/floor_exact_steps.py",),
    notes="Study and floor took turns, round by round. Workers: time x cores, divided "
    "by the floor's time on its one core. The column `loss` is the mean of the six "
    "sites' losses at the end of the last timed round, beside the floor's: close, as "
    "both train on the same batches.",
)


def study_of(strategy: str, *, rounds: int, transport: Mapping[str, Any]) -> Any:
    """Six hospitals, a small U-Net, ten steps a round."""
    return {
        "rounds": rounds,
        "sites": {
            "dataset": "phantom",
            "preset": "prostate_af",
            "cases_per_site": 6,
            "size": [80, 80, 12],
        },
        "split": {"train": 0.67, "validation": 0.17, "test": 0.16},
        "preprocess": {"size": [80, 80]},
        "model": {"name": "unet", "base_width": 8, "levels": 4, "norm": "batch"},
        "train": {
            "batch_size": 8,
            "local_steps": 10,
            "optimizer": {"name": "adam", "lr": 2.0e-3},
        },
        "strategy": {"name": strategy, "sync": "step"},
        "transport": transport,
    }


def measured(variant: str, *, quick: bool = False) -> Mapping[str, Any]:
    """Measure one variant, study and floor in turns."""
    name, _, side = variant.partition("/")
    rounds, skip = (3, 1) if quick else (5, 1)
    transport = TRANSPORTS[side]
    if side == "workers":
        transport = {**transport, "num_workers": CORES}
    content = study_of(name, rounds=rounds + 1, transport=transport)
    study = study_from_dict({"name": "bench", **content})
    section = study.strategy
    floor = PooledFloor(
        study,
        transport_sites(study),
        load_strategy(section.name, section.options),
        cache=cache_folder(study),
    )
    found = measure_study(content, skip=skip, between=floor.round)
    return {
        **found,
        "reference_seconds": statistics.median(floor.took_s[skip:-1]),
        "reference_loss": floor.losses[-2],
    }


if __name__ == "__main__":
    variant_main(measured, [variant.name for variant in WORKLOAD.variants])
