"""What a strategy's messages weigh, before anything is run: from its network alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedmed.partition import Entry, StatePartition
from fedmed.strategy import Strategy
from fedmed.study import study_from_dict
from fedmed.task import Task, build_model

_TRAINABLE = frozenset({"weight", "norm_affine"})


@dataclass(frozen=True)
class PartSize:
    """One top-level part of a network, or all of them.

    Attributes:
        part: Its name, or "all".
        shared_values: Trainable numbers that are shared.
        kept_values: Trainable numbers that stay at each site.
        shared_bytes: All shared entries, running statistics included: a message of
            weights, and one of the gradient with the statistics.
        kept_bytes: All entries that stay at a site.
    """

    part: str
    shared_values: int
    kept_values: int
    shared_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class NetworkSize:
    """What a strategy does with one network.

    Attributes:
        network: Its name and preset.
        num_classes: Label classes, background included.
        parts: In the network's order; the last is "all".
    """

    network: str
    num_classes: int
    parts: tuple[PartSize, ...]


def network_size(strategy: Strategy, model: Mapping[str, Any]) -> NetworkSize:
    """Build a network as the strategy composes it, and weigh what is shared of it.

    Args:
        strategy: The method.
        model: `model` section of a study; `num_classes` beside it, if not 2. Images
            have one channel per slice.

    Raises:
        ConfigError: If the strategy cannot use that network.

    Example:
        >>> from fedmed.resolve import load_strategy
        >>> fedbn = load_strategy("fedbn", {})
        >>> size = network_size(fedbn, {"name": "unet", "base_width": 2, "levels": 1})
        >>> size.parts[-1].shared_values, size.parts[-1].kept_values
        (60, 8)
    """
    section = dict(model)
    num_classes = int(section.pop("num_classes", 2))
    study = study_from_dict(
        {"name": "size", "sites": {"dataset": "phantom"}, "model": section}
    )
    names = tuple(f"class {number}" for number in range(num_classes))
    built = build_model(study, Task("segmentation", names, 1, 3), strategy)
    preset = section.get("preset")
    return NetworkSize(
        network=study.model.name + (f", preset {preset}" if preset else ""),
        num_classes=num_classes,
        parts=_parts(strategy.partition(built)),
    )


def _parts(partition: StatePartition) -> tuple[PartSize, ...]:
    shared = set(partition.shared)
    names = dict.fromkeys(entry.part for entry in partition.entries)
    return (
        *(
            _sum(name, [e for e in partition.entries if e.part == name], shared)
            for name in names
        ),
        _sum("all", partition.entries, shared),
    )


def _sum(part: str, entries: Iterable[Entry], shared: set[str]) -> PartSize:
    travelling = [entry for entry in entries if entry.name in shared]
    kept = [entry for entry in entries if entry.name not in shared]
    return PartSize(
        part=part,
        shared_values=sum(_num_values(e) for e in travelling if e.role in _TRAINABLE),
        kept_values=sum(_num_values(e) for e in kept if e.role in _TRAINABLE),
        shared_bytes=_bytes(travelling),
        kept_bytes=_bytes(kept),
    )


def _num_values(entry: Entry) -> int:
    return math.prod(entry.shape)


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(_num_values(entry) * entry.dtype.itemsize for entry in entries)
