"""Second derivatives: a site's Hessian times a vector that the server sends."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fedmed.message import State
from fedmed.payload import Gradient
from fedmed.strategy import Outcome, SiteContext
from fedmed.training.trainer import Trainer, TrainingBatch, trainable


def hessian_vector(
    trainer: Trainer, model: nn.Module, batch: TrainingBatch, vector: State
) -> State:
    r"""Multiply the Hessian of a batch's loss by a vector.

    $H v = \nabla_w \langle \nabla_w L(w), v \rangle$, by two backward passes.

    Args:
        trainer: Gives the loss.
        model: Network at w, in training mode.
        batch: The batch of L.
        vector: v, by names of parameters; parameters without one count as 0.

    Returns:
        $H v$ by the names of `vector`, same shapes.
    """
    named = {name: p for name, p in trainable(model).items() if name in vector}
    # Compiled code has no second derivative.
    loss = replace(trainer, compiled=None).forward(model, batch)
    first = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    terms = [
        (grad * vector[name].to(grad)).sum()
        for name, grad in zip(named, first, strict=True)
    ]
    second = torch.autograd.grad(
        torch.stack(terms).sum(), list(named.values()), allow_unused=True
    )
    return {
        name: torch.zeros_like(vector[name])
        if found is None
        else found.to(vector[name])
        for name, found in zip(named, second, strict=True)
    }


def curvature_outcome(
    site: SiteContext, weights: State, vector: State, index: int
) -> Outcome:
    """Answer with the Hessian of the site's loss times `vector`.

    The mini-batch is that of `local_gradient` for the same `index`. What the site
    keeps does not change.

    Args:
        site: The hospital.
        weights: Shared entries at which the curvature is wanted.
        vector: By names of shared trainable entries.
        index: Number of the batch within the round.
    """
    model = site.load(weights)
    (batch,) = site.batches(index, 1)
    product = hessian_vector(site.trainer, model, batch, vector)
    return Outcome(Gradient(num_examples=site.num_examples, state=product))
