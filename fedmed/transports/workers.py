"""Many sites on the cores of one machine, with the weights in shared memory.

A fixed number of worker processes keeps the hospitals. All sites of a worker travel
in one message through a pipe; the weights are written once and read in place by all
workers, replies are read in place by the server, and long sums over the sites are
formed by all workers together, column by column. Nothing is polled.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from fedmed.errors import FedMedError, UsageError
from fedmed.flat import CHUNK, FlatTensors, Layout, Section, Slot, pack
from fedmed.message import Answer, Message, SiteFailure, SiteId, State
from fedmed.reduce import add_rows, mean_of_rows
from fedmed.transports.arena import Pool, Segment
from fedmed.transports.keeper import dense, sent
from fedmed.transports.placement import Placement, Wave
from fedmed.transports.transport import HostSpec, Transport, check_addressed
from fedmed.transports.worker_process import (
    Delivery,
    Errand,
    Job,
    Key,
    Place,
    Sum,
    Table,
    Told,
    listen,
    run_worker,
    tell,
)

logger = logging.getLogger(__name__)

CLOSE_GRACE_S = 10.0
"""How long hosts may take to close before their processes are ended."""

LONG_SUM = 1 << 21
"""Numbers read by a sum from which on the workers help with it."""

DIED = SiteFailure("died", "the process that plays this site died")
LATE = SiteFailure("timeout", "no answer in time; its process was ended")


@dataclass
class Crewman:
    """A worker as the server sees it.

    Attributes:
        owner: Names its segments; no two workers ever have the same.
        process: The process.
        pipe: To it.
        known: Segments that it has mapped.
        segments: Its own segments, mapped here.
        freed: Numbers of its own segments that nobody here looks at any more.
        layouts: Layouts it has told of.
    """

    owner: int
    process: BaseProcess
    pipe: Connection
    known: set[Key] = field(default_factory=set)
    segments: dict[int, Segment] = field(default_factory=dict)
    freed: deque[int] = field(default_factory=deque)
    layouts: dict[int, Layout] = field(default_factory=dict)


class WorkersTransport(Transport):
    """Worker processes that keep their hospitals between messages.

    Args:
        num_workers: Processes, never more than sites; None: as many of the cores as
            shorten a round: three for six sites on four cores.
        durable: Let hosts write their state through to disk after each message; see
            `HostSpec.open`.

    A worker that dies or hangs is replaced; its sites get the failure "died" or
    "timeout" and no longer share a message, so that the one at fault is found and
    costs the others nothing more.

    Replies lie in the memory of the worker that made them for as long as anything
    here looks at them.
    """

    def __init__(
        self, *, num_workers: int | None = None, durable: bool = False
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise UsageError(f"num_workers is {num_workers}, expected at least 1")
        self._num_workers = num_workers
        self._durable = durable
        self._spec: HostSpec | None = None
        self._site_ids: tuple[SiteId, ...] = ()
        self._placement = Placement((), 1)
        self._crew: list[Crewman] = []
        self._hired = 0
        self._pool = Pool()

    def open(self, spec: HostSpec, site_ids: tuple[SiteId, ...]) -> None:
        """Start the workers; hosts open at their first message."""
        self.close()
        spec.prepare()
        self._spec = spec
        self._site_ids = tuple(sorted(site_ids))
        count = num_useful(len(site_ids), self._num_workers)
        self._placement = Placement(self._site_ids, count)
        for _ in range(count):
            self._crew.append(self._hire())

    def _hire(self) -> Crewman:
        """Start one worker: a copy of this process where that is safe, else anew."""
        assert self._spec is not None
        method = start_method(self._spec)
        context: Any = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        foreign = []
        if method == "fork":
            foreign = [ours, *(member.pipe for member in self._crew)]
        process = context.Process(
            target=run_worker,
            args=(theirs, self._spec, self._durable, foreign),
            name="fedmed-worker",
            daemon=True,
        )
        process.start()
        theirs.close()
        self._hired += 1
        return Crewman(self._hired, process, ours)

    def exchange(
        self,
        messages: Mapping[SiteId, Message],
        *,
        timeout_s: float | None = None,
        reference: State | None = None,
    ) -> dict[SiteId, Answer]:
        """Send one message per worker, wait, and replace the workers that failed."""
        if self._spec is None:
            raise FedMedError("the transport is not open", hint="call open() first")
        check_addressed(messages, self._site_ids)

        def run(wave: Wave, deadline: float | None) -> dict[SiteId, Answer]:
            return self._run_wave(wave, messages, reference, deadline)

        return self._placement.in_waves(messages, run, timeout_s=timeout_s)

    def _run_wave(
        self,
        wave: Wave,
        messages: Mapping[SiteId, Message],
        reference: State | None,
        deadline: float | None,
    ) -> dict[SiteId, Answer]:
        here = [messages[site] for group in wave.values() for site in group]
        desk = Desk(self._pool, here, reference)
        jobs = {
            worker: desk.job({site: messages[site] for site in group})
            for worker, group in wave.items()
        }
        answers: dict[SiteId, Answer] = {}
        arrived = self._ask({w: ("job", job) for w, job in jobs.items()}, deadline)
        for worker, group in wave.items():
            outcome = arrived[worker]
            if isinstance(outcome, SiteFailure):
                answers.update(dict.fromkeys(group, outcome))
                self._replace(worker, group)
            else:
                delivered = self._unpack(self._crew[worker], outcome)
                answers.update(zip(group, delivered, strict=True))
        return answers

    def _ask(
        self, words: Mapping[int, tuple[str, Any]], deadline: float | None
    ) -> dict[int, Any]:
        """Say a word to some workers, and wait for all; a failure stands for none."""
        outcomes: dict[int, Any] = {}
        for worker, (word, content) in words.items():
            try:
                self._tell(worker, word, content)
            except (BrokenPipeError, ConnectionError):
                outcomes[worker] = DIED
        waiting = {self._crew[w].pipe: w for w in words if w not in outcomes}
        while waiting:
            left_s = None if deadline is None else max(0, deadline - time.monotonic())
            ready = wait(list(waiting), left_s)
            if not ready:
                outcomes.update(dict.fromkeys(waiting.values(), LATE))
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                worker = waiting.pop(pipe)
                outcomes[worker] = self._hear(worker)
        return outcomes

    def _tell(self, worker: int, word: str, content: Any) -> None:
        member = self._crew[worker]
        present = self._segments()
        gone = tuple(key for key in member.known if key not in present)
        new = {key: seg for key, seg in present.items() if key not in member.known}
        if word == "job":
            new = {key: segment for key, segment in new.items() if key[0] == 0}
        member.known.difference_update(gone)
        member.known.update(new)
        freed = [member.freed.popleft() for _ in range(len(member.freed))]
        told = Told(
            word,
            content,
            made=tuple((key, segment.size) for key, segment in new.items()),
            dropped=gone,
            freed=tuple(freed),
        )
        tell(member.pipe, told, [segment.descriptor for segment in new.values()])

    def _segments(self) -> dict[Key, Segment]:
        """Every segment there is."""
        found = {(0, n): segment for n, segment in self._pool.segments.items()}
        for member in self._crew:
            found |= {(member.owner, n): s for n, s in member.segments.items()}
        return found

    def _hear(self, worker: int) -> Any:
        member = self._crew[worker]
        try:
            told, made = listen(member.pipe)
        except (EOFError, OSError):
            return DIED
        for (_, number), segment in made.items():
            member.segments[number] = segment
        for _, number in told.dropped:
            member.segments.pop(number).close()
        for number, slots in told.layouts.items():
            member.layouts[number] = Layout.interned(slots)
        return told.content

    def _unpack(self, member: Crewman, delivery: Delivery) -> list[Answer]:
        """Read replies in place."""
        whole = {}
        for number in delivery.used:
            whole[number], base = member.segments[number].tensor()
            weakref.finalize(base, member.freed.append, number)
        answers: list[Answer] = []
        for parcel in delivery.answers:
            if isinstance(parcel, SiteFailure):
                answers.append(parcel)
                continue
            number, offset = parcel.place
            layout = member.layouts[parcel.layout]
            buffer = whole[number][offset : offset + layout.num_bytes]
            tensors = FlatTensors(layout, buffer, self)
            answers.append(
                Message(parcel.kind, parcel.header, tensors, norms=parcel.norms)
            )
        return answers

    def mean(
        self, section: Section, rows: Sequence[FlatTensors], shares: Sequence[float]
    ) -> FlatTensors:
        """Average replies into memory that the workers can read; see `Adder`."""
        buffer = self._pool.allocate(section.alone.num_bytes)
        return mean_of_rows(section, rows, shares, buffer=buffer, add=self._add)

    def bring(self, rows: Sequence[FlatTensors], names: tuple[str, ...]) -> None:
        """Do nothing: replies are read in place."""

    def _add(self, out: Tensor, rows: list[Tensor], weights: list[float]) -> None:
        """Form a long sum with the help of all workers, a short one alone."""
        is_long = len(out) * len(rows) >= LONG_SUM and len(self._crew) > 1
        if not (is_long and self._add_together(out, rows, weights)):
            add_rows(out, rows, weights)

    def _add_together(
        self, out: Tensor, rows: list[Tensor], weights: list[float]
    ) -> bool:
        """Let each worker form the sum in some of the columns.

        Returns:
            False if not all of it lies in shared memory, or if a worker failed.
        """
        atlas = Atlas(self._segments())
        found = [atlas.place(tensor) for tensor in (out, *rows)]
        places = [place for place in found if place is not None]
        if len(places) < len(found):
            return False
        sums = {}
        chunks, count = -(-len(out) // CHUNK), len(self._crew)
        for worker in range(count):
            start, stop = (
                min(len(out), k * chunks // count * CHUNK) for k in (worker, worker + 1)
            )
            if stop > start:
                job = Sum(
                    places[0], tuple(places[1:]), tuple(weights), out.dtype, start, stop
                )
                sums[worker] = ("sum", job)
        outcomes = self._ask(sums, None)
        failed = [w for w, o in outcomes.items() if isinstance(o, SiteFailure)]
        for worker in failed:
            self._replace(worker, ())
        return not failed

    def _replace(self, worker: int, group: tuple[SiteId, ...]) -> None:
        """Replace a worker that failed, and suspect the sites it was asked for."""
        self._placement.suspect(group)
        logger.warning("replacing the process of: %s", ", ".join(group) or "no site")
        end(self._crew[worker], at_once=True)
        self._crew[worker] = self._hire()

    def close(self) -> None:
        """Close the hosts and end the workers."""
        crew, self._crew = self._crew, []
        for member in crew:
            try:
                tell(member.pipe, Told("close"), [])
            except OSError:
                continue
        deadline = time.monotonic() + CLOSE_GRACE_S
        for member in crew:
            member.process.join(max(0.0, deadline - time.monotonic()))
            end(member, at_once=False)
        self._pool.close()
        self._pool = Pool()
        self._spec = None


def num_useful(num_sites: int, asked: int | None) -> int:
    """How many workers to start.

    Example:
        >>> num_useful(6, 4), num_useful(2, 4)
        (4, 2)
    """
    if asked is not None:
        return max(1, min(asked, num_sites))
    rounds = math.ceil(num_sites / (os.cpu_count() or 1))
    return max(1, math.ceil(num_sites / max(1, rounds)))


def end(member: Crewman, *, at_once: bool) -> None:
    """End a worker's process, if it has not ended yet, and forget its memory."""
    if at_once or member.process.is_alive():
        member.process.kill()
    member.process.join()
    member.pipe.close()
    for segment in member.segments.values():
        segment.close()
    member.segments = {}


