"""Hosts that try the ways in which shared memory could show.

Imported by name in other processes, so this folder must be on their path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from toy_federation import misbehave

from fedmed.message import Message
from fedmed.seeds import torch_rng

NUM_COLUMNS = 300_001
"""A sum over the replies of eight sites is then long enough for all workers."""


class SharingHost:
    """Answers by the kind of the message.

    Args:
        site_id: Its site.
        options: "closed": a folder in which it notes that it was closed.
    """

    def __init__(self, site_id: str, options: Mapping[str, Any]) -> None:
        self.site_id = site_id
        self.closed = options.get("closed")
        self.received: dict[str, torch.Tensor] = {}

    def handle(self, message: Message) -> Message:
        """Answer."""
        misbehave(message.header.get("misbehave", {}).get(self.site_id, ""))
        answer: Message = getattr(self, message.kind)(message)
        return answer

    def echo(self, message: Message) -> Message:
        """Send back what came."""
        return message

    def vandal(self, message: Message) -> Message:
        """Write to what came, if the message says so; and say what is there."""
        if self.site_id in message.header["vandals"]:
            message.tensors["w"].add_(1.0)
        return Message("Seen", {}, {"w": message.tensors["w"].clone()})

    def keep(self, message: Message) -> Message:
        """Keep what came, without a copy."""
        self.received = dict(message.tensors)
        return Message("Kept")

    def kept(self, message: Message) -> Message:
        """Show what was kept."""
        del message
        return Message("Kept", {}, self.received)

    def describe(self, message: Message) -> Message:
        """Say what the header looks like here."""
        return Message("Seen", {"header": repr(dict(message.header))})

    def draw(self, message: Message) -> Message:
        """Send much: the same in every process for a site and a round."""
        number = message.header["round"]
        rng = torch_rng(11, self.site_id, number)
        wide = torch.randn(NUM_COLUMNS, generator=rng)
        tensors = {
            "state/a": wide,
            "state/b": torch.randn(3, 5, generator=rng).T,
            "state/n": torch.tensor(number + len(self.site_id)),
            "state/d": torch.randn(1000, generator=rng, dtype=torch.float64),
            "extra/control/a": wide * 3,
        }
        return Message("Weights", {"keeps": False, "num_examples": 1}, tensors)

    def close(self) -> None:
        """Leave a note."""
        if self.closed:
            (Path(self.closed) / self.site_id).write_text("closed")


def open_host(site_id: str, options: Mapping[str, Any]) -> SharingHost:
    """Open one."""
    return SharingHost(site_id, options)
