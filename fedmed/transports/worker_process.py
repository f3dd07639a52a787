"""A worker of one machine: the process that plays some of the sites.

It reads what the server sends in place, in shared memory, and leaves its sites'
replies in shared memory of its own; through the pipe go names and places only.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch
from torch import Tensor

from fedmed.flat import FlatTensors, Layout, Origin, Slot, pack
from fedmed.message import Answer, Message, SiteFailure, SiteId
from fedmed.reduce import add_rows
from fedmed.transports.arena import Pool, Segment
from fedmed.transports.keeper import HostKeeper, sent
from fedmed.transports.transport import HostSpec

KEPT_LAYOUTS = 256
"""Layouts after which a worker numbers them anew: shapes may differ in every reply."""

Key = tuple[int, int]
"""Names a segment: its owner (0 is the server), and its number."""

Place = tuple[int, int, int]
"""Where a row of numbers starts: owner, number of the segment, offset in bytes."""

Table = tuple[tuple[Slot, int], ...]
"""Slots (their offsets within the segment) and the segment of each."""


@dataclass(frozen=True)
class Errand:
    """One site's message: everything but its tensors.

    Attributes:
        site_id: The site.
        kind: Of the message.
        header: Of the message.
        table: Which of the job's tables lists its tensors.
    """

    site_id: SiteId
    kind: str
    header: Mapping[str, Any]
    table: int


@dataclass(frozen=True)
class Job:
    """Messages to sites of one worker.

    Attributes:
        errands: In the order in which they are run.
        tables: Where tensors lie.
        reference: The table of the server's shared entries, to measure replies by.
    """

    errands: tuple[Errand, ...]
    tables: tuple[Table, ...]
    reference: int | None = None


@dataclass(frozen=True)
class Sum:
    """Columns of a weighted sum of rows; see `fedmed.reduce.add_rows`.

    Attributes:
        out: The whole result.
        rows: Each whole row.
        weights: One per row.
        dtype: Of all of them.
        start: First column.
        stop: End of the columns.
    """

    out: Place
    rows: tuple[Place, ...]
    weights: tuple[float, ...]
    dtype: torch.dtype
    start: int
    stop: int


@dataclass(frozen=True)
class Parcel:
    """A reply, but for its tensors.

    Attributes:
        kind: Of the message.
        header: Of the message.
        norms: Of the message.
        layout: Number of its layout among those that this worker has told of.
        place: Segment of this worker and offset.
    """

    kind: str
    header: Mapping[str, Any]
    norms: Mapping[str, float] | None
    layout: int
    place: tuple[int, int]


@dataclass(frozen=True)
class Delivery:
    """The answers to one job, in the order of its errands.

    Attributes:
        answers: Replies and failures.
        used: Segments of this worker that the replies may lie in.
    """

    answers: list[Parcel | SiteFailure]
    used: list[int]


@dataclass(frozen=True)
class Told:
    """What goes with every word between server and worker: news of memory.

    Attributes:
        word: "job", "sum", "close" down, "done" up.
        content: A `Job`, a `Sum`, a `Delivery` or nothing.
        made: Name and size of segments whose descriptors follow.
        dropped: Segments to forget.
        freed: Numbers of the receiver's own segments that may be used again.
        layouts: Layouts named from now on by their numbers.
    """

    word: str
    content: Any = None
    made: tuple[tuple[Key, int], ...] = ()
    dropped: tuple[Key, ...] = ()
    freed: tuple[int, ...] = ()
    layouts: Mapping[int, tuple[Slot, ...]] = field(default_factory=dict)


def tell(pipe: Connection, told: Told, descriptors: list[int]) -> None:
    """Send a word, and the descriptors of the segments that it announces."""
    pipe.send(told)
    for descriptor in descriptors:
        send_handle(pipe, descriptor, None)


def listen(pipe: Connection) -> tuple[Told, dict[Key, Segment]]:
    """Receive a word, and map the segments that it announces."""
    told: Told = pipe.recv()
    made = {}
    for key, size in told.made:
        made[key] = Segment(key[1], recv_handle(pipe), size)
    return told, made


class Worker:
    """The worker's side of the pipe.

    Args:
        pipe: To the server.
        spec: How to open a host.
        durable: See `HostSpec.open`.
    """

    def __init__(self, pipe: Connection, spec: HostSpec, *, durable: bool) -> None:
        self._pipe = pipe
        self._keeper = HostKeeper(spec, durable=durable)
        self._pool = Pool()
        self._announced: set[int] = set()
        self._mapped: dict[Key, Segment] = {}
        self._layouts: dict[Layout, int] = {}
        self._new_layouts: dict[int, tuple[Slot, ...]] = {}

    def serve(self) -> None:
        """Answer until the server says "close" or is gone."""
        try:
            while self._answer():
                pass
        except (EOFError, ConnectionError):
            pass  # the server is gone, and nobody waits for an answer
        finally:
            self._keeper.close()

    def _answer(self) -> bool:
        """Do as the next word says; False if it is the last."""
        told, made = listen(self._pipe)
        self._mapped.update(made)
        for key in told.dropped:
            self._mapped.pop(key).close()
        self._pool.release(list(told.freed))
        if told.word == "sum":
            self._add(told.content)
            self._reply(None)
        elif told.word == "job":
            delivery = self._run(told.content)
            self._keeper.forget_reference()
            for segment in self._mapped.values():
                segment.end_loan()
            self._reply(delivery)
        return told.word != "close"

    def _reply(self, content: Any) -> None:
        new = [n for n in self._pool.segments if n not in self._announced]
        self._announced.update(new)
        segments = [self._pool.segments[n] for n in new]
        told = Told(
            "done",
            content,
            made=tuple(((0, s.number), s.size) for s in segments),
            dropped=tuple((0, number) for number in self._pool.dropped),
            layouts=self._new_layouts,
        )
        self._pool.dropped.clear()
        self._new_layouts = {}
        tell(self._pipe, told, [segment.descriptor for segment in segments])

    def _run(self, job: Job) -> Delivery:
        if len(self._layouts) > KEPT_LAYOUTS:
            self._layouts.clear()
        whole: dict[int, Tensor] = {}
        tables = [self._read(table, whole) for table in job.tables]
        reference = None if job.reference is None else tables[job.reference]
        tray = Tray(self._pool, len(job.errands))
        parcels: list[Parcel | SiteFailure] = []
        for errand in job.errands:
            # Other sites have the same header; what one does to its own is not seen.
            header = sent(errand.header)
            message = Message(errand.kind, header, tables[errand.table])
            answer = self._keeper.answer(
                errand.site_id, message, reference=reference, pack_into=tray.pack
            )
            parcels.append(self._parcel(answer, tray))
            if isinstance(answer, SiteFailure) and any(
                t._version for t in whole.values()
            ):
                # It wrote to what it was sent. The next site reads the original.
                for number in whole:
                    self._mapped[0, number].renew_guard()
                whole = {}
                tables = [self._read(table, whole) for table in job.tables]
                reference = None if job.reference is None else tables[job.reference]
        return Delivery(parcels, tray.used)

    def _parcel(self, answer: Answer, tray: Tray) -> Parcel | SiteFailure:
        if isinstance(answer, SiteFailure):
            return answer
        assert isinstance(answer.tensors, FlatTensors)
        layout = answer.tensors.layout
        if layout not in self._layouts:
            self._layouts[layout] = len(self._layouts)
            self._new_layouts[self._layouts[layout]] = layout.slots
        number = self._layouts[layout]
        return Parcel(answer.kind, answer.header, answer.norms, number, tray.last)

    def _read(self, table: Table, whole: dict[int, Tensor]) -> dict[str, Tensor]:
        """View the server's tensors; `whole` holds the segments viewed so far."""
        tensors = {}
        for slot, number in table:
            if number not in whole:
                whole[number] = self._mapped[0, number].guarded()
            tensors[slot.name] = slot.read(whole[number])
        return tensors

    def _add(self, job: Sum) -> None:
        item = job.dtype.itemsize
        part = slice(job.start * item, job.stop * item)

        def columns(place: Place) -> Tensor:
            owner, number, offset = place
            whole = self._mapped[owner, number].tensor()[0]
            return whole[offset:][part].view(job.dtype)

        rows = [columns(place) for place in job.rows]
        add_rows(columns(job.out), rows, list(job.weights))


