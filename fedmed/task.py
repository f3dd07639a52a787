"""Task: what is to be learned, and the network and trainer that a study asks for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedmed import seeds
from fedmed.case import DatasetCard
from fedmed.errors import ConfigError
from fedmed.losses.build import build_loss
from fedmed.message import SiteId
from fedmed.networks.build import build_network, initialise
from fedmed.networks.foreign import load_class
from fedmed.optimizer import OptimizerSpec
from fedmed.strategy import Strategy
from fedmed.study import Study
from fedmed.training.allocator import keep_freed_memory
from fedmed.training.schedule import StepDecay
from fedmed.training.trainer import DTYPES, Precision, Trainer


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Attributes:
        kind: "segmentation" or "classification".
        class_names: Name of every class, index 0 is the background or first class.
        num_channels: Channels of an image, or features of a row.
        spatial_dims: 3 or 2, 0 for tables.
    """

    kind: str
    class_names: tuple[str, ...]
    num_channels: int
    spatial_dims: int

    @classmethod
    def of(cls, card: DatasetCard) -> Task:
        """Read the task from a data set's card."""
        names = tuple(card.labels[value] for value in sorted(card.labels))
        return cls(card.kind, names, card.num_channels, card.spatial_dims)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Task:
        """Rebuild a task that travelled as JSON."""
        return cls(**{**content, "class_names": tuple(content["class_names"])})


def resolve_device(name: str) -> str:
    """Turn "auto" into the device at hand.

    Raises:
        ConfigError: If CUDA is asked for and not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "train.device is cuda, and this machine has no usable CUDA device",
            hint="Set train.device: auto.",
        )
    return name


_MODES: Mapping[str, tuple[str, ...]] = {
    "unet": ("slice", "patch"),
    "residual_unet": ("slice", "patch"),
    "dilated_residual": ("slice",),
    "unet_3d_pairs": ("patch",),
    "classifier": ("image",),
    "mlp": ("row",),
}
"""Our own networks, and what each can be fed."""
_OWN_NETWORKS = {"slice": "unet", "patch": "unet", "image": "classifier", "row": "mlp"}


def check_fit(study: Study, task: Task) -> None:
    """Check that the study's model is one for its data.

    Raises:
        ConfigError: If not; the hint says what to set.
    """
    section = study.model
    has_classes = task.kind == "classification"
    if not has_classes:
        fitting: tuple[str, ...] = ("slice", "patch")
        seen = "have a label for every voxel (segmentation)"
    elif task.spatial_dims == 0:
        fitting, seen = ("row",), "are a table with one class per row (classification)"
    else:
        fitting, seen = ("image",), "are images with one class each (classification)"
    hint = " or ".join(
        f"model.mode: {mode} and model.name: {_OWN_NETWORKS[mode]}" for mode in fitting
    )
    if section.mode not in fitting:
        raise ConfigError(
            f"model.mode is {section.mode!r}, and the data {seen}", hint=f"Set {hint}."
        )
    if section.mode not in _MODES.get(section.name, fitting):
        raise ConfigError(
            f"model.name is {section.name!r} in mode {section.mode!r}, and the data "
            f"{seen}",
            hint=f"Set {hint}.",
        )
    if has_classes and study.split.by == "slices":
        raise ConfigError(
            f"split.by is 'slices', and the data {seen}", hint="Set split.by: subject."
        )
    _check_dimensions(study, task)


def example_dims(study: Study, task: Task) -> int:
    """Spatial dimensions of what the network sees: 2 or 3, 0 for a table's row."""
    if study.model.mode == "image":
        size_k = (study.preprocess.size or ())[2:]
        return 2 if size_k == (1,) else task.spatial_dims
    return {"slice": 2, "patch": 3, "row": 0}[study.model.mode]


def _check_dimensions(study: Study, task: Task) -> None:
    asked = study.model.options.get("spatial_dims")
    dims = example_dims(study, task)
    if study.model.mode == "image" and asked not in {None, dims}:
        raise ConfigError(
            f"model.spatial_dims is {asked!r}, and the images have {dims} dimensions",
            hint="Leave it out, or set preprocess.size: [I, J, K] with K = 1 to make "
            "flat images of volumes.",
        )


def build_model(study: Study, task: Task, strategy: Strategy) -> nn.Module:
    """Build the study's network, equal in every process for equal studies.

    `spatial_dims` follows from the mode and the task for our own networks, and in
    mode "image" for those of MONAI that take it.

    Raises:
        ConfigError: If the model does not fit the task, or cannot be built.
    """
    check_fit(study, task)
    section = study.model
    has_dims = _has_dims(section.name, section.mode)

    def build(
        *, draw: str = "", module: nn.Module | None = None, **changes: Any
    ) -> nn.Module:
        # Another draw of initial weights, for methods with several networks; `module`
        # is one of the method's own, which is only drawn.
        draws = ("network", draw) if draw else ("network",)
        if module is not None:
            initialise(module, seeds.derive(study.seed, *draws))
            return module.to(DTYPES[settled_precision(study)])
        options = {**section.options, **changes}
        name = str(options.pop("name", section.name))
        if has_dims:
            options.setdefault("spatial_dims", example_dims(study, task))
        return build_network(
            name,
            in_channels=task.num_channels * section.slices,
            num_classes=len(task.class_names),
            seed=seeds.derive(study.seed, *draws),
            dtype=DTYPES[settled_precision(study)],
            **options,
        )

    return strategy.network(build)


def _has_dims(name: str, mode: str) -> bool:
    if name in _MODES:
        return name != "mlp"
    if mode != "image" or not name.startswith("monai:"):
        return False
    try:
        network = load_class(f"monai.networks.nets:{name.removeprefix('monai:')}")
    except ConfigError:
        return False  # build_network says what is wrong with the name
    return "spatial_dims" in inspect.signature(network).parameters


def build_optimizer(study: Study) -> OptimizerSpec:
    """Read the study's optimiser."""
    decay = study.train.lr_decay
    return OptimizerSpec(
        **study.train.optimizer.model_dump(),
        decay=StepDecay(**decay.model_dump()) if decay else None,
    )


def build_trainer(study: Study, site_id: SiteId) -> Trainer:
    """Build a site's trainer, and make its process ready to train."""
    train = study.train
    keep_freed_memory()
    return Trainer(
        loss=build_loss(train.loss, **train.loss_options),
        optimizer=build_optimizer(study),
        site_id=site_id,
        clip_norm=train.clip_norm,
        device=resolve_device(train.device),
        precision=settled_precision(study),
    )


def settled_precision(study: Study) -> Precision:
    """Read the precision of a study that is about to compute.

    Raises:
        ConfigError: If it is still "auto"; see `fedmed.training.precision`.
    """
    if study.train.precision == "auto":
        raise ConfigError(
            "train.precision is auto, and nobody has measured which is faster here",
            hint="Set train.precision: float32, or bfloat16.",
        )
    return study.train.precision


def limit_gpu_memory(device: str, fraction: float | None) -> None:
    """Cap what this process may take of a GPU, so that several share one.

    Args:
        device: As `resolve_device` gives it; nothing happens on a CPU.
        fraction: Share of the GPU's memory, in (0, 1]; None = no cap.
    """
    if fraction is not None and device.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(fraction, torch.device(device))
