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

from fedmed.message import Message
from fedmed.transports.keeper import dense, sent


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies among the arrays of a bundle, and how to read it."""

    index: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Sheet:
    """A message without its tensors' content; picklable and small."""

    kind: str
    header: Mapping[str, Any]
    slots: Mapping[str, Slot]

    def moved(self, place: Mapping[int, int]) -> Sheet:
        """Give the sheet for a bundle whose arrays lie in other places."""
        slots = {
            name: replace(slot, index=place[slot.index])
            for name, slot in self.slots.items()
        }
        return replace(self, slots=slots)


@dataclass
class Bundle:
    """Collects the distinct tensors of several messages.

    Tensors are the same if they are the same object: a server that sends its weights
    to a hundred sites sends them once per worker.
    """

    arrays: list[np.ndarray] = field(default_factory=list)
    _index: dict[int, Slot] = field(default_factory=dict)
    _tables: dict[int, Mapping[str, Slot]] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)

    def add(self, message: Message) -> Sheet:
        """Add a message's tensors and give the rest of it."""
        tensors = message.tensors
        if id(tensors) not in self._tables:
            self._alive.append(tensors)
            slots = {name: self._slot(tensor) for name, tensor in tensors.items()}
            self._tables[id(tensors)] = slots
        return Sheet(message.kind, sent(message.header), self._tables[id(tensors)])

    def _slot(self, tensor: torch.Tensor) -> Slot:
        if id(tensor) not in self._index:
            self._alive.append(tensor)
            flat = dense(tensor).reshape(-1)
            slot = Slot(len(self.arrays), str(tensor.dtype), tuple(tensor.shape))
            self.arrays.append(flat.view(torch.uint8).numpy())
            self._index[id(tensor)] = slot
        return self._index[id(tensor)]


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
        {name: _read(slot, tensors[slot.index]) for name, slot in sheet.slots.items()},
    )


def _read(slot: Slot, content: torch.Tensor) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, slot.dtype.removeprefix("torch."))
    return content.view(dtype).reshape(slot.shape)
