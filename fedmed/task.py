"""Task: what is to be learned, and the network and trainer that a study asks for it."""

from __future__ import annotations

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
from fedmed.networks.build import build_network
from fedmed.optimizer import OptimizerSpec
from fedmed.strategy import Strategy
from fedmed.study import Study
from fedmed.training.trainer import DTYPES, Trainer


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


def build_model(study: Study, task: Task, strategy: Strategy) -> nn.Module:
    """Build the study's network, equal in every process for equal studies."""
    section = study.model

    def build(**changes: Any) -> nn.Module:
        options = {**section.options, **changes}
        name = str(options.pop("name", section.name))
        if section.name == "unet":
            options.setdefault("spatial_dims", 3 if section.mode == "patch" else 2)
        return build_network(
            name,
            in_channels=task.num_channels * section.slices,
            num_classes=len(task.class_names),
            seed=seeds.derive(study.seed, "network"),
            dtype=DTYPES[study.train.precision],
            **options,
        )

    return strategy.network(build)


def build_optimizer(study: Study) -> OptimizerSpec:
    """Read the study's optimiser."""
    return OptimizerSpec(**study.train.optimizer.model_dump())


def build_trainer(study: Study, site_id: SiteId) -> Trainer:
    """Build a site's trainer."""
    train = study.train
    return Trainer(
        loss=build_loss(train.loss, **train.loss_options),
        optimizer=build_optimizer(study),
        site_id=site_id,
        clip_norm=train.clip_norm,
        device=resolve_device(train.device),
        precision=train.precision,
    )
