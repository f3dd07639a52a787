r"""FedProx. Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020,
arXiv:1812.06127, algorithm 2.

    each site k:  w_k <- approximate minimiser of L_k(w) + mu/2 ||w - w^t||^2
    server:       w^{t+1} <- sum_k (n_k / n) w_k
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class FedProx(Strategy):
    """FedAvg with a proximal term in the local objective.

    Attributes:
        mu: Strength of the pull towards the received model, >= 0. 0 equals FedAvg bit
            for bit.

    Exchanges: 1 per step or 1 per round. With `sync: step` the proximal term is zero
    (the local model has not left the received one), so the step equals FedAvg's.

    Leaves the site:
        As FedAvg.

    Differs from the source:
        The local solver is the study's optimiser for the study's number of steps.
    """

    mu: float = 1e-2

    paper: ClassVar[str] = "Li et al., MLSys 2020, arXiv:1812.06127"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: shared entries after local training",
        "Gradient: trainable entries and normalisation statistics",
    )

    def __post_init__(self) -> None:
        """Check the strength."""
        if self.mu < 0:
            raise ConfigError(f"strategy.mu must be >= 0 (seen: {self.mu})")

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Average the sites' gradients and take the server's optimiser step."""
        replies = yield cohort.ask(self.gradient, weights=server.shared, index=index)
        return stepped(server, replies, self.weights_of(cohort))

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average the sites' weights after proximal local training."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        return merged(server, replies, self.weights_of(cohort))

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Gradient at the received weights, where the proximal term vanishes."""
        return local_gradient(site, weights, index)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps on L_k(w) + mu/2 ||w - w^t||^2."""
        if self.mu == 0:
            return local_training(site, weights)
        return local_training(site, weights, penalty=proximal(weights, self.mu))


def proximal(reference: State, mu: float) -> Callable[[nn.Module], Tensor]:
    r"""Pull local weights towards the model received this round.

    $\frac{\mu}{2} \sum_p \lVert w_p - w_p^t \rVert_2^2$ over the shared parameters;
    kept entries and running statistics do not contribute.

    Args:
        reference: Weights received at the start of the round, any shapes.
        mu: Strength, >= 0.

    Returns:
        A function from the network to a scalar, differentiable in its parameters.

    Source:
        Li et al., arXiv:1812.06127, eq. (2).

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 3.0)
        >>> proximal({"weight": torch.zeros(1, 2)}, mu=1.0)(layer).item()
        9.0
    """

    def penalty(model: nn.Module) -> Tensor:
        terms = [
            (p - reference[name].to(p)).square().sum()
            for name, p in model.named_parameters()
            if name in reference
        ]
        return mu / 2 * torch.stack(terms).sum()

    return penalty
