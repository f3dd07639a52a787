"""Joining: what the sites say about themselves before the first round, checked."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmed.correspondence import raise_first
from fedmed.errors import ConfigError, DataError
from fedmed.message import Message, SiteId
from fedmed.payload import Card, expect, from_message
from fedmed.strategy import POOLED_SITE, Member
from fedmed.study import Study
from fedmed.task import Task
from fedmed.transports.transport import Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Joined:
    """The sites after they presented themselves.

    Attributes:
        task: What all of them agree to learn.
        members: Sites that train, sorted.
        evaluated: Sites that are evaluated, sorted.
        data: Facts per real site, for the lock file and the report.
        public: The public site, which neither trains nor is evaluated; None: the
            method needs none.
        public_data: Facts of it, for the lock file.
    """

    task: Task
    members: tuple[Member, ...]
    evaluated: tuple[SiteId, ...]
    data: Mapping[SiteId, Mapping[str, Any]]
    public: Member | None = None
    public_data: Mapping[str, Any] = field(default_factory=dict)


def join(
    transport: Transport, study: Study, site_ids: tuple[SiteId, ...], at_round: int
) -> Joined:
    """Ask every site to present itself.

    Args:
        transport: Open transport.
        study: The study.
        site_ids: Real sites; the pooled one if the strategy pools data, the public one
            if it needs that.
        at_round: The server's last finished round; sites roll back to it.

    Raises:
        SiteError: If a site cannot take part; all of them are named.
        DataError: If one image lies at two sites, no site has training examples, or a
            hospital's copy of the public images is another than the public site's.
        ConfigError: If more sites are to be drawn each round than train.
    """
    sent = {site: Message("join", {"round": at_round}) for site in site_ids}
    answers = transport.exchange(sent, timeout_s=study.tolerance.timeout_s)
    raise_first(answers, "sites could not join")
    cards = {
        site: expect(from_message(answer), Card)
        for site, answer in answers.items()
        if isinstance(answer, Message)
    }
    _refuse_duplicates({s: card for s, card in cards.items() if s != POOLED_SITE})
    public = cards.pop(study.sites.public or "", None)
    real = {site: card for site, card in cards.items() if site != POOLED_SITE}
    _require_same_public(public, real)
    _warn_of_cut_organs(real)
    trains = (POOLED_SITE,) if POOLED_SITE in cards else _training_sites(study, real)
    members = tuple(_member(site, cards[site]) for site in sorted(trains))
    _require_examples(members)
    _require_enough(study, real)
    return Joined(
        _common_task(real),
        members,
        tuple(sorted(real)),
        {site: _facts(card) for site, card in sorted(real.items())},
        _member(study.sites.public or "", public) if public else None,
        _facts(public) if public else {},
    )


def _member(site: SiteId, card: Card) -> Member:
    return Member(site, card.num_examples, card.values.get("card", {}))


def _require_same_public(public: Card | None, real: Mapping[SiteId, Card]) -> None:
    """Predictions of other images could not be averaged."""
    if public is None:
        return
    wanted = public.values.get("public_fingerprint")
    copies = {s: card.values.get("public_fingerprint") for s, card in real.items()}
    odd = [site for site, copy in sorted(copies.items()) if copy and copy != wanted]
    if odd:
        raise DataError(
            f"the public images at {', '.join(odd)} are not those of the public site",
            hint="Give every hospital the same files.",
        )


def _warn_of_cut_organs(cards: Mapping[SiteId, Card]) -> None:
    for site, card in sorted(cards.items()):
        if number := card.values.get("num_cut", 0):
            logger.error(
                "site %s: preprocess.size cuts off up to %.0f %% of the labelled "
                "organs in %d case(s), which no network can find; enlarge it, or move "
                "it with preprocess.crop",
                site,
                100 * card.values["largest_cut"],
                number,
            )


def _training_sites(study: Study, cards: Mapping[SiteId, Card]) -> tuple[SiteId, ...]:
    return tuple(site for site in cards if site not in study.split.held_out)


def _require_examples(members: tuple[Member, ...]) -> None:
    empty = [member.site_id for member in members if member.num_examples == 0]
    if empty or not members:
        raise DataError(
            f"no training examples at {', '.join(empty) or 'any site'}",
            hint="Give the site more cases, hold it out (split.held_out), or leave it "
            "out (sites.include).",
        )


def _require_enough(study: Study, cards: Mapping[SiteId, Card]) -> None:
    """Refuse a draw of more sites than train; one pooled site stands for all."""
    number, asked = len(_training_sites(study, cards)), study.sites_per_round
    if asked is not None and asked > number:
        raise ConfigError(
            f"sites_per_round is {asked}, but {number} site(s) train",
            hint=f"Choose 1 to {number}, or leave it out for all sites.",
        )


def _common_task(cards: Mapping[SiteId, Card]) -> Task:
    tasks = {site: card.values["task"] for site, card in cards.items()}
    first = min(tasks)
    for site, task in sorted(tasks.items()):
        if task != tasks[first]:
            raise ConfigError(f"sites {first} and {site} describe different tasks")
    return Task.from_dict(tasks[first])


def _refuse_duplicates(cards: Mapping[SiteId, Card]) -> None:
    """One image at two sites would be trained on here and tested on there."""
    holders: dict[str, list[SiteId]] = defaultdict(list)
    for site, card in sorted(cards.items()):
        for fingerprint in card.values.get("fingerprints", ()):
            holders[fingerprint].append(site)
    shared = [sites for sites in holders.values() if len(set(sites)) > 1]
    if shared:
        pairs = sorted({" and ".join(sites) for sites in shared})
        raise DataError(
            f"{len(shared)} image(s) lie at more than one site ({', '.join(pairs)})",
            hint="A case may belong to one site only; remove the copies.",
        )


def _facts(card: Card) -> dict[str, Any]:
    counts = card.values.get("num_cases", {})
    return {
        "num_cut": card.values.get("num_cut", 0),
        "largest_cut": card.values.get("largest_cut", 0.0),
        "num_cases": sum(counts.values()),
        **{f"num_{name}": count for name, count in counts.items()},
        "num_examples": card.num_examples,
        "card": card.values.get("card", {}),
        "case_names": card.values.get("case_names", ""),
        "quarantined": card.values.get("quarantined", {}),
        "fingerprint": card.values.get("data_fingerprint", ""),
    }