class Tray:
    """Where the replies to one job are laid, one behind the other.

    Args:
        pool: Gives the memory.
        expected: How many replies are to come.
    """

    def __init__(self, pool: Pool, expected: int) -> None:
        self._pool = pool
        self._left = expected
        self._segment: Segment | None = None
        self._whole = torch.empty(0, dtype=torch.uint8)
        self._end = 0
        self.used: list[int] = []
        self.last = (0, 0)

    def pack(
        self, tensors: Mapping[str, Tensor], *, origin: Origin | None = None
    ) -> FlatTensors:
        """Pack one reply, behind the one before."""
        layout = Layout.of(tensors)
        size = layout.num_bytes
        if self._segment is None or self._end + size > self._segment.size:
            # Replies to one job are mostly alike.
            self._segment = self._pool.take(size * self._left)
            self.used.append(self._segment.number)
            self._whole = self._segment.tensor()[0]
            self._end = 0
        self.last = (self._segment.number, self._end)
        self._left -= 1
        room = self._whole[self._end : self._end + size]
        packed = pack(tensors, room, origin=origin, layout=layout)
        self._end += size
        return packed


def run_worker(
    pipe: Connection, spec: HostSpec, durable: bool, foreign: list[Connection]
) -> None:
    """Be a worker: what the new process does.

    Args:
        pipe: To the server.
        spec: How to open a host.
        durable: See `HostSpec.open`.
        foreign: The server's ends of pipes that came along; with one of them open
            here, a worker would not notice that the server is gone.
    """
    for other in foreign:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # What a site has to say travels in its answer; the screen is the server's.
    logging.getLogger().handlers = [logging.NullHandler()]
    threading.Thread(target=_follow_server, daemon=True).start()
    torch.set_num_threads(spec.threads)
    # What came along is no garbage, and to look through it would copy its pages.
    gc.freeze()
    Worker(pipe, spec, durable=durable).serve()


def _follow_server() -> None:
    """End with the server, also in the middle of a site's work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
