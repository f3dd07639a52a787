r"""Hospitals that took no part: whose normalisation they use, by named rules.

A method that keeps normalisation (or adapters) at each site leaves a newcomer without
any. `evaluate.unseen` names what it does; gamma, beta are scale and shift of a layer,
(mean, variance) its running statistics, k a training site, p_k its weight in sums:

    adabn          initial gamma, beta; mean, variance re-estimated on the newcomer's
                   own unlabelled images
    average        sum_k p_k of gamma_k, beta_k, mean_k and of adapters;
                   variance = sum_k p_k (variance_k + (mean_k - mean)^2)
    average_adabn  gamma, beta and adapters as in average; mean, variance as in adabn
    nearest        all of the training site whose card is most like the newcomer's
    ensemble       all, one after the other: the mean of the K predictions (softmax)

`adabn` needs nothing of anybody. For the others the training sites are asked, once and
after the last round, for a `Normalisation`: what they keep of normalisation layers and
adapters, never of decoders. For `nearest` alone only the nearest are asked. A site's
policy may refuse; the rule then goes without it.

Source:
    AdaBN: Li et al., Revisiting Batch Normalization For Practical Domain Adaptation,
    2016, arXiv:1603.04779.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedmed.correspondence import Correspondence, RoundLog, Stamp
from fedmed.errors import StateMismatchError
from fedmed.gate import Expectation, screen
from fedmed.message import Answer, Message, SiteFailure, SiteId, State
from fedmed.partition import Entry, StatePartition, check_state
from fedmed.payload import Normalisation, expect, from_message
from fedmed.reduce import merge_states
from fedmed.round_end import FINAL_SPLITS, Columns, deliver_again, rows_of
from fedmed.site_cards import nearest_site
from fedmed.strategy import Cohort, Exchange, Member, Server, Strategy
from fedmed.study import Study, UnseenRule

logger = logging.getLogger(__name__)

AVERAGE = "average"
"""Name of a set that is nobody's own."""
NEEDS_SETS = frozenset({"average", "average_adabn", "nearest", "ensemble"})
"""Rules for which training sites share their normalisation."""
RE_ESTIMATES = frozenset({"adabn", "average_adabn"})
"""Rules for which the newcomer reads all of its images, without labels."""


def shareable(
    partition: StatePartition, training_only: tuple[str, ...] = ()
) -> tuple[Entry, ...]:
    """List what a training site would share of what it keeps.

    Args:
        partition: What of the network is kept.
        training_only: Parts that prediction does not use: `Strategy.training_only`.

    Returns:
        Kept entries of normalisation layers and adapters that prediction uses. Empty
        if there are none, or if prediction needs more of what is kept: then no rule
        makes a model for a newcomer.
    """
    if keeps_layers(partition, training_only):
        return ()
    return _used(partition, training_only)


def keeps_layers(
    partition: StatePartition, training_only: tuple[str, ...] = ()
) -> bool:
    """Whether sites keep layers that prediction needs, and not normalisation alone.

    Args:
        partition: What of the network is kept.
        training_only: As in `shareable`.
    """
    used = _used(partition, training_only)
    return any(entry.role == "weight" and not entry.in_adapter for entry in used)


def _used(
    partition: StatePartition, training_only: tuple[str, ...]
) -> tuple[Entry, ...]:
    """What of the kept entries prediction uses."""
    kept = set(partition.kept)
    return tuple(
        entry
        for entry in partition.entries
        if entry.name in kept and entry.part not in training_only
    )


def sets_for(
    rule: UnseenRule,
    shared: Mapping[SiteId, State],
    *,
    weights: Mapping[SiteId, float],
    entries: tuple[Entry, ...],
    nearest: SiteId | None = None,
) -> dict[str, State]:
    """Give the sets of normalisation that a newcomer predicts with.

    Args:
        rule: The rule.
        shared: What training sites shared, by site.
        weights: Weight of each of them in an average.
        entries: What the network consists of.
        nearest: The site most like the newcomer, of those that shared.

    Returns:
        Sets by name, in sorted order; none for a newcomer that starts from initial
        values.

    Example:
        >>> import torch
        >>> entry = Entry("n.weight", "n", "norm_affine", (1,), torch.float32)
        >>> one = torch.ones(1)
        >>> shared = {"a": {"n.weight": one}, "b": {"n.weight": 3 * one}}
        >>> options = {"weights": {"a": 1.0, "b": 1.0}, "entries": (entry,)}
        >>> sets_for("average", shared, **options)
        {'average': {'n.weight': tensor([2.])}}
        >>> [*sets_for("ensemble", shared, **options)]
        ['a', 'b']
    """
    if rule not in NEEDS_SETS or not shared:
        return {}
    if rule == "ensemble":
        return {site: shared[site] for site in sorted(shared)}
    if rule == "nearest":
        return {} if nearest is None else {nearest: shared[nearest]}
    chosen = {site: weights[site] for site in shared}
    return {AVERAGE: merge_states(shared, chosen, entries)}


