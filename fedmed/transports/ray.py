"""Many sites on the cores of one machine, or on a Ray cluster.

A fixed number of Ray actors keeps the hospitals; each site is pinned to one actor and
stays open there. All sites of an actor travel in one message, and a tensor that goes
to several of them travels once. The only module that imports ray.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from fedmed.errors import FedMedError, UsageError  # noqa: E402
from fedmed.message import Answer, Message, SiteFailure, SiteId, State  # noqa: E402
from fedmed.transports.keeper import HostKeeper, isolated  # noqa: E402
from fedmed.transports.packing import Bundle, Sheet, own_tensors, unpack  # noqa: E402
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

SMALL_BYTES = 100_000
"""Up to this size Ray sends arguments with the call, without its object store."""

Wave = dict[int, tuple[SiteId, ...]]
"""Worker -> the sites whose messages travel to it together."""

Packed = tuple[list[Sheet | SiteFailure], list[np.ndarray]]


class Worker:
    """The process of some sites: an actor's code."""

    def __init__(self, spec: HostSpec, durable: bool) -> None:
        torch.set_num_threads(spec.threads)
        self._keeper = HostKeeper(spec, durable=durable)

    def ready(self) -> None:
        """Return: the process has started."""

    def answer(
        self,
        jobs: Sequence[tuple[SiteId, Sheet]],
        shared: Sequence[np.ndarray],
        own: Sequence[np.ndarray],
    ) -> Packed:
        """Let some sites answer, one after another."""
        tensors = own_tensors([*shared, *own])
        bundle = Bundle()
        replies: list[Sheet | SiteFailure] = []
        for site_id, sheet in jobs:
            answer = self._keeper.answer(site_id, isolated(unpack(sheet, tensors)))
            if isinstance(answer, SiteFailure):
                replies.append(answer)
            else:
                replies.append(bundle.add(answer))
        return replies, bundle.arrays

    def close(self) -> None:
        """Close the hosts."""
        self._keeper.close()


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
        self._suspicion: dict[SiteId, int] = {}

    def open(self, spec: HostSpec, site_ids: tuple[SiteId, ...]) -> None:
        """Start the cluster and the actors; hosts open at their first message."""
        self.close()
        self._spec = spec
        self._site_ids = tuple(sorted(site_ids))
        count = max(1, min(self._num_workers, len(site_ids)))
        self._cluster.enter_context(
            cluster(self._address, num_cpus=count * spec.threads, threads=spec.threads)
        )
        self._suspicion = dict.fromkeys(self._site_ids, 0)
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
        del reference
        if self._spec is None:
            raise FedMedError("the transport is not open", hint="call open() first")
        check_addressed(messages, self._site_ids)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        answers: dict[SiteId, Answer] = {}
        for wave in self._waves(messages):
            for call in self._send(wave, messages):
                outcome = collect(call, deadline)
                if isinstance(outcome, SiteFailure):
                    if outcome.reason in ENDS_WORKER:
                        self._replace(call)
                    outcome = [outcome] * len(call.site_ids)
                answers.update(zip(call.site_ids, outcome, strict=True))
        return {site_id: answers[site_id] for site_id in sorted(answers)}

    def _waves(self, addressed: Iterable[SiteId]) -> list[Wave]:
        """Give the sites that share a message: one group per worker and wave.

        Suspects come last, each alone, when the others' answers are safely here.
        """
        waves: list[Wave] = [{}]
        for worker in range(len(self._workers)):
            mine = [
                s
                for s in self._site_ids[worker :: len(self._workers)]
                if s in addressed
            ]
            trusted = tuple(site for site in mine if not self._suspicion[site])
            if trusted:
                waves[0][worker] = trusted
            suspects = [site for site in mine if self._suspicion[site]]
            waves += [{} for _ in suspects[len(waves) - 1 :]]
            for wave, site in zip(waves[1:], suspects, strict=False):
                wave[worker] = (site,)
        return waves

    def _send(self, wave: Wave, messages: Mapping[SiteId, Message]) -> list[Call]:
        """Send what every call needs once, and the rest with each call."""
        bundle = Bundle()
        sheets = {
            site: bundle.add(messages[site])
            for group in wave.values()
            for site in group
        }
        needs = {
            worker: {s.index for site in group for s in sheets[site].slots.values()}
            for worker, group in wave.items()
        }
        shared = sorted(set.intersection(*needs.values())) if needs else []
        reference = stored([bundle.arrays[index] for index in shared])
        calls = []
        for worker, group in wave.items():
            own = sorted(needs[worker].difference(shared))
            place = {index: k for k, index in enumerate([*shared, *own])}
            jobs = [(site, sheets[site].moved(place)) for site in group]
            reply = self._workers[worker].answer.remote(
                jobs, reference, [bundle.arrays[index] for index in own]
            )
            calls.append(Call(worker, group, reply))
        return calls

    def _replace(self, call: Call) -> None:
        """Replace the actor of a call that failed, and suspect that call's sites."""
        for site_id in call.site_ids:
            self._suspicion[site_id] += 1
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


def collect(call: Call, deadline: float | None) -> list[Answer] | SiteFailure:
    """Wait for the answers of one call."""
    left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        replies, arrays = ray.get(call.reply, timeout=left_s)
    except ray.exceptions.GetTimeoutError:
        return SiteFailure("timeout", "no answer in time; its process was ended")
    except ray.exceptions.RayTaskError as error:
        return SiteFailure("raised", f"its process raised {type(error.cause).__name__}")
    except ray.exceptions.RayError:
        return SiteFailure("died", "the process that plays this site died")
    tensors = own_tensors(arrays)
    return [
        reply if isinstance(reply, SiteFailure) else unpack(reply, tensors)
        for reply in replies
    ]


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
