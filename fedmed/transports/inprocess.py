"""The reference transport: every site in this process, one after another.

What any other transport computes must equal, bit for bit, what this one computes.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedmed.errors import FedMedError
from fedmed.message import Answer, Message, SiteId, State
from fedmed.transports.keeper import HostKeeper, isolated
from fedmed.transports.transport import HostSpec, Transport, check_addressed


class InProcessTransport(Transport):
    """Calls the hosts one after another, in sorted order, with fixed threads.

    A host is opened when its first message comes and stays open. `timeout_s` has no
    effect: nothing can safely interrupt a call in one's own process. Neither is there
    protection from a host that ends the process.

    Args:
        durable: Open the hosts as if the process could change between two messages.

    Example:
        >>> spec = HostSpec("fedmed.transports.echo:open_host", {})
        >>> ask = {"b": Message("ping"), "a": Message("x")}
        >>> with InProcessTransport() as transport:
        ...     transport.open(spec, ("b", "a"))
        ...     answers = transport.exchange(ask)
        >>> [(site_id, answer.kind) for site_id, answer in answers.items()]
        [('a', 'x'), ('b', 'ping')]
    """

    def __init__(self, *, durable: bool = False) -> None:
        self._durable = durable
        self._keeper: HostKeeper | None = None
        self._site_ids: tuple[SiteId, ...] = ()

    def open(self, spec: HostSpec, site_ids: tuple[SiteId, ...]) -> None:
        """Note what to open; a site's own faults show at its first message."""
        self.close()
        self._keeper = HostKeeper(spec, durable=self._durable)
        self._site_ids = site_ids

    def exchange(
        self,
        messages: Mapping[SiteId, Message],
        *,
        timeout_s: float | None = None,
        reference: State | None = None,
    ) -> dict[SiteId, Answer]:
        """Let each addressed site answer; see `Transport.exchange`."""
        del timeout_s
        if self._keeper is None:
            raise FedMedError("the transport is not open", hint="call open() first")
        check_addressed(messages, self._site_ids)
        return {
            site_id: self._keeper.answer(
                site_id, isolated(messages[site_id]), reference=reference
            )
            for site_id in sorted(messages)
        }

    def close(self) -> None:
        """Close the hosts."""
        if self._keeper is not None:
            self._keeper.close()
        self._keeper = None
