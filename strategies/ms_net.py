r"""MS-Net. Liu, Dou, Yu, Heng, MS-Net: Multi-Site Network for Improving Prostate
Segmentation with Heterogeneous MRI Data, IEEE TMI 39(9), 2020, arXiv:2002.03366.

    shared: kernels of encoder E and universal decoder U
    kept by site k: normalisation of E and U; auxiliary decoder A_k, whole
    for each step t, one batch (x_k, y_k) per site:
        A)  L_aux = sum_k  Dice(A_k(E(x_k)), y_k)
            E, A_k        <- Adam (grad L_aux)
        if t >= warm-up:
        B)  yhat_k = argmax A_k(E(x_k))                # hard labels, no gradient
            L_uni = sum_k  1/2 Dice(U(E(x_k)), y_k) + 1/2 Dice(U(E(x_k)), yhat_k)
            E, U          <- Adam'(grad L_uni)         # E as A left it
    prediction: U(E(x)) with the normalisation of the site
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedmed.errors import ConfigError
from fedmed.losses.distillation import hard_labels
from fedmed.message import State
from fedmed.networks.with_auxiliary import WithAuxiliary
from fedmed.optimizer import memory_like
from fedmed.payload import Weights
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
    gradient_outcome,
    merged,
    share_of,
    step_here,
    stepped,
)
from fedmed.training.pooled import PooledTraining
from fedmed.training.trainer import TrainingBatch, trainable

AUXILIARY = "auxiliary_optimizer"
UNIVERSAL = "universal_optimizer"
"""Names of the two optimisers' memories, at the server and at the sites."""

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MSNet(Strategy):
    """Per-site normalisation, and an auxiliary decoder per site that teaches at home.

    Attributes:
        warmup_steps: Steps over all rounds before step B begins. Published: 500 of
            50,000.
        label_weight: Of the universal network's loss at the labels. Published: 0.5.
        kd_weight: Of its loss at the auxiliary's hard labels. Published: 0.5. With 0,
            step B does not run the auxiliary.
        auxiliary_weight: Of the auxiliary's loss. Published: 1. With 0 there is no
            step A and no exchange for it.

    The loss is the study's (`train.loss`; published: dice_linear), for all three
    terms. Sites' losses are added up, not averaged. With `auxiliary_weight: 0,
    kd_weight: 0, label_weight: 1` this is DSBN, bit for bit; `kd_weight: 0` alone is
    not, because the auxiliaries' losses move the encoder.

    Exchanges: 2 per step (1 during the warm-up), or 1 per round. `sync: step` equals
    the pooled method. The second exchange is needed because step B starts from the
    encoder that step A has moved. `sync: round` runs the whole schedule at the sites
    with two optimisers of their own, and averages kernels with equal weights.

    Leaves the site:
        Gradient: of the encoder's kernels (A); of all shared kernels (B).
        Weights: all shared kernels.
        With the published network (`residual_unet`, base 32): 12,571,488 and
        17,272,224 numbers. No logits, no pseudo-labels, nothing of an auxiliary.
    Kept by the site:
        Normalisation, whole (9,920 scales and shifts, 9,920 running values); the
        auxiliary decoder and head, whole (4,704,640 trainable values, 3,904 running
        values); with `sync: step` the memories of both optimisers for them.

    A site that fails between A and B: its gradient of step A stays in the encoder,
    step B is the sum over the other sites, and what it kept in this round is dropped.

    Differs from the source:
        Follows the reference code where the paper leaves it open: hard labels, two
        Adam, the encoder moved by both, no cross-entropy, no weight decay. As there,
        the auxiliary is run in step B in training mode, on the universal network's
        features, so that running statistics of encoder and auxiliary are updated twice
        per step and those of the universal decoder once. Auxiliaries start equal at
        all sites, from a draw of their own. Voxels without a label have no
        pseudo-label either. What the publication does to images before they come here
        is the study's: its random shifts, and the choice of slices that show an organ,
        are not in `studies/ms_net_prostate.yaml`.
    """

    weighting: Weighting = "uniform"
    warmup_steps: int = 0
    label_weight: float | int = 0.5
    kd_weight: float | int = 0.5
    auxiliary_weight: float | int = 1.0

    paper: ClassVar[str] = "Liu et al., IEEE TMI 39(9), 2020, arXiv:2002.03366"
    exchanges: ClassVar = {"step": 2, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Gradient: kernels of the encoder, then all shared kernels",
        "Weights: all shared kernels",
    )
    kept_by_site: ClassVar = (
        "every entry of every normalisation layer",
        "its auxiliary decoder and head",
    )
    keeps: ClassVar = ("norm", "auxiliary")
    training_only: ClassVar = ("auxiliary",)
    published_model: ClassVar[dict[str, Any]] = {
        "name": "residual_unet",
        "preset": "paper",
        "slices": 3,
    }

    def __post_init__(self) -> None:
        """Check the constants."""
        seen = {
            "warmup_steps": self.warmup_steps,
            "label_weight": self.label_weight,
            "kd_weight": self.kd_weight,
            "auxiliary_weight": self.auxiliary_weight,
        }
        for name, value in seen.items():
            if not value >= 0:
                raise ConfigError(f"strategy.{name} must be >= 0 (seen: {value})")
        if not self.label_weight + self.kd_weight:
            raise ConfigError(
                "strategy.label_weight and strategy.kd_weight are both 0",
                hint="The universal network needs at least one loss.",
            )

    def network(self, build: Callable[..., nn.Module]) -> nn.Module:
        """The study's network, and a second decoder and head on its encoder."""
        return WithAuxiliary(build(), build(draw="auxiliary"))

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Step A on the encoder, then step B on everything shared."""
        weights = self.weights_of(cohort)
        parts = share_of(weights, total=True)
        if self.auxiliary_weight:
            replies = yield cohort.ask(
                self.auxiliary,
                encoder=_encoder(server),
                index=index,
                by_site=parts,
            )
            server = stepped(server, replies, weights, total=True, memory=AUXILIARY)
        if server.step < self.warmup_steps:
            return server
        replies = yield cohort.ask(
            self.universal, weights=server.shared, index=index, by_site=parts
        )
        return stepped(server, replies, weights, total=True, memory=UNIVERSAL)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average the kernels after local steps A and B."""
        replies = yield cohort.ask(self.training, weights=server.shared)
        return merged(server, replies, self.weights_of(cohort))

    @at_site
    def auxiliary(
        self, site: SiteContext, encoder: State, index: int, share: float
    ) -> Outcome:
        """Step A: gradient of the encoder's kernels; the site's own parts move here."""
        model = site.load({**_blank(site), **encoder})
        (batch,) = site.batches(index, 1)
        objective = self._auxiliary_objective(site, model, batch)
        return _answer(site, model, objective, index, share=share, memory=AUXILIARY)

    @at_site
    def universal(
        self, site: SiteContext, weights: State, index: int, share: float
    ) -> Outcome:
        """Step B: gradient of all shared kernels, at the encoder as A left it."""
        model = site.load(weights)
        (batch,) = site.batches(index, 1)
        objective = self._universal_objective(site, model, batch)
        return _answer(site, model, objective, index, share=share, memory=UNIVERSAL)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps A and B with the site's own two optimisers."""
        model = site.load(weights)
        named = trainable(model)
        memories = {
            name: memory_like(site.private.states.get(name, {}), named)
            for name in (AUXILIARY, UNIVERSAL)
        }
        losses = []
        for index, batch in enumerate(site.batches(0, site.steps)):
            objective = None
            if self.auxiliary_weight:
                objective = self._auxiliary_objective(site, model, batch)
                step_here(
                    site, model, objective, index=index, memory=memories[AUXILIARY]
                )
            if site.first_step + index >= self.warmup_steps:
                objective = self._universal_objective(site, model, batch)
                step_here(
                    site, model, objective, index=index, memory=memories[UNIVERSAL]
                )
            losses += [] if objective is None else [objective.detach()]
        loss = float(torch.stack(losses).double().mean()) if losses else 0.0
        site.trainer.require_finite(loss)
        payload = Weights(
            num_examples=site.num_examples,
            values={"loss": loss, "steps": site.steps},
            state=site.shared_of(model),
        )
        kept = {n: m for n, m in memories.items() if m and site.keeps_optimizer}
        return Outcome(payload, site.keep(model, **kept))

    def _auxiliary_objective(
        self, site: SiteContext, model: nn.Module, batch: TrainingBatch
    ) -> Tensor:
        assert isinstance(model, WithAuxiliary)
        logits, labels = site.trainer.logits(model.auxiliary_logits, batch)
        return self.auxiliary_weight * site.trainer.loss(logits, labels)

    def _universal_objective(
        self, site: SiteContext, model: nn.Module, batch: TrainingBatch
    ) -> Tensor:
        assert isinstance(model, WithAuxiliary)
        if not self.kd_weight:
            logits, labels = site.trainer.logits(model, batch)
            return self.label_weight * site.trainer.loss(logits, labels)
        (logits, teacher), labels = site.trainer.logits(model.both, batch)
        return self.universal_loss(logits, teacher, labels, loss=site.trainer.loss)

    def universal_loss(
        self, logits_BL: Tensor, auxiliary_BL: Tensor, labels_B: Tensor, *, loss: Loss
    ) -> Tensor:
        """Loss of step B at one site: at the labels, and at the auxiliary's labels.

        Args:
            logits_BL: Of the universal network, (B, L, ...).
            auxiliary_BL: Of the auxiliary, likewise; no gradient flows into it.
            labels_B: (B, ...).
            loss: The study's.
        """
        pseudo_B = hard_labels(auxiliary_BL, labels_B)
        at_labels = self.label_weight * loss(logits_BL, labels_B)
        return at_labels + self.kd_weight * loss(logits_BL, pseudo_B)

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """Steps A and B with two optimisers over all networks."""
        if self.auxiliary_weight:
            self._pooled_phase(pool, index, AUXILIARY)
        if index >= self.warmup_steps:
            self._pooled_phase(pool, index, UNIVERSAL)

    def _pooled_phase(self, pool: PooledTraining, index: int, phase: str) -> None:
        pool.forget_gradients()
        terms = []
        for site, batch in sorted(pool.batches(index).items()):
            model = pool.models[site]
            assert isinstance(model, WithAuxiliary)
            if phase == AUXILIARY:
                logits = model.auxiliary_logits(batch.images, site=site)
                term = self.auxiliary_weight * pool.loss(logits, batch.labels)
            elif self.kd_weight:
                pair = model.both(batch.images, site=site)
                term = self.universal_loss(*pair, batch.labels, loss=pool.loss)
            else:
                logits = model(batch.images, site=site)
                term = self.label_weight * pool.loss(logits, batch.labels)
            terms.append(pool.shares[site] * term)
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        pool.optimizer_of(phase).step()


def _encoder(server: Server) -> State:
    """What step A needs of what is shared."""
    return {
        e.name: server.shared[e.name]
        for e in server.entries
        if e.part == "encoder" and e.name in server.shared
    }


def _blank(site: SiteContext) -> State:
    """Zeros for the shared entries that step A does not use and is not sent."""
    shared = set(site.partition.shared)
    return {
        e.name: torch.zeros((), dtype=e.dtype).expand(e.shape)
        for e in site.partition.entries
        if e.name in shared and e.part != "encoder"
    }


def _answer(
    site: SiteContext,
    model: nn.Module,
    objective: Tensor,
    index: int,
    *,
    share: float,
    memory: str,
) -> Outcome:
    loss = float(objective.detach())
    site.trainer.require_finite(loss)
    gradient = site.trainer.gradient_of(model, objective)
    return gradient_outcome(
        site, model, gradient, index=index, loss=loss, share=share, memory=memory
    )
