"""Local steps whose loss sees a whole forward pass: features, logits and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmed.message import State
from fedmed.optimizer import memory_like
from fedmed.strategy import SiteContext
from fedmed.training.coupled import Pass, captured, noting_trainer
from fedmed.training.local import OPTIMIZER, step_here
from fedmed.training.trainer import TrainResult, trainable


@dataclass(frozen=True)
class Trained:
    """What local steps gave.

    Attributes:
        model: The live network.
        result: The record of the task's loss.
        passes: How often the batches went through the site's examples, at least once.
    """

    model: nn.Module
    result: TrainResult
    passes: int


def train_on_passes(
    site: SiteContext,
    weights: State,
    objective: Callable[[Pass, Tensor], Tensor | None],
    *,
    layers: tuple[str, ...] = (),
) -> Trained:
    """Run the round's local steps on a loss of the method's own.

    Args:
        site: The hospital.
        weights: Shared entries.
        objective: From a step's forward pass and its task loss to what is minimised;
            None = no step. It is called once per batch, in order.
        layers: What the pass notes; see `fedmed.training.coupled.Statistic`.
    """
    model = site.load(weights)
    memory = memory_like(site.private.states.get(OPTIMIZER, {}), trainable(model))
    losses, num_drawn = [], 0
    trainer = noting_trainer(site, layers)
    for index, batch in enumerate(site.batches(0, site.steps)):
        with captured(model, layers) as outputs:
            logits, labels = trainer.logits(model, batch)
            passed = Pass(model, logits, labels, outputs)
            task = site.trainer.loss(logits, labels)
            losses.append(task.detach())
            num_drawn += len(labels)
            wanted = objective(passed, task)
        if wanted is not None:
            step_here(site, model, wanted, index=index, memory=memory)
    loss = float(torch.stack(losses).double().mean())
    site.trainer.require_finite(loss)
    passes = max(1, -(-num_drawn // site.num_examples))
    return Trained(model, TrainResult(loss, memory, len(losses)), passes)
