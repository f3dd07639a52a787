"""Many sites on the cores of one machine, or on a Ray cluster.

A fixed number of Ray actors keeps the hospitals. All sites of an actor travel in one
message, and a tensor that goes to several of them travels once. Long replies stay with
their actors, which add them as far as they can: only partial sums travel. The only
module that imports ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
"""No telemetry, a single machine's cluster on the loopback interface only."""

os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})

import numpy as np  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402

from fedmed.errors import FedMedError, SiteError, UsageError  # noqa: E402
from fedmed.flat import (  # noqa: E402
    CHUNK,
    FlatTensors,
    Layout,
    Section,
    Slot,
    pack,
)
from fedmed.message import Answer, Message, SiteFailure, SiteId, State  # noqa: E402
from fedmed.reduce import Counter, block_sum, whole_blocks  # noqa: E402
from fedmed.transports.keeper import HostKeeper, isolated  # noqa: E402
from fedmed.transports.packing import Bundle, Sheet, own_tensors, unpack  # noqa: E402
from fedmed.transports.placement import Placement, Wave  # noqa: E402
from fedmed.transports.transport import (  # noqa: E402
    HostSpec,
    Transport,
    check_addressed,
)

logger = logging.getLogger(__name__)

START_S = 120.0
"""How long workers may take to start."""

REACH_S = 5.0
"""How long a cluster may take to accept a connection."""

CLOSE_GRACE_S = 10.0
"""How long hosts may take to close before their processes are ended."""

ENDS_WORKER = ("died", "timeout")
"""Failures after which an actor is replaced."""

SHORT_REPLY = 1 << 20
"""Bytes up to which a reply travels at once; a longer one waits to be added up."""

SMALL_BYTES = 100_000
"""Up to this size Ray sends arguments with the call, without its object store."""


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


class WaitingTensors(FlatTensors):
    """A long reply that stays with its actor until somebody looks at it.

    Args:
        layout: Where each tensor lies.
        site_id: Whose reply it is.
        worker: The actor.
        adder: The transport.
    """

    __slots__ = ("__weakref__", "_here", "site_id", "worker")

    def __init__(
        self, layout: Layout, site_id: SiteId, worker: Any, adder: RayTransport
    ) -> None:
        self.layout = layout
        self.adder = adder
        self.site_id = site_id
        self.worker = worker
        self.squares = {}
        self._views = {}
        self._here: torch.Tensor | None = None

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


@dataclass(frozen=True)
class Call:
    """A message under way: the actor it went to and the sites it is for."""

    worker: int
    site_ids: tuple[SiteId, ...]
    reply: Any


