r"""DSBN, per-site normalisation. Chang, You, Seo, Kwak, Han, Domain-Specific Batch
Normalization for Unsupervised Domain Adaptation, CVPR 2019, arXiv:1906.03950, eq. (3);
row DSBN of Liu et al., MS-Net, IEEE TMI 39(9), 2020, arXiv:2002.03366, table 1.

    shared: every kernel W;  kept by site k: BN_k = (gamma, beta, mean, variance)_k
    for each step, one batch (x_k, y_k) per site:
        L = sum_k  loss(f(x_k; W, BN_k), y_k)
        W, BN_1...BN_K  <- Adam(grad L)
    prediction: f(x; W, BN_k) with the normalisation of the site
"""  # noqa: D205

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
from fedmed.training.pooled import PooledTraining, pooled_step


@dataclass(frozen=True)
class DSBN(Strategy):
    """All kernels shared, one whole set of normalisation per site.

    It keeps what FedBN keeps and differs in the sum: the pooled loss adds the sites'
    losses up, where FedBN averages them. With `sync: step` there is one optimiser for
    the kernels, at the server, and its steps are FedBN's with a learning rate as many
    times larger as there are sites (plain SGD; Adam does not notice). With
    `sync: round` it is FedBN bit for bit.

    Exchanges: 1 per step or 1 per round. `sync: step` equals the pooled method.

    Leaves the site:
        Gradient: of all kernels. Published network: 17,272,224 numbers.
        Weights: all kernels.
    Kept by the site:
        Scale, shift, running mean, variance and counter of every normalisation layer
        (published network: 9,920 scales and shifts, 9,920 running values), and with
        `sync: step` the optimiser's memory of scale and shift.

    Differs from the source:
        The site is named with each call and stored nowhere. No adaptation to an
        unlabelled domain (Chang et al., section 4), as in MS-Net's table. A site of
        more examples can be given more weight (`weighting: examples`); weights then
        add up to the number of sites. A site that never trained starts from initial
        scale and shift and re-estimates its statistics on its own unlabelled images.
    """

    weighting: Weighting = "uniform"

    paper: ClassVar[str] = "Chang et al., CVPR 2019, arXiv:1906.03950"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Gradient: all kernels, without normalisation",
        "Weights: all kernels, without normalisation",
    )
    kept_by_site: ClassVar = ("every entry of every normalisation layer",)
    keeps: ClassVar = ("norm",)
    published_model: ClassVar[dict[str, Any]] = {
        "name": "residual_unet",
        "preset": "paper",
        "slices": 3,
    }

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Add the sites' gradients up and take the server's optimiser step."""
        weights = self.weights_of(cohort)
        replies = yield cohort.ask(
            self.gradient,
            weights=server.shared,
            index=index,
            by_site=share_of(weights, total=True),
        )
        return stepped(server, replies, weights, total=True)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average the sites' kernels after local steps."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        return merged(server, replies, self.weights_of(cohort))

    @at_site
    def gradient(
        self, site: SiteContext, weights: State, index: int, share: float
    ) -> Outcome:
        """Gradient of the kernels out; the site's normalisation takes its step here."""
        return local_gradient(site, weights, index, share)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received kernels and the site's own normalisation."""
        return local_training(site, weights)

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """One step on the sum of the sites' losses."""
        pooled_step(replace(pool, weights=pool.shares), index)
