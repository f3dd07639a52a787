r"""MetaReg. Balaji, Sankaranarayanan, Chellappa, MetaReg: Towards Domain Generalization
using Meta-Regularization, NeurIPS 2018, algorithm 1.

Features psi are shared, each site k has a head theta_k of its own, and the penalty
R_phi(theta) = sum_i phi_i |theta_i| on a head is learned before it is used:

    phase 1, each step:
        psi     <- optimiser step along mean_k grad L_k(psi, theta_k)
        theta_k <- optimiser step along grad L_k(psi, theta_k)         at every site k
        draw a site a, and others b:  beta_0 <- theta_a
        beta_{t+1} <- beta_t - alpha grad [L_a(psi, beta_t) + R_phi(beta_t)]  l times
        phi     <- phi + eta alpha (sum_t sign beta_t) * mean_b grad L_b(psi, beta_l)
    phase 2, each step, with a fresh head theta for all sites, and phi frozen:
        psi, theta <- optimiser step along grad [mean_k L_k(psi, theta) + R_phi(theta)]
"""  # noqa: D205

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmed.episodes import (
    Episode,
    check_groups,
    default_meta_test,
    draw_episode,
    mean_over,
)
from fedmed.errors import ConfigError
from fedmed.message import SiteId, State
from fedmed.optimizer import clip, memory_like, step_in_place
from fedmed.partition import select
from fedmed.payload import Gradient, Weights, expect
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
from fedmed.training.local import (
    local_gradient,
    local_training,
    merged,
    optimizer_at,
    present,
    stepped,
)
from fedmed.training.pooled import PooledTraining, functional_loss
from fedmed.training.trainer import trainable

PENALTY = "penalty"
"""Name of phi in the server's memory."""
HEAD = "head"
HEAD_OPTIMIZER = "head_optimizer"
"""Names of a site's own head, and of its optimiser's memory, in its private value."""
_PHASE_TWO = "phase_two"
_SIGNS = "signs"


