r"""Per-FedAvg. Fallah, Mokhtari, Ozdaglar, Personalized Federated Learning with
Theoretical Guarantees, NeurIPS 2020, arXiv:2002.07948, algorithm 1.

    min_w sum_k L_k(w - alpha grad L_k(w))

    each site k, each local step, three mini-batches D, D', D'':
        w~ <- w - alpha grad L_k(w; D)
        w  <- w - eta (I - alpha H_k(w; D'')) grad L_k(w~; D')     (order: second)
              w - eta grad L_k(w~; D')                             (order: first)
    server:     w <- mean_k w_k
    evaluation: site k first takes one step of size alpha on its own training data
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedmed.errors import ConfigError
from fedmed.message import State
from fedmed.optimizer import clip, memory_like, step_in_place
from fedmed.payload import Weights
from fedmed.strategy import (
    Cohort,
    Outcome,
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    Weighting,
    at_site,
)
from fedmed.training.curvature import hessian_vector
from fedmed.training.local import (
    OPTIMIZER,
    gradient_outcome,
    merged,
    optimizer_at,
    stepped,
)
from fedmed.training.pooled import PooledTraining, functional_loss
from fedmed.training.trainer import trainable

_BATCHES = 3
"""Mini-batches that one local step uses up."""


@dataclass(frozen=True)
class PerFedAvg(Strategy):
    r"""Find weights from which one step of training suits each hospital.

    It meta-learns within a site (adaptation to itself), not across sites as MLDG does.

    Attributes:
        inner_lr: alpha, step size of the adaptation, >= 0. 0 is FedAvg on every third
            mini-batch.
        order: "second" is the exact gradient of the objective; "first" drops the
            Hessian (the paper's FO variant).

    Exchanges: 1 per step or 1 per round.

    Leaves the site:
        Weights: every shared entry after local training; size of the model.
        Gradient: of the meta-objective, every trainable entry. Normalisation
        statistics.
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`).

    Differs from the source:
        The local optimiser is the study's; the paper's is plain SGD of step size eta.
        The Hessian is exact (two backward passes), not a difference of gradients. A
        site without training data is evaluated as it is.
    """

    inner_lr: float = 1e-2
    order: Literal["first", "second"] = "first"
    weighting: Weighting = "uniform"

    paper: ClassVar[str] = "Fallah et al., NeurIPS 2020, arXiv:2002.07948"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: shared entries after local training",
        "Gradient: of the meta-objective, and normalisation statistics",
    )

    def __post_init__(self) -> None:
        """Check the constant."""
        if self.inner_lr < 0:
            raise ConfigError(f"strategy.inner_lr must be >= 0 (seen: {self.inner_lr})")

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Average the sites' meta-gradients and take the server's optimiser step."""
        replies = yield cohort.ask(self.gradient, weights=server.shared, index=index)
        return stepped(server, replies, self.weights_of(cohort))

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average the sites' weights after local meta-steps."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        return merged(server, replies, self.weights_of(cohort))

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Gradient of the site's meta-objective, on three batches."""
        model = site.load(weights)
        gradient, loss = self._meta_gradient(site, model, index)
        return gradient_outcome(site, model, gradient, index=index, loss=loss)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps along the meta-gradient."""
        model = site.load(weights)
        named = trainable(model)
        memory = memory_like(site.private.states.get(OPTIMIZER, {}), named)
        losses = []
        for index in range(site.steps):
            gradient, loss = self._meta_gradient(site, model, index)
            gradient = clip(gradient, site.trainer.clip_norm)
            step_in_place(named, gradient, optimizer_at(site, index), memory)
            losses.append(loss)
        payload = Weights(
            num_examples=site.num_examples,
            values={"loss": sum(losses) / len(losses), "steps": len(losses)},
            state=site.shared_of(model),
        )
        kept = {OPTIMIZER: memory} if site.keeps_optimizer else {}
        return Outcome(payload, site.keep(model, **kept))

    def _meta_gradient(
        self, site: SiteContext, model: nn.Module, index: int
    ) -> tuple[State, float]:
        """Gradient of L(w - alpha grad L(w)), and the loss after the adaptation."""
        adapting, judging, *curving = site.batches(_BATCHES * index, _BATCHES)
        named = trainable(model)
        start = {name: p.detach().clone() for name, p in named.items()}
        task, _ = site.trainer.gradient(model, adapting)
        _move(named, start, task, -self.inner_lr)
        gradient, loss = site.trainer.gradient(model, judging)
        _move(named, start, {}, 0.0)
        if self.order == "second":
            product = hessian_vector(site.trainer, model, curving[0], gradient)
            gradient = {n: g - self.inner_lr * product[n] for n, g in gradient.items()}
        return gradient, loss

    def personalise(self, site: SiteContext, model: nn.Module) -> None:
        """Take the one step of adaptation for which the weights were made."""
        named = trainable(model)
        start = {name: p.detach().clone() for name, p in named.items()}
        (batch,) = site.batches(0, 1)
        task, _ = site.trainer.gradient(model, batch)
        _move(named, start, task, -self.inner_lr)

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """Differentiate the sum of all sites' meta-objectives."""
        named = dict(pool.model.named_parameters())
        adapting, judging, curving = (
            pool.batches(_BATCHES * index + position) for position in range(_BATCHES)
        )
        total: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in named.items()}
        for site, weight in sorted(pool.weights.items()):
            task = functional_loss(pool, site, adapting[site], named)
            grads = torch.autograd.grad(task, list(named.values()))
            ahead = {
                name: (p - self.inner_lr * g).detach().requires_grad_()
                for (name, p), g in zip(named.items(), grads, strict=True)
            }
            judged = functional_loss(pool, site, judging[site], ahead)
            outer = torch.autograd.grad(judged, list(ahead.values()))
            if self.order == "second":
                curve = functional_loss(pool, site, curving[site], named)
                first = torch.autograd.grad(
                    curve, list(named.values()), create_graph=True
                )
                products = torch.autograd.grad(first, list(named.values()), outer)
                outer = tuple(
                    g - self.inner_lr * product
                    for g, product in zip(outer, products, strict=True)
                )
            for name, g in zip(named, outer, strict=True):
                total[name] += weight * g
        for name, parameter in named.items():
            parameter.grad = total[name]
        pool.optimizer.step()


def _move(
    named: Mapping[str, Tensor], start: State, direction: State, factor: float
) -> None:
    """Set parameters to `start + factor * direction`."""
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start[name])
            if name in direction:
                parameter.add_(direction[name], alpha=factor)
