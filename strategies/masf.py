r"""MASF. Dou, Castro, Kamnitsas, Glocker, Domain Generalization via Model-Agnostic
Learning of Semantic Features, NeurIPS 2019, arXiv:1910.13580, algorithm 1.

With z the logits, F the features before the head, M_phi a metric network, S_c the
voxels of class c in hospital k's batch:

    each step:  split the sites into meta-train S and meta-test V
                g  <- mean_{k in S} grad L_k(w)
                w' <- w - alpha clip(g)
                s_c^k    = softmax(mean_{n in S_c} z_n(w') / tau)
                l_global = mean over i in S, j in V of
                           1/C sum_c 1/2 [KL(s_c^i || s_c^j) + KL(s_c^j || s_c^i)]
                l_local  = triplet or contrastive loss of M_phi(class means of F at w')
                w   <- optimiser step along  g + grad_{w'} (beta1 l_global
                                                            + beta2 l_local)
                phi <- optimiser step along  grad_phi beta2 l_local

    exchanges:  S: w / g    S, V: w', phi / s, embeddings    S, V: derivatives / grad
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fedmed.episodes import Episode, check_groups, draw_episode, mean_over
from fedmed.losses.known_voxels import one_hot_of_known
from fedmed.message import SiteId, State
from fedmed.networks.metric_network import (
    METRIC,
    MetricNetwork,
    features_before_head,
)
from fedmed.payload import ClassStatistic, Embedding
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
    Weighting,
    at_site,
    check_constants,
    check_count,
    require_count,
)
from fedmed.training.alignment import (
    ROWS,
    Alignment,
    RowTally,
)
from fedmed.training.clustering import (
    LAYERS,
    VECTORS,
    Clustering,
    Embedded,
    Grade,
    MetricLoss,
    embed,
    features_of,
    joined,
    others_of,
)
from fedmed.training.coupled import (
    Measured,
    Pass,
    Statistic,
    cotangent_outcome,
    cotangents,
    statistic_outcome,
)
from fedmed.training.local import (
    local_gradient,
    local_training,
    merged,
)
from fedmed.training.meta_update import (
    MetaUpdate,
    UpdateMode,
    any_weighted,
    sum_of_parts,
    weighted_states,
)
from fedmed.training.plausibility import rows_problem
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

if TYPE_CHECKING:
    from fedmed.task import Task

_LOCAL = "clustering"


@dataclass(frozen=True)
class MASF(Strategy):
    r"""Features that say the same of a class, and keep classes apart, in any hospital.

    Attributes:
        inner_lr: alpha, step size of the inner step, >= 0. Published (PACS): 1e-5.
        alignment_weight: beta1, of l_global, >= 0. Published: 1.
        clustering_weight: beta2, of l_local, >= 0. Published: 0.005. With 0 there is no
            metric network.
        temperature: tau > 0. Published: 2.
        clustering: "exact", "proxy" or "within_site"; see `fedmed.training.clustering`
            and **Leaves the site**.
        metric_loss: "triplet" (semi-hard, squared distances) or "contrastive".
        margin: xi > 0. Published: 10.
        metric_widths: Layers of the metric network. Published (PACS): 1024, 256.
        min_count: Fewest voxels (cases, in classification) of a class in a batch for
            its row or mean embedding to leave; >= 1.
        update_mode: "joint", one step along the sum, as in the paper's algorithm; or
            "split", an optimiser for each of both gradients, as in its code.
        tensor_clip: Largest norm of any one tensor of the inner step's gradient and of
            the meta gradient; None = unlimited. Published: 2.
        meta_lr_factor: Learning rate of the meta gradient's optimiser over the
            study's; with `update_mode: split` or `sync: round`.
        metric_lr_factor: The same for the metric network.
        num_meta_train: Meta-train sites; None = all others.
        num_meta_test: Meta-test sites; None = a third, two at least of four or more.

    First order, as published: the inner step's dependence on w is left out. The task
    loss at w' is not part of MASF. With both weights 0 it is FedSGD on the meta-train
    sites.

    A class's soft label is the softmax of its mean logits, as in the reference code.
    The paper feeds the class's mean feature to the head: the same number for a head
    that is affine in the features and has no dropout (unet, classifier, mlp).
    Features are what enters the part `head` of the network; embeddings are of the mean
    feature of each class in each example.

    Exchanges: 3 per step, 3 per round. `sync: step` equals the pooled method in which
    each site's batch passes the network by itself. With `sync: round` the meta-train
    sites take the round's local steps on the task from w; at w' = their mean all sites
    compute the meta gradient, as in a step, on one batch, and w becomes w' moved along
    it once, by an optimiser of its own (`meta_lr_factor`).

    Leaves the site:
        Gradient: of the network at w (meta-train sites), then of network and metric
        network at w'; normalisation statistics.
        ClassStatistic: C x C log-probabilities and C marks of present classes; with
        `clustering: proxy` also a mean embedding and a mark for each class. Size
        depends on classes only.
        Embedding: with `clustering: exact`, in the statistic's place and with it (a
        policy must allow both kinds): one vector and its class for each class of each
        example of the batch.
        Weights: shared entries of meta-train sites (`sync: round`).
    Kept by the site:
        Nothing (an optimiser's memory with `train.optimizer_state: keep`).

    A site that is lost before it tells its statistic is in no pair. One that is lost
    after it told, before the derivatives come back, is missing from the sum of the
    meta gradient; the others' parts stand, and what it told is a constant of this one
    step. Without a site of either group that tells, the step is one on the meta-train
    sites' gradient.

    Differs from the source:
        Published for classification with three sites; here any number, and
        segmentation, with classes' mean features as samples. A proxy is a constant of
        the same step: positives and negatives are the other sites' means, and the
        loss is averaged over sites. Rows of fewer than `min_count` voxels take no
        part, and a mean embedding of fewer than two examples neither; l_global is
        divided by C all the same, as in the code. Log-probabilities are not clipped.
        Both gradients are of the same weights in `update_mode: split`, where the
        code's three train operations run in no stated order. The metric network
        follows l_local only; the code updates it twice by mistake of a name.
    """

    weighting: Weighting = "uniform"
    inner_lr: float = 1e-3
    alignment_weight: float = 1.0
    clustering_weight: float = 0.005
    temperature: float = 2.0
    clustering: Grade = "proxy"
    metric_loss: MetricLoss = "triplet"
    margin: float = 10.0
    metric_widths: tuple[int, ...] = (24, 16)
    min_count: int = 100
    update_mode: UpdateMode = "joint"
    tensor_clip: float | int | None = None
    meta_lr_factor: float = 1.0
    metric_lr_factor: float = 1.0
    num_meta_train: int | None = None
    num_meta_test: int | None = None

    paper: ClassVar[str] = "Dou et al., NeurIPS 2019, arXiv:1910.13580"
    exchanges: ClassVar = {"step": 3, "round": 3}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Gradient: trainable entries and normalisation statistics",
        "ClassStatistic: C x C log-probabilities, mean embeddings of classes",
        "Embedding: with clustering: exact, a vector for each class of each example",
        "Weights: shared entries after local training",
    )

    def __post_init__(self) -> None:
        """Check the constants."""
        check_groups(self.num_meta_train, self.num_meta_test)
        clip = 1.0 if self.tensor_clip is None else self.tensor_clip
        check_constants(
            self,
            ("inner_lr", self.inner_lr >= 0, ">= 0"),
            ("alignment_weight", self.alignment_weight >= 0, ">= 0"),
            ("clustering_weight", self.clustering_weight >= 0, ">= 0"),
            ("temperature", self.temperature > 0, "> 0"),
            ("margin", self.margin > 0, "> 0"),
            ("min_count", self.min_count >= 1, ">= 1"),
            ("tensor_clip", clip > 0, "> 0"),
            ("meta_lr_factor", self.meta_lr_factor > 0, "> 0"),
            ("metric_lr_factor", self.metric_lr_factor > 0, "> 0"),
        )

    @property
    def smallest_cohort(self) -> int:
        """One site at least in each group of an episode."""
        return (self.num_meta_train or 1) + (self.num_meta_test or 1)

    def check_task(self, task: Task, batch_size: int) -> None:
        """Refuse batches of a classification that hold too few labels."""
        check_count(task, batch_size, self.min_count)

    @property
    def _aligns(self) -> Alignment:
        return Alignment(self.alignment_weight, self.temperature, self.min_count)

    @property
    def _clusters(self) -> Clustering:
        return Clustering(
            self.clustering,
            self.margin,
            self.clustering_weight,
            self.min_count,
            self.metric_loss,
        )

    @property
    def _layers(self) -> tuple[str, ...]:
        return LAYERS if self.clustering_weight else ()

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
        if self.clustering_weight:
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

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Inner step, comparison of all sites after it, then the update."""
        episode, weights = self._episode(cohort, index), self.weights_of(cohort)
        tasks = yield episode.meta_train.ask(
            self.gradient, weights=server.shared, index=index
        )
        if (task := mean_over(tasks, weights)) is None:
            return server
        ahead = self._update.ahead(server, task, self.inner_lr)
        metas = yield from self._judged(ahead, episode, weights, index)
        server = self._update.apply(server, task, _sum(metas))
        return _with_statistics(server, {**tasks, **metas}, weights)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Local steps of the meta-train sites, then one step on the meta loss."""
        episode, weights = self._episode(cohort, 0), self.weights_of(cohort)
        tasks = yield episode.meta_train.ask(self.training, weights=server.shared)
        if not any_weighted(tasks, weights):
            return server
        server = merged(server, tasks, weights)
        # On a batch that nobody has trained on in this round.
        metas = yield from self._judged(server, episode, weights, cohort.steps)
        if (meta := _sum(metas)) is None:
            return server
        server = self._update.judge(server, meta)
        return _with_statistics(server, metas, weights)

    def _judged(
        self,
        ahead: Server,
        episode: Episode,
        weights: Mapping[SiteId, float],
        index: int,
    ) -> Generator[Exchange, Replies, Replies]:
        """Both halves of the meta loss at w'; gives the gradients that came back."""
        if not (self.alignment_weight or self.clustering_weight):
            return {}
        both = episode.both
        request = both.ask(self.statistic, weights=ahead.shared, index=index)
        replies = yield request.expecting(checks={"state": self._problem})
        told = weighted_states(states_of(replies, "state"), weights)
        if not _has_both(episode, told):
            return {}
        request = both.select(tuple(told)).ask(
            self.meta_gradient,
            weights=ahead.shared,
            index=index,
            by_site=self._second_half(told, episode, weights),
        )
        # A site that shares no class with the others has next to no gradient.
        return (yield request.expecting(comparable=False))

    def _second_half(
        self,
        told: Mapping[SiteId, State],
        episode: Episode,
        weights: Mapping[SiteId, float],
    ) -> dict[SiteId, dict[str, Any]]:
        """Each site's cotangents, others' proxies and factor of its own clustering."""

        def coupling(states: Mapping[SiteId, State]) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            if self.alignment_weight:
                total = total + self._aligned(states, episode)
            if self._clusters.is_exact:
                total = total + self._clusters.over_all(states)
            return total

        names = [ROWS] if self.alignment_weight else []
        names += [VECTORS] if self._clusters.is_exact else []
        _, found = cotangents(told, coupling, names=names)
        whole = sum(weights[site] for site in told)
        return {
            site: {
                "cotangent": found[site],
                "others": self._others(told, site),
                "pull": self.clustering_weight * weights[site] / whole,
            }
            for site in told
        }

    def _aligned(self, told: Mapping[SiteId, State], episode: Episode) -> Tensor:
        groups = (episode.meta_train.site_ids, episode.meta_test.site_ids)
        return self._aligns.over_pairs(told, *groups)

    def _problem(self, state: State) -> str:
        """Say what is wrong with what a site told; "" if nothing is."""
        rows = rows_problem(state) if self.alignment_weight else ""
        return rows or self._clusters.problem(state, width=self.metric_widths[-1])

    def _others(self, told: Mapping[SiteId, State], site: SiteId) -> State:
        return others_of(told, site) if self._clusters.by_proxies else {}

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Gradient of the site's task loss at w."""
        return local_gradient(site, weights, index)

    @at_site
    def statistic(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Soft labels and embeddings of classes at w'."""
        statistic = Statistic(self._told, self._layers)
        kind: type[ClassStatistic] | type[Embedding] = ClassStatistic
        if self._clusters.is_exact:
            kind = Embedding
        return statistic_outcome(site, weights, index, statistic, kind=kind)

    @at_site
    def meta_gradient(
        self,
        site: SiteContext,
        weights: State,
        *,
        index: int,
        cotangent: State,
        others: State,
        pull: float,
    ) -> Outcome:
        """Gradient at w' of what the server and the site find of the meta loss."""

        def compute(passed: Pass) -> Measured:
            values: State = {}
            if self.alignment_weight:
                values |= self._rows_of(passed).values
            if self._clusters.is_exact:
                values[VECTORS] = self._embedded(passed).vectors_NF
            elif self._clusters.is_here:
                values[_LOCAL] = self._clusters.here(self._embedded(passed), others)
            return Measured(values)

        local = (
            {_LOCAL: torch.tensor(pull, dtype=torch.float64)}
            if self._clusters.is_here
            else {}
        )
        return cotangent_outcome(
            site,
            weights,
            index,
            Statistic(compute, self._layers),
            {**cotangent, **local},
            task_weight=0.0,
        )

    def _told(self, passed: Pass) -> Measured:
        """What of a batch leaves the site in the first half."""
        parts = []
        if self.alignment_weight:
            parts.append(self._rows_of(passed))
        if self.clustering_weight:
            parts.append(self._clusters.told(self._embedded(passed)))
        return joined(*parts)

    def _rows_of(self, passed: Pass | PooledPass) -> Measured:
        return self._aligns.told(self._tallied(passed))

    def _tallied(self, passed: Pass | PooledPass) -> RowTally:
        """Add up a batch's logits by class.

        Raises:
            ConfigError: If no class of such a batch could ever be compared.
        """
        require_count(passed.labels.numel(), self.min_count)
        return RowTally.of(passed.logits, passed.labels)

    def _embedded(self, passed: Pass | PooledPass) -> Embedded:
        features_BF = (
            features_of(passed) if isinstance(passed, Pass) else passed.features
        )
        masks_BL = one_hot_of_known(
            passed.labels, num_classes=int(passed.logits.shape[1])
        )
        metric = passed.model.get_submodule(METRIC)
        return embed(metric, features_BF, masks_BL)

    @at_site
    def training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps on the task from w."""
        return local_training(site, weights)

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """Both halves of the episode in one process, all sites at hand."""
        assert pool.cohort is not None
        episode = self._episode(pool.cohort, index)
        task = task_gradient(pool, episode.meta_train, index)
        meta: dict[str, Tensor] = {}
        if self.alignment_weight or self.clustering_weight:
            leaves = stepped_ahead(
                pool, task, lr=self.inner_lr, max_norm=self.tensor_clip
            )
            leaves |= metric_parameters(pool)
            passes = passes_at(pool, episode.both, index, weights=leaves)
            loss = self._pooled_meta_loss(pool, episode, passes)
            meta = gradient_at(loss, leaves)
        take_steps(pool, task, meta, self._update)

    def _pooled_meta_loss(
        self,
        pool: PooledTraining,
        episode: Episode,
        passes: Mapping[SiteId, PooledPass],
    ) -> Tensor:
        terms = []
        if self.alignment_weight:
            told = {}
            for site, passed in passes.items():
                measured = self._rows_of(passed)
                told[site] = {**measured.values, **measured.facts}
            terms.append(self._aligned(told, episode))
        if self.clustering_weight:
            embedded = {site: self._embedded(p) for site, p in passes.items()}
            weights = {site: pool.weights[site] for site in passes}
            terms.append(self._clusters.pooled(embedded, weights))
        return torch.stack(terms).sum()


def _sum(metas: Replies) -> State | None:
    return sum_of_parts(states_of(metas, "state")) if metas else None


def _with_statistics(
    server: Server, replies: Replies, weights: Mapping[SiteId, float]
) -> Server:
    """The server with the normalisation statistics of gradients merged."""
    buffers = {
        site: reply.buffers for site, reply in replies.items() if weights[site] > 0
    }
    if not buffers:
        return server
    return server.with_shared(
        server.merge_buffers(buffers, {site: weights[site] for site in buffers})
    )


def _has_both(episode: Episode, told: Mapping[SiteId, State]) -> bool:
    groups = (episode.meta_train.site_ids, episode.meta_test.site_ids)
    return all(any(site in told for site in group) for group in groups)
