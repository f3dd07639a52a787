r"""FedBN. Li, Jiang, Zhang, Kamp, Dou, FedBN: Federated Learning on Non-IID Features
via Local Batch Normalization, ICLR 2021, arXiv:2102.07623, algorithm 1.

    each site k:  all entries but normalisation <- w^t;  w_k <- local steps on L_k
    server:       w^{t+1} <- sum_k p_k w_k   without any normalisation entry
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
    Weighting,
    at_site,
)
from fedmed.training.local import (
    local_gradient,
    local_training,
    merged,
    share_of,
    stepped,
)


@dataclass(frozen=True)
class FedBN(Strategy):
    """FedAvg in which every normalisation entry stays at its site.

    Exchanges: 1 per step or 1 per round. `sync: step` equals pooled training with
    domain-specific batch normalisation (DSBN).

    Leaves the site:
        Weights: shared entries, without normalisation.
        Gradient: trainable shared entries, without normalisation.
    Kept by the site:
        Scale, shift, running mean, variance and counter of every normalisation layer,
        and with `sync: step` the optimiser memory of scale and shift.

    Differs from the source:
        Layers are found by module type, not by "bn" in a name. An unseen site starts
        from initial scale and shift and re-estimates its statistics on its own
        unlabelled images (AdaBN).
    """

    weighting: Weighting = "uniform"

    paper: ClassVar[str] = "Li et al., ICLR 2021, arXiv:2102.07623"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: shared entries without normalisation",
        "Gradient: trainable shared entries without normalisation",
    )
    kept_by_site: ClassVar = ("every entry of every normalisation layer",)
    keeps: ClassVar = ("norm",)

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Average the sites' gradients and take the server's optimiser step."""
        weights = self.weights_of(cohort)
        replies = yield cohort.ask(
            self.gradient,
            weights=server.shared,
            index=index,
            by_site=share_of(weights),
        )
        return stepped(server, replies, weights)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average the sites' weights, normalisation excepted."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        return merged(server, replies, self.weights_of(cohort))

    @at_site
    def gradient(
        self, site: SiteContext, weights: State, index: int, share: float
    ) -> Outcome:
        """Shared gradient out; the site's own normalisation takes its step here."""
        return local_gradient(site, weights, index, share)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received weights and the site's own normalisation."""
        return local_training(site, weights)
