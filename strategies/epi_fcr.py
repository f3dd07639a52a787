r"""Epi-FCR. Li, Zhang, Yang, Liu, Song, Hospedales, Episodic Training for Domain
Generalization, ICCV 2019, arXiv:1902.00113, algorithm 1.

An aggregate network of features F and head T for all sites; a network F_k, T_k that
each site k trains on its own data alone; a random head T_r that is never trained. Each
step, sites i (receiving) and j != i (foreign) are drawn:

    L = mean_k L_k(T . F)
        + (1/K) [ w_f L_i(T_j . F)             Epi-F: only F learns
                + w_c L_i(T . F_j) ]           Epi-C: only T learns
        + w_r mean_k L_k(T_r . F)              Epi-R: only F learns
    F, T      <- optimiser step along grad L
    F_k, T_k  <- optimiser step along grad L_k(T_k . F_k)         at every site k
"""  # noqa: D205

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedmed.errors import ConfigError
from fedmed.message import SiteId, State
from fedmed.optimizer import clip, memory_like, step_in_place
from fedmed.partition import select
from fedmed.payload import Weights, expect
from fedmed.seeds import numpy_rng
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
)
from fedmed.training.local import (
    OPTIMIZER,
    gradient_outcome,
    merged,
    optimizer_at,
    step_here,
    stepped,
)
from fedmed.training.pooled import PooledTraining, functional_loss
from fedmed.training.trainer import TrainingBatch, trainable

OWN = "own_network"
OWN_OPTIMIZER = "own_optimizer"
"""Names of a site's own network, and of its optimiser's memory, in what it keeps."""
RANDOM_HEAD = "random_head"
"""The part of the network that holds T_r."""


