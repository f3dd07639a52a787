"""Separate (Intra-site): one model per site, nothing shared. The deck's first row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmed.payload import Weights
from fedmed.strategy import (
    Cohort,
    Outcome,
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    at_site,
)
from fedmed.training.local import OPTIMIZER, train_here
from fedmed.training.pooled import PooledTraining, pooled_gradient


@dataclass(frozen=True)
class Separate(Strategy):
    """Every site trains alone, with the same network, budget and metrics.

    Exchanges: 1 per round, without any weights on the wire. `sync: step` is the same
    training: nothing couples the sites.

    Leaves the site:
        Weights: no entry at all, only the training loss.
    Kept by the site:
        The whole network and the optimiser's memory, which runs on over rounds as in
        training without a federation.

    Differs from the source:
        None (baseline of Liu et al., MS-Net, IEEE TMI 2020, table 1).
    """

    paper: ClassVar[str] = "baseline; row Separate of Liu et al., IEEE TMI 2020"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = ("Weights: no entry, only the training loss",)
    kept_by_site: ClassVar = ("the whole network", "the optimiser's memory")
    keeps: ClassVar = ("all",)

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Let every site take one step of its own."""
        yield cohort.ask(self.training, first=index, count=1)
        return server

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Let every site train for a round."""
        yield cohort.ask(self.training)
        return server

    @at_site
    def training(
        self, site: SiteContext, first: int = 0, count: int | None = None
    ) -> Outcome:
        """Local steps from where this site stopped, with the optimiser running on."""
        model, result = train_here(site, {}, first=first, count=count)
        payload = Weights(site.num_examples, {"loss": result.loss})
        return Outcome(payload, site.keep(model, **{OPTIMIZER: result.memory}))

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """Independent trainings: each site's loss counts in full."""
        pool.weights = dict.fromkeys(pool.models, 1.0)
        pooled_gradient(pool, index)
        pool.optimizer.step()
