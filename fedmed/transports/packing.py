"""Messages of one exchange as plain arrays, each distinct tensor once.

For transports inside one trust domain that move arrays without copies (Ray's object
store). Between institutions messages travel as `fedmed.wire` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedmed.flat import Slot
from fedmed.message import Message
from fedmed.transports.keeper import dense, sent

Table = tuple[tuple[Slot, int], ...]
"""Slots, and the array of each."""


@dataclass(frozen=True)
class Sheet:
    """A message without its tensors' content; picklable and small.

    Attributes:
        kind: Of the message.
        header: Of the message.
        table: Of each tensor, the slot within its array and the array's number.
    """

    kind: str
    header: Mapping[str, Any]
    table: Table

    def moved(self, place: Mapping[int, int]) -> Sheet:
        """Give the sheet for a bundle whose arrays lie in other places."""
        table = tuple((slot, place[number]) for slot, number in self.table)
        return replace(self, table=table)


@dataclass
class Bundle:
    """Collects the distinct tensors of several messages.

    Tensors are the same if they are the same object: a server that sends its weights
    to a hundred sites sends them once per worker.
    """

    arrays: list[np.ndarray] = field(default_factory=list)
    _number: dict[int, int] = field(default_factory=dict)
    _tables: dict[int, Table] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)

    def add(self, message: Message) -> Sheet:
        """Add a message's tensors and give the rest of it."""
        tensors = message.tensors
        if id(tensors) not in self._tables:
            self._alive.append(tensors)
            self._tables[id(tensors)] = tuple(
                (Slot(name, tensor.dtype, tuple(tensor.shape), 0), self._place(tensor))
                for name, tensor in tensors.items()
            )
        return Sheet(message.kind, sent(message.header), self._tables[id(tensors)])

    def _place(self, tensor: torch.Tensor) -> int:
        """Give the number of the array that holds a tensor."""
        if id(tensor) not in self._number:
            self._alive.append(tensor)
            flat = dense(tensor).reshape(-1)
            self._number[id(tensor)] = len(self.arrays)
            self.arrays.append(flat.view(torch.uint8).numpy())
        return self._number[id(tensor)]


def own_tensors(arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Copy arrays (which may be read-only, shared memory) into torch's own memory."""
    tensors = []
    for array in arrays:
        tensor = torch.empty(array.shape, dtype=torch.uint8)
        np.copyto(tensor.numpy(), array)
        tensors.append(tensor)
    return tensors


def unpack(sheet: Sheet, tensors: Sequence[torch.Tensor]) -> Message:
    """Put a sheet and the bundle's bytes together again.

    Args:
        sheet: As `Bundle.add` gave it.
        tensors: The bundle's arrays as flat uint8 tensors. The message's tensors are
            views of them; messages of one bundle may share memory.
    """
    return Message(
        sheet.kind,
        sheet.header,
        {slot.name: slot.read(tensors[number]) for slot, number in sheet.table},
    )