class RayTransport(Transport):
    """Actors that keep their hospitals between messages.

    Args:
        num_workers: Actors; None: one per core, never more than sites.
        address: A running Ray cluster ("ray://...", "auto"). None: a cluster of our
            own on this machine, reachable from nowhere else, ended by `close`.
        gpus_per_worker: GPUs (or a fraction) that each actor asks for.
        durable: Let hosts write their state through to disk after each message, so
            that a site survives the death of its actor; see `HostSpec.open`.

    An actor that dies takes the state in memory of all its sites with it: each of
    these gets the failure "died" and is opened anew, in a new actor, at its next
    message. From then on they no longer share a message, so that the one which kills
    the actor is found and costs the others nothing more.
    """

    def __init__(
        self,
        *,
        num_workers: int | None = None,
        address: str | None = None,
        gpus_per_worker: float = 0.0,
        durable: bool = False,
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise UsageError(f"num_workers is {num_workers}, expected at least 1")
        self._num_workers = num_workers or os.cpu_count() or 1
        self._address = address
        self._gpus_per_worker = gpus_per_worker
        self._durable = durable
        self._cluster = contextlib.ExitStack()
        self._spec: HostSpec | None = None
        self._site_ids: tuple[SiteId, ...] = ()
        self._workers: list[Any] = []
        self._placement = Placement((), 1)
        self._waiting: weakref.WeakSet[WaitingTensors] = weakref.WeakSet()

    def open(self, spec: HostSpec, site_ids: tuple[SiteId, ...]) -> None:
        """Start the cluster and the actors; hosts open at their first message."""
        self.close()
        self._spec = spec
        self._site_ids = tuple(sorted(site_ids))
        count = max(1, min(self._num_workers, len(site_ids)))
        self._cluster.enter_context(
            cluster(self._address, num_cpus=count * spec.threads, threads=spec.threads)
        )
        self._placement = Placement(self._site_ids, count)
        self._workers = [self._start_worker() for _ in range(count)]
        ready = [worker.ready.remote() for worker in self._workers]
        _, missing = ray.wait(ready, num_returns=count, timeout=START_S)
        if missing:
            raise FedMedError(
                f"{len(missing)} of {count} Ray workers did not start within "
                f"{START_S:.0f} s",
                hint="the cluster has too few free cores or GPUs; lower num_workers",
            )

    def _start_worker(self) -> Any:
        assert self._spec is not None
        options: dict[str, Any] = {
            "num_cpus": self._spec.threads if self._address else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        if self._gpus_per_worker:
            options["num_gpus"] = self._gpus_per_worker
        return ray.remote(Worker).options(**options).remote(self._spec, self._durable)

    def exchange(
        self,
        messages: Mapping[SiteId, Message],
        *,
        timeout_s: float | None = None,
        reference: State | None = None,
    ) -> dict[SiteId, Answer]:
        """Send one message per actor, wait, and replace the actors that failed."""
        if self._spec is None:
            raise FedMedError("the transport is not open", hint="call open() first")
        check_addressed(messages, self._site_ids)
        for reply in self._waiting:
            _ = reply.buffer  # its actor is about to forget it
        self._waiting.clear()
        answers: dict[SiteId, Answer] = {}
        for wave in self._placement.waves(messages):
            # Each has its own time: a suspect that hangs costs the others nothing.
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            for call in self._send(wave, messages, reference):
                outcome = collect(call, deadline)
                if isinstance(outcome, SiteFailure):
                    if outcome.reason in ENDS_WORKER:
                        self._replace(call)
                    answers.update(dict.fromkeys(call.site_ids, outcome))
                else:
                    answers.update(self._unpacked(call, outcome))
        for site_id, answer in answers.items():
            self._placement.note(site_id, answer)
        return {site_id: answers[site_id] for site_id in sorted(answers)}

    def _unpacked(
        self, call: Call, parcels: Sequence[Parcel | SiteFailure]
    ) -> dict[SiteId, Answer]:
        answers: dict[SiteId, Answer] = {}
        for site, parcel in zip(call.site_ids, parcels, strict=True):
            if isinstance(parcel, SiteFailure):
                answers[site] = parcel
                continue
            layout = Layout.interned(parcel.slots)
            if parcel.content is None:
                waiting = WaitingTensors(layout, site, self._workers[call.worker], self)
                self._waiting.add(waiting)
                tensors: FlatTensors = waiting
            else:
                tensors = FlatTensors(layout, own_tensors([parcel.content])[0])
            answers[site] = Message(parcel.kind, parcel.header, tensors, parcel.norms)
        return answers

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

    def _send(
        self, wave: Wave, messages: Mapping[SiteId, Message], reference: State | None
    ) -> list[Call]:
        """Send what every call needs once, and the rest with each call."""
        bundle = Bundle()
        sheets = {
            site: bundle.add(messages[site])
            for group in wave.values()
            for site in group
        }
        origin = None
        if reference is not None:
            origin = bundle.add(Message("reference", {}, reference))
        every = set() if origin is None else {s.index for s in origin.slots.values()}
        needs = {
            worker: every.union(
                *({s.index for s in sheets[site].slots.values()} for site in group)
            )
            for worker, group in wave.items()
        }
        shared = sorted(set.intersection(*needs.values())) if needs else []
        stock = stored([bundle.arrays[index] for index in shared])
        calls = []
        for worker, group in wave.items():
            own = sorted(needs[worker].difference(shared))
            place = {index: k for k, index in enumerate([*shared, *own])}
            moved = {id(sheets[s].slots): sheets[s].moved(place).slots for s in group}
            jobs = [
                (s, replace(sheets[s], slots=moved[id(sheets[s].slots)])) for s in group
            ]
            reply = self._workers[worker].answer.remote(
                jobs,
                stock,
                [bundle.arrays[index] for index in own],
                origin.moved(place) if origin else None,
            )
            calls.append(Call(worker, group, reply))
        return calls

    def _replace(self, call: Call) -> None:
        """Replace the actor of a call that failed, and suspect that call's sites."""
        self._placement.suspect(call.site_ids)
        logger.warning("replacing the process of: %s", ", ".join(call.site_ids))
        ray.kill(self._workers[call.worker], no_restart=True)
        self._workers[call.worker] = self._start_worker()

    def close(self) -> None:
        """Close the hosts, end the actors, and the cluster if it is ours."""
        workers, self._workers = self._workers, []
        with self._cluster:
            pending = [worker.close.remote() for worker in workers]
            if pending:
                ray.wait(pending, num_returns=len(pending), timeout=CLOSE_GRACE_S)
            for worker in workers:
                ray.kill(worker, no_restart=True)
        self._cluster = contextlib.ExitStack()
        self._spec = None


def collect(
    call: Call, deadline: float | None
) -> list[Parcel | SiteFailure] | SiteFailure:
    """Wait for the answers of one call."""
    left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        parcels: list[Parcel | SiteFailure] = ray.get(call.reply, timeout=left_s)
    except ray.exceptions.GetTimeoutError:
        return SiteFailure("timeout", "no answer in time; its process was ended")
    except ray.exceptions.RayTaskError as error:
        return SiteFailure("raised", f"its process raised {type(error.cause).__name__}")
    except ray.exceptions.RayError:
        return SiteFailure("died", "the process that plays this site died")
    return parcels


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


def stored(arrays: list[np.ndarray]) -> Any:
    """Put large arrays into the object store once; small ones travel with the call."""
    large = sum(array.nbytes for array in arrays) > SMALL_BYTES
    return ray.put(arrays) if large else arrays


@contextlib.contextmanager
def cluster(address: str | None, *, num_cpus: int, threads: int) -> Iterator[None]:
    """Join a Ray cluster, or start one on the loopback interface and end it after.

    If this process already speaks to a cluster, that one is used and left running.

    Raises:
        FedMedError: If Ray cannot be started or reached.
    """
    check_reachable(address)
    if ray.is_initialized():
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="fm-ray-"))
    own = {
        "address": "local",
        "num_cpus": num_cpus,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder),
    }
    try:
        with worker_environment(threads), kept_signal_handlers():
            start(**(own if address is None else {"address": address}))
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def check_reachable(address: str | None) -> None:
    """Raise at once where `ray.init` would try for two minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise FedMedError(
            f"no Ray cluster could be reached at {address}: {error.strerror}",
            hint="start one with `ray start --head`, or leave the address out",
        ) from error


def start(**options: Any) -> None:
    """Call `ray.init`, and say in our words why it failed."""
    try:
        ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        own = options["address"] == "local"
        raise FedMedError(
            f"Ray could not be {'started' if own else 'reached'}: "
            f"{type(error).__name__}",
            hint="use --transport inprocess, or check the address, free memory and "
            "/dev/shm",
        ) from error


@contextlib.contextmanager
def worker_environment(threads: int) -> Iterator[None]:
    """Set what new processes inherit: threads of numeric libraries, import paths."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    variables = dict.fromkeys(names, str(threads))
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Keep our handler of SIGTERM, if there is one, from being replaced by Ray's.

    Without one Ray's stays: it ends the cluster, where the default would orphan it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before != signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)
