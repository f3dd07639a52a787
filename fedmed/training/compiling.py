"""A network compiled by `torch.compile`, where that pays back within the study.

Compiling fuses what lies between convolutions, and takes from seconds to minutes in
each process that trains. `train.compile: auto` times both on this machine and asks
whether the study has enough steps; see `fedmed.training.measurement`. Only the call of
the whole network in training is compiled: evaluation, parts of a network that a method
calls by themselves, and second derivatives, which compiled code does not have, run as
always.

On one core of a processor without matrix units, steps of 2D U-Nets took 2 to 9 % less
time, and compiling 40 to 50 s: it pays back after 10,000 steps or so.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fedmed.errors import FedMedError, SiteError
from fedmed.study import Study
from fedmed.task import Task, build_trainer
from fedmed.training.measurement import (
    computing_as_a_site,
    live_model,
    measured_once,
    measured_signature,
    random_batch,
)
from fedmed.training.trainer import Compiled

logger = logging.getLogger(__name__)

GRAPHS = 64
"""Most versions of one network, one for each site that it treats differently."""

_REPEATS = 5


@dataclass(frozen=True)
class Speeds:
    """Seconds of a training step, and of compiling.

    Attributes:
        eager_s: A step without.
        compiled_s: A step with.
        compile_s: What the first step takes longer.
    """

    eager_s: float
    compiled_s: float
    compile_s: float

    def pays_back(self, num_steps: int) -> bool:
        """Whether a process that takes so many steps ends sooner."""
        return (self.eager_s - self.compiled_s) * num_steps > self.compile_s


def compile_network(model: nn.Module, cache: Path) -> Compiled:
    """Compile a network's call when it is first trained.

    Args:
        model: The network; its parameters stay its own.
        cache: Folder where compiled code is kept for the next process.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))
    torch_compile = importlib.import_module("torch").compile
    dynamo = importlib.import_module("torch._dynamo")
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.compile_threads = 1  # sites fill the cores; helpers would outlive them
    inductor.fallback_random = True  # dropout draws what it draws without compiling
    for name in ("recompile_limit", "cache_size_limit"):  # before 2.7 and since
        if hasattr(dynamo.config, name):
            setattr(dynamo.config, name, GRAPHS)
            break
    call = torch_compile(model, dynamic=False)

    def guarded(*arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except dynamo.exc.TorchDynamoException as error:
            raise SiteError(
                f"the network cannot be compiled here ({type(error).__name__})",
                hint="torch.compile needs a C++ compiler and Python's headers; or set "
                "train.compile: false.",
            ) from error

    return Compiled(model, guarded)


def decide_compile(study: Study, task: Task, cache: Path, num_sites: int) -> bool:
    """Say whether this study's sites compile their networks on this machine.

    Args:
        study: The study, its precision settled. Unless its `train.compile` is "auto",
            that is the answer.
        task: What its sites' data are.
        cache: The cache folder.
        num_sites: Sites that train in a round.
    """
    if study.train.compile != "auto":
        return study.train.compile
    signature = measured_signature(study, task)
    signature["precision"] = study.train.precision
    try:
        found = measured_once(
            cache / "compile",
            signature,
            lambda: vars(measure_speeds(study, task, cache)),
        )
    except (RuntimeError, FedMedError) as error:
        # Not noted: the next study may find a compiler.
        logger.info("not compiled: %s", str(error).partition("\n")[0])
        return False
    speeds, num_steps = Speeds(**found), steps_of_a_process(study, num_sites)
    decided = speeds.pays_back(num_steps)
    logger.info(
        "a compiled step takes %.2f of the time, compiling %.0f s, %d steps: %s",
        speeds.compiled_s / speeds.eager_s,
        speeds.compile_s,
        num_steps,
        "compiled" if decided else "not compiled",
    )
    return decided


def steps_of_a_process(study: Study, num_sites: int) -> int:
    """Steps that a process takes at least, with one process a core.

    An epoch counts as one step, since its length is known at the sites only.
    """
    train = study.train
    steps = train.local_steps or math.ceil(train.local_epochs or 1)
    return study.rounds * steps * math.ceil(num_sites / (os.cpu_count() or 1))


def with_compile(study: Study, decided: bool) -> Study:
    """Copy a study with its compiling settled."""
    train = study.train.model_copy(update={"compile": decided})
    return study.model_copy(update={"train": train})


def measure_speeds(study: Study, task: Task, cache: Path) -> Speeds:
    """Time training steps without and with compiling, in turns.

    Raises:
        SiteError: If the network cannot be compiled.
        RuntimeError: If it cannot be trained so.
    """
    model, batch = live_model(study, task), random_batch(study, task)
    plain = build_trainer(study, "")
    fast = replace(plain, compiled=compile_network(model, cache))
    eager_s: list[float] = []
    compiled_s: list[float] = []
    with computing_as_a_site(study.train.threads):
        plain.train(model, [batch])
        began = time.perf_counter()
        fast.train(model, [batch])
        first_s = time.perf_counter() - began
        for _ in range(_REPEATS):
            for trainer, seen in ((plain, eager_s), (fast, compiled_s)):
                began = time.perf_counter()
                trainer.train(model, [batch])
                seen.append(time.perf_counter() - began)
    middle_s = statistics.median(compiled_s)
    return Speeds(statistics.median(eager_s), middle_s, max(0.0, first_s - middle_s))
