r"""FedAdam. Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv:2003.00295,
algorithm 2 (FedOpt).

    Delta <- sum_k (n_k / n) (w_k - w^t)
    m <- beta1 m + (1 - beta1) Delta
    v <- beta2 v + (1 - beta2) Delta^2
    w^{t+1} <- w^t + eta_g m / (sqrt(v) + tau)
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
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    at_site,
)
from fedmed.training.local import local_gradient, local_training, merged, stepped
from fedmed.training.pooled import PooledTraining, optimizer_change


@dataclass(frozen=True)
class FedAdam(Strategy):
    """FedAvg with Adam on the server, on the averaged change of the weights.

    Attributes:
        server_lr: eta_g, > 0.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        tau: Degree of adaptivity, > 0.

    Exchanges: 1 per step or 1 per round. With `sync: step` Delta is one step of the
    study's optimiser on the averaged gradient.

    Leaves the site:
        As FedAvg.

    Differs from the source:
        v starts at 0 (the paper allows any v >= tau^2). No bias correction, as there.
        Running statistics are merged, Adam moves trainable entries only.
    """

    server_lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    paper: ClassVar[str] = "Reddi et al., ICLR 2021, arXiv:2003.00295"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: shared entries after local training",
        "Gradient: trainable entries and normalisation statistics",
    )

    def __post_init__(self) -> None:
        """Check the constants."""
        decays = (self.beta1, self.beta2)
        if any(not 0 <= b < 1 for b in decays) or min(self.server_lr, self.tau) <= 0:
            raise ConfigError(
                "strategy.beta1 and beta2 must be in [0, 1), server_lr and tau > 0 "
                f"(seen: {decays}, {self.server_lr}, {self.tau})"
            )

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Adam on one averaged optimiser step."""
        replies = yield cohort.ask(self.gradient, weights=server.shared, index=index)
        return self._move(server, stepped(server, replies, self.weights_of(cohort)))

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Adam on the averaged change of the round."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        return self._move(server, merged(server, replies, self.weights_of(cohort)))

    def _move(self, before: Server, target: Server) -> Server:
        first = dict(before.memory.get("first_moment", {}))
        second = dict(before.memory.get("second_moment", {}))
        moved: State = {}
        for name, start in before.trainable().items():
            delta = target.shared[name] - start
            zero = torch.zeros_like(delta)
            m = self.beta1 * first.get(name, zero) + (1 - self.beta1) * delta
            v = self.beta2 * second.get(name, zero) + (1 - self.beta2) * delta.square()
            moved[name] = start + self.server_lr * m / (v.sqrt() + self.tau)
            first[name], second[name] = m, v
        return target.with_shared(moved).remember(
            first_moment=first, second_moment=second
        )

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Gradient of the site's loss on its batch number `index` of the round."""
        return local_gradient(site, weights, index)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received weights."""
        return local_training(site, weights)

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """The pooled method: the moments of one optimiser step, -lr g for plain SGD."""
        for name, (start, change) in optimizer_change(pool, index).items():
            zero = torch.zeros_like(start)
            m = pool.memory.get(f"{name}|m", zero)
            v = pool.memory.get(f"{name}|v", zero)
            m = m + (1 - self.beta1) * (change - m)
            v = v + (1 - self.beta2) * (change**2 - v)
            pool.memory |= {f"{name}|m": m, f"{name}|v": v}
            update = self.server_lr * m / (torch.sqrt(v) + self.tau)
            pool.model.get_parameter(name).data = start + update
