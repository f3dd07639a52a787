r"""FedDF. Lin, Kong, Stich, Jaggi, Ensemble Distillation for Robust Model Fusion in
Federated Learning, NeurIPS 2020, arXiv:2006.07242, algorithm 1 (one architecture).

    each site k:      w_k <- w^t; K local steps on L_k
    server:           w <- sum_k (n_k / n) w_k
    public site:      for batches x_1 .. x_J of public images:
                          z_j <- mean_k f(x_j; w_k)
                          w <- Adam step along KL(softmax(z_j) || softmax(f(x_j; w)))
    server:           w^{t+1} <- w
"""  # noqa: D205

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedmed.losses.distillation import softened_kl
from fedmed.losses.known_voxels import at_least_float32
from fedmed.message import SiteId, State
from fedmed.optimizer import OptimizerSpec, clip, step_in_place
from fedmed.payload import Weights
from fedmed.replies import states_of
from fedmed.strategy import (
    Cohort,
    Outcome,
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    Sync,
    at_site,
    check_constants,
)
from fedmed.training.local import local_training, merged
from fedmed.training.predict import evaluating
from fedmed.training.public import Statistics, learning
from fedmed.training.trainer import TrainingBatch


@dataclass(frozen=True)
class FedDF(Strategy):
    r"""FedAvg, and then what all hospitals predict distilled into their average.

    Attributes:
        distillation_steps: J, steps on public images each round, >= 0. 0 makes it
            FedAvg.
        distillation_lr: Of Adam, > 0; its memory starts afresh each round.
        schedule: "cosine" lets it fall to 0 over the round's J steps.
        temperature: T > 0 of the softened predictions.
        statistics: Of batch normalisation while the average learns: "own" uses those
            that were merged and leaves them alone, as in evaluation; "public" uses
            those of the public batches, which the running ones follow.

    Exchanges: 2 per round: with the hospitals, then with the public site. The server of
    the paper distils; here no server opens an image, so the site that has the public
    images does it, a host like any other, usually run by the server's owner.

    Leaves the site:
        Weights: every shared entry after local training; size of the model. From the
        public site, the distilled ones. Each hospital's own weights travel on to the
        public site, as many as there are hospitals: sums of them alone would not do.
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`).

    Differs from the source:
        A fixed number of steps, not up to 10,000 until a validation score stands still.
        The published learning rate is 1e-3; Adam's first steps are as long as that in
        every weight, and few steps do not make good for them.
        Batch-norm running statistics of the average are merged by the law of total
        variance. The published method learns with `statistics: public`, on images like
        the clients'; after it a network is tuned to the scanner of the public images.
    """

    sync: Sync = "round"
    distillation_steps: int = 20
    distillation_lr: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    temperature: float = 1.0
    statistics: Statistics = "own"

    paper: ClassVar[str] = "Lin et al., NeurIPS 2020, arXiv:2006.07242"
    exchanges: ClassVar = {"round": 2}
    leaves_site: ClassVar = (
        "Weights: shared entries after local training; of the public site, distilled",
    )
    syncs: ClassVar = ("round",)
    needs_public: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the constants."""
        check_constants(
            self,
            ("distillation_steps", self.distillation_steps >= 0, ">= 0"),
            ("distillation_lr", self.distillation_lr > 0, "> 0"),
            ("temperature", self.temperature > 0, "> 0"),
        )

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average the sites' weights, then distil their predictions into the mean."""
        weights = self.weights_of(cohort)
        replies = yield cohort.ask(self.training, weights=server.shared)
        server = merged(server, replies, weights)
        if not self.distillation_steps:
            return server
        states = states_of(replies, "state")
        told = yield cohort.at_public().ask(
            self.distillation,
            weights=server.shared,
            teachers=side_by_side({s: states[s] for s in states if weights[s] > 0}),
            first=(cohort.round - 1) * self.distillation_steps,
        )
        (reply,) = told.values()
        return server.with_shared(reply.state)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received weights."""
        return local_training(site, weights)

    @at_site
    def distillation(
        self, site: SiteContext, weights: State, teachers: State, first: int
    ) -> Outcome:
        """At the public site: let the average learn what the ensemble predicts."""
        model = site.load(weights)
        ensemble = Ensemble(model, one_by_one(teachers), site)
        named = dict(model.named_parameters())
        memory: State = {}
        losses: list[float] = []
        batches = site.public_batches(first, self.distillation_steps)
        for index, batch in enumerate(batches):
            teacher = ensemble.logits(batch)
            with learning(model, self.statistics):
                student, _ = site.trainer.logits(model, batch)
            loss = softened_kl(student, teacher, temperature=self.temperature)
            losses.append(float(loss.detach()))
            site.trainer.require_finite(losses[-1])
            gradient = site.trainer.gradient_of(model, loss)
            gradient = clip(gradient, site.trainer.clip_norm)
            step_in_place(named, gradient, self._optimizer(index), memory)
        payload = Weights(
            num_examples=site.num_examples,
            values={"distillation_loss": sum(losses) / len(losses)},
            state=site.shared_of(model),
        )
        return Outcome(payload)

    def _optimizer(self, index: int) -> OptimizerSpec:
        """Adam as it is at a step of a round's distillation."""
        share = 1.0
        if self.schedule == "cosine":
            share = (1 + math.cos(math.pi * index / self.distillation_steps)) / 2
        return OptimizerSpec("adam", lr=self.distillation_lr * share)


class Ensemble:
    """Networks of one architecture that predict together.

    Args:
        model: The live network; its own entries stay as they are.
        states: All entries of each member.
        site: Where they predict.
    """

    def __init__(
        self, model: nn.Module, states: Sequence[State], site: SiteContext
    ) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._site = site
        self._states = [
            {name: tensor.to(device) for name, tensor in state.items()}
            for state in states
        ]

    def logits(self, batch: TrainingBatch) -> Tensor:
        """Mean of the members' logits, in evaluation mode, without gradient."""
        with torch.no_grad(), evaluating(self._model):
            told = [self._of(state, batch) for state in self._states]
        return torch.stack(told).mean(dim=0)

    def _of(self, state: State, batch: TrainingBatch) -> Tensor:
        def member(images: Tensor, **how: Any) -> Tensor:
            found: Tensor = torch.func.functional_call(
                self._model, dict(state), (images,), how
            )
            return found

        logits, _ = self._site.trainer.logits(member, batch)
        return at_least_float32(logits)


def side_by_side(states: Mapping[SiteId, State]) -> State:
    """Put the states of several sites into one, numbered in sorted order.

    Example:
        >>> list(side_by_side({"b": {"w": torch.ones(1)}, "a": {"w": torch.ones(1)}}))
        ['0/w', '1/w']
    """
    return {
        f"{number}/{name}": tensor
        for number, site in enumerate(sorted(states))
        for name, tensor in states[site].items()
    }


def one_by_one(state: State) -> list[State]:
    """Take apart what `side_by_side` put together."""
    found: dict[int, dict[str, Tensor]] = {}
    for path, tensor in state.items():
        number, _, name = path.partition("/")
        found.setdefault(int(number), {})[name] = tensor
    return [found[number] for number in sorted(found)]
