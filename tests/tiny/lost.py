"""Sites and servers that are there for one exchange and gone for another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmed.message import Answer, Message, SiteFailure, SiteId
from fedmed.strategy import Server, ServerHalf
from fedmed.transports.inprocess import InProcessTransport


@dataclass
class LostAt(InProcessTransport):
    """Lets one site give no answer to one action, once it has joined.

    Attributes:
        site: The site.
        action: Of the message; "" is any.
        round: Of the message; None is any.
    """

    site: SiteId = "b"
    action: str = ""
    round: int | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def exchange(
        self, messages: Mapping[SiteId, Message], **how: Any
    ) -> dict[SiteId, Answer]:
        answers = super().exchange(messages, **how)
        sent = messages.get(self.site)
        if sent is not None and _is_meant(sent, self.action, self.round):
            answers[self.site] = SiteFailure("timeout", "no answer")
        return answers


@dataclass
class ServerDies(InProcessTransport):
    """The server dies when it sends messages of one action.

    Attributes:
        action: Of the messages; "" is any.
        round: Of the messages; None is any.
    """

    action: str = ""
    round: int | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def exchange(
        self, messages: Mapping[SiteId, Message], **how: Any
    ) -> dict[SiteId, Answer]:
        if any(_is_meant(m, self.action, self.round) for m in messages.values()):
            raise KeyboardInterrupt
        return super().exchange(messages, **how)


def _is_meant(message: Message, action: str, number: int | None) -> bool:
    if message.kind == "join" or action not in {"", message.kind}:
        return False
    return number is None or message.header["round"] == number


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
