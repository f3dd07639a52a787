"""Joint (DeepAll): all data pooled, one network. Simulation only."""

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
from fedmed.training.local import OPTIMIZER, train_here, trained_outcome


@dataclass(frozen=True)
class Joint(Strategy):
    """One network trained on the pooled data of all sites.

    The cohort is a single virtual site that draws the same number of examples from
    every hospital at each step; a step sees as many examples per site as a federated
    step does. Impossible in a deployment, and refused there.

    Exchanges: 1 per round, with the virtual site.

    Leaves the site:
        Weights: every entry, from the virtual site.
    Kept by the site:
        The optimiser's memory, which runs on over rounds.

    Differs from the source:
        None (baseline Joint of Liu et al., MS-Net, IEEE TMI 2020, table 1, and DeepAll
        of Liu, Dou, Heng, SAML, MICCAI 2020, table 1).
    """

    paper: ClassVar[str] = "baseline; row Joint of Liu et al., IEEE TMI 2020"
    exchanges: ClassVar = {"round": 1}
    leaves_site: ClassVar = ("Weights: every entry, from the virtual pooled site",)
    kept_by_site: ClassVar = ("the optimiser's memory",)
    syncs: ClassVar = ("round",)
    pools_data: ClassVar[bool] = True

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Train on the pool for a round."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        (reply,) = replies.values()
        return server.with_shared(reply.state)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Ordinary training on mixed batches, the optimiser running on."""
        model, result = train_here(site, weights)
        return trained_outcome(site, model, result, keep={OPTIMIZER: result.memory})
