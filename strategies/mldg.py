r"""MLDG. Li, Yang, Song, Hospedales, Learning to Generalize: Meta-Learning for Domain
Generalization, AAAI 2018, arXiv:1710.03463, algorithm 1.

    each step:  split the sites into meta-train S and meta-test V
                g  <- mean_{k in S} grad L_k(w)
                w' <- w - alpha g
                h  <- mean_{k in V} grad L_k(w')
                w  <- optimiser step along  g + beta h                  (first order)
                                            g + beta (I - alpha H_S) h  (second order)
"""  # noqa: D205

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedmed.episodes import Episode, check_groups, draw_episode, mean_over
from fedmed.errors import ConfigError
from fedmed.message import State
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
)
from fedmed.training.curvature import curvature_outcome
from fedmed.training.local import local_gradient, local_training
from fedmed.training.meta_update import along
from fedmed.training.pooled import PooledTraining
from fedmed.training.pooled_episode import mean_loss

_DRAWS = "episode"


@dataclass(frozen=True)
class MLDG(Strategy):
    r"""Train so that a step that helps some hospitals helps the others too.

    Attributes:
        inner_lr: alpha, step size of the inner step, >= 0. 0 makes both halves
            gradients at the same weights.
        beta: Weight of the meta-test term, >= 0. 0 is FedSGD on the meta-train sites.
        order: "first" ignores how the inner step depends on the weights, as most
            published code does; "second" is the exact gradient of
            $L_S(w) + \beta L_V(w - \alpha \nabla L_S(w))$.
        num_meta_train: Meta-train sites; None = all others.
        num_meta_test: Meta-test sites; None = a third, two at least of four or more.

    Exchanges: 2 per step (3 with `order: second`), 2 per round. With `sync: round`
    the meta-train sites take the round's local steps from w, the meta-test sites from
    w' = their mean, and w moves to w' + beta (mean of the meta-test sites - w').

    Leaves the site:
        Gradient: every trainable entry, and normalisation statistics, once a step; of
        meta-train sites also, with `order: second`, their Hessian times a vector.
        Weights: shared entries (`sync: round`).
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`).

    Differs from the source:
        Losses are averaged over sites, not added up. A group that loses all its sites
        within a step takes no part in it: without meta-test sites the step is FedSGD.
    """

    weighting: Weighting = "uniform"
    inner_lr: float = 1e-3
    beta: float = 1.0
    order: Literal["first", "second"] = "first"
    num_meta_train: int | None = None
    num_meta_test: int | None = None

    paper: ClassVar[str] = "Li et al., AAAI 2018, arXiv:1710.03463"
    exchanges: ClassVar = {"step": 2, "round": 2}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Gradient: trainable entries and normalisation statistics; with order: second "
        "a Hessian times a vector",
        "Weights: shared entries after local training",
    )

    def __post_init__(self) -> None:
        """Check the constants."""
        check_groups(self.num_meta_train, self.num_meta_test)
        if self.inner_lr < 0 or self.beta < 0:
            raise ConfigError(
                "strategy.inner_lr and strategy.beta must be >= 0 "
                f"(seen: {self.inner_lr}, {self.beta})"
            )

    @property
    def smallest_cohort(self) -> int:
        """One site at least in each group of an episode."""
        return (self.num_meta_train or 1) + (self.num_meta_test or 1)

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Inner step on the meta-train sites, judged by the meta-test sites."""
        episode, weights = self._episode(cohort, index), self.weights_of(cohort)
        tasks = yield episode.meta_train.ask(
            self.gradient, weights=server.shared, index=index
        )
        if (task := mean_over(tasks, weights)) is None:
            return server
        ahead = server.with_shared(along(server.shared, -self.inner_lr, task))
        metas = yield episode.meta_test.ask(
            self.gradient, weights=ahead.shared, index=index
        )
        direction = task
        if (meta := mean_over(metas, weights)) is not None:
            if self.order == "second":
                products = yield episode.meta_train.ask(
                    self.curvature, weights=server.shared, vector=meta, index=index
                )
                if (product := mean_over(products, weights)) is not None:
                    meta = along(meta, -self.inner_lr, product)
            direction = along(task, self.beta, meta)
        buffers = {**states_of(tasks, "buffers"), **states_of(metas, "buffers")}
        statistics = server.merge_buffers(
            buffers, {site: weights[site] for site in buffers}
        )
        return server.descend(direction).with_shared(statistics)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Local training of one group from w, then of the other from its result."""
        episode, weights = self._episode(cohort, 0), self.weights_of(cohort)
        tasks = yield episode.meta_train.ask(self.training, weights=server.shared)
        if mean_over(tasks, weights) is None:
            return server
        ahead = server.with_shared(
            server.merge(states_of(tasks, "state"), {s: weights[s] for s in tasks})
        )
        metas = yield episode.meta_test.ask(self.training, weights=ahead.shared)
        if mean_over(metas, weights) is None:
            return ahead
        states = {**states_of(tasks, "state"), **states_of(metas, "state")}
        merged = server.merge(states, {site: weights[site] for site in states})
        judged = server.merge(states_of(metas, "state"), {s: weights[s] for s in metas})
        step = {name: judged[name] - w for name, w in ahead.trainable().items()}
        moved = along(ahead.trainable(), self.beta, step)
        return server.with_shared({**merged, **moved})

    def _episode(self, cohort: Cohort, index: int) -> Episode:
        return draw_episode(
            cohort,
            index,
            num_meta_train=self.num_meta_train,
            num_meta_test=self.num_meta_test,
        )

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Gradient of the site's loss at w or at w'."""
        with site.draws(_DRAWS, index):
            return local_gradient(site, weights, index)

    @at_site
    def curvature(
        self, site: SiteContext, weights: State, vector: State, index: int
    ) -> Outcome:
        """Hessian of the site's loss at w, on the inner step's batch, times h."""
        with site.draws(_DRAWS, index):  # dropout as in the gradient at w
            return curvature_outcome(site, weights, vector, index)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps from the received weights."""
        return local_training(site, weights)

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """Differentiate through the inner step (or not), in one graph."""
        assert pool.cohort is not None
        episode = self._episode(pool.cohort, index)
        named = dict(pool.model.named_parameters())
        task = mean_loss(pool, episode.meta_train, index, named)
        grads = torch.autograd.grad(
            task, list(named.values()), create_graph=self.order == "second"
        )
        ahead = {
            name: p - self.inner_lr * g
            for (name, p), g in zip(named.items(), grads, strict=True)
        }
        if self.order == "first":
            # The parameters are still reached, with the identity as derivative.
            ahead = {
                name: p + (moved - p).detach()
                for (name, p), moved in zip(named.items(), ahead.values(), strict=True)
            }
        meta = mean_loss(pool, episode.meta_test, index, ahead)
        pool.optimizer.zero_grad(set_to_none=True)
        task = mean_loss(pool, episode.meta_train, index, named)
        (task + self.beta * meta).backward()  # type: ignore[no-untyped-call]
        pool.optimizer.step()
