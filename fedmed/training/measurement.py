"""What a training step costs here, measured on noise of the study's shape.

A measurement is made once per machine, network and batch, and noted in the cache
folder; what was decided from it stands in study.lock.yaml, so that all sites and a
resumed run use the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedmed.resolve import load_strategy
from fedmed.seeds import torch_rng
from fedmed.storage import write_atomic
from fedmed.study import Study
from fedmed.task import Task, build_model, example_dims, resolve_device

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


def random_batch(study: Study, task: Task) -> RandomBatch:
    """Noise of the shape of a training batch, on the CPU."""
    shape = batch_shape(study, task)
    rng = torch_rng(study.seed, "measurement")
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


def live_model(study: Study, task: Task) -> nn.Module:
    """Build the network as a site holds it: on its device, kernels channels-last."""
    strategy = load_strategy(study.strategy.name, study.strategy.options)
    model = build_model(study, task, strategy).to(resolve_device(study.train.device))
    if example_dims(study, task) == 2:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.train()


@contextlib.contextmanager
def computing_as_a_site(threads: int) -> Iterator[None]:
    """As a site computes: so many threads; torch's random state is left as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


def measured_once(
    folder: Path,
    signature: Mapping[str, Any],
    measure: Callable[[], Mapping[str, float]],
) -> dict[str, float]:
    """Give what was measured before, or measure and note it.

    Args:
        folder: Of the notes.
        signature: Everything that the numbers depend on, as JSON.
        measure: Gives finite numbers by name.
    """
    text = _canonical(signature)
    digest = hashlib.blake2b(text, digest_size=12).hexdigest()
    file = folder / f"{digest}.json"
    numbers = _noted(file, signature)
    if numbers is None:
        numbers = dict(measure())
        folder.mkdir(parents=True, exist_ok=True)
        note = {"signature": signature, "numbers": numbers}
        write_atomic(file, json.dumps(note, indent=1).encode())
    return numbers


def _noted(file: Path, signature: Mapping[str, Any]) -> dict[str, float] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        numbers = {str(n): float(v) for n, v in content["numbers"].items()}
        is_known = content["signature"] == json.loads(_canonical(signature))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    is_whole = bool(numbers) and all(map(math.isfinite, numbers.values()))
    return numbers if is_known and is_whole else None


def _canonical(signature: Mapping[str, Any]) -> bytes:
    return json.dumps(signature, sort_keys=True).encode()
