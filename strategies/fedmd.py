r"""FedMD. Li, Wang, FedMD: Heterogenous Federated Learning via Model Distillation,
NeurIPS workshop 2019, arXiv:1910.03581, algorithm 1.

    before:   each site k trains f_k on its own data
    for each round t, with the public batches x of the round:
        communicate:  each site k:  f_k(x)
        aggregate:    server:       c <- mean_k f_k(x)
        digest:       each site k:  steps along lambda KL(softmax(c) || f_k(x))
        revisit:      each site k:  K local steps on L_k

A round here begins with digest and ends with communicate, so that one exchange is
enough: the consensus of round t is that of the networks as round t - 1 left them.
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.errors import ConfigError
from fedmed.losses.distillation import softened_kl
from fedmed.message import State
from fedmed.payload import PublicLogits
from fedmed.reduce import weighted_mean
from fedmed.replies import states_of
from fedmed.strategy import (
    Cohort,
    Outcome,
    Replies,
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    Sync,
    Weighting,
    at_site,
    check_constants,
)
from fedmed.training.local import OPTIMIZER, present, step_here, train_on
from fedmed.training.predict import evaluating
from fedmed.training.public import Statistics, learning

_CONSENSUS = "consensus"
_LARGEST = 6e4
"""Of a logit that travels in 16 bits."""

Wire = Literal["float32", "float16", "uint8"]


@dataclass(frozen=True)
class FedMD(Strategy):
    r"""Hospitals teach each other on public images; no weight ever travels.

    Attributes:
        public_batches: Batches (`train.batch_size`) of public images each round, >= 1.
        digest_weight: lambda, >= 0; 0 makes it `separate`.
        digest_epochs: Passes over the round's public batches, >= 1.
        digest: "kl" to the softened consensus, or "mae" of the logits, as the
            reference's code.
        temperature: T > 0, "kl" only.
        statistics: Of batch normalisation while a network digests: "own" uses the
            site's and leaves them alone, as when it tells what it predicts; "public"
            uses those of the public batches, which the running ones follow.
        wire: "float16" or "float32" sends logits, "uint8" probabilities in steps of
            1/255.
        coarseness: Voxels along each axis whose mean logits are sent as one, >= 1.

    Exchanges: 1 per round.

    Leaves the site:
        PublicLogits: one number per class and voxel of the round's public images:
        public_batches x batch_size x classes x voxels / coarseness^dimensions numbers,
        each of 4 bytes (`float32`), 2 (`float16`) or 1 (`uint8`), whatever the site's
        own images are. Never a weight. As many numbers come back as the consensus, of 2
        bytes with `uint8`.
    Kept by the site:
        The whole network and the optimiser's memory, which runs on over rounds.

    Differs from the source:
        The public images have no labels, so nobody is trained on them beforehand. The
        networks have one architecture here. KL in place of the mean absolute error is
        the default, and logits are centred (minus their mean over the classes) before
        they are averaged: a softmax does not see the difference. With `uint8`,
        probabilities are averaged. Digesting starts with a fresh memory of the
        study's optimiser each round. The reference's code digests with `statistics:
        public`; its public images are like the private ones.
    """

    sync: Sync = "round"
    weighting: Weighting = "uniform"
    public_batches: int = 4
    digest_weight: float = 1.0
    digest_epochs: int = 1
    digest: Literal["kl", "mae"] = "kl"
    temperature: float = 1.0
    statistics: Statistics = "own"
    wire: Wire = "float16"
    coarseness: int = 1

    paper: ClassVar[str] = "Li & Wang, NeurIPS workshop 2019, arXiv:1910.03581"
    exchanges: ClassVar = {"round": 1}
    leaves_site: ClassVar = (
        "PublicLogits: predictions of the round's public images, 1 to 4 bytes a class "
        "and voxel",
    )
    kept_by_site: ClassVar = ("the whole network", "the optimiser's memory")
    syncs: ClassVar = ("round",)
    keeps: ClassVar = ("all",)
    needs_public: ClassVar[bool] = True
    copies_public: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the constants."""
        check_constants(
            self,
            ("public_batches", self.public_batches >= 1, ">= 1"),
            ("digest_weight", self.digest_weight >= 0, ">= 0"),
            ("digest_epochs", self.digest_epochs >= 1, ">= 1"),
            ("temperature", self.temperature > 0, "> 0"),
            ("coarseness", self.coarseness >= 1, ">= 1"),
            ("digest", not self._mixes_scales, "kl with wire: uint8"),
        )

    @property
    def _mixes_scales(self) -> bool:
        return self.digest == "mae" and self.wire == "uint8"

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Let the sites digest the last consensus, train, and say what they predict."""
        count = self.public_batches
        replies = yield cohort.ask(
            self.training,
            consensus=server.memory.get(_CONSENSUS, {}),
            digest_first=(cohort.round - 2) * count,
            tell_first=(cohort.round - 1) * count,
        )
        consensus = self._consensus(replies, self.weights_of(cohort))
        return server.remember(**{_CONSENSUS: consensus})

    def _consensus(self, replies: Replies, weights: Mapping[str, float]) -> State:
        """Average what the sites predict; as it travels back."""
        told = {
            site: {number: tensor.float() for number, tensor in state.items()}
            for site, state in states_of(replies, "state").items()
        }
        back = torch.float32 if self.wire == "float32" else torch.float16
        scale = 1 / 255 if self.wire == "uint8" else 1.0
        mean = weighted_mean(told, present(weights, replies))
        return {number: (scale * tensor).to(back) for number, tensor in mean.items()}

    @at_site
    def training(
        self, site: SiteContext, consensus: State, digest_first: int, tell_first: int
    ) -> Outcome:
        """Digest, revisit, communicate."""
        model = site.load({})
        if self.digest_weight and consensus:
            self._digest(site, model, consensus, digest_first)
        result = train_on(site, model)
        private = site.keep(model, **{OPTIMIZER: result.memory})
        told = self._told(site, model, tell_first) if self.digest_weight else {}
        payload = PublicLogits(site.num_examples, {"loss": result.loss}, told)
        return Outcome(payload, private)

    def _digest(
        self, site: SiteContext, model: nn.Module, consensus: State, first: int
    ) -> None:
        """Take steps towards the consensus, in place."""
        memory: State = {}
        for epoch in range(self.digest_epochs):
            batches = site.public_batches(first, len(consensus))
            for index, batch in enumerate(batches):
                with learning(model, self.statistics):
                    logits, _ = site.trainer.logits(model, batch)
                loss = self._distance(logits, consensus[str(index)])
                site.trainer.require_finite(float(loss.detach()))
                step_here(
                    site,
                    model,
                    self.digest_weight * loss,
                    index=epoch * len(consensus) + index,
                    memory=memory,
                )

    def _distance(self, logits_BL: Tensor, consensus_BL: Tensor) -> Tensor:
        """How far predictions are from the consensus."""
        own_BL = coarse(logits_BL, self.coarseness)
        goal_BL = consensus_BL.to(own_BL.device, torch.float32)
        if self.digest == "mae":
            return (centred(own_BL) - goal_BL).abs().mean()
        if self.wire == "uint8":
            # Less than half a step of what travels, where all sites said 0.
            goal_BL = goal_BL.clamp(min=1e-3).log()
        return softened_kl(own_BL, goal_BL, temperature=self.temperature)

    def _told(self, site: SiteContext, model: nn.Module, first: int) -> State:
        """What the network predicts for the round's public images, as it travels."""
        told = {}
        with torch.no_grad(), evaluating(model):
            batches = site.public_batches(first, self.public_batches)
            for index, batch in enumerate(batches):
                logits, _ = site.trainer.logits(model, batch)
                told[str(index)] = self._encoded(coarse(logits, self.coarseness)).cpu()
        return told

    def _encoded(self, logits_BL: Tensor) -> Tensor:
        if self.wire == "uint8":
            return (255 * logits_BL.float().softmax(dim=1)).round().to(torch.uint8)
        centred_BL = centred(logits_BL)
        if self.wire == "float32":
            return centred_BL
        return centred_BL.clamp(-_LARGEST, _LARGEST).half()


def centred(logits_BL: Tensor) -> Tensor:
    """Logits in float32, whose mean over the classes is 0 in every voxel.

    Example:
        >>> centred(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.,  1.]])
    """
    logits_BL = logits_BL.float()
    return logits_BL - logits_BL.mean(dim=1, keepdim=True)


def coarse(logits_BL: Tensor, factor: int) -> Tensor:
    """Average blocks of voxels, what is left at the far ends among themselves.

    Args:
        logits_BL: (B, L), (B, L, I, J) or (B, L, I, J, K).
        factor: Voxels along each axis of a block; 1 changes nothing.

    Raises:
        ConfigError: If there are no voxels to average.

    Example:
        >>> coarse(torch.tensor([[[[1.0, 3.0, 5.0]]]]), 2)
        tensor([[[[2., 5.]]]])
    """
    if factor == 1:
        return logits_BL
    pools = {4: functional.avg_pool2d, 5: functional.avg_pool3d}
    pool = pools.get(logits_BL.dim())
    if pool is None:
        raise ConfigError(
            f"strategy.coarseness is {factor}, and a case has one prediction, no voxels"
        )
    found: Tensor = pool(logits_BL, factor, ceil_mode=True)
    return found
