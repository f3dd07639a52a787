r"""FedAvg. McMahan et al., Communication-Efficient Learning of Deep Networks from
Decentralized Data, AISTATS 2017, arXiv:1602.05629, algorithm 1.

    server: w^0
    for each round t:
        each site k:  w_k <- w^t; E local epochs or K local steps of SGD on L_k
        server:       w^{t+1} <- sum_k (n_k / n) w_k
"""  # noqa: D205

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
class FedAvg(Strategy):
    """Federated averaging; with `sync: step`, gradient averaging (FedSGD).

    Exchanges: 1 per step (`sync: step`) or 1 per round (`sync: round`).

    Leaves the site:
        Weights: every shared entry after local training; size of the model.
        Gradient: every trainable entry; size of the model. Normalisation statistics.
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`).

    Differs from the source:
        Batch-norm running statistics are merged by the law of total variance.
    """

    paper: ClassVar[str] = "McMahan et al., AISTATS 2017, arXiv:1602.05629"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: shared entries after local training",
        "Gradient: trainable entries and normalisation statistics",
    )

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Average the sites' gradients and take the server's optimiser step."""
        replies = yield cohort.ask(self.gradient, weights=server.shared, index=index)
        return stepped(server, replies, self.weights_of(cohort))

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average the sites' weights after local training."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        return merged(server, replies, self.weights_of(cohort))

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Gradient of the site's loss on its batch number `index` of the round."""
        return local_gradient(site, weights, index)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received weights."""
        return local_training(site, weights)