@dataclass(frozen=True)
class EpiFCR(Strategy):
    """Train features and head so that they work with those of another hospital.

    Attributes:
        head: Parts of the network, or paths of modules in it, that are the head; the
            rest are features.
        relay: What of site j's own network crosses to site i. "heads" is T_j alone:
            Epi-F, without Epi-C. "all" is T_j and F_j, the published method.
        feature_weight: w_f of Epi-F, >= 0. Published: 2.
        classifier_weight: w_c of Epi-C, >= 0; used with `relay: all` only. Published:
            0.05.
        random_weight: w_r of Epi-R, >= 0. Published: 0.1.
        warmup_steps: Steps over all rounds before the episodes begin; until then the
            aggregate and the sites' own networks learn without each other. Published:
            500 of 3,000.
        num_pairs: Pairs (i, j) per step or round, at most one for each site.
            Published: 1.

    With all three weights 0 this is federated averaging, bit for bit.

    Exchanges: 2 per step or round, of which the first is with the sites j alone (1
    during the warm-up, or without a relay). `sync: step` equals the pooled method.
    With `sync: round` the pair and T_j stay for the round's local steps.

    Use a network without batch normalisation (`model.norm: instance` or `group`).
    The source trains with batch normalisation frozen at the statistics of ImageNet;
    here, in training mode, F_j and T_j see statistics of the receiving site's batch.

    Leaves the site:
        Weights: of the drawn sites j, their own network's head; with `relay: all` all
        of that network's weights. It is trained on one hospital's data alone, is
        averaged with nobody's, and the server hands it to another hospital: the worst
        privacy of the methods here, see the relay's default. Normalisation statistics
        of it stay. With `sync: round` also shared entries after local training.
        Gradient: of the aggregate, every trainable entry, and its normalisation
        statistics.
    Kept by the site:
        Its own network and that network's optimiser memory; the random head, equal at
        all sites; nothing of what was relayed to it.

    A site j that is lost takes its pair's terms with it; the step is made of the rest.

    Differs from the source:
        Losses are averaged over sites, which divides the source's by their number. In
        a step the aggregate comes first: T_j and F_j are those before it. A site's own
        network starts from the aggregate as it first receives it. By default Epi-C is
        left out, see `relay`.
    """

    weighting: Weighting = "uniform"
    head: tuple[str, ...] = ("head",)
    relay: Literal["heads", "all"] = "heads"
    feature_weight: float = 2.0
    classifier_weight: float = 0.05
    random_weight: float = 0.1
    warmup_steps: int = 0
    num_pairs: int = 1

    paper: ClassVar[str] = "Li et al., ICCV 2019, arXiv:1902.00113"
    exchanges: ClassVar = {"step": 2, "round": 2}
    exact: ClassVar[bool] = True
    needs_others: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: of drawn sites, the head of their own network, with relay: all the "
        "whole of it; shared entries after local training",
        "Gradient: trainable entries and normalisation statistics of the aggregate",
    )
    kept_by_site: ClassVar = (
        "its own network and that network's optimiser memory",
        "the random head",
    )
    keeps: ClassVar = (RANDOM_HEAD,)
    training_only: ClassVar = (RANDOM_HEAD,)

    def __post_init__(self) -> None:
        """Check the constants."""
        for name in ("feature_weight", "classifier_weight", "random_weight"):
            if not (seen := getattr(self, name)) >= 0:
                raise ConfigError(f"strategy.{name} must be >= 0 (seen: {seen})")
        if self.warmup_steps < 0 or self.num_pairs < 1:
            raise ConfigError(
                "strategy.warmup_steps must be >= 0 and strategy.num_pairs >= 1 "
                f"(seen: {self.warmup_steps}, {self.num_pairs})"
            )

    def network(self, build: Callable[..., nn.Module]) -> nn.Module:
        """The study's network, and a random head that its forward does not use."""
        model, other = build(), build(draw=RANDOM_HEAD)
        known = dict(other.named_modules())
        if missing := [path for path in self.head if path not in known or not path]:
            parts = ", ".join(name for name, _ in other.named_children())
            raise ConfigError(
                f"strategy.head names {missing[0]!r}, no module of the network",
                hint=f"Its parts are {parts}.",
            )
        heads = nn.ModuleDict({_key(path): known[path] for path in self.head})
        model.add_module(RANDOM_HEAD, heads.requires_grad_(requires_grad=False))
        return model

    @property
    def _relays(self) -> bool:
        """Whether anybody's own network is of use to another site."""
        return bool(self.feature_weight or self._relays_features)

    @property
    def _relays_features(self) -> bool:
        return self.relay == "all" and self.classifier_weight > 0

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Relay what the pairs need, then one step of the aggregate."""
        weights = self.weights_of(cohort)
        foreign = yield from self._relayed(server, cohort, index)
        replies = yield cohort.ask(
            self.gradient,
            weights=server.shared,
            index=index,
            foreign={},
            episodes=self._has_episodes(server.step),
            by_site=foreign,
        )
        return stepped(server, replies, weights)

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Relay what the pairs need, then average weights after local training."""
        weights = self.weights_of(cohort)
        foreign = yield from self._relayed(server, cohort, 0)
        replies = yield cohort.ask(
            self.training,
            weights=server.shared,
            foreign={},
            episodes=self._has_episodes(server.step),
            by_site=foreign,
        )
        return merged(server, replies, weights)

    def _has_episodes(self, step: int) -> bool:
        return step >= self.warmup_steps

    def _relayed(
        self, server: Server, cohort: Cohort, index: int
    ) -> Generator[Exchange, Replies, dict[SiteId, dict[str, State]]]:
        """Ask the foreign sites; give each receiving site its part."""
        pairs = self._pairs(cohort, index)
        if not (pairs and self._relays and self._has_episodes(server.step)):
            return {}
        weights = self.weights_of(cohort)
        givers = tuple(sorted(set(pairs.values())))
        names = self._relayed_names(server)
        told = yield (
            cohort.select(givers)
            .ask(self.own_network, weights={n: server.shared[n] for n in names})
            .expecting({name: tuple(server.shared[name].shape) for name in names})
        )
        return {
            receiver: {"foreign": expect(told[giver], Weights).state}
            for receiver, giver in pairs.items()
            if giver in told and weights[giver] > 0
        }

    def _pairs(self, cohort: Cohort, index: int) -> dict[SiteId, SiteId]:
        """Draw receiving sites and the foreign site of each."""
        names = cohort.site_ids
        if len(names) < 2:
            return {}
        order = numpy_rng(cohort.rng_seed, "pairs", index).permutation(len(names))
        drawn = [names[position] for position in order]
        following = dict(zip(drawn, [*drawn[1:], drawn[0]], strict=True))
        return {site: following[site] for site in drawn[: self.num_pairs]}

    def _relayed_names(self, server: Server) -> tuple[str, ...]:
        everything = tuple(server.trainable())
        if self._relays_features:
            return everything
        head = set(select(server.entries, self.head))
        return tuple(name for name in everything if name in head)

    @at_site
    def own_network(self, site: SiteContext, weights: State) -> Outcome:
        """As site j: entries of the own network; at first, they are what came."""
        own = site.private.states.get(OWN, {})
        state = {name: own.get(name, w) for name, w in weights.items()}
        return Outcome(Weights(num_examples=site.num_examples, state=state))

    @at_site
    def gradient(
        self,
        site: SiteContext,
        weights: State,
        index: int,
        foreign: State,
        episodes: bool,
    ) -> Outcome:
        """Gradient of the aggregate; the site's own network takes its step here."""
        model = site.load(weights)
        (batch,) = site.batches(index, 1)
        task, objective = self._objective(site, model, batch, foreign, episodes)
        loss = float(task.detach())
        site.trainer.require_finite(loss)
        gradient = site.trainer.gradient_of(model, objective)
        outcome = gradient_outcome(site, model, gradient, index=index, loss=loss)
        if not self._relays:
            return outcome
        assert outcome.private is not None
        own = self._own_step(site, weights, batch, index)
        return Outcome(outcome.payload, outcome.private.with_states(**own))

    def _own_step(
        self, site: SiteContext, weights: State, batch: TrainingBatch, index: int
    ) -> dict[str, State]:
        """One step of the site's own network."""
        model = _with_own_network(site, weights)
        gradient, _ = site.trainer.gradient(model, batch)
        named = trainable(model)
        memory = memory_like(site.private.states.get(OWN_OPTIMIZER, {}), named)
        gradient = clip(gradient, site.trainer.clip_norm)
        step_in_place(named, gradient, optimizer_at(site, index), memory)
        kept = {OWN: site.shared_of(model)}
        return {**kept, OWN_OPTIMIZER: memory} if memory else kept

    @at_site
    def training(
        self, site: SiteContext, weights: State, foreign: State, episodes: bool
    ) -> Outcome:
        """Local steps of the aggregate, then as many of the site's own network."""
        model = site.load(weights)
        named = trainable(model)
        memory = memory_like(site.private.states.get(OPTIMIZER, {}), named)
        losses = []
        for index, batch in enumerate(site.batches(0, site.steps)):
            task, objective = self._objective(site, model, batch, foreign, episodes)
            step_here(site, model, objective, index=index, memory=memory)
            losses.append(task.detach())
        loss = float(torch.stack(losses).double().mean())
        site.trainer.require_finite(loss)
        payload = Weights(
            num_examples=site.num_examples,
            values={"loss": loss, "steps": len(losses)},
            state=site.shared_of(model),
        )
        kept = {OPTIMIZER: memory} if site.keeps_optimizer else {}
        private = site.keep(model, **kept)
        if self._relays:
            private = private.with_states(**self._own_training(site, weights))
        return Outcome(payload, private)

    def _own_training(self, site: SiteContext, weights: State) -> dict[str, State]:
        """The round's local steps of the site's own network."""
        model = _with_own_network(site, weights)
        result = site.trainer.train(
            model,
            site.batches(0, site.steps),
            memory=dict(site.private.states.get(OWN_OPTIMIZER, {})),
            first_step=site.first_step,
        )
        kept = {OWN: site.shared_of(model)}
        return {**kept, OWN_OPTIMIZER: result.memory} if site.keeps_optimizer else kept

    def _objective(
        self,
        site: SiteContext,
        model: nn.Module,
        batch: TrainingBatch,
        foreign: State,
        episodes: bool,
    ) -> tuple[Tensor, Tensor]:
        """The site's loss, and that plus the terms of its episodes."""
        task = site.trainer.forward(model, batch)
        objective = task
        if episodes:
            for weight, entries in self._episodes(model, foreign):
                network = functools.partial(_forward_with, model, entries)
                logits, labels = site.trainer.logits(network, batch)
                objective = objective + weight * site.trainer.loss(logits, labels)
        return task, objective

    def _episodes(
        self, model: nn.Module, foreign: Mapping[str, Tensor]
    ) -> list[tuple[float, dict[str, Tensor]]]:
        """Weight of each term, and the entries that take the place of the model's."""
        named = dict(model.named_parameters())
        paths = {
            name: path
            for name in named
            for path in self.head
            if name.startswith(f"{path}.")
        }
        given = {name: foreign[name].detach().to(named[name]) for name in foreign}
        terms: list[tuple[float, dict[str, Tensor]]] = []
        if given and self.feature_weight:
            terms.append((self.feature_weight, {n: given[n] for n in paths}))
        if given and self._relays_features:
            features = {n: t for n, t in given.items() if n not in paths}
            terms.append((self.classifier_weight, features))
        if self.random_weight:
            random: dict[str, Tensor] = {
                name: named[_random(name, path)] for name, path in paths.items()
            }
            terms.append((self.random_weight, random))
        return terms

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """All terms of all sites in one loss; then every site's own network."""
        assert pool.cohort is not None
        pool.forget_gradients()
        if not pool.networks:
            pool.networks = {s: copy.deepcopy(m) for s, m in pool.models.items()}
        batches, has_episodes = pool.batches(index), self._has_episodes(index)
        pairs = self._pairs(pool.cohort, index) if has_episodes else {}
        losses = []
        for site, batch in sorted(batches.items()):
            loss = pool.loss(pool.models[site](batch.images, site=site), batch.labels)
            foreign: dict[str, Tensor] = {}
            if site in pairs and self._relays:
                foreign = _weights_of(pool.networks[pairs[site]])
            terms = self._episodes(pool.models[site], foreign) if has_episodes else []
            for weight, entries in terms:
                loss = loss + weight * functional_loss(pool, site, batch, entries)
            losses.append(pool.weights[site] * loss)
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        pool.optimizer.step()
        if self._relays:
            for site, batch in batches.items():
                _pooled_own_step(pool, site, batch)


