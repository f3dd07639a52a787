r"""Dual-Stream. Valindria et al., Multi-modal Learning from Unpaired Images:
Application to Multi-organ Segmentation in CT and MRI, WACV 2018, section 3; a row of
Liu et al., MS-Net, IEEE TMI 39(9), 2020, arXiv:2002.03366, table 1.

    shared:          the deepest levels of the encoder, the first of the decoder
    kept by site k:  streams of its own above them: the upper levels of the encoder,
                     the last levels of the decoder, the head
    each step:  L = mean_k loss(f(x_k), y_k);   all <- SGD or Adam(grad L)
"""  # noqa: D205

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fedmed.errors import ConfigError
from fedmed.message import State
from fedmed.partition import StatePartition
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
class DualStream(Strategy):
    """A trunk for all sites in the middle of the network, own streams at both ends.

    Attributes:
        shared_encoder_levels: How many of the deepest levels of the encoder are
            shared. None: two, but never the uppermost level.
        shared_decoder_levels: How many of the first (deepest) levels of the decoder
            are shared; the head is the site's unless all are. None: one, but never
            the last level.

    Of the published network's five and four levels the default shares encoder levels 4
    and 5 and decoder level 1 (X shape). `shared_encoder_levels: 0` with all levels of
    the decoder is a Y with separate encoders; all of the encoder with
    `shared_decoder_levels: 0` one with separate decoders.

    Exchanges: 1 per step or 1 per round. `sync: step` equals the pooled method in
    which each site's batch passes the trunk by itself.

    Leaves the site:
        Gradient: of the trunk, its normalisation included, and its statistics.
        Weights: the trunk.
        Published network: 15,637,504 trainable numbers and 7,168 running values.
    Kept by the site:
        Every entry of its streams (published network: 1,644,640 trainable numbers,
        2,752 running values), and with `sync: step` the optimiser's memory of them.

    Differs from the source:
        The network is the study's, with a trunk of its own depth; where MS-Net's
        comparison cut its network is not published. Sites count alike;
        `weighting: examples` changes that. A site that never trained would start from
        streams that nobody trained: hold none out.
    """

    weighting: Weighting = "uniform"
    shared_encoder_levels: int | None = None
    shared_decoder_levels: int | None = None

    paper: ClassVar[str] = "Valindria et al., WACV 2018"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Gradient: trainable entries of the trunk, and its normalisation statistics",
        "Weights: every entry of the trunk",
    )
    kept_by_site: ClassVar = (
        "upper levels of the encoder, last levels of the decoder, and the head",
    )
    published_model: ClassVar[dict[str, Any]] = {
        "name": "residual_unet",
        "preset": "paper",
        "slices": 3,
    }

    def partition(self, model: nn.Module) -> StatePartition:
        """Divide at the levels; the rest of encoder and decoder is the site's."""
        encoder, decoder = num_levels(model)
        deep = _asked("encoder", self.shared_encoder_levels, encoder, usual=2)
        first = _asked("decoder", self.shared_decoder_levels, decoder, usual=1)
        kept = [f"encoder.levels.{level}" for level in range(encoder - deep)]
        # Level 0 of both is the uppermost: the decoder's is the last.
        own = range(decoder - first)
        kept += [f"decoder.{what}.{level}" for level in own for what in _WAY_UP]
        if own or not decoder:
            kept.append("head")
        return StatePartition.of(model, kept)

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
        """Average the sites' trunks after local training."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        return merged(server, replies, self.weights_of(cohort))

    @at_site
    def gradient(
        self, site: SiteContext, weights: State, index: int, share: float
    ) -> Outcome:
        """Shared gradient out; the site's streams take their step here."""
        return local_gradient(site, weights, index, share)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received weights and what the site keeps."""
        return local_training(site, weights)


_WAY_UP = ("up", "levels")


def num_levels(model: nn.Module) -> tuple[int, int]:
    """Count the levels of a network's encoder and decoder.

    Raises:
        ConfigError: If the network is not one of levels, with head.
    """
    places = ("encoder.levels", "decoder.levels", "decoder.up", "head")
    modules = dict(model.named_modules())
    if any(place not in modules for place in places):
        raise ConfigError(
            f"dual_stream needs a network with the modules {', '.join(places)}; "
            f"{type(model).__name__} has not all of them",
            hint="Set model.name: unet, residual_unet or unet_3d_pairs.",
        )
    return (
        len(list(modules["encoder.levels"].children())),
        len(list(modules["decoder.levels"].children())),
    )


def _asked(part: str, asked: int | None, levels: int, *, usual: int) -> int:
    if asked is None:
        return max(0, min(usual, levels - 1))
    if not 0 <= asked <= levels:
        raise ConfigError(
            f"strategy.shared_{part}_levels must be in 0 to {levels}, the levels of "
            f"the {part} (seen: {asked})"
        )
    return asked
