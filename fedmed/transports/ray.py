"""Many sites on the cores of one machine, or on a Ray cluster.

A fixed number of Ray actors keeps the hospitals. All sites of an actor travel in one
message, and a tensor that goes to several of them travels once. Long replies stay with
their actors, which add them as far as they can: only partial sums travel.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedmed.errors import FedMedError, UsageError
from fedmed.flat import FlatTensors, Layout
from fedmed.message import Answer, Message, SiteFailure, SiteId, State
from fedmed.transports.packing import Bundle, own_tensors
from fedmed.transports.placement import Placement, Wave
from fedmed.transports.ray_cluster import cluster, ray
from fedmed.transports.ray_replies import WaitingTensors
from fedmed.transports.ray_worker import Parcel, Worker
from fedmed.transports.transport import HostSpec, Transport, check_addressed

logger = logging.getLogger(__name__)

START_S = 120.0
"""How long workers may take to start."""

CLOSE_GRACE_S = 10.0
"""How long hosts may take to close before their processes are ended."""

ENDS_WORKER = ("died", "timeout")
"""Failures after which an actor is replaced."""

SMALL_BYTES = 100_000
"""Up to this size Ray sends arguments with the call, without its object store."""


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
        answers: dict[SiteId, Answer] = {}
        for call in self._send(wave, messages, reference):
            outcome = collect(call, deadline)
            if isinstance(outcome, SiteFailure):
                if outcome.reason in ENDS_WORKER:
                    self._replace(call)
                answers.update(dict.fromkeys(call.site_ids, outcome))
            else:
                answers.update(self._unpacked(call, outcome))
        return answers

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
                waiting = WaitingTensors(layout, site, self._workers[call.worker])
                self._waiting.add(waiting)
                tensors: FlatTensors = waiting
            else:
                tensors = FlatTensors(layout, own_tensors([parcel.content])[0])
            answers[site] = Message(parcel.kind, parcel.header, tensors, parcel.norms)
        return answers

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
        every = set() if origin is None else {n for _, n in origin.table}
        needs = {
            worker: every.union(*({n for _, n in sheets[site].table} for site in group))
            for worker, group in wave.items()
        }
        shared = sorted(set.intersection(*needs.values())) if needs else []
        stock = stored([bundle.arrays[index] for index in shared])
        calls = []
        for worker, group in wave.items():
            own = sorted(needs[worker].difference(shared))
            place = {index: k for k, index in enumerate([*shared, *own])}
            moved = {id(sheets[s].table): sheets[s].moved(place).table for s in group}
            jobs = [
                (s, replace(sheets[s], table=moved[id(sheets[s].table)])) for s in group
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


def stored(arrays: list[np.ndarray]) -> Any:
    """Put large arrays into the object store once; small ones travel with the call."""
    large = sum(array.nbytes for array in arrays) > SMALL_BYTES
    return ray.put(arrays) if large else arrays
