"""Precision by measurement: is bfloat16 faster here, for this network and batch?

Processors differ: one with matrix units for bfloat16 trains more than twice as fast in
it, one that only has its dot products is slower than in float32. So a few steps are
timed, once per machine, network and batch; the answer is kept in the cache folder, and
by whoever asked in study.lock.yaml, so that all sites and a resumed run use the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.errors import FedMedError
from fedmed.resolve import load_strategy
from fedmed.seeds import torch_rng
from fedmed.storage import write_atomic
from fedmed.study import Study
from fedmed.task import Task, build_model, build_trainer, example_dims, resolve_device
from fedmed.training.trainer import Precision, Trainer

logger = logging.getLogger(__name__)

GAIN = 1.1
"""How many times faster bfloat16 has to be; less is not worth its rounding."""

_REPEATS = 5
_BUDGET_S = 20.0
_SIDE = {2: 128, 3: 64}
"""Side of an image in voxels where the study does not fix one."""
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve")


@dataclass
class RandomBatch:
    """Noise of the study's shape.

    Attributes:
        images: (B, C, ...).
        labels: (B, ...), or (B,) for whole images.
    """

    images: Tensor
    labels: Tensor


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
    signature = measured_signature(study, task)
    digest = hashlib.blake2b(_canonical(signature), digest_size=12).hexdigest()
    file = cache / "precision" / f"{digest}.json"
    ratio = _known_ratio(file, signature)
    if ratio is None:
        ratio = measure_ratio(study, task)
        _keep(file, signature, ratio)
    decided: Precision = "bfloat16" if ratio >= GAIN else "float32"
    logger.info("bfloat16 trains %.2f times as fast here: %s", ratio, decided)
    return decided


def with_precision(study: Study, precision: Precision) -> Study:
    """Copy a study with its precision settled."""
    train = study.train.model_copy(update={"precision": precision})
    return study.model_copy(update={"train": train})


def measured_signature(study: Study, task: Task) -> dict[str, Any]:
    """Everything that the speed of a training step depends on."""
    device = resolve_device(study.train.device)
    return {
        "processor": processor_name(device),
        "torch": torch.__version__,
        "threads": study.train.threads,
        "network": study.model.model_dump(mode="json"),
        "strategy": study.strategy.name,
        "loss": study.train.loss,
        "optimizer": study.train.optimizer.name,
        "classes": len(task.class_names),
        "images": list(batch_shape(study, task)),
    }


def batch_shape(study: Study, task: Task) -> tuple[int, ...]:
    """Shape (B, C, ...) of a training batch, as far as the study fixes it."""
    dims = example_dims(study, task)
    fixed: tuple[int, ...] = study.preprocess.size or ()
    if study.model.mode == "patch":
        fixed = study.model.patch_size or ()
    sizes = (*fixed, *(_SIDE[dims] for _ in range(dims)))[:dims]
    return (study.train.batch_size, task.num_channels * study.model.slices, *sizes)


def measure_ratio(study: Study, task: Task) -> float:
    """Time training steps in float32 and in bfloat16, in turns.

    Returns:
        Median time of a step in float32 over that in bfloat16; 0 if the network
        cannot be trained in bfloat16 at all.
    """
    strategy = load_strategy(study.strategy.name, study.strategy.options)
    model = build_model(study, task, strategy)
    batch = random_batch(study, task)
    compared: tuple[Precision, ...] = ("float32", "bfloat16")
    trainers = {
        name: build_trainer(with_precision(study, name), "") for name in compared
    }
    with _alone(study.train.threads):
        model = model.to(trainers["float32"].device)
        if batch.images.dim() == 4:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            times_s = _times_s(trainers, model, batch)
        except (RuntimeError, FedMedError) as error:
            logger.info("no training in bfloat16: %s", str(error).partition("\n")[0])
            return 0.0
    return times_s["float32"] / times_s["bfloat16"]


def random_batch(study: Study, task: Task) -> RandomBatch:
    """Noise of the shape of a training batch, on the CPU."""
    shape = batch_shape(study, task)
    rng = torch_rng(study.seed, "precision")
    is_segmentation = task.kind == "segmentation"
    label_shape = (shape[0], *shape[2:]) if is_segmentation else shape[:1]
    labels = torch.randint(0, len(task.class_names), label_shape, generator=rng)
    return RandomBatch(torch.randn(shape, generator=rng), labels)


def processor_name(device: str) -> str:
    """Name what computes, with the instructions that matter for bfloat16."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    entries: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        entries[key.strip()] = value.strip()
    flags = set((entries.get("flags") or entries.get("Features") or "").split())
    having = [name for name in _INSTRUCTIONS if name in flags]
    return " ".join([entries.get("model name", "unnamed"), *having])


def _times_s(
    trainers: Mapping[Precision, Trainer], model: nn.Module, batch: RandomBatch
) -> dict[Precision, float]:
    """Median seconds of a step; the first of each, which plans, is not counted."""
    model.train()
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


@contextlib.contextmanager
def _alone(threads: int) -> Iterator[None]:
    """As a site computes: so many threads; torch's random state is left as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


def _known_ratio(file: Path, signature: Mapping[str, Any]) -> float | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        ratio = float(content["ratio"])
        known = content["signature"] == json.loads(_canonical(signature))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ratio if known and math.isfinite(ratio) else None


def _keep(file: Path, signature: Mapping[str, Any], ratio: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"signature": signature, "ratio": ratio}
    write_atomic(file, json.dumps(content, indent=1).encode())


def _canonical(signature: Mapping[str, Any]) -> bytes:
    return json.dumps(signature, sort_keys=True).encode()
