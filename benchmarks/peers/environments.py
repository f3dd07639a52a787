"""One virtual environment per peer, built from its requirements and kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INSTALL_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Peer:
    """A row of the comparison.

    Attributes:
        name: Of its file of results; of its folder here, unless that is given.
        title: What the table calls it.
        package: Whose version is told.
        folder: Its folder here; "" = the bare loop.
        launcher: Between Python and the script.
        options: Behind the script's arguments.
        workloads: What it runs.
        draws_sites: Whether it samples the sites of a round itself.
        draws_own: Whether it draws its batches and initial weights itself.
    """

    name: str
    title: str
    package: str
    folder: str = ""
    launcher: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ("W1", "W2", "W3")
    draws_sites: bool = False
    draws_own: bool = False

    @property
    def requirements(self) -> Path:
        """What its environment holds; it runs in this one if there is no such file."""
        return HERE / self.folder / "requirements.txt"

    @property
    def command(self) -> tuple[str, ...]:
        """Behind Python, before the workload."""
        if not self.folder:
            return ("-m", "benchmarks.floor")
        return (*self.launcher, str(HERE / self.folder / "simulate.py"))

    def does(self, workload: str) -> bool:
        """Whether it runs this workload."""
        return workload in self.workloads


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
BFLOAT16: dict[str, Any] = {"options": ("--bfloat16",), "workloads": ("W1",)}
FEDMED: dict[str, Any] = {"package": "fedmed", "folder": "fedmed", "draws_own": True}
PEERS = (
    Peer("fedmed", "fedmed, 4 workers", **FEDMED),
    Peer("fedmed_bfloat16", "fedmed, bfloat16", **FEDMED, **BFLOAT16),
    Peer("floor_bfloat16", "the floor, bfloat16", "torch", **BFLOAT16),
    Peer(
        "pfl_research",
        "pfl-research, 4 processes",
        "pfl",
        folder="pfl_research",
        launcher=TORCHRUN,
    ),
    Peer(
        "flower",
        "Flower simulation (Ray backend)",
        "flwr",
        folder="flower",
        draws_sites=True,
    ),
    Peer(
        "nvflare_simulator",
        "NVFlare simulator",
        "nvflare",
        folder="nvflare_simulator",
        draws_sites=True,
    ),
)


class InstallError(Exception):
    """The environment of a peer could not be built; the message is one line."""


def environment(peer: Peer, folder: Path) -> Path:
    """Return the Python of the peer's environment, building it where it is missing."""
    if not peer.requirements.is_file():
        return Path(sys.executable)
    place = folder / f"venv-{peer.name}"
    python, stamp = place / "bin" / "python", place / "installed"
    digest = hashlib.sha256(peer.requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    shutil.rmtree(place, ignore_errors=True)
    log = folder / f"install-{peer.name}.log"
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    with log.open("w") as stream:
        for command in (
            [sys.executable, "-m", "venv", str(place)],
            [*pip, "--requirement", str(peer.requirements)],
        ):
            _install(command, stream, log)
    stamp.write_text(digest)
    return python


def _install(command: list[str], stream: object, log: Path) -> None:
    try:
        subprocess.run(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=INSTALL_TIMEOUT_S,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise InstallError(f"not installed within {INSTALL_TIMEOUT_S} s") from None
    except (subprocess.CalledProcessError, OSError):
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise InstallError(f"pip: {errors[-1] if errors else 'no output'}") from None


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of installed packages, and of Python."""
    code = (
        "import json, platform, sys; from importlib.metadata import version;"
        "print(json.dumps({'python': platform.python_version()}"
        " | {name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *packages],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))
