"""The contract of a transport.

A transport carries messages to site hosts and answers back. It knows neither the
algorithm nor the data: a host is whatever `HostSpec.factory` names.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from fedmed.errors import FedMedError
from fedmed.message import Answer, Message, SiteId, State

AnyTransport = TypeVar("AnyTransport")


@runtime_checkable
class Host(Protocol):
    """A site as a transport sees it: it answers messages, and can be closed."""

    def handle(self, message: Message) -> Message:
        """Answer one message. May raise; the transport turns that into a failure.

        The message's tensors are lent until the answer: whoever keeps one copies it.
        """

    def close(self) -> None:
        """Release files and memory."""


@dataclass(frozen=True)
class HostSpec:
    """How to open the host of one site in any process of any machine.

    Attributes:
        factory: "package.module:function", called as
            `function(site_id, options) -> Host`.
        options: Picklable, JSON-serialisable keyword facts: the study, folders, the
            number of threads...
        threads: Torch threads of the site's work, fixed by the study.
    """

    factory: str
    options: Mapping[str, Any]
    threads: int = 1

    def open(
        self,
        site_id: SiteId,
        *,
        durable: bool,
        common: dict[str, Any] | None = None,
    ) -> Host:
        """Import the factory and open one site's host in this process.

        Args:
            site_id: The site.
            durable: The process may change between two messages, so the host must
                write its working state through to disk after each.
            common: What the hosts of this process share; empty at first, and given
                to each of them. The one live network is there.
        """
        common = {} if common is None else common
        return self._function()(
            site_id, {**self.options, "durable": durable, "common": common}
        )

    def prepare(self) -> None:
        """Import what hosts need, before this process is copied."""
        self._function()

    def _function(self) -> Callable[..., Host]:
        module, _, name = self.factory.partition(":")
        function: Callable[..., Host] = getattr(importlib.import_module(module), name)
        return function


class Transport(abc.ABC):
    """Carries messages between the server and the hosts of a study.

    Use as a context manager. `exchange` may be called any number of times, always
    from the same thread.
    """

    @abc.abstractmethod
    def open(self, spec: HostSpec, site_ids: tuple[SiteId, ...]) -> None:
        """Make the hosts reachable; raises `FedMedError` if that is impossible."""

    @abc.abstractmethod
    def exchange(
        self,
        messages: Mapping[SiteId, Message],
        *,
        timeout_s: float | None = None,
        reference: State | None = None,
    ) -> dict[SiteId, Answer]:
        """Deliver each message to its site and wait for all answers.

        Args:
            messages: One per addressed site.
            timeout_s: The longest wait, plus a bounded grace; None = no limit.
            reference: The server's shared entries. A transport whose sites all are
                its own processes may measure replies by it, where they are made.

        Returns:
            Exactly one answer per addressed site, in sorted site order: its reply or
            the reason why there is none. Never raises for a site's fault.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """End processes and connections; may be called twice."""

    def __enter__(self: AnyTransport) -> AnyTransport:
        """Enter."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close, whatever happened."""
        self.close()


def check_addressed(
    messages: Mapping[SiteId, Message], known: tuple[SiteId, ...]
) -> None:
    """Raise if a message is for a site that the transport was not opened for."""
    strangers = sorted(set(messages) - set(known))
    if strangers:
        raise FedMedError(
            f"messages for sites that take no part: {', '.join(strangers)}",
            hint=f"the transport was opened for: {', '.join(sorted(known))}",
        )
