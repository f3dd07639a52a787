"""The proof: a federated method in `sync: step` equals its pooled method.

Both sides run in float64 on the same phantom hospitals with the same batches. The
federated side is a real run through the engine; the pooled side is plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedmed import seeds
from fedmed.errors import ConfigError
from fedmed.message import SiteId, State
from fedmed.resolve import load_strategy, strategy_class
from fedmed.run import cache_folder, run_study, transport_sites
from fedmed.runfolder import RunFolder
from fedmed.storage import read_state
from fedmed.strategy import Cohort, Member, Strategy
from fedmed.study import Study, apply_overrides, study_from_dict
from fedmed.task import Task, build_model, build_optimizer, build_trainer
from fedmed.training.pooled import PooledTraining, distinct_parameters, tied

PROOF_STUDY: Mapping[str, Any] = {
    "name": "proof",
    "rounds": 1,
    "sites": {
        "dataset": "phantom",
        "preset": "prostate_abc",
        "cases_per_site": 3,
        "size": [32, 32, 4],
    },
    "split": {"train": 0.6, "validation": 0.0, "test": 0.4},
    "preprocess": {"size": [32, 32], "intensity": "zscore"},
    "model": {"name": "unet", "base_width": 4, "levels": 3, "norm": "batch"},
    "train": {
        "batch_size": 4,
        "loss": "dice_linear+cross_entropy",
        "optimizer": {"name": "sgd", "lr": 0.02},
        "precision": "float64",
        "compile": False,
    },
    "evaluate": {"overlays": 0},
}
"""Three phantom hospitals, small enough for seconds; overrides change it.

The learning rate is one at which training is stable even where sites' losses are added
up: at 0.05 MS-Net multiplies a rounding error by twenty or so in every step, pooled or
not, and after eight steps nobody could tell it from a mistake.
"""


@dataclass(frozen=True)
class Proof:
    """How far a federated run and its pooled method are apart.

    Attributes:
        strategy: Name of the method.
        steps: Optimisation steps taken on both sides.
        max_abs_diff: Largest absolute difference of any compared entry.
        where: The entry with that difference.
        num_compared: Number of compared scalars.
        moved: Largest absolute change of a weight since the start; the scale against
            which the difference is to be read.
    """

    strategy: str
    steps: int
    max_abs_diff: float
    where: str
    num_compared: int
    moved: float


def prove(name: str, *, steps: int = 5, overrides: Sequence[str] = ()) -> Proof:
    """Compare a strategy with its pooled method.

    Args:
        name: The strategy.
        steps: Optimisation steps.
        overrides: Changes of `PROOF_STUDY`, as on the command line.

    Raises:
        ConfigError: If the strategy does not claim to be exact, or an override asks
            for something that has no pooled side here.
    """
    content: dict[str, Any] = {
        **PROOF_STUDY,
        "strategy": {"name": name, "sync": "step"},
        "train": {**PROOF_STUDY["train"], "local_steps": steps},
    }
    study = study_from_dict(apply_overrides(content, overrides), where="the proof")
    strategy = _exact_strategy(study)
    _require_comparable(study, strategy, steps)
    # First, for it sees the network before anything is trained.
    pooled, start = _pooled(study, strategy, steps)
    with tempfile.TemporaryDirectory(prefix="fedmed-prove-") as temporary:
        federated = _federated(study, strategy, Path(temporary) / "run")
    return _compare(name, steps, federated, pooled, start)


def _exact_strategy(study: Study) -> Strategy:
    section = study.strategy
    if not strategy_class(section.name).exact:
        raise ConfigError(
            f"strategy {section.name!r} does not claim to equal a pooled method",
            hint="`fedmed strategies` lists those that do.",
        )
    return load_strategy(section.name, section.options)


def _require_comparable(study: Study, strategy: Strategy, steps: int) -> None:
    """Refuse what would be reported as a difference and is none of the method's."""
    wanted: dict[str, tuple[Any, Any]] = {
        "rounds": (study.rounds, 1),
        "strategy.sync": (strategy.sync, "step"),
        "train.local_steps": (study.train.local_steps, steps),
        "train.clip_norm": (study.train.clip_norm, None),
        "split.held_out": (study.split.held_out, ()),
    }
    for key, (seen, needed) in wanted.items():
        if seen != needed:
            raise ConfigError(
                f"the proof compares with {key} {needed!r} only (seen: {seen!r})",
                hint="The number of steps is the option --steps."
                if key == "train.local_steps"
                else "Leave this override out.",
            )


_Dropout = torch.nn.modules.dropout._DropoutNd
Entries = Mapping[tuple[SiteId, str], torch.Tensor]
"""Every compared entry: ("", name) if shared, (site, name) if kept."""


