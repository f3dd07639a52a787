"""The reference transport: every site in this process, one after another.

What any other transport computes must equal, bit for bit, what this one computes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from fedmed.errors import FedMedError
from fedmed.message import Answer, Message, SiteId
from fedmed.transports.failure import describe_failure
from fedmed.transports.transport import Host, HostSpec, Transport

logger = logging.getLogger(__name__)


class InProcessTransport(Transport):
    """Calls the hosts one after another, in sorted order, with fixed threads.

    A host is opened when its first message comes and stays open. `timeout_s` has no
    effect: nothing can safely interrupt a call in one's own process. Neither is there
    protection from a host that ends the process.

    Example:
        >>> spec = HostSpec("fedmed.transports.echo:open_host", {})
        >>> with InProcessTransport() as transport:
        ...     transport.open(spec, ("b", "a"))
        ...     answers = transport.exchange({"b": Message("ping"), "a": Message("x")})
        >>> [(site_id, answer.kind) for site_id, answer in answers.items()]
        [('a', 'x'), ('b', 'ping')]
    """

    def __init__(self) -> None:
        self._spec: HostSpec | None = None
        self._site_ids: frozenset[SiteId] = frozenset()
        self._hosts: dict[SiteId, Host] = {}

    def open(self, spec: HostSpec, site_ids: tuple[SiteId, ...]) -> None:
        """Note what to open; a site's own faults show at its first message."""
        self._spec = spec
        self._site_ids = frozenset(site_ids)

    def exchange(
        self, messages: Mapping[SiteId, Message], *, timeout_s: float | None = None
    ) -> dict[SiteId, Answer]:
        """Let each addressed site answer; see `Transport.exchange`."""
        del timeout_s
        if self._spec is None:
            raise FedMedError("the transport is not open", hint="call open() first")
        check_addressed(messages, self._site_ids)
        with fixed_threads(self._spec.threads):
            return {
                site: self._answer(site, messages[site]) for site in sorted(messages)
            }

    def _answer(self, site_id: SiteId, message: Message) -> Answer:
        assert self._spec is not None
        try:
            if site_id not in self._hosts:
                self._hosts[site_id] = self._spec.open(site_id, durable=False)
            return isolated(self._hosts[site_id].handle(isolated(message)))
        except (Exception, SystemExit) as error:
            return describe_failure(self._hosts.get(site_id), error)

    def close(self) -> None:
        """Close the hosts; one that raises while closing does not stop the others."""
        while self._hosts:
            site_id, host = self._hosts.popitem()
            try:
                host.close()
            except Exception as error:
                logger.warning(
                    "site %s raised %s while closing", site_id, type(error).__name__
                )
        self._spec = None


def check_addressed(
    messages: Mapping[SiteId, Message], known: frozenset[SiteId]
) -> None:
    """Raise if a message is for a site that the transport was not opened for."""
    strangers = sorted(set(messages) - known)
    if strangers:
        raise FedMedError(
            f"messages for sites that take no part: {', '.join(strangers)}",
            hint=f"the transport was opened for: {', '.join(sorted(known))}",
        )


def isolated(message: Message) -> Message:
    """Give an equal message whose tensors cannot be changed through the original.

    Nothing is copied until one of the two sides writes: the tensors are lazy clones,
    which torch copies at the first write to either. Memory that torch does not own
    (an array behind `from_numpy`) is copied at once. The one gap: a NumPy view that
    the sender took of its own tensor before sending, and writes to afterwards.
    """
    tensors = {name: _lazy_clone(tensor) for name, tensor in message.tensors.items()}
    return replace(message, tensors=tensors)


def _lazy_clone(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:
        return tensor.clone()


@contextlib.contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """Compute with so many torch threads, and restore their number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
