r"""Latent regularisation in the manner of LatReg: Aslani et al., Scanner Invariant
Multiple Sclerosis Lesion Segmentation from MRI, ISBI 2020.

With z the deepest features averaged over all positions, and R a classifier of K sites:

    R        <- optimiser step along grad mean_k CE(R(z), k)                   z fixed
    network  <- optimiser step along
                grad mean_k [ L_k + lambda(t) CE(uniform over K, R(z)) ]       R fixed
    lambda(t) = latent_weight * min(1, t / (ramp * T))         of T steps in all
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.errors import ConfigError
from fedmed.message import SiteId, State
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
    Weighting,
    at_site,
    check_constants,
)
from fedmed.training.coupled import captured
from fedmed.training.latent import latent_vectors, latent_width
from fedmed.training.local import (
    OPTIMIZER,
    gradient_outcome,
    merged,
    present,
    trained_outcome,
)
from fedmed.training.pooled import PooledTraining

SITE_CLASSIFIER = "site_classifier"
"""The part of the network that is R, its optimiser's memory, and its gradient's name
beside weights."""
_NUMBERS = "site_numbers"


@dataclass(frozen=True)
class LatReg(Strategy):
    r"""Train features from which nobody can tell the hospital.

    Attributes:
        latent_weight: lambda at its full height, >= 0. 0 is federated averaging of the
            network, bit for bit; R is trained all the same.
        ramp: Share of the run over which lambda grows from 0, in [0, 1]; with
            `sync: round` it grows from round to round. 0 = at once.
        layer: Module of the network whose output is averaged to z; of a tuple, the
            last.
        hidden_width: Width of R's one hidden layer.
        max_sites: Most training sites that R can tell apart; outputs without a site
            take no part.

    Exchanges: 1 per step or round. R belongs to the server. In `sync: step` sites send
    its gradient with the network's, and both take a step, equal to the pooled method.
    A hospital has one label k only, and would train R to say nothing else; in
    `sync: round` R is therefore frozen at the sites, and takes one step per round along
    the mean of its gradient over the round's batches.

    Leaves the site:
        Gradient: every trainable entry and normalisation statistics, R's among them
        (hidden_width F + hidden_width max_sites weights for F features; a mean over
        the batch: of a batch of one, that example's z can be computed from it).
        Weights: shared entries after local training; extra "site_classifier": the
        gradient of R.
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`).

    Differs from the source:
        The source's regularisation network and loss are not known here beyond their
        purpose: a site classifier and domain confusion (Tzeng et al., Simultaneous
        Deep Transfer Across Domains and Tasks, ICCV 2015, arXiv:1510.02192) stand in
        for them. The network is the study's.
    """

    weighting: Weighting = "uniform"
    latent_weight: float = 0.1
    ramp: float = 1 / 3
    layer: str = "encoder"
    hidden_width: int = 128
    max_sites: int = 16

    paper: ClassVar[str] = "in the manner of Aslani et al., ISBI 2020"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Gradient: trainable entries, the site classifier's too, and normalisation "
        "statistics",
        "Weights: shared entries after local training, and the gradient of the site "
        "classifier",
    )
    training_only: ClassVar = (SITE_CLASSIFIER,)

    def __post_init__(self) -> None:
        """Check the constants."""
        check_constants(
            self,
            ("latent_weight", self.latent_weight >= 0, ">= 0"),
            ("ramp", 0 <= self.ramp <= 1, "in [0, 1]"),
            ("hidden_width", self.hidden_width >= 1, ">= 1"),
            ("max_sites", self.max_sites >= 2, ">= 2"),
        )

    def network(self, build: Callable[..., nn.Module]) -> nn.Module:
        """The study's network, and R, which its forward does not use."""
        model = build()
        classifier = nn.Sequential(
            nn.Linear(latent_width(model, self.layer), self.hidden_width),
            nn.ReLU(),
            nn.Linear(self.hidden_width, self.max_sites),
        )
        drawn = build(module=classifier, draw=SITE_CLASSIFIER)
        model.add_module(SITE_CLASSIFIER, drawn)
        return model

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Average both gradients; network and R take a step each."""
        server = self._numbered(server, cohort)
        replies = yield cohort.ask(
            self.gradient,
            weights=server.shared,
            index=index,
            pull=self._pull(cohort, index),
            num_sites=cohort.num_sites,
            by_site=_numbers(server, cohort),
        )
        weights = present(self.weights_of(cohort), replies)
        gradient = weighted_mean(states_of(replies, "state"), weights)
        own = {name: g for name, g in gradient.items() if _is_of_classifier(name)}
        rest = {name: g for name, g in gradient.items() if name not in own}
        server = server.descend(rest).descend(own, memory=SITE_CLASSIFIER)
        statistics = server.merge_buffers(states_of(replies, "buffers"), weights)
        return server.with_shared(statistics)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average weights that were trained against R; then R takes a step."""
        server = self._numbered(server, cohort)
        replies: Replies = yield cohort.ask(
            self.training,
            weights=server.shared,
            pull=self._pull(cohort, 0),
            num_sites=cohort.num_sites,
            by_site=_numbers(server, cohort),
        )
        weights = self.weights_of(cohort)
        before = {n: w for n, w in server.shared.items() if _is_of_classifier(n)}
        # The mean of equal numbers may differ from them in the last bit.
        server = merged(server, replies, weights).with_shared(before)
        gradient = weighted_mean(
            states_of(replies, f"extra/{SITE_CLASSIFIER}"), present(weights, replies)
        )
        return server.descend(gradient, memory=SITE_CLASSIFIER)

    def _numbered(self, server: Server, cohort: Cohort) -> Server:
        """Give every site that was not met before the next number.

        Raises:
            ConfigError: If there are more sites than R has outputs.
        """
        if cohort.num_sites > self.max_sites:
            raise ConfigError(
                f"strategy.max_sites is {self.max_sites}, and {cohort.num_sites} sites "
                "train",
                hint=f"Set strategy.max_sites: {cohort.num_sites} or more.",
            )
        known = dict(server.memory.get(_NUMBERS, {}))
        for site in cohort.site_ids:
            known.setdefault(site, torch.tensor(len(known)))
        return server.remember(**{_NUMBERS: known})

    def _pull(self, cohort: Cohort, index: int) -> float:
        """Lambda at a step of a round."""
        whole = self.ramp * cohort.num_rounds * cohort.steps
        done = (cohort.round - 1) * cohort.steps + index
        return self.latent_weight * (min(1.0, done / whole) if whole else 1.0)

    @at_site
    def gradient(
        self,
        site: SiteContext,
        weights: State,
        index: int,
        *,
        pull: float,
        num_sites: int,
        number: int,
    ) -> Outcome:
        """Gradient of the network and of R on one batch."""
        model = site.load(weights)
        (batch,) = site.batches(index, 1)
        with captured(model, (self.layer,)) as outputs:
            task = site.trainer.forward(model, batch)
            vectors_BF = latent_vectors(outputs[self.layer])
        loss = float(task.detach())
        site.trainer.require_finite(loss)
        objective = task + self._recognition(model, vectors_BF, number, num_sites)
        if pull:
            confusion = self._confusion(model, vectors_BF, num_sites)
            objective = objective + pull * confusion
        gradient = site.trainer.gradient_of(model, objective)
        return gradient_outcome(site, model, gradient, index=index, loss=loss)

    @at_site
    def training(
        self,
        site: SiteContext,
        weights: State,
        *,
        pull: float,
        num_sites: int,
        number: int,
    ) -> Outcome:
        """Local steps against R as it came, and R's mean gradient on the way."""
        model = site.load(weights)
        named = {
            name: p for name, p in model.named_parameters() if _is_of_classifier(name)
        }
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        with captured(model, (self.layer,)) as outputs:

            def coupling(model: nn.Module) -> Tensor:
                vectors_BF = latent_vectors(outputs[self.layer])
                loss = self._recognition(model, vectors_BF, number, num_sites)
                found = torch.autograd.grad(loss, list(named.values()))
                for name, g in zip(named, found, strict=True):
                    total[name] += g / site.steps
                if not pull:
                    return torch.zeros_like(loss)
                return pull * self._confusion(model, vectors_BF, num_sites)

            result = site.trainer.train(
                model,
                site.batches(0, site.steps),
                memory=dict(site.private.states.get(OPTIMIZER, {})),
                penalty=coupling,
                first_step=site.first_step,
            )
        extra = {SITE_CLASSIFIER: {name: g.cpu() for name, g in total.items()}}
        return trained_outcome(site, model, result, extra=extra)

    def _recognition(
        self, model: nn.Module, vectors_BF: Tensor, number: int, num_sites: int
    ) -> Tensor:
        """CE(R(z), k): what R minimises; z is fixed."""
        classifier = model.get_submodule(SITE_CLASSIFIER)
        logits_BS = _site_logits(classifier, {}, vectors_BF.detach(), num_sites)
        labels_B = torch.full((len(logits_BS),), number, device=logits_BS.device)
        return functional.cross_entropy(logits_BS, labels_B)

    def _confusion(
        self, model: nn.Module, vectors_BF: Tensor, num_sites: int
    ) -> Tensor:
        """CE(uniform, R(z)): what the network minimises; R is fixed."""
        classifier = model.get_submodule(SITE_CLASSIFIER)
        frozen = {name: p.detach() for name, p in classifier.named_parameters()}
        logits_BS = _site_logits(classifier, frozen, vectors_BF, num_sites)
        return -functional.log_softmax(logits_BS, dim=1).mean()

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """Both losses over all sites' batches, R's and the network's steps in one."""
        assert pool.cohort is not None
        pool.forget_gradients()
        count, pull = pool.cohort.num_sites, self._pull(pool.cohort, index)
        terms = []
        for number, (site, batch) in enumerate(sorted(pool.batches(index).items())):
            model = pool.models[site]
            with captured(model, (self.layer,)) as outputs:
                logits = model(batch.images, site=site)
            vectors_BF = latent_vectors(outputs[self.layer])
            term = pool.loss(logits, batch.labels)
            term = term + self._recognition(model, vectors_BF, number, count)
            term = term + pull * self._confusion(model, vectors_BF, count)
            terms.append(pool.weights[site] * term)
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        pool.optimizer.step()


def _site_logits(
    classifier: nn.Module,
    entries: Mapping[str, Tensor],
    vectors_BF: Tensor,
    num_sites: int,
) -> Tensor:
    """R's outputs (B, S) of the sites there are."""
    first = next(classifier.parameters())
    inputs = vectors_BF.to(first.dtype)
    logits_BS: Tensor = torch.func.functional_call(classifier, dict(entries), (inputs,))
    return logits_BS[:, :num_sites]


def _is_of_classifier(name: str) -> bool:
    return name.startswith(f"{SITE_CLASSIFIER}.")


def _numbers(server: Server, cohort: Cohort) -> dict[SiteId, dict[str, Any]]:
    known = server.memory[_NUMBERS]
    return {site: {"number": int(known[site])} for site in cohort.site_ids}
