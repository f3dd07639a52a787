"""The server's letters to the sites: what they are told, and what it knows of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedmed.errors import SiteError
from fedmed.message import Answer, Message, SiteFailure, SiteId, State
from fedmed.strategy import Exchange
from fedmed.transports.transport import Transport


@dataclass
class RoundLog:
    """What happened in one attempt at a round."""

    losses: dict[SiteId, float] = field(default_factory=dict)
    bytes_down: dict[SiteId, int] = field(default_factory=dict)
    bytes_up: dict[SiteId, int] = field(default_factory=dict)
    refused: dict[SiteId, str] = field(default_factory=dict)
    failed: dict[SiteId, str] = field(default_factory=dict)
    not_shared: dict[SiteId, str] = field(default_factory=dict)
    exchanges: int = 0
    is_hopeless: bool = False

    def count(self, sent: Mapping[SiteId, Message], came: Mapping[SiteId, Any]) -> None:
        """Add the bytes of one exchange."""
        for site, message in sent.items():
            self.bytes_down[site] = self.bytes_down.get(site, 0) + message.num_bytes
        for site, answer in came.items():
            if isinstance(answer, Message):
                self.bytes_up[site] = self.bytes_up.get(site, 0) + answer.num_bytes


@dataclass
class Kept:
    """What the server knows of what the sites keep: after which round, and where.

    Attributes:
        rounds: Site -> the last round after which it kept something new.
        unfiled: Sites whose newest state is in memory only.
        tells: Site -> whether its last reply said that it keeps something.
    """

    rounds: dict[SiteId, int] = field(default_factory=dict)
    unfiled: set[SiteId] = field(default_factory=set)
    tells: dict[SiteId, bool] = field(default_factory=dict)

    def note(self, number: int, sites: Iterable[SiteId], *, filed: bool) -> None:
        """Note which sites kept something new after a round."""
        for site in sites:
            self.rounds[site] = number
            self.unfiled.add(site)
        if filed:
            self.unfiled.clear()


@dataclass(frozen=True)
class Stamp:
    """Which exchange a message belongs to.

    Attributes:
        round: Its number.
        attempt: How often the round was tried before.
        exchange: Of the attempt, from 0.
        first_step: Steps of all rounds before.
    """

    round: int
    attempt: int
    exchange: int
    first_step: int

    @property
    def token(self) -> str:
        """Names the exchange within the run."""
        return f"{self.round}.{self.attempt}.{self.exchange}"


@dataclass
class Correspondence:
    """Writes to the sites, and remembers what each of them goes on from.

    Attributes:
        transport: Open transport to the hosts.
        timeout_s: For the answers of one exchange; None = no limit.
        tokens: Site -> the last exchange of this attempt whose answer counts.
        kept: What the sites keep.
    """

    transport: Transport
    timeout_s: float | None
    tokens: dict[SiteId, str] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)

    def messages(
        self, request: Exchange, targets: Iterable[SiteId], stamp: Stamp
    ) -> dict[SiteId, Message]:
        """Write the messages; sites that are told the same share one object."""
        common = flattened(request.content)
        alike: dict[tuple[str, int], Message] = {}
        sent = {}
        for site in targets:
            token = self.tokens.get(site, "")
            # Who keeps nothing has staged nothing to go on from.
            after = token if self.kept.tells.get(site, True) else ""
            version = self.kept.rounds.get(site, 0)
            content = content_for(site, request, common)
            if content is common and (after, version) in alike:
                sent[site] = alike[after, version]
                continue
            header = {
                "round": stamp.round,
                "token": stamp.token,
                "after": after,
                "version": version,
                "first_step": stamp.first_step,
                "values": content.values,
                "states": content.states,
            }
            sent[site] = Message(request.action, header, content.tensors)
            if content is common:
                alike[after, version] = sent[site]
        return sent

    def deliver(
        self, sent: Mapping[SiteId, Message], reference: State | None = None
    ) -> dict[SiteId, Answer]:
        """Let the sites answer, as far as they can in time."""
        if not sent:
            return {}
        return self.transport.exchange(
            sent, timeout_s=self.timeout_s, reference=reference
        )

    def accept(self, site: SiteId, message: Message, stamp: Stamp) -> None:
        """Note that a site goes on from this answer."""
        self.tokens[site] = stamp.token
        self.kept.tells[site] = bool(message.header.get("keeps", True))


@dataclass(frozen=True)
class Content:
    """What a server's message says, as it travels.

    Attributes:
        values: The JSON values by name.
        states: Names of the states.
        tensors: Of all states, under joined names.
    """

    values: dict[str, Any]
    states: list[str]
    tensors: dict[str, torch.Tensor]


def flattened(content: Mapping[str, Any]) -> Content:
    """Tell JSON values and states apart, and join the names of nested tensors."""
    flat = Content({}, [], {})
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat.states.append(name)
            flat.tensors.update({f"{name}/{key}": t for key, t in value.items()})
        else:
            flat.values[name] = value
    return flat


def content_for(site: SiteId, request: Exchange, common: Content) -> Content:
    """What one site is told: what all are told, unless there is more for it."""
    if site not in request.content_by_site:
        return common
    own = request.content_by_site[site]
    content = flattened({**request.content, **own})
    if content.states == common.states and not any(
        isinstance(value, Mapping) for value in own.values()
    ):
        content = replace(content, tensors=common.tensors)
    return content


def failures(answers: Mapping[SiteId, Answer]) -> dict[SiteId, str]:
    """Name the sites without a reply and why."""
    return {
        site: f"{answer.reason}: {answer.detail}"
        for site, answer in answers.items()
        if isinstance(answer, SiteFailure)
    }


def raise_first(answers: Mapping[SiteId, Answer], doing: str) -> None:
    """Raise if any site failed, naming all of them.

    Raises:
        SiteError: With every reason once, and the sites that gave it.
    """
    problems = failures(answers)
    if problems:
        raise SiteError(f"{doing}: {told(problems)}")


def told(problems: Mapping[SiteId, str]) -> str:
    """Put the problems of sites into one line, equal ones together.

    Example:
        >>> told({"b": "died: in step 3", "a": "died: in step 3", "c": "refused: NaN"})
        'a, b: died: in step 3; c: refused: NaN'
    """
    by_reason: dict[str, list[SiteId]] = {}
    for site, why in sorted(problems.items()):
        plain = why.removeprefix("raised: ").removeprefix(f"site {site}: ")
        by_reason.setdefault(plain, []).append(site)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())