@dataclass(frozen=True)
class MetaReg(Strategy):
    r"""Learn how strongly to hold back each weight of the head, then train with that.

    Attributes:
        head: Which entries the head is: parts of the network, paths of modules in it
            and the other words of `StatePartition.of`. For a U-Net that is to be
            penalised in its last level too: [head, decoder.up.0, decoder.levels.0].
        phase_one_rounds: Rounds of phase 1, fewer than the run has; None = half of
            the run, with `sync: step` to the step. 0 trains with the penalty from the
            start.
        inner_steps: l >= 1.
        inner_lr: alpha, >= 0, of plain gradient descent. 0 leaves the penalty as it is.
        penalty_lr: eta, >= 0, of plain gradient descent.
        initial_penalty: phi at the start, equal for all weights of the head.
        num_meta_test: Sites b; None = a third, two at least of four or more.

    Exchanges: in phase 1, 3 per step or round, of which the second is with one site
    and the third with few, and what they send back has the size of the head; in phase
    2, 1. `sync: step` equals the pooled method. With `sync: round` local steps take
    the place of the first exchange, and phi takes one step per round.

    Leaves the site:
        Gradient: of everything but the head (all sites, phase 1), with normalisation
        statistics; of the head alone, on one batch, at another site's head (sites b);
        of everything (phase 2).
        Weights: of site a, its own head after l steps on its own data, and the sum of
        the signs of that head's weights: a model of one hospital, as large as the
        head, which the server hands to the sites b. With `sync: round` also shared
        entries after local training, without the head in phase 1.
    Kept by the site:
        Its own head with its normalisation statistics, and that head's optimiser
        memory.

    The head of the run's model is trained in phase 2 only: validation before that is
    of a head at its initial weights.

    Differs from the source:
        Losses are averaged over sites; in the source the sites take turns. The sites b
        may be several. For l > 1 second derivatives are left out; for l = 1 there are
        none, and the gradient of phi is exact. Phase 2 goes on from the features of
        phase 1. phi is not kept from falling below 0, as in the source.
    """

    weighting: Weighting = "uniform"
    head: tuple[str, ...] = ("head",)
    phase_one_rounds: int | None = None
    inner_steps: int = 1
    inner_lr: float = 1e-2
    penalty_lr: float = 1.0
    initial_penalty: float = 0.0
    num_meta_test: int | None = None

    paper: ClassVar[str] = "Balaji et al., NeurIPS 2018"
    exchanges: ClassVar = {"step": 3, "round": 3}
    exact: ClassVar[bool] = True
    needs_others: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Gradient: trainable entries and normalisation statistics, in phase 1 without "
        "the head; of the head alone, at another site's head",
        "Weights: one site's own head after inner steps, with sums of its signs; "
        "shared entries after local training",
    )
    kept_by_site: ClassVar = ("its own head", "that head's optimiser memory")

    def __post_init__(self) -> None:
        """Check the constants."""
        check_constants(
            self,
            ("inner_steps", self.inner_steps >= 1, ">= 1"),
            ("inner_lr", self.inner_lr >= 0, ">= 0"),
            ("penalty_lr", self.penalty_lr >= 0, ">= 0"),
            ("phase_one_rounds", (self.phase_one_rounds or 0) >= 0, ">= 0"),
        )
        check_groups(None, self.num_meta_test)

    def initial(self, server: Server) -> Server:
        """Start with one phi for every trainable entry of the head."""
        head = set(select(server.entries, self.head))
        penalty = {
            name: torch.full_like(w, self.initial_penalty)
            for name, w in server.trainable().items()
            if name in head
        }
        if not penalty or len(penalty) == len(server.trainable()):
            raise ConfigError(
                f"strategy.head names {len(penalty)} of the network's "
                f"{len(server.trainable())} trainable entries; some must be the head, "
                "and some features",
                hint="Set strategy.head: [head], or to paths of modules.",
            )
        return server.remember(**{PENALTY: penalty})

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """One step of features and heads and one of phi; or one with phi frozen."""
        weights = self.weights_of(cohort)
        if not self._is_phase_one(cohort, index):
            replies = yield cohort.ask(
                self.gradient, weights=server.shared, index=index
            )
            return self._penalised(server, replies, weights)
        replies = yield cohort.ask(
            self.feature_gradient, weights=server.shared, index=index
        )
        server = stepped(server, replies, weights)
        return (yield from self._meta_step(server, cohort, index))

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Local steps of features and heads and one of phi; or some with phi frozen."""
        weights = self.weights_of(cohort)
        if not self._is_phase_one(cohort):
            replies = yield cohort.ask(
                self.training, weights=server.shared, penalty=server.memory[PENALTY]
            )
            return merged(server, replies, weights)
        replies = yield cohort.ask(self.feature_training, weights=server.shared)
        server = merged(server, replies, weights)
        return (yield from self._meta_step(server, cohort, 0))

    def _is_phase_one(self, cohort: Cohort, index: int | None = None) -> bool:
        """Whether a step (or, without a number, a whole round) is of phase 1.

        Raises:
            ConfigError: If there is no round for phase 2.
        """
        end, total = self.phase_one_rounds, cohort.num_rounds
        if end is None:
            if not total:
                return True
            if index is None:
                return cohort.round <= total // 2
            return (
                2 * ((cohort.round - 1) * cohort.steps + index) < total * cohort.steps
            )
        if total and end >= total:
            raise ConfigError(
                f"strategy.phase_one_rounds is {end}, and the run has {total} "
                "round(s), so that the head would never be trained",
                hint="Lower it, or raise rounds.",
            )
        return cohort.round <= end

    def _meta_step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """One step of phi: one site's inner steps, judged by others."""
        episode = self._episode(cohort, index)
        if episode is None:
            return server
        weights, penalty = self.weights_of(cohort), server.memory[PENALTY]
        shapes = {name: tuple(phi.shape) for name, phi in penalty.items()}
        first = self._first_batch(cohort, index)
        told = yield episode.meta_train.ask(
            self.inner, weights=server.shared, penalty=penalty, first=first
        ).expecting(shapes)
        ahead = [expect(told[s], Weights) for s in told if weights[s] > 0]
        if not ahead:
            return server
        judged = yield episode.meta_test.ask(
            self.judgement,
            weights=server.shared,
            head=ahead[0].state,
            index=first + self.inner_steps,
        ).expecting(shapes)
        slope = mean_over(judged, weights)
        if slope is None:
            return server
        signs, rate = ahead[0].extra[_SIGNS], self.penalty_lr * self.inner_lr
        moved = {n: phi + rate * signs[n] * slope[n] for n, phi in penalty.items()}
        return server.remember(**{PENALTY: moved})

    def _episode(self, cohort: Cohort, index: int) -> Episode | None:
        """Draw a site a and sites b; None if there is only one site."""
        count = len(cohort.members)
        if count < 2:
            return None
        wanted = self.num_meta_test or default_meta_test(count)
        test = min(wanted, count - 1)
        return draw_episode(cohort, index, num_meta_train=1, num_meta_test=test)

    def _first_batch(self, cohort: Cohort, index: int) -> int:
        """Number of the first of a step's batches for phi; none serves twice."""
        return cohort.steps + index * (self.inner_steps + 1)

    def _penalised(
        self, server: Server, replies: Replies, weights: Mapping[SiteId, float]
    ) -> Server:
        """Step along the mean gradient and the penalty's, which the server knows."""
        weights = present(weights, replies)
        gradient = dict(weighted_mean(states_of(replies, "state"), weights))
        for name, phi in server.memory[PENALTY].items():
            gradient[name] = gradient[name] + phi * server.shared[name].sign()
        server = server.descend(gradient, memory=_PHASE_TWO)
        statistics = server.merge_buffers(states_of(replies, "buffers"), weights)
        return server.with_shared(statistics)

    @at_site
    def feature_gradient(
        self, site: SiteContext, weights: State, index: int
    ) -> Outcome:
        """Gradient of the features at the site's own head, which steps here."""
        model = self._with_own_head(site, weights)
        (batch,) = site.batches(index, 1)
        gradient, loss = site.trainer.gradient(model, batch)
        head = self._head_of(site)
        own = {name: g for name, g in gradient.items() if name in head}
        named = trainable(model)
        memory = memory_like(site.private.states.get(HEAD_OPTIMIZER, {}), named)
        own = clip(own, site.trainer.clip_norm)
        step_in_place(named, own, optimizer_at(site, index), memory)
        entries = site.shared_of(model)
        buffers = {name for name, _ in model.named_buffers()} - head
        payload = Gradient(
            num_examples=site.num_examples,
            values={"loss": loss},
            state={name: g for name, g in gradient.items() if name not in head},
            buffers={name: t for name, t in entries.items() if name in buffers},
        )
        return self._outcome(site, model, payload, entries, memory)

    @at_site
    def feature_training(self, site: SiteContext, weights: State) -> Outcome:
        """Local steps of features and of the site's own head."""
        model = self._with_own_head(site, weights)
        result = site.trainer.train(
            model,
            site.batches(0, site.steps),
            memory=dict(site.private.states.get(HEAD_OPTIMIZER, {})),
            first_step=site.first_step,
        )
        head, entries = self._head_of(site), site.shared_of(model)
        payload = Weights(
            num_examples=site.num_examples,
            values={"loss": result.loss, "steps": result.steps},
            state={name: t for name, t in entries.items() if name not in head},
        )
        memory = result.memory if site.keeps_optimizer else {}
        return self._outcome(site, model, payload, entries, memory)

    @at_site
    def inner(
        self, site: SiteContext, weights: State, penalty: State, first: int
    ) -> Outcome:
        """As site a: the own head after l steps, and the sum of its signs on the way.

        The head that the site keeps does not change.
        """
        model = self._with_own_head(site, weights)
        named = {name: p for name, p in trainable(model).items() if name in penalty}
        phi = {name: penalty[name].to(p) for name, p in named.items()}
        signs = {name: torch.zeros_like(p) for name, p in named.items()}
        for batch in site.batches(first, self.inner_steps):
            loss = site.trainer.forward(model, batch)
            found = torch.autograd.grad(loss, list(named.values()))
            with torch.no_grad():
                for (name, p), g in zip(named.items(), found, strict=True):
                    sign = p.sign()
                    signs[name] += sign
                    p.sub_(g + phi[name] * sign, alpha=self.inner_lr)
        payload = Weights(
            num_examples=site.num_examples,
            state={name: p.detach().cpu().clone() for name, p in named.items()},
            extra={_SIGNS: {name: s.cpu() for name, s in signs.items()}},
        )
        return Outcome(payload)

    @at_site
    def judgement(
        self, site: SiteContext, weights: State, head: State, index: int
    ) -> Outcome:
        """As a site b: gradient of another site's head on the data here."""
        model = site.load({**weights, **head})
        named = {name: p for name, p in trainable(model).items() if name in head}
        (batch,) = site.batches(index, 1)
        loss = site.trainer.forward(model, batch)
        found = torch.autograd.grad(loss, list(named.values()))
        slope = {n: g.cpu() for n, g in zip(named, found, strict=True)}
        return Outcome(Gradient(num_examples=site.num_examples, state=slope))

    @at_site
    def gradient(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Phase 2: gradient of the site's loss; the server adds the penalty's."""
        return local_gradient(site, weights, index)

    @at_site
    def training(self, site: SiteContext, weights: State, penalty: State) -> Outcome:
        """Phase 2: local steps with the penalty."""

        def penalised(model: nn.Module) -> Tensor:
            named = trainable(model)
            return _penalty_of({n: (named[n], phi) for n, phi in penalty.items()})

        return local_training(site, weights, penalty=penalised)

    def _head_of(self, site: SiteContext) -> set[str]:
        """Every entry of the head, statistics included."""
        return set(select(site.partition.entries, self.head))

    def _with_own_head(self, site: SiteContext, weights: State) -> nn.Module:
        """The features that came, under the site's own head (at first, what came)."""
        return site.load({**weights, **site.private.states.get(HEAD, {})})

    def _outcome(
        self,
        site: SiteContext,
        model: nn.Module,
        payload: Gradient | Weights,
        entries: State,
        memory: State,
    ) -> Outcome:
        head = self._head_of(site)
        kept = {HEAD: {name: t for name, t in entries.items() if name in head}}
        if memory:
            kept[HEAD_OPTIMIZER] = memory
        return Outcome(payload, site.keep(model, **kept))

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """Both phases in plain PyTorch; phi's gradient by automatic differentiation."""
        assert pool.cohort is not None
        pool.forget_gradients()
        head = self._pooled_head(pool)
        if not self._is_phase_one(pool.cohort, index):
            losses = [
                pool.weights[s] * functional_loss(pool, s, batch, {})
                for s, batch in sorted(pool.batches(index).items())
            ]
            now = dict(pool.model.named_parameters())
            held = _penalty_of({n: (now[n], pool.memory[n]) for n in head})
            (torch.stack(losses).sum() + held).backward()  # type: ignore[no-untyped-call]
            pool.optimizer_of(_PHASE_TWO).step()
            return
        self._pooled_features(pool, index, head)
        if (episode := self._episode(pool.cohort, index)) is not None:
            self._pooled_penalty(pool, index, episode, head)

    def _pooled_head(self, pool: PooledTraining) -> tuple[str, ...]:
        """Names of the head's weights; phi and the sites' heads, made once."""
        from fedmed.partition import describe_state

        chosen = select(describe_state(pool.model), self.head)
        head = tuple(n for n, _ in pool.model.named_parameters() if n in chosen)
        if not pool.networks:
            for name in head:
                weight = pool.model.get_parameter(name)
                pool.memory[name] = torch.full_like(weight, self.initial_penalty)
            for site in pool.models:
                pool.networks[site] = copy.deepcopy(pool.model)
            assert pool.make_optimizer is not None
            heads = [n.get_parameter(x) for n in pool.networks.values() for x in head]
            pool.optimizers[HEAD] = pool.make_optimizer(heads)
            pool.set_lr(pool.lr)
        return head

    def _pooled_features(
        self, pool: PooledTraining, index: int, head: tuple[str, ...]
    ) -> None:
        features = {n: p for n, p in pool.model.named_parameters() if n not in head}
        total = {name: torch.zeros_like(p) for name, p in features.items()}
        for site, batch in sorted(pool.batches(index).items()):
            own = {name: pool.networks[site].get_parameter(name) for name in head}
            wanted = {**features, **own}
            loss = functional_loss(pool, site, batch, wanted)
            found = torch.autograd.grad(loss, list(wanted.values()))
            for (name, parameter), g in zip(wanted.items(), found, strict=True):
                if name in own:
                    parameter.grad = g
                else:
                    total[name] += pool.weights[site] * g
        for name, parameter in features.items():
            parameter.grad = total[name]
        pool.optimizer.step()
        pool.optimizers[HEAD].step()

    def _pooled_penalty(
        self,
        pool: PooledTraining,
        index: int,
        episode: Episode,
        head: tuple[str, ...],
    ) -> None:
        assert pool.cohort is not None
        first = self._first_batch(pool.cohort, index)
        (site,) = episode.meta_train.site_ids
        phi = {n: pool.memory[n].clone().requires_grad_() for n in head}
        beta = {n: pool.networks[site].get_parameter(n).detach() for n in head}
        for number in range(first, first + self.inner_steps):
            # Each head is a leaf here: how a later gradient depends on phi is the
            # second derivative that is left out.
            leaves = {n: b.detach().requires_grad_() for n, b in beta.items()}
            loss = functional_loss(pool, site, pool.batches(number)[site], leaves)
            found = torch.autograd.grad(loss, list(leaves.values()))
            beta = {
                n: beta[n] - self.inner_lr * (g + phi[n] * beta[n].detach().sign())
                for n, g in zip(head, found, strict=True)
            }
        batches = pool.batches(first + self.inner_steps)
        judges = episode.meta_test.site_ids
        total = sum(pool.weights[s] for s in judges)
        terms = [
            pool.weights[s] / total * functional_loss(pool, s, batches[s], beta)
            for s in judges
        ]
        slopes = torch.autograd.grad(torch.stack(terms).sum(), list(phi.values()))
        for name, slope in zip(head, slopes, strict=True):
            pool.memory[name] = pool.memory[name] - self.penalty_lr * slope


def _penalty_of(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    r"""$R_\phi(\theta) = \sum_i \phi_i |\theta_i|$ over pairs of theta and phi."""
    terms = [(phi.to(theta) * theta.abs()).sum() for theta, phi in pairs.values()]
    return torch.stack(terms).sum()
