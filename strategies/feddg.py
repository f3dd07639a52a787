r"""FedDG (ELCFS). Liu, Chen, Qin, Dou, Heng, FedDG: Federated Domain Generalization on
Medical Image Segmentation via Episodic Learning in Continuous Frequency Space, CVPR
2021, arXiv:2103.06030.

    once:        site k tells how its images' low-frequency amplitudes A_k are spread
    each site k, each local step, with A_n drawn from another site and lambda ~ U(0, 1):
        x'    <- image with amplitude A_x (1-M) + (1-lambda) A_x M + lambda A_n M,
                 and the phase of x; M marks the low frequencies
        w'    <- w - alpha clamp(grad L(x; w), -c, c)
        total <- L(x; w) + L(x'; w') + gamma L_boundary(h(x; w), h(x'; w'))
        w     <- optimiser step along grad total                        (first order)
    server:      w <- sum_k (n_k / n) w_k
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.errors import ConfigError
from fedmed.losses.boundary_contrast import boundary_embeddings, nt_xent
from fedmed.losses.known_voxels import at_least_float32
from fedmed.losses.metric import Labelled
from fedmed.message import SiteId, State
from fedmed.networks.metric_network import HEAD, features_before_head
from fedmed.optimizer import clip, memory_like, step_in_place
from fedmed.payload import AmplitudeStatistic, Weights
from fedmed.replies import states_of
from fedmed.strategy import (
    Cohort,
    Exchange,
    Outcome,
    Replies,
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    at_site,
    check_constants,
    check_images,
)
from fedmed.training.amplitude import every_image
from fedmed.training.coupled import captured
from fedmed.training.examples import Batch
from fedmed.training.local import (
    OPTIMIZER,
    gradient_outcome,
    merged,
    optimizer_at,
    stepped,
)
from fedmed.training.pooled import PooledTraining
from fedmed.training.statistic_bank import banked, banked_sites
from fedmed.training.styles import (
    Bank,
    restyled,
    styles_of_others,
    told_styles,
)
from fedmed.training.trainer import TrainingBatch, trainable

if TYPE_CHECKING:
    from fedmed.task import Task

_BANK = "amplitude_bank"
_STYLE = "style"

Forward = Callable[[Mapping[str, Tensor], TrainingBatch], tuple[Tensor, Tensor, Tensor]]
"""From weights and a batch to logits, labels, and the features before the head."""


@dataclass(frozen=True)
class FedDG(Strategy):
    """Learn at each hospital as if its scans came from the others' scanners.

    Attributes:
        band: L, in [0, 1/2): floor(L min(I, J)) frequencies each way are exchanged, at
            least 1 unless L = 0, which is the mean intensity alone.
        interpolation: Largest lambda, in [0, 1]. 0 leaves images as they are.
        inner_lr: alpha >= 0, step size of the inner step.
        clamp: c > 0, largest absolute VALUE of an entry of the inner gradient.
        outer_weight: Of the loss on the changed image at w', >= 0. Published: 1. With
            `outer_weight: 0, boundary_weight: 0` this is FedAvg, bit for bit.
        boundary_weight: gamma >= 0. The fundus code's 0.1.
        temperature: Of the boundary contrast, > 0.
        bank: What a site tells once: mean and covariance of the logarithm of its
            amplitudes ("distribution"), or those of single examples ("examples").
        bank_share: Share of the examples that "examples" tells, in (0, 1].

    Exchanges: 1 per step or 1 per round, as FedAvg; and 1 before the first of them, or
    before the first in which a new site takes part.

    Leaves the site:
        AmplitudeStatistic: once. D = C ((2b + 1)^2 + 1) / 2 numbers describe one image
        of C channels: 25 a channel at 384 pixels. "distribution": D + D^2 numbers,
        whatever the number of cases. "examples": D numbers for each told example. Of
        images as training draws them, augmented if the study says so. No
        phase, no other amplitude. It tells which scanner a site has, by construction;
        the server passes it on to the other sites, without names.
        Weights: every shared entry after local training; size of the model.
        Gradient: every trainable entry; size of the model. Normalisation statistics.
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`). Embeddings,
        masks and changed images are never sent.

    Differs from the source:
        Paper's eq. (2) in the author's corrected form. The released loader exchanges
        one coefficient (L = 0) whole (lambda = 1); here L = 0.01 and lambda ~ U(0, 1).
        It ships whole amplitude maps of single images; here the centre only, and by
        default its distribution, from which hospitals draw (cut at 2 deviations).
        Values are not clipped to 0..255. Classes exclude one another (softmax); each
        has its own contrast, of labels equal to it. Contours and rings that are empty
        in a slice are left out; the reference divides by zero there. Site weights are
        not rounded. The network is the study's: published is a U-Net with instance
        normalisation without affine part; running statistics, if there are any, see
        both images.
    """

    band: float = 0.01
    interpolation: float = 1.0
    inner_lr: float = 1e-3
    clamp: float = 100.0
    outer_weight: float = 1.0
    boundary_weight: float = 0.1
    temperature: float = 0.05
    bank: Bank = "distribution"
    bank_share: float = 0.125

    paper: ClassVar[str] = "Liu et al., CVPR 2021, arXiv:2103.06030"
    exchanges: ClassVar = {"step": 1, "round": 1}
    first_round_exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "AmplitudeStatistic: once, mean and covariance of low-frequency amplitudes "
        "(bank: examples: those of some examples)",
        "Weights: shared entries after local training",
        "Gradient: trainable entries and normalisation statistics",
    )

    def __post_init__(self) -> None:
        """Check the constants."""
        check_constants(
            self,
            ("band", 0 <= self.band < 0.5, "in [0, 1/2)"),
            ("interpolation", 0 <= self.interpolation <= 1, "in [0, 1]"),
            ("inner_lr", self.inner_lr >= 0, ">= 0"),
            ("clamp", self.clamp > 0, "> 0"),
            ("outer_weight", self.outer_weight >= 0, ">= 0"),
            ("boundary_weight", self.boundary_weight >= 0, ">= 0"),
            ("temperature", self.temperature > 0, "> 0"),
            ("bank_share", 0 < self.bank_share <= 1, "in (0, 1]"),
        )

    def check_task(self, task: Task, batch_size: int) -> None:
        """Refuse a table, and labels without a boundary."""
        del batch_size
        if self._uses_styles:
            check_images(task, "exchanges amplitudes of")
        if task.kind == "classification" and self.boundary_weight:
            raise ConfigError(
                "strategy.boundary_weight is above 0, and images with one class each "
                "have no boundary",
                hint="Set strategy.boundary_weight: 0.",
            )

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Average the gradients of the sites' episodes."""
        if index == 0:
            server = yield from self._with_bank(server, cohort)
        replies = yield self._asked(
            server, cohort, self.gradient, weights=server.shared, index=index
        )
        return stepped(server, replies, self.weights_of(cohort))

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average the weights after local episodes."""
        server = yield from self._with_bank(server, cohort)
        replies = yield self._asked(
            server, cohort, self.training, weights=server.shared
        )
        return merged(server, replies, self.weights_of(cohort))

    def _with_bank(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Ask sites that have not told their amplitudes yet, once in a round."""
        bank = server.memory.get(_BANK, {})
        missing = [s for s in cohort.site_ids if s not in banked_sites(bank)]
        if not missing or not self._uses_styles:
            return server
        told: Replies = yield cohort.select(tuple(missing)).ask(self.amplitudes)
        new = {
            f"{site}|{name}": tensor
            for site, state in states_of(told, "state").items()
            for name, tensor in state.items()
        }
        return server.remember(**{_BANK: {**bank, **new}})

    @property
    def _uses_styles(self) -> bool:
        return self.interpolation > 0 and not self._is_fedavg

    @property
    def _is_fedavg(self) -> bool:
        return not (self.outer_weight or self.boundary_weight)

    def _asked(
        self,
        server: Server,
        cohort: Cohort,
        action: Callable[..., Outcome],
        **content: Any,
    ) -> Exchange:
        """Ask for training, with the other sites' banks."""
        weights = self.weights_of(cohort)
        bank = server.memory.get(_BANK, {})
        known = {
            site: banked(bank, site)
            for site in banked_sites(bank)
            if weights.get(site, 1.0) > 0
        }
        by_site = {s: {"styles": styles_of_others(known, s)} for s in cohort.site_ids}
        return cohort.ask(action, by_site=by_site, **content)

    @at_site
    def amplitudes(self, site: SiteContext) -> Outcome:
        """Tell how the low-frequency amplitudes of the training images are spread."""
        images = every_image(lambda n: site.batches(0, n), site.num_examples)
        state, count = self.told(images)
        return Outcome(
            AmplitudeStatistic(site.num_examples, state=state, min_count=count)
        )

    def told(self, images: Iterable[Tensor]) -> tuple[State, int]:
        """What leaves a site of its images, and how many are behind each number."""
        return told_styles(
            images, band=self.band, bank=self.bank, share=self.bank_share
        )

    @at_site
    def gradient(
        self, site: SiteContext, weights: State, styles: State, index: int
    ) -> Outcome:
        """Gradient of one episode on the site's batch number `index`."""
        model = site.load(weights)
        (batch,) = site.batches(index, 1)
        gradient, loss = self._gradient(site, model, batch, index, styles=styles)
        return gradient_outcome(site, model, gradient, index=index, loss=loss)

    @at_site
    def training(self, site: SiteContext, weights: State, styles: State) -> Outcome:
        """Local steps along the gradients of episodes."""
        model = site.load(weights)
        named = trainable(model)
        memory = memory_like(site.private.states.get(OPTIMIZER, {}), named)
        losses = []
        for index, batch in enumerate(site.batches(0, site.steps)):
            gradient, loss = self._gradient(site, model, batch, index, styles=styles)
            gradient = clip(gradient, site.trainer.clip_norm)
            step_in_place(named, gradient, optimizer_at(site, index), memory)
            losses.append(loss)
        payload = Weights(
            num_examples=site.num_examples,
            values={"loss": sum(losses) / len(losses), "steps": len(losses)},
            state=site.shared_of(model),
        )
        kept = {OPTIMIZER: memory} if site.keeps_optimizer else {}
        return Outcome(payload, site.keep(model, **kept))

    def _gradient(
        self,
        site: SiteContext,
        model: nn.Module,
        batch: TrainingBatch,
        index: int,
        *,
        styles: State,
    ) -> tuple[State, float]:
        """Gradient of an episode's total, and the loss on the image as it is."""

        def forward(
            weights: Mapping[str, Tensor], batch: TrainingBatch
        ) -> tuple[Tensor, Tensor, Tensor]:
            def network(images: Tensor, site: SiteId) -> Tensor:
                return _called(model, weights, images, site)

            with captured(model, _layers(model)) as outputs:
                logits, labels = site.trainer.logits(network, batch)
            return logits, labels, outputs.get(f"{HEAD}/input", logits)

        changed = self._restyled(batch, styles, site.draws(_STYLE, index))
        total, own = self.objective(
            forward, trainable(model), batch, changed, loss=site.trainer.loss
        )
        value = float(own.detach())
        site.trainer.require_finite(value)
        return site.trainer.gradient_of(model, total), value

    def _restyled(
        self, batch: TrainingBatch, styles: State, draws: AbstractContextManager[None]
    ) -> Batch:
        if not self._uses_styles:
            return Batch(batch.images, batch.labels)
        images = restyled(
            batch.images, styles, interpolation=self.interpolation, draws=draws
        )
        return Batch(images, batch.labels)

    def objective(
        self,
        forward: Forward,
        named: Mapping[str, Tensor],
        batch: TrainingBatch,
        changed: TrainingBatch,
        *,
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Total of one episode, and its first term.

        Args:
            forward: Of the network, at given weights.
            named: The weights w, by name.
            batch: Images x.
            changed: Images x'.
            loss: The study's.
        """
        logits, labels, features = forward(named, batch)
        own = loss(logits, labels)
        if self._is_fedavg:
            return own, own
        gradient = torch.autograd.grad(
            own, list(named.values()), retain_graph=True, allow_unused=True
        )
        ahead = {
            name: w
            if g is None
            else w - self.inner_lr * g.clamp(-self.clamp, self.clamp)
            for (name, w), g in zip(named.items(), gradient, strict=True)
        }
        new_logits, _, new_features = forward(ahead, changed)
        total = own + self.outer_weight * loss(new_logits, labels)
        if self.boundary_weight:
            contrast = self.boundary(features, new_features, labels, logits.shape[1])
            total = total + self.boundary_weight * contrast
        return total, own

    def boundary(
        self,
        features_BF: Tensor,
        new_features_BF: Tensor,
        labels_B: Tensor,
        num_classes: int,
    ) -> Tensor:
        """Contrast of contours and rings, of both images, summed over the classes."""
        pair = [_fitted(f, labels_B) for f in (features_BF, new_features_BF)]
        terms = []
        for label in range(1, num_classes):
            first, other = (boundary_embeddings(f, labels_B, label=label) for f in pair)
            together = Labelled(
                torch.cat((first.vectors_NF, other.vectors_NF)),
                torch.cat((first.labels_N, other.labels_N)),
            )
            terms.append(nt_xent(together, temperature=self.temperature))
        return torch.stack(terms).sum()

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """The weighted mean of all sites' episodes, in one process."""
        bank = self._pooled_bank(pool)
        pool.forget_gradients()
        terms = []
        for site, batch in sorted(pool.batches(index).items()):
            model = pool.models[site]
            assert pool.draws is not None
            changed = self._restyled(
                batch, styles_of_others(bank, site), pool.draws(site, _STYLE, index)
            )
            total, _ = self.objective(
                _pooled_forward(model, site),
                dict(model.named_parameters()),
                batch,
                changed,
                loss=pool.loss,
            )
            terms.append(pool.weights[site] * total)
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        pool.optimizer.step()

    def _pooled_bank(self, pool: PooledTraining) -> dict[SiteId, State]:
        assert pool.cohort is not None
        return {
            member.site_id: self.told(
                every_image(
                    lambda n, site=member.site_id: (  # type: ignore[misc]
                        pool.batches(i)[site] for i in range(n)
                    ),
                    member.num_examples,
                )
            )[0]
            for member in pool.cohort.members
        }


def _called(
    model: nn.Module, weights: Mapping[str, Tensor], images: Tensor, site: SiteId
) -> Tensor:
    logits: Tensor = torch.func.functional_call(
        model, dict(weights), (images,), {"site": site}
    )
    return logits


def _layers(model: nn.Module) -> tuple[str, ...]:
    features_before_head(model)
    return (HEAD,)


def _pooled_forward(model: nn.Module, site: SiteId) -> Forward:
    def forward(
        weights: Mapping[str, Tensor], batch: TrainingBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen: list[Tensor] = []
        head = model.get_submodule(HEAD)
        handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        logits = _called(model, weights, batch.images, site)
        handle.remove()
        return logits, batch.labels, seen[0]

    return forward


def _fitted(features_BF: Tensor, labels_B: Tensor) -> Tensor:
    """Features at the labels' resolution: padding cut off, coarse ones magnified."""
    size, found = labels_B.shape[1:], features_BF.shape[2:]
    features_BF = at_least_float32(features_BF)
    if any(have < need for have, need in zip(found, size, strict=True)):
        mode = "bilinear" if len(size) == 2 else "trilinear"
        return functional.interpolate(features_BF, size=size, mode=mode)
    for axis, need in enumerate(size, start=2):
        features_BF = features_BF.narrow(axis, 0, need)
    return features_BF
