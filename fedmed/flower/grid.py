"""The transport over Flower's grid: simulated, or between institutions.

Runs inside Flower's server app. Which node is which site is asked of the nodes
themselves; who may join is the matter of Flower's node authentication.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping

import flwr.app
from flwr.serverapp import Grid

from fedmed.errors import FedMedError, SiteError, WireError
from fedmed.flower.content import (
    MESSAGE_TYPE,
    WHO,
    from_records,
    tag_of,
    to_answer,
    to_records,
)
from fedmed.message import Answer, Message, SiteFailure, SiteId, State
from fedmed.transports.transport import HostSpec, Transport, check_addressed
from fedmed.wire import WireLimits

logger = logging.getLogger(__name__)

FIRST_POLL_S = 0.01
SLOWEST_POLL_S = 0.5
TTL_GRACE_S = 60.0
"""How much longer than the timeout Flower keeps a message that nobody fetched."""

NODE_UNAVAILABLE = 5
CLIENT_APP_CRASHED = 8
FAILURES = {
    2: SiteFailure("raised", "the client app of the site raised"),
    3: SiteFailure("timeout", "the message expired before the site took it"),
    4: SiteFailure("timeout", "the reply expired"),
    NODE_UNAVAILABLE: SiteFailure("unreachable", "the node of the site is gone"),
    CLIENT_APP_CRASHED: SiteFailure("died", "the client app of the site died"),
}
"""Flower's error codes. Its error texts may name a patient's file: never repeated."""

DEAD_ACTOR = ("ActorDiedError", "ActorUnavailableError", "RayActorError")


class FlowerTransport(Transport):
    """Exchanges over a `flwr.serverapp.Grid`.

    Replies are matched by the message they reply to and by the tag of the exchange: a
    reply that comes too late or twice belongs to no open question and is dropped.

    Args:
        grid: As Flower gives it to the server app.
        join_timeout_s: How long `open` waits for all sites to be connected.
        limits: Largest reply that is read.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        join_timeout_s: float = 120.0,
        limits: WireLimits | None = None,
    ) -> None:
        self._grid = grid
        self._join_timeout_s = join_timeout_s
        self._limits = limits or WireLimits()
        self._session = uuid.uuid4().hex
        self._exchanges = 0
        self._nodes: dict[SiteId, int] = {}
        self._pool_is_broken = False

    def open(self, spec: HostSpec, site_ids: tuple[SiteId, ...]) -> None:
        """Wait until every site is connected and has said which node it is.

        The hosts are not opened from here: each node knows its own site and options.

        Raises:
            SiteError: If sites are missing after `join_timeout_s`, or two nodes claim
                to be the same site.
        """
        del spec
        self._nodes = {}
        asked: set[int] = set()
        deadline = time.monotonic() + self._join_timeout_s
        while missing := sorted(set(site_ids) - set(self._nodes)):
            if time.monotonic() > deadline:
                raise SiteError(
                    f"sites not connected after {self._join_timeout_s:.0f} s: "
                    + ", ".join(missing),
                    hint="start their SuperNodes, or take them out of the study",
                )
            new = sorted(set(self._grid.get_node_ids()) - asked)
            asked.update(self._introduce(new, site_ids, deadline))
            if not new:
                time.sleep(SLOWEST_POLL_S)

    def _introduce(
        self, nodes: list[int], site_ids: tuple[SiteId, ...], deadline: float
    ) -> set[int]:
        """Ask nodes for their names; give the nodes that answered."""
        who = Message(WHO)
        found = self._ask(dict.fromkeys(nodes, who), deadline - time.monotonic())
        answered = set()
        for node, answer in found.items():
            if isinstance(answer, SiteFailure):
                logger.warning("a node does not say its name: %s", answer.detail)
                continue
            answered.add(node)
            site_id = answer.header.get("site")
            if site_id not in site_ids:
                logger.warning("a node that is no site of this study stands aside")
            elif self._nodes.setdefault(str(site_id), node) != node:
                raise SiteError(f"two nodes claim to be site {site_id}")
        return answered

    def exchange(
        self,
        messages: Mapping[SiteId, Message],
        *,
        timeout_s: float | None = None,
        reference: State | None = None,
    ) -> dict[SiteId, Answer]:
        """Push all messages, then fetch replies until all are here or time is up."""
        del reference  # what comes over a network is measured here, by the gate
        check_addressed(messages, tuple(self._nodes))
        if self._pool_is_broken:
            raise FedMedError(
                "a process of Flower's simulation died; its pool cannot replace it",
                hint="go on with --resume, or use --transport ray",
            )
        asked = {self._nodes[site_id]: messages[site_id] for site_id in messages}
        answers = self._ask(asked, timeout_s)
        return {site_id: answers[self._nodes[site_id]] for site_id in sorted(messages)}

    def _ask(
        self, messages: Mapping[int, Message], timeout_s: float | None
    ) -> dict[int, Answer]:
        self._exchanges += 1
        tag = f"{self._session}/{self._exchanges}"
        pending = self._push(messages, tag, timeout_s)
        answers: dict[int, Answer] = {
            node: SiteFailure("unreachable", "Flower did not take the message")
            for node in messages
        }
        answers |= dict.fromkeys(
            pending.values(), SiteFailure("timeout", "no answer in time")
        )
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s = FIRST_POLL_S
        while pending:
            for reply in list(self._grid.pull_messages(list(pending))):
                node = pending.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    answers[node] = self._read(reply, tag)
                    pause_s = FIRST_POLL_S
            if not pending or (deadline is not None and time.monotonic() >= deadline):
                break
            time.sleep(pause_s)
            pause_s = min(SLOWEST_POLL_S, pause_s * 1.5)
        return answers

    def _push(
        self, messages: Mapping[int, Message], tag: str, timeout_s: float | None
    ) -> dict[str, int]:
        """Push messages; equal ones are encoded once. Gives message id -> node."""
        packed = {id(m): to_records(m, tag=tag) for m in messages.values()}
        ttl = None if timeout_s is None else timeout_s + TTL_GRACE_S
        pending = {}
        for node in sorted(messages):
            message = flwr.app.Message(
                packed[id(messages[node])], node, MESSAGE_TYPE, ttl=ttl, group_id=tag
            )
            for message_id in self._grid.push_messages([message]):
                pending[message_id] = node
        return pending

    def _read(self, reply: flwr.app.Message, tag: str) -> Answer:
        if reply.has_error():
            if any(name in reply.error.reason for name in DEAD_ACTOR):
                self._pool_is_broken = True
                return FAILURES[CLIENT_APP_CRASHED]
            return FAILURES.get(
                reply.error.code, SiteFailure("raised", "Flower reports an error")
            )
        try:
            if tag_of(reply.content) != tag:
                return SiteFailure("wire", "the reply belongs to another exchange")
            return to_answer(from_records(reply.content, self._limits))
        except WireError as error:
            return SiteFailure("wire", error.message)

    def close(self) -> None:
        """Forget the nodes; Flower ends its own connections."""
        self._nodes = {}
