"""The trainer: local optimisation for one site on one device. Knows no algorithm."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedmed.errors import SiteError
from fedmed.message import State
from fedmed.optimizer import OptimizerSpec, memory_like, step_in_place

Precision = Literal["float32", "float64", "bfloat16"]
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.float32,  # weights stay float32, arithmetic is autocast
}


@runtime_checkable
class TrainingBatch(Protocol):
    """What a trainer needs of a batch: images (B, C, ...) and labels (B, ...)."""

    @property
    def images(self) -> Tensor:
        """Of any floating-point dtype."""

    @property
    def labels(self) -> Tensor:
        """Integers."""


@dataclass(frozen=True)
class TrainResult:
    """What local training gives back.

    Attributes:
        loss: Mean training loss over the steps, penalty excluded.
        memory: The optimiser's memory after the last step.
        steps: Steps taken.
    """

    loss: float
    memory: State = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class Compiled:
    """A network and its compiled call; see `fedmed.training.compiling`.

    Attributes:
        module: The network.
        call: Computes what `module` computes, up to rounding.
    """

    module: nn.Module
    call: Callable[..., Any]


@dataclass(frozen=True)
class Trainer:
    """Batches in, gradients or trained weights out.

    Attributes:
        loss: Maps logits (B, L, ...) and labels (B, ...) to a scalar.
        optimizer: Local optimiser.
        site_id: Passed to the network's forward, which may hold per-site sets.
        clip_norm: Largest global L2 norm of a gradient, None = unlimited.
        device: Where the network lives.
        precision: "bfloat16" autocasts the forward pass; weights stay float32.
        compiled: Called instead of its network; None = nothing is compiled.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: OptimizerSpec
    site_id: str
    clip_norm: float | None = None
    device: str = "cpu"
    precision: Precision = "float32"
    compiled: Compiled | None = None

    def forward(self, model: nn.Module, batch: TrainingBatch) -> Tensor:
        """Mean loss of one batch, differentiable."""
        return self.loss(*self.logits(model, batch))

    def logits(
        self, network: Callable[..., Any], batch: TrainingBatch
    ) -> tuple[Any, Tensor]:
        """What a network gives for a batch, and labels (B, ...), on the device.

        Args:
            network: Called with the images and the site: the model for logits
                (B, L, ...), or one of its methods.
            batch: The batch.
        """
        images, labels = self._sent(batch)
        if self.compiled is not None and network is self.compiled.module:
            network = self.compiled.call
        with self._autocast():
            return network(images, site=self.site_id), labels

    def gradient(self, model: nn.Module, batch: TrainingBatch) -> tuple[State, float]:
        """Gradient of the batch's loss with respect to every trainable parameter.

        Raises:
            SiteError: If the loss is not finite.
        """
        loss = self.forward(model, batch)
        value = float(loss.detach())
        self.require_finite(value)
        return self.gradient_of(model, loss), value

    def gradient_of(self, model: nn.Module, objective: Tensor) -> State:
        """Gradient of a scalar with respect to every parameter that it depends on."""
        named = trainable(model)
        _forget_gradients(named)
        objective.backward()  # type: ignore[no-untyped-call]
        gradient = {n: p.grad for n, p in named.items() if p.grad is not None}
        _forget_gradients(named)
        return gradient

    def train(
        self,
        model: nn.Module,
        batches: Iterable[TrainingBatch],
        *,
        memory: State | None = None,
        penalty: Callable[[nn.Module], Tensor] | None = None,
        correction: State | None = None,
        first_step: int = 0,
    ) -> TrainResult:
        """Take one optimiser step per batch, in place.

        Args:
            model: Network in training mode.
            batches: The batches, in order.
            memory: Optimiser memory to continue from; None starts fresh.
            penalty: Added to every step's loss (a proximal term).
            correction: Added to the gradient of the named parameters.
            first_step: Number of the first step over all rounds.
        """
        named = trainable(model)
        memory = memory_like(memory or {}, named)
        losses = []
        for step, batch in enumerate(batches, start=first_step):
            _forget_gradients(named)
            loss = self.forward(model, batch)
            losses.append(loss.detach())
            total = loss if penalty is None else loss + penalty(model)
            total.backward()  # type: ignore[no-untyped-call]
            gradient = {name: p.grad for name, p in named.items()}
            _add(gradient, correction or {})
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(named.values(), self.clip_norm)
            step_in_place(named, gradient, self.optimizer.at(step), memory)
        _forget_gradients(named)
        if not losses:
            return TrainResult(float("nan"), memory)
        # The only time the processor waits for a GPU.
        mean = sum(torch.stack(losses).tolist()) / len(losses)
        self.require_finite(mean)
        return TrainResult(mean, memory, len(losses))

    def _sent(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        """A batch on the device, images of two dimensions channels-last."""
        is_flat = batch.images.dim() == 4
        images = batch.images.to(
            self.device,
            DTYPES[self.precision],
            non_blocking=True,
            memory_format=torch.channels_last if is_flat else torch.preserve_format,
        )
        return images, batch.labels.to(self.device, non_blocking=True)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)

    def require_finite(self, loss: float) -> None:
        """Refuse to go on with a loss that is no number.

        Raises:
            SiteError: If it is NaN or infinite.
        """
        if not math.isfinite(loss):
            raise SiteError(
                f"site {self.site_id}: the training loss became {loss}",
                hint="Lower train.optimizer.lr, or set train.clip_norm.",
            )


_PARAMETERS: weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = (
    weakref.WeakKeyDictionary()
)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that want a gradient, by name.

    A network's list of parameters is made once: walking through its modules costs as
    much as a step of a small network.
    """
    if model not in _PARAMETERS:
        _PARAMETERS[model] = dict(model.named_parameters())
    return {n: p for n, p in _PARAMETERS[model].items() if p.requires_grad}


_BUFFERS: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = (
    weakref.WeakKeyDictionary()
)


def names_of_buffers(model: nn.Module) -> frozenset[str]:
    """Names of a network's buffers, listed once."""
    if model not in _BUFFERS:
        _BUFFERS[model] = frozenset(name for name, _ in model.named_buffers())
    return _BUFFERS[model]


def _forget_gradients(named: Mapping[str, nn.Parameter]) -> None:
    for parameter in named.values():
        parameter.grad = None


def _add(gradient: Mapping[str, Tensor | None], correction: State) -> None:
    for name, shift in correction.items():
        if (grad := gradient.get(name)) is not None:
            grad.add_(shift.to(grad))
