r"""SiloBN. Andreux et al., Siloed Federated Learning for Multi-Centric Histopathology
Datasets, DART at MICCAI 2020, arXiv:2008.07424, section 3.

    each site k:  all entries but running statistics <- w^t;  w_k <- local steps on L_k
    server:       w^{t+1} <- sum_k p_k w_k   scale and shift included
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
class SiloBN(Strategy):
    """FedAvg in which running statistics stay at their site.

    Exchanges: 1 per step or 1 per round. `sync: step` equals pooled training in which
    each site's batch passes alone through the common normalisation layers and every
    site has running statistics of its own.

    Leaves the site:
        Weights: shared entries, scale and shift included, no running statistics.
        Gradient: every trainable entry.
    Kept by the site:
        Running mean, variance and counter of every normalisation layer.

    Differs from the source:
        None. An unseen site re-estimates its statistics on its own unlabelled images,
        as the paper proposes.
    """

    paper: ClassVar[str] = "Andreux et al., DART 2020, arXiv:2008.07424"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: shared entries without running statistics",
        "Gradient: trainable entries",
    )
    kept_by_site: ClassVar = ("running mean, variance and counter of normalisation",)
    keeps: ClassVar = ("norm_statistics",)

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Average the sites' gradients and take the server's optimiser step."""
        replies = yield cohort.ask(self.gradient, weights=server.shared, index=index)
        return stepped(server, replies, self.weights_of(cohort))

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average the sites' weights, running statistics excepted."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        return merged(server, replies, self.weights_of(cohort))

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Gradient of the site's loss on its batch number `index` of the round."""
        return local_gradient(site, weights, index)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received weights and the site's own statistics."""
        return local_training(site, weights)
