"""The process of some sites on a Ray cluster: an actor's code.

Long replies stay here until somebody looks at them, and are added here as far as the
tree of the sum allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedmed.flat import FlatTensors, Slot, pack
from fedmed.message import Message, SiteFailure, SiteId
from fedmed.reduce import block_sum, whole_blocks
from fedmed.transports.keeper import HostKeeper, isolated
from fedmed.transports.packing import Sheet, own_tensors, unpack
from fedmed.transports.transport import HostSpec

SHORT_REPLY = 1 << 20
"""Bytes up to which a reply travels at once; a longer one waits to be added up."""

FlatTensorsAsArray = tuple[tuple[Slot, ...], np.ndarray]
"""Slots of a layout, and the bytes."""

Block = tuple[int, int, np.ndarray]
"""First place and level of a block of the tree, and its sum."""


@dataclass(frozen=True)
class Parcel:
    """A reply as an actor sends it.

    Attributes:
        kind: Of the message.
        header: Of the message.
        norms: Of the message.
        slots: Of its layout.
        content: The bytes; None: they wait at the actor.
    """

    kind: str
    header: Mapping[str, Any]
    norms: Mapping[str, float] | None
    slots: tuple[Slot, ...]
    content: np.ndarray | None


class Worker:
    """The process of some sites: an actor's code."""

    def __init__(self, spec: HostSpec, durable: bool) -> None:
        torch.set_num_threads(spec.threads)
        self._keeper = HostKeeper(spec, durable=durable)
        self._replies: dict[SiteId, FlatTensors] = {}

    def ready(self) -> None:
        """Return: the process has started."""

    def answer(
        self,
        jobs: Sequence[tuple[SiteId, Sheet]],
        shared: Sequence[np.ndarray],
        own: Sequence[np.ndarray],
        reference: Sheet | None,
    ) -> list[Parcel | SiteFailure]:
        """Let some sites answer, one after another; long replies wait here."""
        tensors = own_tensors([*shared, *own])
        origin = dict(unpack(reference, tensors).tensors) if reference else None
        self._replies = {}
        parcels: list[Parcel | SiteFailure] = []
        for site_id, sheet in jobs:
            message = isolated(unpack(sheet, tensors))
            answer = self._keeper.answer(site_id, message, reference=origin)
            if isinstance(answer, SiteFailure):
                parcels.append(answer)
            else:
                parcels.append(self._parcel(site_id, answer))
        return parcels

    def _parcel(self, site_id: SiteId, answer: Message) -> Parcel:
        assert isinstance(answer.tensors, FlatTensors)
        layout, content = answer.tensors.layout, None
        if layout.num_bytes <= SHORT_REPLY:
            content = answer.tensors.buffer.numpy()
        else:
            self._replies[site_id] = answer.tensors
        return Parcel(answer.kind, answer.header, answer.norms, layout.slots, content)

    def fetch(self, site_id: SiteId) -> np.ndarray:
        """Give one reply that waits here."""
        return self._replies[site_id].buffer.numpy()

    def read(
        self, site_ids: Sequence[SiteId], names: tuple[str, ...]
    ) -> list[FlatTensorsAsArray]:
        """Give some tensors of replies that wait here."""
        found = []
        for site in site_ids:
            packed = pack({name: self._replies[site][name] for name in names})
            found.append((packed.layout.slots, packed.buffer.numpy()))
        return found

    def partial_sums(
        self, section: str, places: Mapping[SiteId, int], shares: Sequence[float]
    ) -> list[list[Block]]:
        """Add the replies that wait here as far as whole blocks of the tree go.

        Args:
            section: Which part of the replies.
            places: Of the sites that are here, among all that take part.
            shares: Weights of all that take part.

        Returns:
            The blocks of each run of the section.
        """
        by_place = {place: self._replies[site] for site, place in places.items()}
        runs = next(iter(by_place.values())).layout.sections[section].runs
        result = []
        for run in runs:
            rows = {p: run.read(flat.buffer) for p, flat in by_place.items()}
            blocks: list[Block] = []
            for first, level in whole_blocks(sorted(rows)):
                inside = range(first, first + (1 << level))
                parts = [rows[place] for place in inside]
                if run.dtype.is_floating_point:
                    total = block_sum(parts, [shares[place] for place in inside])
                else:
                    total = torch.stack(parts).amax(0)
                blocks.append((first, level, total.numpy()))
            result.append(blocks)
        return result

    def close(self) -> None:
        """Close the hosts."""
        self._keeper.close()
