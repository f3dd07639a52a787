"""What every transport does at the site's end: keep hosts open and let them answer.

One place, so that a site's work has the same threads, the same tensors and the same
failures whichever way the message came.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fedmed import exact_json
from fedmed.errors import WireError
from fedmed.flat import FlatTensors, lazy_clone, pack
from fedmed.gate import Yardstick, measure
from fedmed.message import Answer, Message, SiteId, State
from fedmed.transports.failure import describe_failure
from fedmed.transports.transport import Host, HostSpec

logger = logging.getLogger(__name__)

PackInto = Callable[..., FlatTensors]
"""Packs a reply somewhere; called as `fedmed.flat.pack` without a buffer."""


class HostKeeper:
    """The open hosts of one process.

    Args:
        spec: How to open a host.
        durable: The process may change between two messages; see `HostSpec.open`.
    """

    def __init__(self, spec: HostSpec, *, durable: bool) -> None:
        self.spec = spec
        self.durable = durable
        self._hosts: dict[SiteId, Host] = {}
        self._common: dict[str, Any] = {}
        self._yardstick: Yardstick | None = None

    def answer(
        self,
        site_id: SiteId,
        message: Message,
        *,
        reference: State | None = None,
        pack_into: PackInto = pack,
    ) -> Answer:
        """Let one site answer; its host is opened at its first message.

        Args:
            site_id: The site.
            message: For it.
            reference: The server's shared entries; the reply is measured by them.
            pack_into: Copies the tensors of the reply to where they are to lie.

        Returns:
            The reply as it arrives from another machine: its header what
            `fedmed.exact_json` makes of it, its tensors dense copies. What the host
            raises becomes a `SiteFailure`; only `KeyboardInterrupt` passes.
        """
        before = _versions(message)
        try:
            with fixed_threads(self.spec.threads):
                reply = self._host(site_id).handle(message)
                header = sent(reply.header)
                if reference is None:
                    packed = Message(reply.kind, header, pack_into(reply.tensors))
                else:
                    packed = self._measured(reply, header, reference, pack_into)
                _require_unchanged(message, before)
            return packed
        except (Exception, SystemExit) as error:
            return describe_failure(self._hosts.get(site_id), error)

    def _measured(
        self,
        reply: Message,
        header: Mapping[str, Any],
        reference: State,
        pack_into: PackInto,
    ) -> Message:
        """Pack a reply and measure it while it is at hand."""
        yardstick, kind = self._yardstick_of(reference), reply.kind
        tensors = pack_into(
            reply.tensors, origin=lambda run: yardstick.origin(kind, run)
        )
        norms = measure(Message(kind, header, tensors), yardstick)
        return Message(kind, header, tensors, norms)

    def _yardstick_of(self, reference: State) -> Yardstick:
        """One yardstick for all replies of an exchange."""
        if self._yardstick is None or self._yardstick.reference is not reference:
            self._yardstick = Yardstick(reference)
        return self._yardstick

    def forget_reference(self) -> None:
        """Look no longer at what the last replies were measured by."""
        self._yardstick = None

    def _host(self, site_id: SiteId) -> Host:
        if site_id not in self._hosts:
            self._hosts[site_id] = self.spec.open(
                site_id, durable=self.durable, common=self._common
            )
        return self._hosts[site_id]

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


def isolated(message: Message) -> Message:
    """Give an equal message that cannot be changed through the original.

    Header and tensors become just what arrives from another machine: the header what
    `fedmed.exact_json` makes of it, the tensors sorted by name, detached, dense and
    row-major, on the CPU. Sums over them then have one order in all transports.

    Nothing is copied until one of the two sides writes: the tensors are lazy clones,
    which torch copies at the first write to either. Memory that torch does not own
    (an array behind `from_numpy`) is copied at once. The one gap: a NumPy view that
    the sender took of its own tensor before sending, and writes to afterwards.

    Raises:
        WireError: If the header holds what cannot be sent.
    """
    tensors = sorted(message.tensors.items())
    return Message(
        message.kind,
        sent(message.header),
        {name: lazy_clone(dense(tensor)) for name, tensor in tensors},
    )


def sent(header: Mapping[str, Any]) -> dict[str, Any]:
    """Give a header as it arrives from another machine.

    Raises:
        WireError: If it holds what cannot be sent.
    """
    if all(map(_is_plain, header, header.values())):
        return {name: _copied(value) for name, value in sorted(header.items())}
    try:
        arrived: dict[str, Any] = exact_json.loads(exact_json.dumps(header))
    except ValueError as error:
        raise WireError(f"cannot send this message: {error}") from error
    return arrived


_WHOLE = (str, int, bool, type(None))


def _is_plain(name: object, value: object) -> bool:
    """Whether JSON gives back just this: a name and a value, or a few values."""
    if type(name) is not str:
        return False
    if type(value) is dict:
        return all(type(n) is str and _is_scalar(v) for n, v in value.items())
    if type(value) is list:
        return all(map(_is_scalar, value))
    return _is_scalar(value)


def _is_scalar(value: object) -> bool:
    return type(value) in _WHOLE or (type(value) is float and math.isfinite(value))


def _copied(value: Any) -> Any:
    if type(value) is dict:
        return dict(sorted(value.items()))
    return list(value) if type(value) is list else value


def _versions(message: Message) -> tuple[int, ...]:
    return tuple([tensor._version for tensor in message.tensors.values()])


def _require_unchanged(message: Message, before: tuple[int, ...]) -> None:
    """Raise if a host wrote to the tensors that it was sent: others read them too."""
    if _versions(message) != before:
        raise WireError(
            f"the answer to {message.kind!r} changed tensors of the message in place",
            hint="A site's half of a strategy must copy what it wants to change.",
        )


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Give the tensor detached, on the CPU, in row-major order; a view if it can."""
    return tensor.detach().to("cpu").contiguous()


@contextlib.contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """Compute with so many torch threads, and restore their number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