def _with_own_network(site: SiteContext, weights: State) -> nn.Module:
    """The site's own network; at first, the aggregate that came."""
    return site.load({**weights, **site.private.states.get(OWN, {})})


def _forward_with(
    model: nn.Module,
    entries: Mapping[str, Tensor],
    images: Tensor,
    site: str | None = None,
) -> Tensor:
    """What the network gives with some entries replaced.

    Running statistics are not moved: the same images have moved them already.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits: Tensor = torch.func.functional_call(
        model, {**buffers, **entries}, (images,), {"site": site}
    )
    return logits


def _key(path: str) -> str:
    """Spell a module's path as one name; names of modules hold no points."""
    return path.replace(".", "-")


def _random(name: str, path: str) -> str:
    """Where the random head has the value of an entry of the head."""
    return f"{RANDOM_HEAD}.{_key(path)}.{name.removeprefix(path + '.')}"


def _weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}


def _pooled_own_step(pool: PooledTraining, site: SiteId, batch: TrainingBatch) -> None:
    network, name = pool.networks[site], f"own {site}"
    if name not in pool.optimizers:
        assert pool.make_optimizer is not None
        pool.optimizers[name] = pool.make_optimizer(list(network.parameters()))
        pool.set_lr(pool.lr)
    network.zero_grad(set_to_none=True)
    loss = pool.loss(network(batch.images, site=site), batch.labels)
    loss.backward()  # type: ignore[no-untyped-call]
    pool.optimizers[name].step()
