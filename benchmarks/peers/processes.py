"""Run one simulation: its rounds, its start-up, the memory of all its processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.5


class RunError(Exception):
    """A simulation did not come to its end; the message is one line."""


def quiet_environment(folder: Path) -> dict[str, str]:
    """One thread per process, no telemetry, no GPU, nothing of the caller's Python."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "FLWR_HOME": str(folder / "flwr"),
        "FEDMED_CACHE": str(folder / "cache"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "NVFLARE_TELEMETRY_ENABLED": "0",
    }


def run(command: list[str], folder: Path, timeout_s: float) -> dict[str, Any]:
    """Run a command that prints `workload.Rounds` lines, and read them.

    Returns:
        `rounds_s` of all rounds but the first; `start_s`, from the start of the process
        to the end of the first round less one ordinary round; `peak_rss_bytes`, the
        largest sum over the processes; and what the last line says, `loss` among it.
    """
    with tempfile.TemporaryFile("w+") as output:
        started_unix_s = time.time()
        process = psutil.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=quiet_environment(folder),
            cwd=folder,
        )
        try:
            peak_rss_bytes = _watch(process, timeout_s)
        finally:
            _end(process)
        output.seek(0)
        text = output.read()
    lines = [line for line in map(_parse, text.splitlines()) if line]
    rounds = [line for line in lines if "round" in line]
    ends = [line for line in lines if "loss" in line]
    if process.returncode != 0 or not ends or len(rounds) < 2:
        (folder / "last_failure.log").write_text(text)
        raise RunError(f"exit code {process.returncode}: {_last_error(text)}")
    rounds_s = [line["seconds"] for line in rounds[1:]]
    first_s = rounds[0]["end_unix_s"] - started_unix_s
    return {
        "rounds_s": rounds_s,
        "start_s": first_s - statistics.median(rounds_s),
        "peak_rss_bytes": peak_rss_bytes,
    } | {k: v for k, v in ends[-1].items() if k.startswith("loss")}


def _watch(process: psutil.Popen, timeout_s: float) -> int:
    """Wait for the end; the largest sum of resident memory seen meanwhile."""
    peak, deadline_s = 0, time.monotonic() + timeout_s
    while True:
        try:
            process.wait(POLL_S)
            return peak
        except psutil.TimeoutExpired:
            peak = max(peak, sum(map(_rss_bytes, _family(process))))
        if time.monotonic() > deadline_s:
            raise RunError(f"not done after {timeout_s:.0f} s")


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _end(process: psutil.Popen) -> None:
    """Kill what is left of a simulation, so that the next one has the machine."""
    family = _family(process)
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


def _parse(line: str) -> dict[str, Any] | None:
    """A line of `workload.Rounds`, wherever in a framework's output it stands."""
    try:
        found = json.loads(line[line.index('{"') :])
    except ValueError:
        return None
    return found if isinstance(found, dict) and "end_unix_s" in found else None


def _last_error(text: str) -> str:
    """The line that says most: a logged error, else an exception, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for mark in (" ERROR ", "Error"):
        found = [line for line in lines if mark in line]
        if found:
            return found[-1][-200:]
    return lines[-1][-200:] if lines else "no output"
