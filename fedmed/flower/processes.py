"""Processes that end with us, whatever they started in turn."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from fedmed.errors import FedMedError

logger = logging.getLogger(__name__)

GRACE_S = 3.0
"""How long processes may take to end before they are killed."""

MARK = "FEDMED_PROCESS_GROUP"


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Ask Linux to end this new process should we be killed; runs inside it."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class ProcessGroup:
    """Child processes with one environment, ended together with all descendants.

    Descendants are found by a mark in their environment, because Flower and Ray
    start theirs in sessions of their own, out of reach of a process group's signals.

    Args:
        environment: Added to that of this process.
        log_folder: Where each process writes its output, "<name>.log".
    """

    def __init__(self, environment: Mapping[str, str], log_folder: Path) -> None:
        self._mark = secrets.token_hex(8)
        scripts = str(Path(sys.executable).parent)
        self._environment = {
            **os.environ,
            "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(sys.path),
            **environment,
            MARK: self._mark,
        }
        self._log_folder = log_folder
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a process; its output goes to its log file."""
        with (self._log_folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 -- one C call, no locks
            )
        self._children.append(child)
        return child

    def end(self) -> None:
        """End all processes: politely, then at once."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + GRACE_S
            for pid in self.alive():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.02)
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=GRACE_S)

    def alive(self) -> list[int]:
        """Process ids of the children that run, and (on Linux) their descendants."""
        own = [child.pid for child in self._children if child.poll() is None]
        return sorted({*own, *marked_processes(self._mark)})


def marked_processes(mark: str) -> list[int]:
    """Find the processes whose environment holds our mark (Linux only)."""
    found = []
    needle = f"{MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@contextlib.contextmanager
def process_group(
    environment: Mapping[str, str], log_folder: Path
) -> Iterator[ProcessGroup]:
    """Open a group of processes and end it on leaving, also on SIGTERM."""
    group = ProcessGroup(environment, log_folder)
    with exit_on_sigterm():
        try:
            yield group
        finally:
            group.end()


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit`, so that `finally` blocks run.

    A handler that somebody else installed stays.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def free_port() -> int:
    """Give a port of the loopback interface that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_listening(
    port: int, process: subprocess.Popen[bytes], *, timeout_s: float
) -> None:
    """Wait until a process accepts connections on a loopback port.

    Raises:
        FedMedError: If it ends, or does not listen in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=0.5).close()
            return
        time.sleep(0.05)
    raise FedMedError(
        "a Flower process "
        + ("ended at once" if process.poll() is not None else "does not listen"),
        hint="its log lies in the folder flower-logs of the run folder",
    )
