r"""UMMKD. Dou, Liu, Heng, Glocker, Unpaired Multi-modal Segmentation via Knowledge
Distillation, IEEE TMI 39(7), 2020, arXiv:2001.03111.

Hospital k has one modality, its own normalisation and the kernels that all share. With
$S_c$ the voxels of class c in its batch, z the logits and T the temperature:

    q_c^k = softmax(mean_{n in S_c} z_n / T)                       one row of C x C
    KD(i, j) = mean_c [ KL(q_c^i || q_c^j) + KL(q_c^j || q_c^i) ]  classes both show
    L = sum_k L_seg^k + kd_weight * mean over pairs {i, j} of KD(i, j)

    sync: step   sites:   log q^k on batch t              server: c^k = dL / dlog q^k
                 sites:   grad(L_seg^k + <c^k, log q^k>)  server: one optimiser step
    sync: round  sites:   K local steps on L_seg^k + KD to the others' remembered rows
                 server:  averages kernels; q^k <- m q^k + (1 - m) (row that came)
"""  # noqa: D205

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fedmed.losses.distillation import (
    Reduction,
    class_logit_sums,
    soft_confusion,
    symmetric_kl,
)
from fedmed.message import SiteId, State
from fedmed.payload import ClassStatistic, expect
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
    check_count,
    require_count,
)
from fedmed.training.coupled import (
    NOTHING_TOLD,
    TOLD_WITH,
    Measured,
    Pass,
    Statistic,
    cotangent_outcome,
    cotangents,
    coupled_training,
    statistic_outcome,
    told_with,
    trained_outcome_with,
)
from fedmed.training.local import merged, present, share_of, stepped
from fedmed.training.plausibility import rows_problem
from fedmed.training.pooled import PooledTraining
from fedmed.training.statistic_bank import (
    PRESENT,
    banked,
    banked_sites,
    updated_bank,
)

if TYPE_CHECKING:
    from fedmed.task import Task

_BANK = "class_bank"
_ROWS = "rows"


@dataclass(frozen=True)
class _Tally:
    """Logits added up by class.

    Attributes:
        sums_LL: Summed logits, row c for class c.
        counts_L: Voxels of each class.
        num_examples: Examples that they are from, repeated ones too.
    """

    sums_LL: Tensor
    counts_L: Tensor
    num_examples: int

    def detached(self) -> _Tally:
        """The same without a graph."""
        return _Tally(self.sums_LL.detach(), self.counts_L, self.num_examples)

    def plus(self, other: _Tally) -> _Tally:
        """Both together."""
        return _Tally(
            self.sums_LL + other.sums_LL,
            self.counts_L + other.counts_L,
            self.num_examples + other.num_examples,
        )


