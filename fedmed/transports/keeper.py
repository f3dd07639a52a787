"""What every transport does at the site's end: keep hosts open and let them answer.

One place, so that a site's work has the same threads, the same tensors and the same
failures whichever way the message came.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

from fedmed import exact_json
from fedmed.errors import WireError
from fedmed.message import Answer, Message, SiteId
from fedmed.transports.failure import describe_failure
from fedmed.transports.transport import Host, HostSpec

logger = logging.getLogger(__name__)


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

    def answer(self, site_id: SiteId, message: Message) -> Answer:
        """Let one site answer; its host is opened at its first message.

        What the host raises becomes a `SiteFailure`; only `KeyboardInterrupt` passes.
        """
        try:
            with fixed_threads(self.spec.threads):
                return isolated(self._host(site_id).handle(message))
        except (Exception, SystemExit) as error:
            return describe_failure(self._hosts.get(site_id), error)

    def _host(self, site_id: SiteId) -> Host:
        if site_id not in self._hosts:
            self._hosts[site_id] = self.spec.open(site_id, durable=self.durable)
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
    try:
        header = exact_json.loads(exact_json.dumps(message.header))
    except ValueError as error:
        raise WireError(f"cannot send this message: {error}") from error
    tensors = sorted(message.tensors.items())
    return Message(
        message.kind,
        header,
        {name: _lazy_clone(tensor) for name, tensor in tensors},
    )


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Give the tensor detached, on the CPU, in row-major order; a view if it can."""
    return tensor.detach().to("cpu").contiguous()


def _lazy_clone(tensor: torch.Tensor) -> torch.Tensor:
    tensor = dense(tensor)
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
