"""Strategies whose replies are statistics of classes, or parts of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedmed.message import State
from fedmed.payload import ClassStatistic, Gradient
from fedmed.strategy import (
    Cohort,
    Outcome,
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    at_site,
)
from fedmed.training.local import local_gradient

NUM_CLASSES = 2


@dataclass(frozen=True)
class Counting(Strategy):
    """Asks for counts; the sites named in `wide` send one class too many."""

    wide: tuple[str, ...] = ()
    paper: ClassVar[str] = "none"
    exchanges: ClassVar = {"round": 1}
    leaves_site: ClassVar = ("ClassStatistic: counts",)
    syncs: ClassVar = ("round",)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        ask = cohort.ask(self.count, wide=list(self.wide))
        replies = yield ask.expecting({"counts": (NUM_CLASSES,)})
        return server.remember(
            counts={site: reply.state["counts"] for site, reply in replies.items()}
        )

    @at_site
    def count(self, site: SiteContext, wide: list[str]) -> Outcome:
        (batch,) = site.batches(0, 1)
        size = NUM_CLASSES + (site.site_id in wide)
        counts = torch.bincount(batch.labels.reshape(-1), minlength=size)
        state = {"counts": counts.double()}
        return Outcome(ClassStatistic(num_examples=len(batch.labels), state=state))


@dataclass(frozen=True)
class InParts(Strategy):
    """The first site sends the gradient of biases, the others that of the rest."""

    declared: bool = True
    paper: ClassVar[str] = "none"
    exchanges: ClassVar = {"step": 1}
    leaves_site: ClassVar = ("Gradient: some entries",)
    syncs: ClassVar = ("step",)

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        ask = cohort.ask(self.part, weights=server.shared, index=index)
        replies = yield ask.expecting(alike=False) if self.declared else ask
        first = replies[cohort.site_ids[0]].state
        second = replies[cohort.site_ids[1]].state
        return server.descend({**first, **second})

    @at_site
    def part(self, site: SiteContext, weights: State, index: int) -> Outcome:
        payload = local_gradient(site, weights, index).payload
        assert isinstance(payload, Gradient)
        wants_bias = site.site_id == "a"
        part = {
            n: t for n, t in payload.state.items() if n.endswith("bias") == wants_bias
        }
        return Outcome(Gradient(num_examples=payload.num_examples, state=part))