def _federated(study: Study, strategy: Strategy, out: Path) -> Entries:
    del strategy
    run_study(study, out)
    folder = RunFolder(out)
    shared, _ = read_state(folder.model_file)
    found: dict[tuple[SiteId, str], torch.Tensor] = {
        ("", name): tensor for name, tensor in shared.items()
    }
    module = importlib.import_module("sites.private_state")
    for site in transport_sites(study):
        store = module.PrivateStore(folder.site_folder(site) / "private")
        kept: State = store.committed(1).states.get("kept", {})
        found.update({(site, name): tensor for name, tensor in kept.items()})
    return found


def _pooled(study: Study, strategy: Strategy, steps: int) -> tuple[Entries, Entries]:
    site_ids = transport_sites(study)
    context = importlib.import_module("sites.context")
    benches = {s: context.Workbench(study, s, cache_folder(study)) for s in site_ids}
    task: Task = benches[site_ids[0]].task
    model = build_model(study, task, strategy)
    _require_no_dropout(model)
    partition = benches[site_ids[0]].partition
    models = tied(model, site_ids, partition.shared)
    spec = build_optimizer(study)
    pool = PooledTraining(
        models=models,
        batches=functools.partial(_batches, benches),
        loss=build_trainer(study, site_ids[0]).loss,
        weights=_normalised(strategy, benches),
        optimizer=spec.build(distinct_parameters(models)),
        lr=spec.lr,
        cohort=_first_cohort(study, benches, steps),
        make_optimizer=spec.build,
        draws=lambda site, *purpose: seeds.seeded(
            seeds.derive(study.seed, "draws", site, 1, *purpose)
        ),
    )
    comparable = {
        entry.name
        for entry in partition.entries
        # Shared running statistics have no pooled counterpart: the pooled method
        # never merges any. Kept ones have, site by site.
        if entry.name in partition.kept or entry.role in {"weight", "norm_affine"}
    }
    start = _entries(pool, partition.shared, comparable)
    for index in range(steps):
        pool.set_lr(spec.at(index).lr)
        strategy.pooled_step(pool, index)
    return _entries(pool, partition.shared, comparable), start


def _require_no_dropout(model: torch.nn.Module) -> None:
    """Refuse a network whose two sides would drop different values."""
    layers = [m for m in model.modules() if isinstance(m, _Dropout) and m.p > 0]
    if layers:
        raise ConfigError(
            f"the proof needs a network without dropout (seen: {layers[0].p})",
            hint="Both sides would drop different values and differ by that: set "
            "model.dropout=0.",
        )


def _first_cohort(study: Study, benches: Mapping[SiteId, Any], steps: int) -> Cohort:
    """The cohort that the engine gives the strategy in round 1."""
    return Cohort(
        tuple(Member(site, benches[site].num_examples) for site in sorted(benches)),
        steps=steps,
        round=1,
        rng_seed=seeds.derive(study.seed, "strategy", 1),
        num_rounds=study.rounds,
    )


def _normalised(
    strategy: Strategy, benches: Mapping[SiteId, Any]
) -> dict[SiteId, float]:
    counts = {site: float(bench.num_examples) for site, bench in benches.items()}
    if strategy.weighting == "uniform":
        counts = dict.fromkeys(counts, 1.0)
    total = sum(counts.values())
    return {site: count / total for site, count in counts.items()}


def _batches(benches: Mapping[SiteId, Any], index: int) -> dict[SiteId, Any]:
    batches = {}
    for site, bench in benches.items():
        batch = bench.batch(1, index)
        batches[site] = type(batch)(batch.images.double(), batch.labels)
    return batches


def _entries(
    pool: PooledTraining, shared: tuple[str, ...], comparable: set[str]
) -> Entries:
    found: dict[tuple[SiteId, str], torch.Tensor] = {}
    for site, model in pool.models.items():
        for name, tensor in model.state_dict().items():
            if name in comparable:
                key = ("" if name in shared else site, name)
                found.setdefault(key, tensor.detach().clone())
    return found


def _compare(
    name: str, steps: int, federated: Entries, pooled: Entries, start: Entries
) -> Proof:
    worst, where, moved = 0.0, "", 0.0
    for (site, entry), expected in sorted(pooled.items()):
        got = federated[(site, entry)]
        difference = float((got.double() - expected.double()).abs().max())
        if not difference <= worst:  # a NaN must not slip through
            worst, where = difference, f"{site}:{entry}" if site else entry
        if expected.is_floating_point():
            change = (expected - start[(site, entry)]).abs().max()
            moved = max(moved, float(change))
    count = sum(tensor.numel() for tensor in pooled.values())
    return Proof(name, steps, worst, where, count, moved)
