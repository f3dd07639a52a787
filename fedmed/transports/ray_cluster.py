"""Ray's start and end: join a cluster, or have one on this machine, seen by nobody.

The only module that imports ray: what must be set before that is set here.
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
from collections.abc import Iterator
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

import ray as ray  # noqa: E402, PLC0414

from fedmed.errors import FedMedError  # noqa: E402

REACH_S = 5.0
"""How long a cluster may take to accept a connection."""


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
