r"""SAML. Liu, Dou, Heng, Shape-aware Meta-learning for Generalizing Prostate MRI
Segmentation to Unseen Domains, MICCAI 2020, arXiv:2007.02035, algorithm 1.

With p the probability of foreground, F the features before the head, M_phi a metric
network:

    each step:  split the sites into meta-train S and meta-test V
                g  <- mean_{k in S} grad L_k(w)
                w' <- w - alpha clip(g)
                L_compact = mean_{k in V} sum over slices P(p)^2 / (4 pi A(p))
                L_smooth  = triplet loss of M_phi(mean of F over each slice's contour),
                            M_phi(mean of F over the ring around it), slices of S and V
                L_meta    = mean_{k in V} L_k(w') + lambda1 L_compact + lambda2 L_smooth
                w   <- optimiser step along  g + grad_{w'} L_meta
                phi <- optimiser step along  grad_phi lambda2 L_smooth

    exchanges:  S: w / g    S, V: w', phi / embeddings    S, V: derivatives / grad
                without L_smooth:    S: w / g    V: w' / grad
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fedmed.episodes import Episode, check_groups, draw_episode, mean_over
from fedmed.errors import ConfigError
from fedmed.losses.compactness import compactness_loss, in_slices
from fedmed.losses.contour import contour_masks
from fedmed.message import SiteId, State
from fedmed.networks.metric_network import (
    METRIC,
    MetricNetwork,
    features_before_head,
)
from fedmed.payload import ClassStatistic, Embedding, Gradient, expect
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
from fedmed.training.clustering import (
    LAYERS,
    VECTORS,
    Clustering,
    Embedded,
    Grade,
    Tally,
    embed,
    features_of,
    from_bank,
    others_of,
    to_bank,
)
from fedmed.training.coupled import (
    TOLD_WITH,
    Measured,
    Pass,
    Statistic,
    cotangent_outcome,
    cotangents,
    statistic_outcome,
    told_with,
    trained_outcome_with,
)
from fedmed.training.local import local_gradient, trained_outcome
from fedmed.training.meta_update import (
    MetaUpdate,
    UpdateMode,
    any_weighted,
    sum_of_parts,
    weighted_states,
)
from fedmed.training.passes import train_on_passes
from fedmed.training.pooled import PooledTraining
from fedmed.training.pooled_episode import (
    PooledPass,
    gradient_at,
    metric_parameters,
    passes_at,
    stepped_ahead,
    take_steps,
    task_gradient,
)
from fedmed.training.statistic_bank import updated_bank
from fedmed.training.trainer import trainable

if TYPE_CHECKING:
    from fedmed.task import Task

_COMPACT, _SMOOTH = "compact", "smooth"
_PROXY_BANK = "proxy_bank"


@dataclass(frozen=True)
class SAML(Strategy):
    r"""Meta-learning across hospitals whose judge also looks at the predicted shape.

    Attributes:
        inner_lr: alpha, step size of the inner step, >= 0. Published: 1e-4.
        compact_weight: lambda1, of L_compact, >= 0. Published: 1 on a perimeter scaled
            by 0.01, which is 1e-4 on the quotient itself, as here.
        smooth_weight: lambda2, of L_smooth, >= 0. Published: 0.005. With 0 there is no
            metric network.
        smoothness: "exact", "proxy" or "within_site": what L_smooth compares; see
            `fedmed.training.clustering` and **Leaves the site**. "exact" needs
            `sync: step`.
        margin: Of the triplet loss, > 0. Published: 10.
        contour_px: Width of the contour, >= 1. Published: 1.
        ring_px: Width of the ring of background around it, >= 1. Published: 5.
        metric_widths: Layers of the metric network. Published: 24, 16.
        min_count: Fewest pixels of contour or ring in a batch, or in a round, for its
            mean embedding to leave; >= 1.
        update_mode: "joint", one step along the sum of both gradients; or "split", an
            optimiser for each, as in the reference's code.
        tensor_clip: Largest norm of any one tensor of the inner step's gradient and of
            the meta gradient; None = unlimited. Published: 10.
        meta_lr_factor: Learning rate of the meta gradient's optimiser over the
            study's; `update_mode: split` only. Published: 10, on 1e-4.
        metric_lr_factor: The same for the metric network. Published: 10.
        num_meta_train: Meta-train sites; None = all others. Published code: 2 of 5.
        num_meta_test: Meta-test sites; None = a third, two at least of four or more.
            Published code: 1.

    The rows of its table: `compact_weight: 0, smooth_weight: 0` is plain meta-learning,
    MLDG of first order with beta = 1, bit for bit in `sync: step`; one weight at 0
    leaves the other loss. First order, as published: the inner step's dependence on w
    is left out.

    Exchanges: 3 per step, 2 without L_smooth or with `smoothness: within_site`; 2 per
    round. `sync: step` equals the pooled method in which each site's batch passes the
    network by itself. With `sync: round` the meta-train sites take the round's local
    steps on the task from w, the meta-test sites theirs on L_meta from w' = the mean,
    against the mean embeddings that the others told last; w becomes the mean of the
    meta-test sites.

    Leaves the site:
        Gradient: of the network at w (meta-train sites), then of network and metric
        network at w'; normalisation statistics.
        ClassStatistic: with `smoothness: proxy`, mean embeddings of contour and ring,
        and a mark for each: 2 D + 2 numbers, D = 16.
        Embedding: with `smoothness: exact`, one vector and its type for contour and
        ring of each slice of the batch that shows foreground.
        Weights: shared entries (`sync: round`), beside them the ClassStatistic.
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`).

    A site that is lost before it tells its statistic is not compared with. One that is
    lost after it told, before the derivatives come back, is missing from the mean of
    its group, in which the others then count for more; what it told is a constant of
    this one step. Without the answer of a meta-test site the step is one on the
    meta-train sites' gradient.

    Differs from the source:
        Its group of five slices of three sites is normalised together; here each
        site's slices pass the network by themselves, so that L_smooth with batch
        normalisation is another function of the same slices, and the same one with a
        normalisation that does not mix samples. Contour and ring are taken of every
        slice of all sites of the episode; there, one of both from each of five slices.
        Foreground is every class but the first. Features are what enters the head;
        there, together with those of the level below. Slices without foreground take
        no part in L_compact and L_smooth. A volume (3D patches) counts as its slices.
        Means over meta-test sites, which is one there. A proxy is a constant of the
        same step, and a mean of fewer than two slices is not told.
    """

    weighting: Weighting = "uniform"
    inner_lr: float = 1e-4
    compact_weight: float = 1e-4
    smooth_weight: float = 0.005
    smoothness: Grade = "proxy"
    margin: float = 10.0
    contour_px: int = 1
    ring_px: int = 5
    metric_widths: tuple[int, ...] = (24, 16)
    min_count: int = 10
    update_mode: UpdateMode = "joint"
    tensor_clip: float | int | None = None
    meta_lr_factor: float = 1.0
    metric_lr_factor: float = 1.0
    num_meta_train: int | None = None
    num_meta_test: int | None = None

    paper: ClassVar[str] = "Liu et al., MICCAI 2020, arXiv:2007.02035"
    exchanges: ClassVar = {"step": 3, "round": 2}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Gradient: trainable entries and normalisation statistics",
        "ClassStatistic: mean embeddings of contour and of the ring around it",
        "Embedding: with smoothness: exact, two vectors for each slice of the batch",
        "Weights: shared entries; beside them in sync: round the ClassStatistic",
    )

    def __post_init__(self) -> None:
        """Check the constants."""
        check_groups(self.num_meta_train, self.num_meta_test)
        clip = 1.0 if self.tensor_clip is None else self.tensor_clip
        check_constants(
            self,
            ("inner_lr", self.inner_lr >= 0, ">= 0"),
            ("compact_weight", self.compact_weight >= 0, ">= 0"),
            ("smooth_weight", self.smooth_weight >= 0, ">= 0"),
            ("margin", self.margin > 0, "> 0"),
            ("contour_px", self.contour_px >= 1, ">= 1"),
            ("ring_px", self.ring_px >= 1, ">= 1"),
            ("min_count", self.min_count >= 1, ">= 1"),
            ("tensor_clip", clip > 0, "> 0"),
            ("meta_lr_factor", self.meta_lr_factor > 0, "> 0"),
            ("metric_lr_factor", self.metric_lr_factor > 0, "> 0"),
        )
        if self._clusters.is_exact and self.sync == "round":
            raise ConfigError(
                "strategy.smoothness is exact, and strategy.sync is round: embeddings "
                "of single slices can only be compared in the step that made them",
                hint="Set strategy.smoothness: proxy, or strategy.sync: step.",
            )

    @property
    def smallest_cohort(self) -> int:
        """One site at least in each group of an episode."""
        return (self.num_meta_train or 1) + (self.num_meta_test or 1)

    def check_task(self, task: Task, batch_size: int) -> None:
        """Refuse labels without a shape, unless no loss looks at it."""
        del batch_size
        if task.kind == "classification" and self.compact_weight + self.smooth_weight:
            raise ConfigError(
                "SAML's losses are about shapes, and the labels of this study have "
                "none",
                hint="Choose a segmentation task, or set strategy.compact_weight: 0 "
                "and strategy.smooth_weight: 0.",
            )

    @property
    def _clusters(self) -> Clustering:
        return Clustering(
            self.smoothness, self.margin, self.smooth_weight, self.min_count
        )

    @property
    def _layers(self) -> tuple[str, ...]:
        return LAYERS if self.smooth_weight else ()

    @property
    def _update(self) -> MetaUpdate:
        return MetaUpdate(
            self.update_mode,
            self.tensor_clip,
            self.meta_lr_factor,
            self.metric_lr_factor,
        )

    def network(self, build: Callable[..., nn.Module]) -> nn.Module:
        """The study's network, and a metric network on what enters its head."""
        network = build()
        if self.smooth_weight:
            width = features_before_head(network)
            metric = build(draw=METRIC, module=MetricNetwork(width, self.metric_widths))
            network.add_module(METRIC, metric)
        return network

    def _episode(self, cohort: Cohort, index: int) -> Episode:
        return draw_episode(
            cohort,
            index,
            num_meta_train=self.num_meta_train,
            num_meta_test=self.num_meta_test,
        )

    def _judges(self, episode: Episode) -> Cohort:
        """The sites that L_meta needs."""
        return episode.both if self.smooth_weight else episode.meta_test

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Inner step on the meta-train sites, judged by the meta-test sites."""
        episode, weights = self._episode(cohort, index), self.weights_of(cohort)
        tasks = yield episode.meta_train.ask(
            self.gradient, weights=server.shared, index=index
        )
        if (task := mean_over(tasks, weights)) is None:
            return server
        ahead = self._update.ahead(server, task, self.inner_lr)
        judges = self._judges(episode)
        told: Mapping[SiteId, State] = {}
        if self._clusters.is_exact or self._clusters.by_proxies:
            request = judges.ask(self.statistic, weights=ahead.shared, index=index)
            replies = yield request.expecting(checks={"state": self._problem})
            told = weighted_states(states_of(replies, "state"), weights)
            judges = cohort.select(tuple(told))
        metas: Replies = {}
        if any_weighted(_of(judges.site_ids, episode.meta_test), weights):
            request = judges.ask(
                self.meta_gradient,
                weights=ahead.shared,
                index=index,
                by_site=self._second_half(told, judges, episode, weights),
            )
            # Meta-test sites have the task's loss, the others only one of embeddings,
            # of which there may be next to nothing.
            roles = dict.fromkeys(episode.meta_train.site_ids, "meta-train")
            metas = yield request.expecting(
                roles=roles, comparable=not self.smooth_weight
            )
        server = self._update.apply(server, task, _meta(metas, episode, weights))
        buffers = {**states_of(tasks, "buffers"), **states_of(metas, "buffers")}
        statistics = server.merge_buffers(
            buffers, {site: weights[site] for site in buffers}
        )
        return server.with_shared(statistics)

    def _second_half(
        self,
        told: Mapping[SiteId, State],
        judges: Cohort,
        episode: Episode,
        weights: Mapping[SiteId, float],
    ) -> dict[SiteId, dict[str, Any]]:
        """Each site's part of L_meta; the server averages over each group."""
        found: Mapping[SiteId, State] = {}
        if self._clusters.is_exact:
            _, found = cotangents(told, self._clusters.over_all, names=[VECTORS])
        whole = sum(weights[site] for site in judges.site_ids)
        content = {}
        for group in (episode.meta_train, episode.meta_test):
            names = _of(judges.site_ids, group)
            total = sum(weights[site] for site in names)
            for site in names:
                share = weights[site] / total if total else 0.0
                content[site] = {
                    "task": 1.0 if group is episode.meta_test else 0.0,
                    "cotangent": _divided(found.get(site, {}), share),
                    "others": self._others(told, site),
                    "pull": self.smooth_weight * total / whole if whole else 0.0,
                }
        return content

    def _problem(self, state: State) -> str:
        """Say what is wrong with what a site told; "" if nothing is."""
        return self._clusters.problem(state, width=self.metric_widths[-1])

    def _problem_with(self, state: State) -> str:
        """The same of what came with weights, which a policy may have noised."""
        width = self.metric_widths[-1]
        return self._clusters.problem(state, width=width, noised=True)

    def _others(self, told: Mapping[SiteId, State], site: SiteId) -> State:
        return others_of(told, site) if self._clusters.by_proxies else {}

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Gradient of the site's task loss at w."""
        return local_gradient(site, weights, index)

    @at_site
    def statistic(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Embeddings of contours and of the rings around them at w'."""

        def compute(passed: Pass) -> Measured:
            return self._clusters.told(self._embedded(passed))

        kind = Embedding if self._clusters.is_exact else ClassStatistic
        statistic = Statistic(compute, self._layers)
        return statistic_outcome(site, weights, index, statistic, kind=kind)

    @at_site
    def meta_gradient(
        self,
        site: SiteContext,
        weights: State,
        *,
        index: int,
        task: float,
        cotangent: State,
        others: State,
        pull: float,
    ) -> Outcome:
        """Gradient of the site's part of L_meta at w'."""
        factors = {}
        if task and self.compact_weight:
            factors[_COMPACT] = self.compact_weight
        if self._clusters.is_here:
            factors[_SMOOTH] = pull

        names: set[str] = set()

        def compute(passed: Pass) -> Measured:
            names.update(trainable(passed.model))
            values: State = {}
            if _COMPACT in factors:
                values[_COMPACT] = self._compactness(passed)
            if self._clusters.is_exact:
                values[VECTORS] = self._embedded(passed).vectors_NF
            elif self._clusters.is_here:
                values[_SMOOTH] = self._clusters.here(self._embedded(passed), others)
            return Measured(values)

        local = {
            name: torch.tensor(factor, dtype=torch.float64)
            for name, factor in factors.items()
        }
        outcome = cotangent_outcome(
            site,
            weights,
            index,
            Statistic(compute, self._layers),
            {**cotangent, **local},
            task_weight=task,
        )
        return _whole(outcome, {name: weights[name] for name in names & set(weights)})

    def _compactness(self, passed: Pass | PooledPass) -> Tensor:
        return compactness_loss(passed.logits, passed.labels)

    def _embedded(self, passed: Pass | PooledPass) -> Embedded:
        """Contour and ring of each slice, embedded."""
        features_BF = (
            features_of(passed) if isinstance(passed, Pass) else passed.features
        )
        if features_BF.ndim == 5:  # each K of a volume is a slice
            features_BF = features_BF.movedim(4, 1).flatten(0, 1)
        masks_BT = contour_masks(
            in_slices(passed.labels), contour_px=self.contour_px, ring_px=self.ring_px
        )
        return embed(passed.model.get_submodule(METRIC), features_BF, masks_BT)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Local steps on the task, then of the meta-test sites on L_meta."""
        episode, weights = self._episode(cohort, 0), self.weights_of(cohort)
        request = episode.meta_train.ask(self.training, weights=server.shared)
        tasks = yield request.expecting(checks={TOLD_WITH: self._problem_with})
        if not any_weighted(tasks, weights):
            return server
        states = dict(states_of(tasks, "state"))
        ahead = server.with_shared(server.merge(states, {s: weights[s] for s in tasks}))
        ahead = self._remembering(ahead, tasks, weights)
        proxies = from_bank(ahead.memory.get(_PROXY_BANK, {}))
        judges = episode.meta_test
        request = judges.ask(
            self.meta_training,
            weights=ahead.shared,
            by_site={s: {"others": others_of(proxies, s)} for s in judges.site_ids},
        )
        metas = yield request.expecting(checks={TOLD_WITH: self._problem_with})
        if not any_weighted(metas, weights):
            return ahead
        judged = server.merge(states_of(metas, "state"), {s: weights[s] for s in metas})
        states |= states_of(metas, "state")
        every = server.merge(states, {site: weights[site] for site in states})
        moved = {name: judged[name] for name in server.trainable()}
        return self._remembering(ahead, metas, weights).with_shared({**every, **moved})

    def _remembering(
        self, server: Server, replies: Replies, weights: Mapping[SiteId, float]
    ) -> Server:
        """The server with the mean embeddings that came along."""
        if not self._clusters.by_proxies:
            return server
        told = to_bank(weighted_states(told_with(replies), weights))
        bank = dict(server.memory.get(_PROXY_BANK, {}))
        return server.remember(**{_PROXY_BANK: updated_bank(bank, told, momentum=0.0)})

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps on the task from w."""
        return self._trained(site, weights, lambda _, __, task: task)

    @at_site
    def meta_training(
        self, site: SiteContext, weights: State, others: State
    ) -> Outcome:
        """Local steps on L_meta from w'."""

        def objective(passed: Pass, embedded: Embedded | None, task: Tensor) -> Tensor:
            total = task
            if self.compact_weight:
                total = total + self.compact_weight * self._compactness(passed)
            if embedded is not None:
                smooth = self._clusters.here(embedded, others)
                total = total + self.smooth_weight * smooth
            return total

        return self._trained(site, weights, objective)

    def _trained(
        self,
        site: SiteContext,
        weights: State,
        objective: Callable[[Pass, Embedded | None, Tensor], Tensor],
    ) -> Outcome:
        """Local steps, and the mean embeddings of their batches."""
        tallies: list[Tally] = []

        def noting(passed: Pass, task: Tensor) -> Tensor:
            embedded = self._embedded(passed) if self.smooth_weight else None
            if embedded is not None:
                tallies.append(Tally.of(embedded))
            return objective(passed, embedded, task)

        done = train_on_passes(site, weights, noting, layers=self._layers)
        if not self._clusters.by_proxies:
            return trained_outcome(site, done.model, done.result)
        told = Tally.total(tallies).told(self.min_count, passes=done.passes)
        return trained_outcome_with(site, done.model, done.result, told)

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """Both halves of the episode in one process, all sites at hand."""
        assert pool.cohort is not None
        episode = self._episode(pool.cohort, index)
        task = task_gradient(pool, episode.meta_train, index)
        leaves = stepped_ahead(pool, task, lr=self.inner_lr, max_norm=self.tensor_clip)
        leaves |= metric_parameters(pool)
        judges = self._judges(episode)
        passes = passes_at(pool, judges, index, weights=leaves)
        total = sum(pool.weights[site] for site in episode.meta_test.site_ids)
        terms = []
        for site in episode.meta_test.site_ids:
            term = pool.loss(passes[site].logits, passes[site].labels)
            if self.compact_weight:
                term = term + self.compact_weight * self._compactness(passes[site])
            terms.append(pool.weights[site] / total * term)
        if self.smooth_weight:
            embedded = {site: self._embedded(p) for site, p in passes.items()}
            weights = {site: pool.weights[site] for site in passes}
            terms.append(self._clusters.pooled(embedded, weights))
        meta = gradient_at(torch.stack(terms).sum(), leaves)
        take_steps(pool, task, meta, self._update)


def _of(names: tuple[SiteId, ...], group: Cohort) -> list[SiteId]:
    """Those names that are of one group."""
    return [site for site in names if site in group.site_ids]


def _meta(
    metas: Replies, episode: Episode, weights: Mapping[SiteId, float]
) -> State | None:
    """Gradient of L_meta: the sum of each group's mean; None if nobody judged."""
    means = {}
    for name, group in (("test", episode.meta_test), ("train", episode.meta_train)):
        here = {site: metas[site] for site in _of(tuple(metas), group)}
        if (mean := mean_over(here, weights)) is not None:
            means[name] = mean
    return sum_of_parts(means) if "test" in means else None


def _whole(outcome: Outcome, weights: State) -> Outcome:
    """The same with zeros for the head, of which embeddings alone have no gradient."""
    payload = expect(outcome.payload, Gradient)
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    return replace(outcome, payload=replace(payload, state=zeros | payload.state))


def _divided(cotangent: State, share: float) -> State:
    return {name: c / share for name, c in cotangent.items()} if share else cotangent
