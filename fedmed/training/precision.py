"""Precision by measurement: is bfloat16 faster here, for this network and batch?

Processors differ: one with matrix units for bfloat16 trains more than twice as fast in
it, one that only has its dot products is slower than in float32. So a few steps are
timed; see `fedmed.training.measurement`.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from fedmed.errors import FedMedError
from fedmed.study import Study
from fedmed.task import Task, build_trainer, example_dims
from fedmed.training.measurement import (
    RandomBatch,
    computing_as_a_site,
    live_model,
    measured_once,
    measured_signature,
    random_batch,
)
from fedmed.training.trainer import Precision, Trainer

logger = logging.getLogger(__name__)

GAIN = 1.1
"""How many times faster bfloat16 has to be; less is not worth its rounding."""

_REPEATS = 5
_BUDGET_S = 20.0


def decide_precision(study: Study, task: Task, cache: Path) -> Precision:
    """Say in which precision this machine trains this study.

    Args:
        study: The study. Unless its `train.precision` is "auto", that is the answer.
        task: What its sites' data are.
        cache: The cache folder; a decision is measured once and kept there.

    Returns:
        "bfloat16" if its training steps are at least `GAIN` times as fast as those
        in float32, else "float32". Tables are always float32.
    """
    if study.train.precision != "auto":
        return study.train.precision
    if example_dims(study, task) == 0:
        return "float32"
    study = with_precision(study, "float32")
    ratio = measured_once(
        cache / "precision",
        measured_signature(study, task),
        lambda: {"ratio": measure_ratio(study, task)},
    )["ratio"]
    decided: Precision = "bfloat16" if ratio >= GAIN else "float32"
    logger.info("bfloat16 trains %.2f times as fast here: %s", ratio, decided)
    return decided


def with_precision(study: Study, precision: Precision) -> Study:
    """Copy a study with its precision settled."""
    train = study.train.model_copy(update={"precision": precision})
    return study.model_copy(update={"train": train})


def measure_ratio(study: Study, task: Task) -> float:
    """Time training steps in float32 and in bfloat16, in turns.

    Returns:
        Median time of a step in float32 over that in bfloat16; 0 if the network
        cannot be trained in bfloat16 at all.
    """
    model = live_model(study, task)
    batch = random_batch(study, task)
    compared: tuple[Precision, ...] = ("float32", "bfloat16")
    trainers = {
        name: build_trainer(with_precision(study, name), "") for name in compared
    }
    with computing_as_a_site(study.train.threads):
        try:
            times_s = _times_s(trainers, model, batch)
        except (RuntimeError, FedMedError) as error:
            logger.info("no training in bfloat16: %s", str(error).partition("\n")[0])
            return 0.0
    return times_s["float32"] / times_s["bfloat16"]


def _times_s(
    trainers: Mapping[Precision, Trainer], model: nn.Module, batch: RandomBatch
) -> dict[Precision, float]:
    """Median seconds of a step; the first of each, which plans, is not counted."""
    times_s: dict[Precision, list[float]] = {name: [] for name in trainers}
    started = time.perf_counter()
    for repeat in range(_REPEATS + 1):
        if repeat > 1 and time.perf_counter() - started > _BUDGET_S:
            break
        for name, trainer in trainers.items():
            before = time.perf_counter()
            trainer.train(model, [batch])
            if repeat:
                times_s[name].append(time.perf_counter() - before)
    return {name: statistics.median(seen) for name, seen in times_s.items()}
