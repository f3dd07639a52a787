"""Pooled side of episodic methods: two forward passes, plain PyTorch, one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedmed.message import SiteId
from fedmed.networks.metric_network import HEAD, METRIC
from fedmed.strategy import Cohort
from fedmed.training.clustering import cropped_to
from fedmed.training.meta_update import MetaUpdate
from fedmed.training.pooled import PooledTraining, functional_loss

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class PooledPass:
    """One site's batch at given weights.

    Attributes:
        logits: (B, L, ...).
        labels: (B, ...).
        features: What entered the head, (B, F, ...).
        model: The site's network.
    """

    logits: Tensor
    labels: Tensor
    features: Tensor
    model: nn.Module


def network_parameters(pool: PooledTraining) -> dict[str, nn.Parameter]:
    """Parameters of the network, without the metric network beside it."""
    return {
        name: p
        for name, p in pool.model.named_parameters()
        if not name.startswith(f"{METRIC}.")
    }


def metric_parameters(pool: PooledTraining) -> dict[str, nn.Parameter]:
    """Parameters of the metric network; {} if there is none."""
    network = network_parameters(pool)
    return {n: p for n, p in pool.model.named_parameters() if n not in network}


def mean_loss(
    pool: PooledTraining, group: Cohort, index: int, weights: Weights
) -> Tensor:
    """Weighted mean of the losses of a group's sites at given weights."""
    batches = pool.batches(index)
    total = sum(pool.weights[site] for site in group.site_ids)
    terms = [
        pool.weights[site] / total * functional_loss(pool, site, batches[site], weights)
        for site in group.site_ids
    ]
    return torch.stack(terms).sum()


def task_gradient(pool: PooledTraining, group: Cohort, index: int) -> dict[str, Tensor]:
    """Gradient of `mean_loss` at the network's weights."""
    named = network_parameters(pool)
    loss = mean_loss(pool, group, index, named)
    return dict(
        zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)
    )


def clipped(gradient: Weights, max_norm: float | None) -> dict[str, Tensor]:
    """Each tensor scaled to an L2 norm of at most `max_norm`."""
    if max_norm is None:
        return dict(gradient)
    return {
        name: g * (max_norm / g.norm()).clamp(max=1.0) if g.any() else g
        for name, g in gradient.items()
    }


def stepped_ahead(
    pool: PooledTraining, gradient: Weights, *, lr: float, max_norm: float | None
) -> dict[str, Tensor]:
    """Weights after the inner step, as new leaves: first order."""
    return {
        name: (p - lr * clipped(gradient, max_norm)[name]).detach().requires_grad_()
        for name, p in network_parameters(pool).items()
    }


def passes_at(
    pool: PooledTraining, group: Cohort, index: int, *, weights: Weights
) -> dict[SiteId, PooledPass]:
    """Run the batches of a group's sites, each by itself, at given weights."""
    found = {}
    batches = pool.batches(index)
    for site in group.site_ids:
        seen: list[Tensor] = []
        model, batch = pool.models[site], batches[site]
        hook = None
        if METRIC in dict(model.named_children()):
            hook = model.get_submodule(HEAD).register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0])
            )
        logits = torch.func.functional_call(
            model, dict(weights), (batch.images,), {"site": site}
        )
        if hook is not None:
            hook.remove()
        features = cropped_to(batch.labels, seen[0]) if seen else logits
        found[site] = PooledPass(logits, batch.labels, features, model)
    return found


def gradient_at(loss: Tensor, leaves: Weights) -> dict[str, Tensor]:
    """Gradient with respect to the leaves that the loss depends on."""
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def take_steps(
    pool: PooledTraining, task: Weights, meta: Weights, update: MetaUpdate
) -> None:
    """Step along task and meta gradient, together or one after the other."""
    network, metric = network_parameters(pool), metric_parameters(pool)
    judged = {name: g for name, g in meta.items() if name in network}
    judged = clipped(judged, update.tensor_clip)
    if update.mode == "joint":
        both = {name: g + judged.get(name, 0.0) for name, g in task.items()}
        _step(pool, pool.optimizer, network, both)
    else:
        _step(pool, pool.optimizer, network, task)
        _step(pool, _scaled(pool, "meta", update.meta_lr_factor), network, judged)
    embedding = {name: g for name, g in meta.items() if name in metric}
    _step(pool, _scaled(pool, "metric", update.metric_lr_factor), metric, embedding)


def _scaled(pool: PooledTraining, name: str, factor: float) -> torch.optim.Optimizer:
    optimizer = pool.optimizer_of(name)
    for group in optimizer.param_groups:
        group["lr"] = factor * pool.lr
    return optimizer


def _step(
    pool: PooledTraining,
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    gradient: Weights,
) -> None:
    if not gradient:
        return
    pool.forget_gradients()
    for name, g in gradient.items():
        named[name].grad = g.detach().clone()
    optimizer.step()