@dataclass(frozen=True)
class Found:
    """Rows of the held-out sites.

    Attributes:
        result: By the first rule, for cases.csv; empty if the end of the round gave
            them.
        by_rule: By every rule, with the columns "rule" and "sets_of"; empty if there
            is nothing but `adabn`.
    """

    result: list[Mapping[str, Any]]
    by_rule: list[Mapping[str, Any]]


@dataclass(frozen=True)
class _Ended:
    """A round that is over: the server after it, its stamp and its log."""

    server: Server
    stamp: Stamp
    log: RoundLog

    def next(self) -> Stamp:
        """Stamp of the next exchange."""
        return replace(self.stamp, exchange=self.log.exchanges)


@dataclass(frozen=True)
class Newcomers:
    """Evaluates the sites that were held out by every rule of the study.

    Attributes:
        study: The study.
        strategy: Its method.
        post: Writes to the sites.
        members: Sites that train.
        cards: Public card of every real site.
        columns: Columns of cases.csv.
    """

    study: Study
    strategy: Strategy
    post: Correspondence
    members: tuple[Member, ...]
    cards: Mapping[SiteId, Mapping[str, Any]]
    columns: tuple[str, ...]

    def apart(self, server: Server, number: int) -> frozenset[SiteId]:
        """Held-out sites whose result does not come from the end of the round."""
        if self.study.evaluate.unseen[0] == "adabn" or not self._rules(server, number):
            return frozenset()
        return frozenset(self.study.split.held_out)

    def run(self, server: Server, stamp: Stamp, log: RoundLog) -> Found:
        """Evaluate by every rule after the last round; nothing after others.

        Args:
            server: After the round.
            stamp: Of this round.
            log: Of the round.
        """
        rules, ended = self._rules(server, stamp.round), _Ended(server, stamp, log)
        shared: dict[SiteId, State] = {}
        needing = NEEDS_SETS.intersection(rules)
        if needing == {"nearest"}:
            shared = self._collect_nearest(ended)
        elif needing:
            everybody = tuple(member.site_id for member in self.members)
            shared = self._collect(ended, everybody)
        by_rule = {rule: self._by(rule, shared, ended) for rule in rules}
        first = self.study.evaluate.unseen[0]
        result = by_rule.get(first, []) if self.apart(server, stamp.round) else []
        return Found(
            [{k: v for k, v in r.items() if k not in _EXTRA} for r in result],
            [row for rows in by_rule.values() for row in rows],
        )

    def _rules(self, server: Server, number: int) -> tuple[UnseenRule, ...]:
        """What is to be tried after a round; nothing where `adabn` is all there is."""
        rules, study = self.study.evaluate.unseen, self.study
        if number != study.rounds or not study.split.held_out:
            return ()
        if keeps_layers(server.partition, self.strategy.training_only):
            logger.error(  # seen without --verbose too
                "strategy %s keeps layers at its sites; evaluate.unseen has no rule "
                "for them, so a hospital held out has none or their initial values",
                study.strategy.name,
            )
        known = shareable(server.partition, self.strategy.training_only)
        return rules if known and rules != ("adabn",) else ()

    def _collect_nearest(self, ended: _Ended) -> dict[SiteId, State]:
        """Ask the sites nearest to a newcomer, and the next one if one refuses."""
        shared: dict[SiteId, State] = {}
        left = {member.site_id: self.cards[member.site_id] for member in self.members}
        while left:
            found = {
                nearest_site(self.cards[site], left)
                for site in self.study.split.held_out
            }
            asked = tuple(sorted(s for s in found if s is not None and s not in shared))
            if not asked:
                break
            shared |= self._collect(ended, asked)
            left = {s: c for s, c in left.items() if s in shared or s not in asked}
        return shared

    def _collect(self, ended: _Ended, sites: tuple[SiteId, ...]) -> dict[SiteId, State]:
        """Ask training sites for their normalisation."""
        server, log = ended.server, ended.log
        uses_weights = self.study.evaluate.statistics == "recalibrated"
        content = {"weights": server.shared if uses_weights else {}}
        answers = self._ask(Exchange("share_normalisation", sites, content), ended)
        came: dict[SiteId, Message] = {}
        for site, answer in answers.items():
            if isinstance(answer, SiteFailure):
                log.not_shared[site] = f"{answer.reason}: {answer.detail}"
            elif answer.tensors:
                came[site] = answer
            else:
                log.not_shared[site] = "it never trained"
        accepted, refused = screen(came, self._expected(server))
        log.not_shared.update(refused)
        shared: dict[SiteId, State] = {}
        for site, message in accepted.items():
            state = expect(from_message(message), Normalisation).state
            if why := _problem(state, self._entries(server)):
                log.not_shared[site] = why
            else:
                # What came may lie in memory that the next message is written to.
                shared[site] = {name: tensor.clone() for name, tensor in state.items()}
        for site in sites:
            if site in log.not_shared:
                why = log.not_shared[site]
                logger.warning("no normalisation of site %s: %s", site, why)
        return shared

    def _ask(self, request: Exchange, ended: _Ended) -> dict[SiteId, Answer]:
        sites = request.site_ids
        sent = self.post.messages(request, sites, ended.next())
        retries = self.study.tolerance.retries
        answers = deliver_again(self.post, sent, sites, log=ended.log, retries=retries)
        ended.log.exchanges += 1
        return answers

    def _entries(self, server: Server) -> tuple[Entry, ...]:
        return shareable(server.partition, self.strategy.training_only)

    def _expected(self, server: Server) -> Expectation:
        return Expectation(
            reference={},
            registered={m.site_id: m.num_examples for m in self.members},
            kinds=frozenset({Normalisation.__name__}),
            sends={entry.name: entry.shape for entry in self._entries(server)},
        )

    def _by(
        self, rule: UnseenRule, shared: Mapping[SiteId, State], ended: _Ended
    ) -> list[Mapping[str, Any]]:
        """Rows of all held-out sites by one rule."""
        log, held_out = ended.log, tuple(sorted(self.study.split.held_out))
        if rule in NEEDS_SETS and not shared:
            why = f"rule {rule}: no training site shared its normalisation"
            log.failed.update(dict.fromkeys(held_out, why))
            return []
        sets = {site: self._sets(rule, site, shared, ended) for site in held_out}
        content = {
            "splits": list(FINAL_SPLITS),
            "overlays": rule == self.study.evaluate.unseen[0],
            "re_estimates": rule in RE_ESTIMATES,
            "weights": ended.server.shared,
        }
        numbered = {site: _numbered(chosen) for site, chosen in sets.items()}
        request = Exchange("evaluate_newcomer", held_out, content, numbered)
        rows: list[Mapping[str, Any]] = []
        for site, answer in self._ask(request, ended).items():
            names = [*shared] if AVERAGE in sets[site] else [*sets[site]]
            extra = {"rule": rule, "sets_of": " ".join(sorted(names))}
            columns = Columns(self.columns, FINAL_SPLITS, ended.stamp.round)
            rows += [{**row, **extra} for row in rows_of(site, answer, columns, log)]
        return rows

    def _sets(
        self,
        rule: UnseenRule,
        site: SiteId,
        shared: Mapping[SiteId, State],
        ended: _Ended,
    ) -> dict[str, State]:
        number = ended.stamp.round
        cohort = Cohort(self.members, steps=1, round=number, rng_seed=0)
        cards = {name: self.cards[name] for name in shared}
        return sets_for(
            rule,
            shared,
            weights=self.strategy.weights_of(cohort),
            entries=ended.server.entries,
            nearest=nearest_site(self.cards[site], cards),
        )


_EXTRA = frozenset({"rule", "sets_of"})


def _numbered(sets: Mapping[str, State]) -> dict[str, Any]:
    """Sets as arguments of a message; a site's name might not do as one."""
    named = {f"set{number}": state for number, state in enumerate(sets.values())}
    return {"sets": len(named), **named}


def _problem(state: State, entries: tuple[Entry, ...]) -> str:
    """Say what is wrong with a set of normalisation; empty if nothing is."""
    try:
        check_state(state, entries)
    except StateMismatchError as error:
        return error.message
    for name, tensor in state.items():
        if name.endswith("running_var") and bool((tensor < 0).any()):
            return f"{name} holds a negative variance"
    return ""
