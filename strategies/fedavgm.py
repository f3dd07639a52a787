r"""FedAvgM. Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution
for Federated Visual Classification, 2019, arXiv:1909.06335, section 4.

    Delta <- sum_k (n_k / n) (w_k - w^t)
    v <- beta v + Delta;   w^{t+1} <- w^t + eta_g v
"""  # noqa: D205

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedmed.errors import ConfigError
from fedmed.message import State
from fedmed.strategy import (
    Cohort,
    Outcome,
    Replies,
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    at_site,
)
from fedmed.training.local import local_gradient, local_training, merged, stepped
from fedmed.training.pooled import PooledTraining, optimizer_change


@dataclass(frozen=True)
class FedAvgM(Strategy):
    """FedAvg with momentum on the server.

    Attributes:
        beta: Momentum, in [0, 1). 0 with `server_lr` 1 equals FedAvg.
        server_lr: eta_g, > 0.

    Exchanges: 1 per step or 1 per round. With `sync: step` Delta is one step of the
    study's optimiser on the averaged gradient.

    Leaves the site:
        As FedAvg.

    Differs from the source:
        Running statistics are merged, momentum moves trainable entries only.
    """

    beta: float = 0.9
    server_lr: float = 1.0

    paper: ClassVar[str] = "Hsu, Qi, Brown 2019, arXiv:1909.06335"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: shared entries after local training",
        "Gradient: trainable entries and normalisation statistics",
    )

    def __post_init__(self) -> None:
        """Check the constants."""
        if not 0 <= self.beta < 1 or self.server_lr <= 0:
            raise ConfigError(
                "strategy.beta must be in [0, 1) and strategy.server_lr > 0 "
                f"(seen: {self.beta} and {self.server_lr})"
            )

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Momentum on one averaged optimiser step."""
        replies = yield cohort.ask(self.gradient, weights=server.shared, index=index)
        return self._move(server, stepped(server, replies, self.weights_of(cohort)))

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Momentum on the averaged change of the round."""
        replies: Replies = yield cohort.ask(self.training, weights=server.shared)
        return self._move(server, merged(server, replies, self.weights_of(cohort)))

    def _move(self, before: Server, target: Server) -> Server:
        start = before.trainable()
        change = {name: target.shared[name] - w for name, w in start.items()}
        previous = before.memory.get("momentum", {})
        velocity = {
            name: self.beta * previous.get(name, torch.zeros_like(delta)) + delta
            for name, delta in change.items()
        }
        moved = {n: w + self.server_lr * velocity[n] for n, w in start.items()}
        return target.with_shared(moved).remember(momentum=velocity)

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Gradient of the site's loss on its batch number `index` of the round."""
        return local_gradient(site, weights, index)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received weights."""
        return local_training(site, weights)

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """The pooled method: v <- beta v + d; w <- w + eta_g v, d one optimiser step.

        With plain SGD this is heavy-ball momentum, d = -lr g.
        """
        for name, (start, change) in optimizer_change(pool, index).items():
            before = pool.memory.get(name, torch.zeros_like(start))
            pool.memory[name] = velocity = self.beta * before + change
            pool.model.get_parameter(name).data = start + self.server_lr * velocity
