"""Long replies that stay with their Ray actors, as the server sees them.

They are added where they are: only partial sums travel, and a whole reply only if
somebody looks at it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedmed.errors import SiteError
from fedmed.flat import CHUNK, FlatTensors, Layout, Section
from fedmed.message import SiteId
from fedmed.reduce import Counter
from fedmed.transports.packing import own_tensors
from fedmed.transports.ray_cluster import ray
from fedmed.transports.ray_worker import Block


class WaitingTensors(FlatTensors):
    """A long reply that stays with its actor until somebody looks at it.

    Args:
        layout: Where each tensor lies.
        site_id: Whose reply it is.
        worker: The actor.
    """

    __slots__ = ("__weakref__", "_here", "site_id", "worker")

    def __init__(self, layout: Layout, site_id: SiteId, worker: Any) -> None:
        self.layout = layout
        self.adder = ADDER
        self.site_id = site_id
        self.worker = worker
        self.squares = {}
        self._views = {}
        self._typed = {}
        self._here: torch.Tensor | None = None

    # Mappings compare by content and so have no hash; a reply is known by itself.
    __hash__ = object.__hash__

    @property
    def buffer(self) -> torch.Tensor:  # type: ignore[override]
        """The bytes; they travel when they are first asked for.

        Raises:
            SiteError: If the actor died since.
        """
        if self._here is None:
            with lost_replies(self.site_id):
                content = ray.get(self.worker.fetch.remote(self.site_id))
            (self._here,) = own_tensors([content])
            self.worker = None
        return self._here

    @property
    def waits(self) -> bool:
        """Whether it is still at its actor."""
        return self._here is None

    def joined(self, names: Sequence[str]) -> torch.Tensor:
        """Copy some tensors of one dtype to (N,); what was brought suffices."""
        if self.waits:
            return torch.cat([self[name].reshape(-1) for name in names])
        return super().joined(names)

    def keep(self, views: Mapping[str, torch.Tensor]) -> None:
        """Take some tensors that came without the others."""
        self._views.update(views)


@contextlib.contextmanager
def lost_replies(site_id: SiteId) -> Iterator[None]:
    """Say in our words that an actor died with a reply that was not fetched.

    Raises:
        SiteError: In place of Ray's own error.
    """
    try:
        yield
    except ray.exceptions.RayError:
        raise SiteError(
            f"site {site_id}: its process died with a reply that was accepted",
            hint="Go on with --resume.",
        ) from None


class ActorsAdder:
    """Has replies added by the actors that they wait at; see `fedmed.flat.Adder`."""

    def mean(
        self, section: Section, rows: Sequence[FlatTensors], shares: Sequence[float]
    ) -> FlatTensors | None:
        """Let the actors add what waits with them; only partial sums travel."""
        waiting = [r for r in rows if isinstance(r, WaitingTensors) and r.waits]
        if len(waiting) < len(rows):
            return None
        groups: dict[Any, dict[SiteId, int]] = {}
        for place, row in enumerate(waiting):
            groups.setdefault(row.worker, {})[row.site_id] = place
        calls = [
            worker.partial_sums.remote(section.name, places, list(shares))
            for worker, places in groups.items()
        ]
        with lost_replies(", ".join(row.site_id for row in waiting)):
            by_worker = ray.get(calls)
        layout = section.alone
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
        for number, run in enumerate(layout.runs):
            blocks = [block for found in by_worker for block in found[number]]
            add_blocks(run.read(buffer), sorted(blocks, key=lambda block: block[0]))
        return FlatTensors(layout, buffer)

    def bring(self, rows: Sequence[FlatTensors], names: tuple[str, ...]) -> None:
        """Fetch some small tensors of replies that wait, one call per actor."""
        groups: dict[Any, list[WaitingTensors]] = {}
        for row in rows:
            if isinstance(row, WaitingTensors) and row.waits:
                groups.setdefault(row.worker, []).append(row)
        calls = [
            worker.read.remote([row.site_id for row in group], names)
            for worker, group in groups.items()
        ]
        with lost_replies("some"):
            found = ray.get(calls)
        for group, arrived in zip(groups.values(), found, strict=True):
            for row, (slots, content) in zip(group, arrived, strict=True):
                (own,) = own_tensors([content])
                row.keep(dict(FlatTensors(Layout.interned(slots), own)))


ADDER = ActorsAdder()


def add_blocks(out: torch.Tensor, blocks: Sequence[Block]) -> None:
    """Finish a sum from its blocks, or a maximum of whole numbers, chunk by chunk."""
    # What the object store lends is read-only, and torch has no such tensors.
    arrays = [array for _, _, array in blocks]
    if not out.dtype.is_floating_point:
        out.copy_(torch.from_numpy(np.max(arrays, axis=0)))
        return
    for start in range(0, len(out), CHUNK):
        part = slice(start, start + CHUNK)
        counter = Counter()
        for (_, level, _), array in zip(blocks, arrays, strict=True):
            counter.push(level, torch.from_numpy(array[part].copy()))
        out[part].copy_(counter.total())