class Desk:
    """Writes the jobs of one wave; what several sites get is written down once.

    Args:
        pool: Memory for what does not lie in shared memory yet.
        messages: Of all sites of the wave.
        reference: The server's shared entries, or None.
    """

    def __init__(
        self,
        pool: Pool,
        messages: Iterable[Message],
        reference: State | None,
    ) -> None:
        self._atlas = Atlas({(0, n): s for n, s in pool.segments.items()})
        self._reference = reference
        states: dict[int, Mapping[str, Tensor]] = {
            id(message.tensors): message.tensors for message in messages
        }
        if reference is not None:
            states[id(reference)] = reference
        self._alive = list(states.values())
        self._tables: dict[int, Table] = {}
        strangers = {key: self._strangers(state) for key, state in states.items()}
        sizes = {key: Layout.of(new).num_bytes for key, new in strangers.items()}
        # One segment for all: each costs a descriptor here and in every worker.
        self._room = pool.allocate(sum(sizes.values())) if any(sizes.values()) else None
        if self._room is not None:
            self._atlas = Atlas({(0, n): s for n, s in pool.segments.items()})
        start = 0
        for key, state in states.items():
            packed = self._packed(strangers[key], start, sizes[key])
            self._tables[key] = self._table({**state, **packed})
            start += sizes[key]

    def job(self, messages: Mapping[SiteId, Message]) -> Job:
        """Write the job of one worker."""
        tables: list[Table] = []
        position: dict[int, int] = {}
        headers = {id(m.header): m.header for m in messages.values()}
        checked = {key: sent(header) for key, header in headers.items()}

        def place(tensors: Mapping[str, Tensor]) -> int:
            if id(tensors) not in position:
                position[id(tensors)] = len(tables)
                tables.append(self._tables[id(tensors)])
            return position[id(tensors)]

        errands = tuple(
            Errand(site, m.kind, checked[id(m.header)], place(m.tensors))
            for site, m in messages.items()
        )
        origin = None if self._reference is None else place(self._reference)
        return Job(errands, tuple(tables), origin)

    def _strangers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that do not lie in shared memory."""
        return {n: dense(t) for n, t in state.items() if self._atlas.place(t) is None}

    def _packed(
        self, tensors: Mapping[str, Tensor], start: int, size: int
    ) -> Mapping[str, Tensor]:
        if self._room is None or not tensors:
            return {}
        return pack(tensors, self._room[start : start + size])

    def _table(self, tensors: Mapping[str, Tensor]) -> Table:
        table = []
        for name, tensor in sorted(tensors.items()):
            place = self._atlas.place(tensor)
            assert place is not None
            shape = tuple(tensor.shape)
            table.append((Slot(name, tensor.dtype, shape, place[2]), place[1]))
        return tuple(table)


class Atlas:
    """Finds in which segment a tensor lies.

    Args:
        segments: Those to look in.
    """

    def __init__(self, segments: Mapping[Key, Segment]) -> None:
        self._by_address = {s.address: key for key, s in segments.items()}

    def place(self, tensor: Tensor) -> Place | None:
        """Give the place of a dense tensor, or None if it lies elsewhere."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
        key = self._by_address.get(tensor.untyped_storage().data_ptr())
        if key is None:
            return None
        return (*key, int(tensor.storage_offset()) * tensor.element_size())


def start_method(spec: HostSpec) -> str:
    """How to start a worker: "fork" where copying this process is safe.

    A copy shares what is loaded and starts in milliseconds. It is not safe with a GPU
    in use, nor for more than one thread: the library that keeps the threads does not
    survive it.
    """
    if spec.threads > 1 or _gpu_in_use() or not hasattr(os, "fork"):
        return "spawn"
    return "fork"


def _gpu_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
