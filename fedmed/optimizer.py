"""Optimisers as values: state in, state out.

The arithmetic is `torch.optim`'s; only the bookkeeping is ours, so that optimiser
memory is a plain `State` that can be checkpointed, sent and compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fedmed.message import State

OptimizerName = Literal["sgd", "adam", "adamw"]

_CLASSES: Mapping[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True)
class OptimizerSpec:
    """Which optimiser, with its constants.

    Attributes:
        name: "sgd", "adam" or "adamw".
        lr: Learning rate, > 0.
        momentum: SGD only, in [0, 1).
        weight_decay: >= 0; L2 for sgd and adam, decoupled for adamw.
        betas: Adam's decay rates.
        eps: Adam's denominator constant.
    """

    name: OptimizerName = "sgd"
    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the torch optimiser for live parameters."""
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.name == "sgd":
            options["momentum"] = self.momentum
        else:
            options |= {"betas": self.betas, "eps": self.eps}
        return _CLASSES[self.name](parameters, **options)


def memory_of(optimizer: torch.optim.Optimizer, names: list[str]) -> State:
    """Read an optimiser's memory as flat tensors "name/moment"."""
    memory: State = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if value is not None:
                memory[f"{names[index]}|{slot}"] = torch.as_tensor(value).clone()
    return memory


def restore_memory(
    optimizer: torch.optim.Optimizer, names: list[str], memory: State
) -> None:
    """Put memory read by `memory_of` back into a fresh optimiser."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    position = {name: index for index, name in enumerate(names)}
    for key, value in memory.items():
        name, _, slot = key.rpartition("|")
        slots.setdefault(position[name], {})[slot] = value.clone()
    if slots:
        content = optimizer.state_dict()
        content["state"] = slots
        optimizer.load_state_dict(content)


def descend(
    weights: State, gradient: State, spec: OptimizerSpec, memory: State
) -> tuple[State, State]:
    """Take one optimiser step and return new weights and memory.

    Args:
        weights: Trainable entries; entries without a gradient are returned as given.
        gradient: Subset of the names of `weights`, same shapes and dtypes.
        spec: The optimiser.
        memory: What the previous step returned, {} at the start. That of entries
            without a gradient is returned as given.

    Returns:
        New weights and new memory; the arguments are unchanged.
    """
    names = sorted(gradient)
    parameters = [nn.Parameter(weights[name].detach().clone()) for name in names]
    for parameter, name in zip(parameters, names, strict=True):
        parameter.grad = gradient[name].to(parameter.dtype)
    optimizer = spec.build(parameters)
    own = {key: m for key, m in memory.items() if key.rpartition("|")[0] in gradient}
    restore_memory(optimizer, names, own)
    optimizer.step()
    moved = {n: p.detach() for n, p in zip(names, parameters, strict=True)}
    return {**weights, **moved}, {**memory, **memory_of(optimizer, names)}


def clip(gradient: State, max_norm: float | None) -> State:
    """Scale a gradient so that its global L2 norm is at most `max_norm`."""
    if max_norm is None:
        return gradient
    total = torch.sqrt(sum_of_squares(gradient)).item()
    if total <= max_norm:
        return gradient
    return {name: g * (max_norm / total) for name, g in gradient.items()}


def sum_of_squares(state: State) -> torch.Tensor:
    """Sum of squared entries in float64, tensors in sorted name order."""
    total = torch.zeros((), dtype=torch.float64)
    for name in sorted(state):
        total += state[name].double().square().sum().cpu()
    return total
