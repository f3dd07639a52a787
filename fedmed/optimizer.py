"""Optimisers as values: state in, state out.

The arithmetic is torch's (the functions behind `torch.optim`, fused where it has
them); only the bookkeeping is ours, so that optimiser memory is a plain `State` that
can be checkpointed, sent and compared. The classes of `torch.optim` are not used: the
first one made imports the compiler, which takes longer than torch itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedmed.message import State
from fedmed.training.schedule import StepDecay

OptimizerName = Literal["sgd", "adam", "adamw"]

_CLASSES: Mapping[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_FUSED_DEVICES = ("cpu", "cuda")
_CHUNK = 1 << 14
"""Entries that torch adds up in one thread, whatever the number of threads."""


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
        decay: How `lr` falls with the number of steps; None = it stays.
    """

    name: OptimizerName = "sgd"
    lr: float = 1e-2
    momentum: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: StepDecay | None = None

    def at(self, step: int) -> OptimizerSpec:
        """Give the optimiser as it is at a step, counted over all rounds from 0."""
        if self.decay is None:
            return self
        return replace(self, lr=self.lr * self.decay.scale(step), decay=None)

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the torch optimiser for live parameters.

        For comparisons with plain PyTorch; what trains is `step_in_place`.
        """
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.name == "sgd":
            options["momentum"] = self.momentum
        else:
            options |= {"betas": self.betas, "eps": self.eps}
        return _CLASSES[self.name](parameters, **options)


def step_in_place(
    weights: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor | None],
    spec: OptimizerSpec,
    memory: State,
) -> None:
    """Take one optimiser step, moving weights and memory where they lie.

    Args:
        weights: Floating-point tensors or live parameters.
        gradient: By names of `weights`, of the same shape; others stand still, and
            so do those whose gradient is None.
        spec: The optimiser.
        memory: Of the steps before, {} at the start; moved along. Entries are called
            "name|slot", with torch's slots momentum_buffer, exp_avg, exp_avg_sq, step.
    """
    given = {name: g for name, g in sorted(gradient.items()) if g is not None}
    if not given:
        return
    names = list(given)
    with torch.no_grad():
        moved = [weights[name] for name in names]
        if spec.name == "sgd" and not spec.momentum and not spec.weight_decay:
            torch._foreach_add_(moved, list(given.values()), alpha=-spec.lr)
            return
        grads = [_laid_out_as(g, weights[name]) for name, g in given.items()]
        if spec.name == "sgd":
            _sgd_step(names, moved, grads, spec, memory)
        else:
            _adam_step(names, moved, grads, spec, memory)


def _sgd_step(
    names: list[str],
    weights: list[Tensor],
    grads: list[Tensor],
    spec: OptimizerSpec,
    memory: State,
) -> None:
    buffers: list[Tensor | None] = [None] * len(names)
    if spec.momentum:
        # From zero, the first buffer becomes the gradient, as torch's does.
        buffers = [
            _slot(memory, f"{name}|momentum_buffer", weight)
            for name, weight in zip(names, weights, strict=True)
        ]
    sgd(
        weights,
        grads,
        buffers,
        fused=_can_fuse(weights),
        foreach=False,
        lr=spec.lr,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def _adam_step(
    names: list[str],
    weights: list[Tensor],
    grads: list[Tensor],
    spec: OptimizerSpec,
    memory: State,
) -> None:
    steps = [
        memory.setdefault(f"{name}|step", torch.zeros((), device=weight.device))
        for name, weight in zip(names, weights, strict=True)
    ]
    means, squares = (
        [
            _slot(memory, f"{name}|{slot}", weight)
            for name, weight in zip(names, weights, strict=True)
        ]
        for slot in ("exp_avg", "exp_avg_sq")
    )
    function: Any = adam if spec.name == "adam" else adamw
    function(
        weights,
        grads,
        means,
        squares,
        [],
        steps,
        fused=_can_fuse(weights),
        foreach=False,
        amsgrad=False,
        beta1=spec.betas[0],
        beta2=spec.betas[1],
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        eps=spec.eps,
        maximize=False,
    )


def memory_like(memory: State, weights: Mapping[str, Tensor]) -> State:
    """Copy memory to where its weights are and as they are laid out.

    Args:
        memory: Entries "name|slot", from a file, another device or another run.
        weights: Every name of `memory`.
    """
    copied: State = {}
    for key, value in memory.items():
        name, _, slot = key.rpartition("|")
        if slot == "step":
            copied[key] = value.detach().to(weights[name].device, copy=True)
        else:
            copied[key] = torch.empty_like(weights[name].detach()).copy_(value)
    return copied


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
    moved = {name: weights[name].detach().clone() for name in gradient}
    own = {key: m for key, m in memory.items() if key.rpartition("|")[0] in gradient}
    own = memory_like(own, moved)
    step_in_place(moved, gradient, spec, own)
    return {**weights, **moved}, {**memory, **own}


def clip(gradient: State, max_norm: float | None) -> State:
    """Scale a gradient so that its global L2 norm is at most `max_norm`."""
    if max_norm is None:
        return gradient
    total = torch.sqrt(sum_of_squares(gradient)).item()
    if total <= max_norm:
        return gradient
    return {name: g * (max_norm / total) for name, g in gradient.items()}


def sum_of_squares(state: State) -> Tensor:
    """Sum of squared entries in float64, tensors in sorted name order.

    The order of the sum depends on names and shapes only, not on how tensors lie in
    memory or how many threads there are.
    """
    total = torch.zeros((), dtype=torch.float64)
    for name in sorted(state):
        flat = state[name].detach().reshape(-1)
        pieces = torch.split(flat, _CHUNK) if flat.is_cpu else (flat,)
        for piece in pieces:
            total += piece.double().square().sum().cpu()
    return total


def _laid_out_as(gradient: Tensor, weight: Tensor) -> Tensor:
    """Give a gradient the dtype, device and strides of its weight.

    Torch's fused optimisers walk through memory and do not look at strides.
    """
    alike = gradient.dtype == weight.dtype and gradient.device == weight.device
    if alike and gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight.detach()).copy_(gradient)


def _slot(memory: State, key: str, weight: Tensor) -> Tensor:
    if key not in memory:
        memory[key] = torch.zeros_like(weight)
    return memory[key]


def _can_fuse(weights: list[Tensor]) -> bool:
    return all(
        w.device.type in _FUSED_DEVICES and w.is_floating_point() for w in weights
    )
