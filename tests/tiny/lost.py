"""A site that is there for one exchange and gone for another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmed.message import Answer, Message, SiteFailure, SiteId
from fedmed.strategy import Server, ServerHalf
from fedmed.transports.inprocess import InProcessTransport


@dataclass
class LostAt(InProcessTransport):
    """Lets one site give no answer to one action."""

    site: SiteId = "b"
    action: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def exchange(
        self, messages: Mapping[SiteId, Message], **how: Any
    ) -> dict[SiteId, Answer]:
        answers = super().exchange(messages, **how)
        sent = messages.get(self.site)
        if sent is not None and sent.kind == self.action:
            answers[self.site] = SiteFailure("timeout", "no answer")
        return answers


def finish_without(ward: Any, half: ServerHalf, site: SiteId, action: str) -> Server:
    """Drive a server half to its end; one site's reply to one action never arrives."""
    try:
        request = next(half)
        while True:
            replies = ward.answer(request)
            if request.action == action:
                replies.pop(site, None)
            request = half.send(replies)
    except StopIteration as end:
        server: Server = end.value
        return server
