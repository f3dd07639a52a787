"""W4, exact steps: `sync: step` on six phantom hospitals against pooled training.

    python -m benchmarks.exact_steps fedbn/workers

One exchange per optimisation step: the engine's whole cost falls on every batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.floor_exact_steps import train_pooled
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
            Variant(f"{name}/floor"),
            Variant(f"{name}/inprocess", f"{name}/floor", bar=1.10),
            Variant(
                f"{name}/workers",
                f"{name}/floor",
                bar=1.3,
                cores=CORES,
                per_core=True,
            ),
        )
    ),
    floors=("benchmarks/floor_exact_steps.py",),
    notes="Workers: time x cores, divided by the floor's time on its one core. "
    "The column `loss` is the mean of the six sites' losses at the end of the last "
    "timed round: equal to the floor's where the arithmetic is the same.",
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
    """Measure one variant."""
    name, _, side = variant.partition("/")
    rounds, skip = (3, 1) if quick else (5, 1)
    if side != "floor":
        transport = TRANSPORTS[side]
        if side == "workers":
            transport = {**transport, "num_workers": CORES}
        content = study_of(name, rounds=rounds + 1, transport=transport)
        return measure_study(content, skip=skip)
    content = study_of(name, rounds=rounds, transport=TRANSPORTS["inprocess"])
    study = study_from_dict({"name": "bench", **content})
    section = study.strategy
    return train_pooled(
        study,
        transport_sites(study),
        load_strategy(section.name, section.options),
        cache=cache_folder(study),
        rounds=rounds,
    ).described(skip)


if __name__ == "__main__":
    variant_main(measured, [variant.name for variant in WORKLOAD.variants])
