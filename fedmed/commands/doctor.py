"""`fedmed doctor`: what is missing or wrong on this machine, with the fix."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from fedmed.errors import FedMedError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        ok: Whether it is as it should be.
        seen: What was seen.
        fix: What to do, empty if nothing.
    """

    name: str
    ok: bool
    seen: str
    fix: str = ""


def doctor_command(*, as_json: bool) -> None:
    """Check everything; exit code 7 if something needed is wrong."""
    findings = [check() for check in CHECKS]
    if as_json:
        typer.echo(json.dumps({"findings": [asdict(f) for f in findings]}))
    else:
        for finding in findings:
            mark = "ok  " if finding.ok else "FIX "
            typer.echo(f"{mark} {finding.name}: {finding.seen}")
            if finding.fix:
                typer.echo(f"       {finding.fix}")
    if not all(finding.ok for finding in findings):
        sys.exit(7)


def _python() -> Finding:
    version = sys.version.split()[0]
    ok = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Finding("Python", ok, version, "" if ok else "Use Python 3.11 to 3.13.")


def _packages() -> Finding:
    try:
        from fedmed.resolve import require_own_packages

        require_own_packages()
    except FedMedError as error:
        return Finding("packages", False, error.message, error.hint)
    return Finding("packages", True, "fedmed, sites and strategies lie side by side")


def _torch() -> Finding:
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU only"
    return Finding("torch", True, f"{torch.__version__}, {device}")


def _flower() -> Finding:
    version = importlib.metadata.version("flwr")
    ok = version.startswith("1.41.")
    fix = "" if ok else 'pip install "flwr[simulation]>=1.41,<1.42"'
    return Finding("flwr", ok, version, fix)


def _ray() -> Finding:
    return Finding("ray", True, importlib.metadata.version("ray"))


def _memory() -> Finding:
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = pages / 2**30
    ok = size >= 4
    return Finding(
        "memory",
        ok,
        f"{size:.0f} GiB, {os.cpu_count()} cores",
        "" if ok else "Studies of 2D networks need about 4 GiB.",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    ok = free >= 2
    fix = "" if ok else "Free some space, or run in another folder."
    return Finding("disk", ok, f"{free:.0f} GiB free in this folder", fix)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.exists():
        return Finding("shared memory", True, "no /dev/shm on this system")
    free = shutil.disk_usage(path).free / 2**30
    ok = free >= 0.25
    fix = "" if ok else "In a container: docker run --shm-size=2g."
    return Finding("shared memory", ok, f"{free:.1f} GiB", fix)


def _data() -> Finding:
    named = os.environ.get("FEDMED_DATA")
    if not named:
        return Finding("FEDMED_DATA", True, "not set; only needed for the real sets")
    ok = Path(named).is_dir()
    fix = "" if ok else "Set it to the folder in which the data sets lie."
    return Finding("FEDMED_DATA", ok, "set" if ok else "names no folder", fix)


def _extras() -> Finding:
    have = [n for n in ("monai",) if importlib.util.find_spec(n) is not None]
    return Finding("extras", True, ", ".join(have) or "none installed")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _packages,
    _torch,
    _flower,
    _ray,
    _memory,
    _disk,
    _shared_memory,
    _data,
    _extras,
)
