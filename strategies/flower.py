"""Any aggregator of `flwr.serverapp.strategy`, named `flwr:<Name>` in a study.

The local training is FedAvg's; what differs is how the server combines the weights:
`flwr:FedTrimmedAvg`, `flwr:FedMedian`, `flwr:Krum` and so on, unmodified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedmed.flower.aggregate import TrainRound, aggregate_with_flower, make_strategy
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
from fedmed.training.local import local_training, merged

_MEMORY = "flower"


@dataclass(frozen=True)
class Flower(Strategy):
    """A plain train round, aggregated by a strategy of Flower's.

    Attributes:
        aggregator: Name of the class in `flwr.serverapp.strategy`.
        options: Its arguments; in a study they stand beside `name`.

    Exchanges: 1 per round.

    Leaves the site:
        Weights: every shared entry after local training; size of the model.

    Differs from the source:
        Replies go in sorted order of the sites. Running statistics are merged, not
        aggregated.
    """

    aggregator: str = "FedAvg"
    options: Mapping[str, Any] = field(default_factory=dict)

    paper: ClassVar[str] = "Flower, flwr.serverapp.strategy; see the named class"
    exchanges: ClassVar = {"round": 1}
    leaves_site: ClassVar = ("Weights: shared entries after local training",)
    syncs: ClassVar = ("round",)

    def __post_init__(self) -> None:
        """Check the name and the options."""
        make_strategy(self.aggregator, self.options)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Let Flower's strategy combine the weights after local training."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        weights = self.weights_of(cohort)
        # Running statistics are no directions: Adam's step would make variances
        # negative. They are merged by the law of total variance, as everywhere.
        target = merged(server, replies, weights)
        initial = server.trainable()
        train_round = TrainRound(
            number=cohort.round,
            initial=initial,
            replies={
                site: ({name: reply.state[name] for name in initial}, weights[site])
                for site, reply in replies.items()
            },
            losses={s: float(r.values["loss"]) for s, r in replies.items()},
        )
        combined = aggregate_with_flower(
            self.aggregator,
            self.options,
            train_round,
            memory=dict(server.memory.get(_MEMORY, {})),
        )
        return target.with_shared(combined.state).remember(**{_MEMORY: combined.memory})

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received weights."""
        return local_training(site, weights)
