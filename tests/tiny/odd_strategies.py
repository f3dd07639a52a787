"""Strategies that are wrong on purpose: what the tests must catch."""

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
from fedmed.training.local import local_gradient, stepped


@dataclass(frozen=True)
class DoubledSite(Strategy):
    """Gradient averaging that counts one site twice, and still claims to be exact."""

    doubled: str = "b"

    paper: ClassVar[str] = "none"
    exchanges: ClassVar = {"step": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = ("Gradient: trainable entries",)
    syncs: ClassVar = ("step",)

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        replies = yield cohort.ask(self.gradient, weights=server.shared, index=index)
        weights = self.weights_of(cohort)
        return stepped(
            server, replies, {**weights, self.doubled: 2 * weights[self.doubled]}
        )

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        return local_gradient(site, weights, index)


@dataclass(frozen=True)
class OneBatchLate(Strategy):
    """Gradient averaging on the next step's batches."""

    paper: ClassVar[str] = "none"
    exchanges: ClassVar = {"step": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = ("Gradient: trainable entries",)
    syncs: ClassVar = ("step",)

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        replies = yield cohort.ask(
            self.gradient, weights=server.shared, index=index + 1
        )
        return stepped(server, replies, self.weights_of(cohort))

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        return local_gradient(site, weights, index)


NO_STRATEGY = 3
