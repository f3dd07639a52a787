r"""SCAFFOLD. Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning, ICML 2020, arXiv:1910.06378, algorithm 1, option II.

    each site k, K steps:  w_k <- w_k - eta_l (g_k(w_k) - c_k + c)
                           c_k+ <- c_k - c + (w^t - w_k) / (K eta_l)
    server:                w^{t+1} <- w^t + eta_g mean_k (w_k - w^t)
                           c <- c + (|S| / N) mean_k (c_k+ - c_k)
"""  # noqa: D205

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedmed.errors import ConfigError
from fedmed.message import SiteId, State
from fedmed.reduce import weighted_mean
from fedmed.replies import states_of
from fedmed.strategy import (
    Cohort,
    Exchange,
    Outcome,
    Replies,
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    Weighting,
    at_site,
)
from fedmed.training.local import (
    merged,
    optimizer_at,
    present,
    train_here,
    trained_outcome,
)
from fedmed.training.pooled import PooledTraining, optimizer_change

_CONTROL = "control"


@dataclass(frozen=True)
class Scaffold(Strategy):
    """FedAvg with control variates that correct the drift of local steps.

    Attributes:
        server_lr: eta_g, > 0.

    Exchanges: 1 per round (`sync: round`) or 1 per step (`sync: step`, K = 1). With
    every site present the control variates cancel in a mean of single steps, so
    `sync: step` equals pooled SGD of step size eta_g eta_l. With `sites_per_round` the
    present ones are S, all training sites N.

    Leaves the site:
        Weights: shared entries; extra "control": the change of the control variate,
        as revealing as a gradient; together twice the size of the model.
    Kept by the site:
        Its control variate c_k.

    Differs from the source:
        Running statistics are merged and have no control variate. Sites may be
        weighted by examples (`weighting: examples`); the paper's mean is the default.
    """

    weighting: Weighting = "uniform"
    server_lr: float = 1.0

    paper: ClassVar[str] = "Karimireddy et al., ICML 2020, arXiv:1910.06378"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: shared entries and the change of the control variate",
    )
    kept_by_site: ClassVar = ("its control variate",)

    def __post_init__(self) -> None:
        """Check the constant."""
        if self.server_lr <= 0:
            raise ConfigError(
                f"strategy.server_lr must be > 0 (seen: {self.server_lr})"
            )

    def initial(self, server: Server) -> Server:
        """Start with c = 0."""
        if server.optimizer.name != "sgd" or server.optimizer.momentum:
            raise ConfigError(
                "scaffold needs plain SGD at the sites (seen: "
                f"{server.optimizer.name}, momentum {server.optimizer.momentum})",
                hint="Set train.optimizer: {name: sgd, momentum: 0}.",
            )
        zero = {name: torch.zeros_like(w) for name, w in server.trainable().items()}
        return server.remember(control=zero)

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """One corrected local step each, then the server's update."""
        replies = yield self._ask(server, cohort, first=index, count=1)
        return self._update(server, cohort, replies)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Corrected local steps, then the server's update."""
        replies = yield self._ask(server, cohort, first=0, count=None)
        return self._update(server, cohort, replies)

    def _ask(
        self, server: Server, cohort: Cohort, *, first: int, count: int | None
    ) -> Exchange:
        return cohort.ask(
            self.training,
            weights=server.shared,
            control=server.memory[_CONTROL],
            first=first,
            count=count,
        )

    def _merged(
        self, server: Server, replies: Replies, weights: Mapping[SiteId, float]
    ) -> Server:
        if self.sync == "round":
            return merged(server, replies, weights)
        states = states_of(replies, "state")
        return server.with_shared(
            server.merge_buffers(states, present(weights, replies))
        )

    def _update(self, server: Server, cohort: Cohort, replies: Replies) -> Server:
        weights = self.weights_of(cohort)
        target = self._merged(server, replies, weights)
        moved = {
            name: w + self.server_lr * (target.shared[name] - w)
            for name, w in server.trainable().items()
        }
        change = weighted_mean(
            states_of(replies, f"extra/{_CONTROL}"),
            {site: weights[site] for site in replies},
        )
        present = len(replies) / cohort.num_sites
        control = {
            name: c + present * change[name]
            for name, c in server.memory[_CONTROL].items()
        }
        return target.with_shared(moved).remember(control=control)

    @at_site
    def training(
        self,
        site: SiteContext,
        weights: State,
        control: State,
        first: int,
        count: int | None,
    ) -> Outcome:
        """Local steps along g - c_k + c, and the new c_k."""
        zero = {name: torch.zeros_like(c) for name, c in control.items()}
        own = site.private.states.get(_CONTROL, zero)
        shift = {name: c - own[name] for name, c in control.items()}
        model, result = train_here(
            site, weights, first=first, count=count, correction=shift
        )
        end = dict(model.named_parameters())
        steps = range(first, first + result.steps)
        scale = 1 / math.fsum(optimizer_at(site, step).lr for step in steps)
        change = {
            name: scale * (weights[name] - end[name].detach().to(c)) - c
            for name, c in control.items()
        }
        kept = {name: own[name] + change[name] for name in control}
        return trained_outcome(
            site, model, result, extra={_CONTROL: change}, keep={_CONTROL: kept}
        )

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """The pooled method: SGD of step size eta_g eta_l, w <- w - eta_g eta_l g."""
        for name, (start, change) in optimizer_change(pool, index).items():
            pool.model.get_parameter(name).data = start + self.server_lr * change
