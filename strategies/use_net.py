r"""USE-Net. Rundo et al., USE-Net: incorporating Squeeze-and-Excitation blocks into
U-Net for prostate zonal segmentation of multi-institutional MRI datasets,
Neurocomputing 365, 2019, arXiv:1904.08254, section 3 (Enc-Dec USE-Net).

    after every block of encoder and decoder, with features x of c channels:
        g = sigmoid(W_2 relu(W_1 mean(x))),   x <- g * x     W_1: c/r x c, W_2: c x c/r
    each step:  L = mean_k loss(f(x_k; W), y_k);   W <- SGD or Adam(grad L)
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

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
    check_constants,
)
from fedmed.training.local import local_gradient, local_training, merged, stepped


@dataclass(frozen=True)
class USENet(Strategy):
    """One network for all sites, with gates that see what kind of image it is.

    The gates are put into the study's network: any of ours but `mlp`. All else is
    federated averaging.

    Attributes:
        reduction: r, at least 1. 16 as in MS-Net's comparison.
        least_hidden: Fewest hidden units of a gate, at least 1. Published: 1, in a
            network of 32 channels and more.

    Exchanges: 1 per step or 1 per round. `sync: step` equals the pooled method in
    which each site's batch passes by itself, so that normalisation does not mix sites.

    Leaves the site:
        Gradient: every entry, gates included, and normalisation statistics. Published
        network: 17,338,464 numbers, 56,320 of them in gates (54,528 with
        `least_hidden: 1`), and 9,920 running values.
        Weights: every entry.
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`).

    Differs from the source:
        The network is the study's, and its gates have eight hidden units at least: with
        the one or two that r = 16 leaves to a narrow layer, many never learn. Sites
        count alike, as in a pool that draws the same number of examples from each;
        `weighting: examples` changes that. Running statistics are merged by the law of
        total variance. In the published pool a batch mixes sites; here each site's is
        normalised by itself in training, and by what all have in common afterwards,
        which costs Dice where sites differ (docs/results.md, prostate).
    """

    weighting: Weighting = "uniform"
    reduction: int = 16
    least_hidden: int = 8

    paper: ClassVar[str] = "Rundo et al., Neurocomputing 2019, arXiv:1904.08254"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Gradient: trainable entries and normalisation statistics",
        "Weights: every entry after local training",
    )
    published_model: ClassVar[dict[str, Any]] = {
        "name": "residual_unet",
        "preset": "paper",
        "slices": 3,
    }

    def __post_init__(self) -> None:
        """Check the constants."""
        check_constants(
            self,
            ("reduction", self.reduction >= 1, ">= 1"),
            ("least_hidden", self.least_hidden >= 1, ">= 1"),
        )

    def network(self, build: Callable[..., nn.Module]) -> nn.Module:
        """The study's network with a gate after every block."""
        return build(
            add="squeeze",
            squeeze_reduction=self.reduction,
            squeeze_least_hidden=self.least_hidden,
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
