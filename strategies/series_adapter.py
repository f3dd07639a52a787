r"""Series adapters. Rebuffi, Bilen, Vedaldi, Learning multiple visual domains with
residual adapters, NeurIPS 2017, arXiv:1705.08045, section 3.1; a row of Liu et al.,
MS-Net, IEEE TMI 39(9), 2020, arXiv:2002.03366, table 1.

    shared: 3x3 kernels W;  kept by site k: BN_k, and per kernel V_k (1x1) and BN'_k
    every convolution, of an input a that site k normalised by BN_k:
        u = W * a,   out = u + V_k BN'_k(u)            V_k: c_out x c_out
    each step:  L = mean_k loss(f(x_k), y_k)
                W, V_k, BN_k, BN'_k <- SGD or Adam(grad L)
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
)
from fedmed.training.local import (
    local_gradient,
    local_training,
    merged,
    share_of,
    stepped,
)


@dataclass(frozen=True)
class SeriesAdapter(Strategy):
    """Shared kernels, each corrected by a 1x1 convolution behind it that is the site's.

    Adapters are put beside every convolution of the study's network whose kernel is
    larger than 1x1, transposed ones included. They start at zero, where the network is
    the shared one bit for bit.

    Exchanges: 1 per step or 1 per round. `sync: step` equals the pooled method.

    Leaves the site:
        Gradient: of the shared kernels. Published network: 17,272,224 numbers.
        Weights: the shared kernels.
    Kept by the site:
        Every normalisation layer and every adapter, whole (published network:
        9,920 scales and shifts outside of adapters, 1,931,848 numbers in them, 21,764
        running values), and with `sync: step` the optimiser's memory of both.

    Differs from the source:
        V_k maps c_out to c_out, as the equation needs (reference code of MS-Net: c_in
        to c_out, which fits where they are equal).
        The network is the study's. All sites train at once and the kernels are trained
        with the adapters, not before them. Sites count alike; `weighting: examples`
        changes that. A site that never trained starts from adapters at zero and
        re-estimates its normalisation statistics on its own unlabelled images.
    """

    weighting: Weighting = "uniform"

    paper: ClassVar[str] = "Rebuffi et al., NeurIPS 2017, arXiv:1705.08045"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Gradient: shared kernels, without normalisation and adapters",
        "Weights: shared kernels, without normalisation and adapters",
    )
    kept_by_site: ClassVar = (
        "every entry of every normalisation layer",
        "every entry of every adapter",
    )
    keeps: ClassVar = ("norm", "adapter")
    published_model: ClassVar[dict[str, Any]] = {
        "name": "residual_unet",
        "preset": "paper",
        "slices": 3,
    }

    def network(self, build: Callable[..., nn.Module]) -> nn.Module:
        """The study's network with series adapters."""
        return build(add="series_adapter")

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
        """Average the sites' kernels after local training."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        return merged(server, replies, self.weights_of(cohort))

    @at_site
    def gradient(
        self, site: SiteContext, weights: State, index: int, share: float
    ) -> Outcome:
        """Kernels' gradient out; what the site keeps takes its step here."""
        return local_gradient(site, weights, index, share)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received weights and what the site keeps."""
        return local_training(site, weights)
