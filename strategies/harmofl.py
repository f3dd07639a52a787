r"""HarmoFL. Jiang, Wang, Dou, HarmoFL: Harmonizing Local and Global Drifts in Federated
Learning on Heterogeneous Medical Images, AAAI 2022, arXiv:2112.10775, algorithm 1.

    network:     images first get the reference amplitude A at low frequencies, phases
                 stay
    round 1:     site k uses its own running mean, A_k <- (1-m) A_k + m mean(batch)
                 server: A <- mean_k A_k, fixed from then on
    each site k, each local step:
        delta <- alpha grad L_k(w) / || grad L_k(w) ||
        w     <- optimiser step from w along grad L_k(w + delta)
    server:      w <- mean_k w_k
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fedmed.message import SiteId, State
from fedmed.networks.amplitude_normalisation import (
    AMPLITUDE,
    REFERENCE,
    normalise_amplitude,
)
from fedmed.optimizer import clip, memory_like, step_in_place, sum_of_squares
from fedmed.payload import (
    AMPLITUDE_STATISTIC,
    AmplitudeStatistic,
    Gradient,
    Weights,
    expect,
)
from fedmed.reduce import weighted_mean
from fedmed.replies import states_of
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
    check_images,
)
from fedmed.training.amplitude import amplitude_centre, every_image
from fedmed.training.local import (
    OPTIMIZER,
    gradient_outcome,
    merged,
    optimizer_at,
    present,
    stepped,
)
from fedmed.training.pooled import PooledTraining, functional_loss
from fedmed.training.trainer import TrainingBatch, trainable

if TYPE_CHECKING:
    from fedmed.task import Task


@dataclass(frozen=True)
class HarmoFL(Strategy):
    """Make images of all hospitals alike, and look for flat minima at each.

    Attributes:
        alpha: Length of the perturbation of the weights, >= 0. 0 takes one pass per
            step instead of two.
        normalise: Whether amplitudes are normalised. With `normalise: false, alpha: 0`
            this is FedAvg, bit for bit.
        half_width: b: (2b + 1)^2 amplitudes a channel are normalised; 3 is 1 % of 384
            pixels. 0 is the mean intensity alone.
        momentum: m of the running mean in (0, 1].

    The loss is the study's; published: half of cross_entropy + dice_linear.

    Exchanges: 1 per step or 1 per round, as FedAvg. With `sync: step` there are no
    local steps in which a running mean could form: sites tell their mean amplitude in
    one exchange before the first step.

    Leaves the site:
        AmplitudeStatistic: once; the mean amplitude centre, C (2b + 1)^2 numbers for
        images of C channels, with the weights of round 1 (`sync: step`: before the
        first step), of images as training draws them, augmented if the study says so.
        It is merged once and never averaged again.
        Weights: every shared entry but the reference, after local training; size of
        the model.
        Gradient: at the perturbed weights, every trainable entry; normalisation
        statistics.
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`).

    Differs from the source:
        The released code passes m = 0.1 as an integer, which makes the reference the
        first batch's mean, and replaces one coefficient (L = 0), so that normalising
        sets each image's mean; here both are as the paper says. It sends whole
        amplitude maps, here the centre travels. Its normalisation layers always use
        the batch's statistics, so that predictions depend on what else is in a batch:
        here running statistics are used, and they are those of the pass at w. It
        divides slices, not patients, into train and test, and averages Dice over the
        background too: here division and scores are the study's. The transform runs on
        the network's device.
    """

    weighting: Weighting = "uniform"
    alpha: float = 0.05
    normalise: bool = True
    half_width: int = 3
    momentum: float = 0.1

    paper: ClassVar[str] = "Jiang et al., AAAI 2022, arXiv:2112.10775"
    exchanges: ClassVar = {"step": 1, "round": 1}
    first_round_exchanges: ClassVar = {"step": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "AmplitudeStatistic: once, the mean low-frequency amplitude; in sync: round "
        "beside the weights",
        "Weights: shared entries but the amplitude's reference",
        "Gradient: at perturbed weights, and normalisation statistics",
    )
    published_model: ClassVar[dict[str, Any]] = {
        "name": "unet",
        "base_width": 32,
        "levels": 5,
        "slices": 3,
        "norm_affine": False,
    }

    def __post_init__(self) -> None:
        """Check the constants."""
        check_constants(
            self,
            ("alpha", self.alpha >= 0, ">= 0"),
            ("half_width", self.half_width >= 0, ">= 0"),
            ("momentum", 0 < self.momentum <= 1, "in (0, 1]"),
        )

    def check_task(self, task: Task, batch_size: int) -> None:
        """Refuse a table, which has no amplitudes."""
        del batch_size
        if self.normalise:
            check_images(task, "normalises amplitudes of")

    def network(self, build: Callable[..., nn.Module]) -> nn.Module:
        """The study's network behind a normalisation of amplitudes."""
        network = build()
        if not self.normalise:
            return network
        return normalise_amplitude(network, half_width=self.half_width)

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Average gradients at perturbed weights; first settle the reference."""
        weights = self.weights_of(cohort)
        if self._must_settle(server):
            told = yield cohort.ask(self.amplitudes)
            means = states_of(told, "state")
            server = server.with_shared(weighted_mean(means, present(weights, told)))
        replies = yield cohort.ask(self.gradient, weights=server.shared, index=index)
        return stepped(server, replies, weights)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average weights; after round 1 the reference too, and never again."""
        weights, settles = self.weights_of(cohort), self._must_settle(server)
        replies = yield cohort.ask(
            self.training, weights=server.shared, observes=settles
        )
        server = merged(server, replies, weights)
        if not settles:
            return server
        means = states_of(replies, f"extra/{AMPLITUDE_STATISTIC}")
        return server.with_shared(weighted_mean(means, present(weights, replies)))

    def _must_settle(self, server: Server) -> bool:
        return self.normalise and not bool((server.shared[REFERENCE] > 0).any())

    @at_site
    def amplitudes(self, site: SiteContext) -> Outcome:
        """Mean amplitude of the training images."""
        entry = next(e for e in site.partition.entries if e.name == REFERENCE)
        centres = [
            self._centre(image[None].to(entry.dtype))
            for image in every_image(lambda n: site.batches(0, n), site.num_examples)
        ]
        state = {REFERENCE: torch.stack(centres).mean(dim=0)}
        payload = AmplitudeStatistic(
            site.num_examples, state=state, min_count=len(centres)
        )
        return Outcome(payload)

    def _centre(self, images_BC: Tensor) -> Tensor:
        """Mean amplitude centre of some images, (C, n, n)."""
        return amplitude_centre(images_BC, self.half_width).mean(dim=0)

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Gradient at the perturbed weights, on batch number `index`."""
        model = site.load(weights)
        (batch,) = site.batches(index, 1)
        gradient, loss = self._gradient(site, model, batch)
        outcome = gradient_outcome(site, model, gradient, index=index, loss=loss)
        payload = expect(outcome.payload, Gradient)
        buffers = _without_reference(payload.buffers)
        return replace(outcome, payload=replace(payload, buffers=buffers))

    @at_site
    def training(self, site: SiteContext, weights: State, observes: bool) -> Outcome:
        """Local steps along gradients at perturbed weights."""
        model = site.load(weights)
        named = trainable(model)
        memory = memory_like(site.private.states.get(OPTIMIZER, {}), named)
        losses, num_seen = [], 0
        for index, batch in enumerate(site.batches(0, site.steps)):
            if observes:
                self._observe(model, batch, is_first=index == 0)
                # With m = 1 the running mean is the last batch's.
                num_seen *= self.momentum < 1
                num_seen += len(batch.images)
            gradient, loss = self._gradient(site, model, batch)
            gradient = clip(gradient, site.trainer.clip_norm)
            step_in_place(named, gradient, optimizer_at(site, index), memory)
            losses.append(loss)
        state, extra = site.shared_of(model), {}
        if observes:
            extra = {AMPLITUDE_STATISTIC: {REFERENCE: state[REFERENCE]}}
        payload = Weights(
            num_examples=site.num_examples,
            values={"loss": sum(losses) / len(losses), "steps": len(losses)},
            state=_without_reference(state),
            extra=extra,
            min_count=min(num_seen, site.num_examples),
        )
        kept = {OPTIMIZER: memory} if site.keeps_optimizer else {}
        return Outcome(payload, site.keep(model, **kept))

    def _observe(
        self, model: nn.Module, batch: TrainingBatch, *, is_first: bool
    ) -> None:
        """Let the site's own reference follow the batches."""
        reference = model.get_submodule(AMPLITUDE).get_buffer("reference")
        mean = self._centre(batch.images.to(reference))
        with torch.no_grad():
            reference.lerp_(mean, 1.0 if is_first else self.momentum)

    def _gradient(
        self, site: SiteContext, model: nn.Module, batch: TrainingBatch
    ) -> tuple[State, float]:
        """Gradient at w + delta, and the loss at w; the model is left at w."""
        gradient, loss = site.trainer.gradient(model, batch)
        norm = float(sum_of_squares(gradient).sqrt())
        if not self.alpha or not norm:
            return gradient, loss
        named = trainable(model)
        before = {name: named[name].detach().clone() for name in gradient}
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        with torch.no_grad():
            for name, g in gradient.items():
                named[name].add_(g, alpha=self.alpha / norm)
        perturbed, _ = site.trainer.gradient(model, batch)
        with torch.no_grad():
            for name, weight in before.items():
                named[name].copy_(weight)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        return perturbed, loss

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """The mean of all sites' gradients, each at its own perturbed weights."""
        if self.normalise and index == 0:
            _settle(pool, {s: self._pooled_mean(pool, s) for s in pool.models})
        named = dict(pool.model.named_parameters())
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        for site, batch in sorted(pool.batches(index).items()):
            loss = functional_loss(pool, site, batch, named)
            first = torch.autograd.grad(loss, list(named.values()))
            norm = torch.cat([g.reshape(-1) for g in first]).norm()
            ahead = {
                name: (p + self.alpha * g / norm).detach().requires_grad_()
                for (name, p), g in zip(named.items(), first, strict=True)
            }
            loss = functional_loss(pool, site, batch, ahead)
            second = torch.autograd.grad(loss, list(ahead.values()))
            for name, g in zip(named, second, strict=True):
                total[name] += pool.weights[site] * g
        for name, parameter in named.items():
            parameter.grad = total[name]
        pool.optimizer.step()

    def _pooled_mean(self, pool: PooledTraining, site: SiteId) -> Tensor:
        assert pool.cohort is not None
        images = every_image(
            lambda count: (pool.batches(i)[site] for i in range(count)),
            pool.cohort.num_examples[site],
        )
        return torch.stack([self._centre(image[None]) for image in images]).mean(dim=0)


def _settle(pool: PooledTraining, means: dict[SiteId, Tensor]) -> None:
    reference = torch.stack([pool.weights[s] * means[s] for s in sorted(means)]).sum(0)
    for network in pool.models.values():
        network.get_submodule(AMPLITUDE).get_buffer("reference").copy_(reference)


def _without_reference(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != REFERENCE}
