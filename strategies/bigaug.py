r"""BigAug. Zhang et al., Generalizing Deep Learning for Medical Image Segmentation to
Unseen Domains via Deep Stacked Transformation, IEEE TMI 39(7), 2020, arXiv:1906.03347.

    each site k, each example (x, y) of a batch:
        for T in blur, sharpen, noise, brightness, contrast, perturbation,
                 rotation, scale, elastic deformation:
            with probability p:  (x, y) <- T(x, y), its strength drawn uniformly
    otherwise FedAvg (sync: round) or pooled training (sync: step)
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from fedmed.message import State
from fedmed.strategy import (
    Cohort,
    Outcome,
    Server,
    ServerHalf,
    SiteContext,
    Strategy,
    at_site,
    check_images,
)
from fedmed.training.big_augmentation import BigAugmentation, big_augmented
from fedmed.training.examples import Batch
from fedmed.training.local import (
    OPTIMIZER,
    gradient_outcome,
    merged,
    stepped,
    trained_outcome,
)
from fedmed.training.pooled import PooledTraining

if TYPE_CHECKING:
    from fedmed.task import Task

_DRAWS = "big augmentation"


@dataclass(frozen=True)
class BigAug(Strategy):
    """FedAvg on examples that are changed strongly before each step.

    Attributes:
        probability: Of each of the nine changes, in [0, 1]. 0 is FedAvg, bit for bit.
        max_rotation_deg: Largest angle either way.
        max_deformation: Farthest that a point of the elastic deformation's grid moves,
            as a share of the image's shortest side.

    The other ranges are fixed, see `fedmed.training.big_augmentation`; they are for
    `preprocess.intensity: zscore`. What is drawn for an example is a function of the
    study's seed, the site, the round and the number of the batch. Augmentations of the
    study (`train.augmentation`) come before.

    Exchanges: 1 per step or 1 per round, as FedAvg; nothing is added to a message.

    Leaves the site:
        Weights: every shared entry after local training; size of the model.
        Gradient: every trainable entry; size of the model. Normalisation statistics.
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`).

    Differs from the source:
        Paper: one hospital's data; here all hospitals' (a row "DeepAll + BigAug"). The
        ranges are those of a public reimplementation, except the deformation's.
    """

    probability: float = 0.5
    max_rotation_deg: float = 20.0
    max_deformation: float = 0.04

    paper: ClassVar[str] = "Zhang et al., IEEE TMI 39(7), 2020, arXiv:1906.03347"
    exchanges: ClassVar = {"step": 1, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: shared entries after local training",
        "Gradient: trainable entries and normalisation statistics",
    )

    def __post_init__(self) -> None:
        """Check the constants."""
        self._settings()

    def _settings(self) -> BigAugmentation:
        limit = self.max_rotation_deg
        return BigAugmentation(
            probability=self.probability,
            rotate_deg=(-limit, limit),
            deform=(0.0, self.max_deformation),
        )

    def check_task(self, task: Task, batch_size: int) -> None:
        """Refuse a table."""
        del batch_size
        check_images(task, "changes")

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
        """Gradient of the site's loss on its changed batch number `index`."""
        model = site.load(weights)
        (batch,) = self._changed(site, index, 1)
        gradient, loss = site.trainer.gradient(model, batch)
        return gradient_outcome(site, model, gradient, index=index, loss=loss)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps on changed batches."""
        model = site.load(weights)
        result = site.trainer.train(
            model,
            self._changed(site, 0, site.steps),
            memory=dict(site.private.states.get(OPTIMIZER, {})),
            first_step=site.first_step,
        )
        return trained_outcome(site, model, result)

    def _changed(self, site: SiteContext, first: int, count: int) -> Iterator[Batch]:
        settings = self._settings()
        for index, batch in enumerate(site.batches(first, count), start=first):
            seed = _drawn_seed(site.draws(_DRAWS, index))
            yield big_augmented(batch, settings, seed=seed)

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """One step on all sites' changed batches."""
        assert pool.draws is not None
        pool.forget_gradients()
        terms = []
        for site, drawn in sorted(pool.batches(index).items()):
            seed = _drawn_seed(pool.draws(site, _DRAWS, index))
            batch = big_augmented(drawn, self._settings(), seed=seed)
            logits = pool.models[site](batch.images, site=site)
            terms.append(pool.weights[site] * pool.loss(logits, batch.labels))
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        pool.optimizer.step()


def _drawn_seed(draws: AbstractContextManager[None]) -> int:
    with draws:
        return int(torch.randint(2**62, ()).item())
