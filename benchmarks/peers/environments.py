"""One virtual environment per peer, built from its requirements and kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALL_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Peer:
    """A framework that is compared: its folder here, its package, how it is started."""

    name: str
    title: str
    package: str
    launcher: tuple[str, ...] = ()

    @property
    def requirements(self) -> Path:
        return HERE / self.name / "requirements.txt"

    @property
    def script(self) -> Path:
        return HERE / self.name / "simulate.py"


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
PEERS = (
    Peer("flower", "Flower simulation (Ray backend)", "flwr"),
    Peer("pfl_research", "pfl-research, 4 processes", "pfl", TORCHRUN),
    Peer("nvflare_simulator", "NVFlare simulator", "nvflare"),
)


class InstallError(Exception):
    """The environment of a peer could not be built; the message is one line."""


def environment(peer: Peer, folder: Path) -> Path:
    """Return the Python of the peer's environment, building it where it is missing."""
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
