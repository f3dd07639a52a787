"""Pooled training: what a federated method must equal, in plain PyTorch.

One process, all sites' batches, one backward pass, one `torch.optim` step. Nothing of
the exchange engine is used here, so that a comparison with it means something.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedmed.message import SiteId, State
from fedmed.strategy import Cohort
from fedmed.training.trainer import TrainingBatch


@dataclass
class PooledTraining:
    """The pooled side of a comparison.

    Attributes:
        models: One network per site. What a strategy shares is one and the same
            parameter in all of them; what sites keep is each network's own.
        batches: Gives every site's batch of a step.
        loss: As in the study.
        weights: Weight of each site's mean loss; they sum to 1.
        optimizer: The study's optimiser over all distinct parameters.
        lr: Its learning rate.
        memory: Moments of methods with an optimiser of their own.
        make_optimizer: Makes another torch optimiser of the study's kind.
        optimizers: Those made so far, by name.
        networks: Further networks of a method, by name.
        cohort: The sites as the federated server sees them in its first round, for
            methods that draw some of them in each step.
        draws: As `SiteContext.draws` of a site, in the first round.
    """

    models: Mapping[SiteId, nn.Module]
    batches: Callable[[int], Mapping[SiteId, TrainingBatch]]
    loss: Callable[[Tensor, Tensor], Tensor]
    weights: Mapping[SiteId, float]
    optimizer: torch.optim.Optimizer
    lr: float
    memory: State = field(default_factory=dict)
    cohort: Cohort | None = None
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)
    draws: Callable[..., AbstractContextManager[None]] | None = None

    @property
    def model(self) -> nn.Module:
        """The first network: the place of the shared parameters."""
        return self.models[min(self.models)]

    @property
    def shares(self) -> dict[SiteId, float]:
        """Factor of each site's loss where the pooled loss is a sum over the sites."""
        return {site: len(self.weights) * w for site, w in self.weights.items()}

    def optimizer_of(self, name: str) -> torch.optim.Optimizer:
        """Give the optimiser of one phase of a method, made when first asked for.

        It has memory of its own for every parameter of all networks; a step leaves
        alone those without a gradient.
        """
        if name not in self.optimizers:
            assert self.make_optimizer is not None
            parameters = distinct_parameters(self.models)
            self.optimizers[name] = self.make_optimizer(parameters)
            self.set_lr(self.lr)
        return self.optimizers[name]

    def set_lr(self, lr: float) -> None:
        """Let all optimisers go on with another learning rate."""
        self.lr = lr
        for optimizer in (self.optimizer, *self.optimizers.values()):
            for group in optimizer.param_groups:
                group["lr"] = lr

    def forget_gradients(self) -> None:
        """Let no parameter of any network have a gradient."""
        for network in self.models.values():
            network.zero_grad(set_to_none=True)


def tied(
    model: nn.Module, site_ids: tuple[SiteId, ...], shared: tuple[str, ...]
) -> dict[SiteId, nn.Module]:
    """Copy a network per site, with one common parameter for each shared name."""
    models = {site: copy.deepcopy(model) for site in site_ids}
    first = dict(models[min(site_ids)].named_parameters())
    for network in models.values():
        for name, parameter in first.items():
            if name in shared:
                parent, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(parent), leaf, parameter)
    return models


def distinct_parameters(models: Mapping[SiteId, nn.Module]) -> list[nn.Parameter]:
    """Every parameter once, in a stable order."""
    found: dict[int, nn.Parameter] = {}
    for site in sorted(models):
        found.update({id(p): p for p in models[site].parameters()})
    return list(found.values())


def pooled_gradient(pool: PooledTraining, index: int) -> State:
    """Backpropagate the weighted sum of all sites' losses once.

    Returns:
        The gradient of the first network's parameters, by name; every parameter's
        `grad` is set.
    """
    pool.forget_gradients()
    batches = pool.batches(index)
    terms = [
        pool.weights[site]
        * pool.loss(pool.models[site](batch.images, site=site), batch.labels)
        for site, batch in sorted(batches.items())
    ]
    torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
    return {
        name: p.grad for name, p in pool.model.named_parameters() if p.grad is not None
    }


def pooled_step(pool: PooledTraining, index: int) -> None:
    """One step of the study's optimiser on the pooled loss."""
    pooled_gradient(pool, index)
    pool.optimizer.step()


def optimizer_change(
    pool: PooledTraining, index: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Take one step of the study's optimiser, and say from where and how far it went.

    Returns:
        Parameter name -> its value before, and its change; for methods that put a
        second optimiser on top of that change.
    """
    named = dict(pool.model.named_parameters())
    start = {name: p.detach().clone() for name, p in named.items()}
    pooled_step(pool, index)
    return {name: (start[name], p.detach() - start[name]) for name, p in named.items()}


def functional_loss(
    pool: PooledTraining,
    site: SiteId,
    batch: TrainingBatch,
    weights: Mapping[str, Tensor],
) -> Tensor:
    """Loss of one site's batch at weights that are not the network's own.

    Args:
        pool: The pooled side.
        site: Whose network's running statistics take part and move.
        batch: The site's batch.
        weights: In place of parameters of these names; may be part of a graph.
    """
    logits = torch.func.functional_call(
        pool.models[site], dict(weights), (batch.images,), {"site": site}
    )
    return pool.loss(logits, batch.labels)