@dataclass(frozen=True)
class UMMKD(Strategy):
    """Shared kernels, normalisation per site, class-wise distillation between sites.

    Attributes:
        kd_weight: Weight of the distillation, >= 0. Published (code): 0.5, of the
            halved KD. With 0 it is DSBN, or FedBN where `site_reduction` is "mean".
        temperature: T > 0.
        min_count: Fewest voxels (cases, in classification) of a class in a batch, or
            in a round's local set, for its row to leave; >= 1. A hospital whose policy
            asks for more refuses rows of less.
        half: Halve KD, as the reference's code does; its paper does not, and names no
            weight.
        divide_by: Divide KD's sum over classes by the number of classes that both
            sites show ("present") or by all classes ("all", as MASF's code).
        site_reduction: Sum the sites' segmentation losses, as published, or take their
            weighted mean, as FedBN does. It sets the length of SGD's steps and how
            much distillation weighs beside them.
        bank_momentum: m of `sync: round`, in [0, 1).

    Exchanges: 2 per step (`sync: step`, equal to pooled training) or 1 per round
    (`sync: round`, where the others' rows are those of earlier rounds).

    Leaves the site:
        Gradient, Weights: of the shared entries, without normalisation.
        ClassStatistic: per exchange C x C log-probabilities and C marks of which
        classes are present, 4 (C^2 + C) bytes in float32, whatever the number of
        voxels. No counts: how many voxels are behind a row stays at the site. It comes
        before the gradient in `sync: step`, beside the weights in `sync: round`.
        From the server come as many bytes: a derivative, or the others' mean rows.
    Kept by the site:
        Every entry of every normalisation layer, and with `sync: step` the optimiser
        memory of scale and shift.

    Differs from the source:
        Paper: any number of hospitals, all unordered pairs with equal weight; two are
        the published method. Classes that a site does not show take no part; in the
        reference their row is uniform and drags the others along. Weight decay is
        `train.optimizer.weight_decay`, on scale and shift too.
        `sync: round` is this project's: all others are one target, their mean row;
        rows are summed up over the round's batches while the weights move; a voxel is
        counted once per pass through the site's data.
    """

    weighting: Weighting = "uniform"
    kd_weight: float = 0.5
    temperature: float = 2.0
    min_count: int = 100
    half: bool = True
    divide_by: Reduction = "present"
    site_reduction: Literal["sum", "mean"] = "sum"
    bank_momentum: float = 0.9

    paper: ClassVar[str] = "Dou et al., IEEE TMI 39(7), 2020, arXiv:2001.03111"
    exchanges: ClassVar = {"step": 2, "round": 1}
    exact: ClassVar[bool] = True
    leaves_site: ClassVar = (
        "Weights: shared entries without normalisation; beside them in sync: round "
        "the ClassStatistic",
        "Gradient: trainable shared entries without normalisation",
        "ClassStatistic: C x C log-probabilities and C marks of present classes",
    )
    kept_by_site: ClassVar = ("every entry of every normalisation layer",)
    keeps: ClassVar = ("norm",)
    published_model: ClassVar[dict[str, Any]] = {
        "name": "dilated_residual",
        "preset": "paper",
        "slices": 3,
        "num_classes": 5,
    }

    def __post_init__(self) -> None:
        """Check the constants."""
        check_constants(
            self,
            ("kd_weight", self.kd_weight >= 0, ">= 0"),
            ("temperature", self.temperature > 0, "> 0"),
            ("min_count", self.min_count >= 1, ">= 1"),
            ("bank_momentum", 0 <= self.bank_momentum < 1, "in [0, 1)"),
        )

    def check_task(self, task: Task, batch_size: int) -> None:
        """Refuse batches of a classification that hold too few labels."""
        check_count(task, batch_size, self.min_count)

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Compare the sites' soft confusions, then sum gradients that know of it."""
        request = cohort.ask(self.confusion, weights=server.shared, index=index)
        told = yield request.expecting(checks={"state": rows_problem})
        cohort = cohort.select(tuple(told))
        weights = present(self.weights_of(cohort), told)
        replies = yield cohort.ask(
            self.gradient,
            weights=server.shared,
            index=index,
            by_site=self._second_half(told, weights),
        )
        total = self.site_reduction == "sum"
        return stepped(server, replies, weights, total=total)

    def _shares(self, weights: Mapping[SiteId, float]) -> dict[SiteId, float]:
        """Factor of each site's segmentation loss in L."""
        parts = share_of(weights, total=self.site_reduction == "sum")
        return {site: part["share"] for site, part in parts.items()}

    def _second_half(
        self, told: Replies, weights: Mapping[SiteId, float]
    ) -> dict[SiteId, dict[str, Any]]:
        """Shares, and cotangents per unit of share: the server weighs by share."""
        shares = self._shares(weights)
        states = {s: expect(told[s], ClassStatistic).state for s in sorted(told)}
        taking_part = {site: states[site] for site in states if shares[site] > 0}
        _, found = cotangents(taking_part, self._distance, names=(_ROWS,))
        content: dict[SiteId, dict[str, Any]] = {}
        for site, share in shares.items():
            cotangent = {_ROWS: torch.zeros_like(states[site][_ROWS])}
            if site in found:
                cotangent = {_ROWS: found[site][_ROWS] / share}
            content[site] = {"cotangent": cotangent, "share": share}
        return content

    def _distance(self, told: Mapping[SiteId, State]) -> Tensor:
        """The distillation's part of L: the mean over all pairs of sites."""
        terms = [
            symmetric_kl(
                told[one][_ROWS],
                told[other][_ROWS],
                (told[one][PRESENT] > 0.5) & (told[other][PRESENT] > 0.5),
                reduction=self.divide_by,
                half=self.half,
            )
            for one, other in itertools.combinations(sorted(told), 2)
        ]
        if not terms:
            return torch.zeros(())
        return self.kd_weight * torch.stack(terms).mean()

    @at_site
    def confusion(self, site: SiteContext, weights: State, index: int) -> Outcome:
        """Soft confusion of the site's batch number `index`."""
        return statistic_outcome(site, weights, index, Statistic(self._soft_confusion))

    @at_site
    def gradient(
        self,
        site: SiteContext,
        weights: State,
        index: int,
        share: float,
        cotangent: State,
    ) -> Outcome:
        """Gradient of segmentation and distillation; normalisation steps here."""
        statistic = Statistic(self._soft_confusion)
        return cotangent_outcome(
            site, weights, index, statistic, cotangent, share=share
        )

    def _soft_confusion(self, passed: Pass) -> Measured:
        return self._told(self._tallied(passed.logits, passed.labels))

    def _tallied(self, logits_BL: Tensor, labels_B: Tensor) -> _Tally:
        """Add up a batch's logits by class.

        Raises:
            ConfigError: If no class of such a batch could ever be compared.
        """
        require_count(labels_B.numel(), self.min_count)
        sums_LL, counts_L = class_logit_sums(logits_BL, labels_B, logits_BL.shape[1])
        return _Tally(sums_LL, counts_L, len(labels_B))

    def _told(self, tally: _Tally, *, passes: int = 1) -> Measured:
        """Rows of the classes that may be told; nothing of the others."""
        rows_LL = soft_confusion(tally.sums_LL, tally.counts_L, self.temperature)
        behind_L = tally.counts_L // passes
        present_L = behind_L >= self.min_count
        return Measured(
            values={_ROWS: rows_LL.masked_fill(~present_L.unsqueeze(1), 0.0)},
            facts={PRESENT: present_L.to(rows_LL)},
            min_count=min(behind_L[present_L].tolist(), default=NOTHING_TOLD),
        )

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Average weights that were trained against what others told before."""
        weights = self.weights_of(cohort)
        bank = server.memory.get(_BANK, {})
        request = cohort.ask(
            self.training,
            weights=server.shared,
            by_site={s: self._target(bank, s, weights) for s in cohort.site_ids},
        )
        replies = yield request.expecting(checks={TOLD_WITH: _noised_problem})
        told = {
            site: {
                _ROWS: state[_ROWS].softmax(dim=1),
                PRESENT: (state[PRESENT] > 0.5).to(state[PRESENT]),
            }
            for site, state in told_with(replies).items()
            if weights[site] > 0
        }
        bank = updated_bank(bank, told, momentum=self.bank_momentum)
        return merged(server, replies, weights).remember(**{_BANK: bank})

    def _target(
        self, bank: State, site: SiteId, weights: Mapping[SiteId, float]
    ) -> dict[str, Any]:
        """The others' mean rows, and how strongly they pull.

        Of the mean over pairs, 2 / K is the part of one site against its mean partner.
        """
        others = [banked(bank, o) for o in banked_sites(bank) if o != site]
        if not others or not weights[site] or not self.kd_weight:
            return {"target": {}, "pull": 0.0}
        marks_SL = torch.stack([other[PRESENT] for other in others]).double()
        rows_SLL = torch.stack([other[_ROWS] for other in others])
        counts_L = marks_SL.sum(dim=0)
        mean_LL = (marks_SL.unsqueeze(2) * rows_SLL).sum(dim=0)
        mean_LL = mean_LL / counts_L.clamp(min=1).unsqueeze(1)
        dtype = rows_SLL.dtype
        target = {_ROWS: mean_LL.to(dtype), PRESENT: (counts_L > 0).to(dtype)}
        share = self._shares(weights)[site]
        pull = self.kd_weight * 2 / (len(others) + 1) / share
        return {"target": target, "pull": pull}

    @at_site
    def training(
        self, site: SiteContext, weights: State, target: State, pull: float
    ) -> Outcome:
        """Local steps with distillation from the target, and fresh rows."""
        tallies: list[_Tally] = []

        def coupling(logits_BL: Tensor, labels_B: Tensor) -> Tensor | None:
            tally = self._tallied(logits_BL, labels_B)
            tallies.append(tally.detached())
            return pull * self._pull(tally, target) if pull else None

        model, result = coupled_training(site, weights, coupling)
        whole = functools.reduce(_Tally.plus, tallies)
        passes = -(-whole.num_examples // site.num_examples)
        told = self._told(whole, passes=passes)
        return trained_outcome_with(site, model, result, told)

    def _pull(self, tally: _Tally, target: State) -> Tensor:
        rows_LL = soft_confusion(tally.sums_LL, tally.counts_L, self.temperature)
        goal_LL = target[_ROWS].to(rows_LL)
        # Rows that nobody told hold zeros, and are masked.
        log_goal_LL = goal_LL.clamp(min=torch.finfo(goal_LL.dtype).tiny).log()
        shown_L = tally.counts_L >= self.min_count
        return symmetric_kl(
            rows_LL,
            log_goal_LL,
            shown_L & (target[PRESENT].to(shown_L.device) > 0.5),
            reduction=self.divide_by,
            half=self.half,
        )

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """The pooled method: one loss over all sites' batches, one optimiser step."""
        pool.forget_gradients()
        shares = pool.shares if self.site_reduction == "sum" else pool.weights
        losses, told = [], {}
        for site, batch in sorted(pool.batches(index).items()):
            logits = pool.models[site](batch.images, site=site)
            losses.append(shares[site] * pool.loss(logits, batch.labels))
            measured = self._told(self._tallied(logits, batch.labels))
            told[site] = {**measured.values, **measured.facts}
        total = torch.stack(losses).sum() + self._distance(told)
        total.backward()  # type: ignore[no-untyped-call]
        pool.optimizer.step()


def _noised_problem(state: State) -> str:
    """Say what is wrong with rows that a policy may have noised."""
    return rows_problem(state, noised=True)
