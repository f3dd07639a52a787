"""Running measurements: fresh processes, interleaved, resumable, with their memory.

A workload is a list of variants. Each repetition runs every variant once, in order, in
a process of its own, and stores what it printed: a run that is killed goes on where it
stopped. Ratios are taken within a repetition, so that a machine that slows down for a
minute slows both sides.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / ".bench"

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_LIBC = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
SAMPLE_S = 0.05
"""How often memory is looked at, in runs of their own."""

MAX_SAID = 200
"""Characters of a failure that are shown."""


@dataclass(frozen=True)
class Verdict:
    """One bar, and whether it is held.

    Attributes:
        what: Is measured, with its unit.
        value: Was measured.
        bar: The largest value allowed.
    """

    what: str
    value: float
    bar: float

    @property
    def is_held(self) -> bool:
        """Whether the bar is held."""
        return self.value <= self.bar

    def __str__(self) -> str:
        share = self.value / self.bar - 1
        told = f"{self.what}: {self.value:.3g}, at most {self.bar:.3g}: "
        if self.is_held:
            return f"{told}held, {-share:.0%} below"
        return f"{told}**not held**, {share:.0%} above"


@dataclass(frozen=True)
class Variant:
    """One side of a comparison.

    Attributes:
        name: What the table calls it; also the argument of the workload's module.
        reference: The variant it is divided by; "" = none. A run that tells
            "reference_seconds" has measured it itself, in turns.
        bar: Largest ratio allowed; None = shown only.
        bar_s: Longest time allowed.
        cores: Cores it may use; with `per_core`, times are multiplied by it.
        per_core: Whether the ratio counts time x cores.
        memory_bar: Largest ratio of memory allowed.
        memory_bar_bytes: Most memory allowed.
    """

    name: str
    reference: str = ""
    bar: float | None = None
    cores: int = 1
    per_core: bool = False
    memory_bar: float | None = None
    bar_s: float | None = None
    memory_bar_bytes: int | None = None


@dataclass(frozen=True)
class Workload:
    """One comparison.

    Attributes:
        key: "W2"...
        title: One line.
        module: Run as `python -m <module> <variant> [--quick]`; its last line on
            standard output is a JSON object with "seconds".
        repeat: Arguments that make a module which measures all its variants in one
            process, with its floors in turns, do that once. It is also given
            `--json FILE`, and writes there an object with "rows".
        quick: Arguments of a try.
        variants: In the order in which they are run.
        floors: Files that are the floor, for the results page.
        memory: Whether one more repetition samples memory.
        repetitions: Largest number of them.
        notes: Said under the table.
        further: Bars that lie between rows, or in them where the workload is whole.
    """

    key: str
    title: str
    module: str
    variants: tuple[Variant, ...] = ()
    floors: tuple[str, ...] = ()
    memory: bool = False
    repeat: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    repetitions: int = 1000
    notes: str = ""
    further: Callable[[Sequence[Any]], Sequence[Verdict]] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether one process measures all variants."""
        return bool(self.repeat)


@dataclass(frozen=True)
class Row:
    """What all repetitions of a variant say together."""

    variant: Variant
    seconds: float
    spread: tuple[float, float]
    ratio: float | None = None
    ratio_spread: tuple[float, float] | None = None
    memory_bytes: int | None = None
    memory_ratio: float | None = None
    reference_s: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdicts(self) -> list[Verdict]:
        """Every bar of this row that could be measured."""
        own, memory = self.variant, self.memory_bytes
        unit = "time x cores" if own.per_core else "time"
        found = [
            (f"{unit} / {own.reference}", self.ratio, own.bar),
            ("seconds", self.seconds, own.bar_s),
            (f"memory / {own.reference}", self.memory_ratio, own.memory_bar),
            (
                "memory, GB",
                memory / 2**30 if memory else None,
                own.memory_bar_bytes and own.memory_bar_bytes / 2**30,
            ),
        ]
        return [
            Verdict(f"{own.name}, {what}", value, bar)
            for what, value, bar in found
            if value is not None and bar is not None
        ]

    @property
    def is_met(self) -> bool | None:
        """Whether all bars are held; None without one."""
        found = self.verdicts
        return all(verdict.is_held for verdict in found) if found else None


class Store:
    """Results of single runs, as files; a damaged or missing one is run again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, workload: str, variant: str, repetition: int | str) -> Path:
        """Where one run's result lies."""
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in variant)
        return self.folder / workload / f"{name}.{repetition}.json"

    def read(
        self, workload: str, variant: str, repetition: int | str
    ) -> dict[str, Any] | None:
        """Read one result; None if there is none."""
        try:
            content = json.loads(self.path(workload, variant, repetition).read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def write(
        self,
        workload: str,
        variant: str,
        repetition: int | str,
        *,
        result: Mapping[str, Any],
    ) -> None:
        """Write one result, whole or not at all."""
        path = self.path(workload, variant, repetition)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(result))
        draft.replace(path)


class FailedRunError(Exception):
    """A measured process failed; the message says how."""


def run_once(
    command: Sequence[str],
    *,
    memory: bool = False,
    timeout_s: float = 1800.0,
    environment: Mapping[str, str] | None = None,
    needs_object: bool = True,
) -> dict[str, Any]:
    """Run one process and read the JSON object on the last line it prints.

    Args:
        command: The process.
        memory: Sample the memory of its process tree; add "memory_bytes", the peak.
            Sampling disturbs the clock: use another run for times.
        timeout_s: Longest time it may take.
        environment: Added to this process's.
        needs_object: Whether it has to say something.

    Raises:
        FailedRunError: If it fails, or says nothing.
    """
    own = {"FEDMED_CACHE": str(STORE / "cache"), **os.environ, **QUIET}
    own |= {**(environment or {}), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as wrong:
        process = subprocess.Popen(
            command,
            stdout=told,
            stderr=wrong,
            env=own,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509, no thread runs yet
        )
        with _ended(process), sampled(process.pid, memory) as peak:
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise FailedRunError(f"took longer than {timeout_s:.0f} s") from None
        result = _last_object(told)
        if code or (needs_object and result is None):
            why = _last_line(wrong)[:MAX_SAID] or f"ended with {code}, said nothing"
            raise FailedRunError(why)
    return (result or {}) | ({"memory_bytes": peak()} if memory else {})


def _end_with_parent() -> None:
    """Let the kernel end this process if the bench is killed: nothing runs on."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave nothing running, whatever happens."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_object(file: Any) -> dict[str, Any] | None:
    line = _last_line(file)
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _last_line(file: Any) -> str:
    file.seek(0)
    lines = [line.strip() for line in file.read().splitlines() if line.strip()]
    return lines[-1] if lines else ""


@contextlib.contextmanager
def sampled(process_id: int, is_on: bool) -> Iterator[Callable[[], int]]:
    """Watch the memory of a process tree; gives a function that tells the peak."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_S):
            peak[0] = max(peak[0], tree_memory(process_id))

    thread = threading.Thread(target=watch, daemon=True)
    if is_on:
        thread.start()
    try:
        yield lambda: peak[0]
    finally:
        over.set()
        if is_on:
            thread.join()


def tree_memory(process_id: int) -> int:
    """Proportional set size of a process and all its descendants, bytes.

    A page that several processes share counts once in the sum.
    """
    return sum(_memory(found) for found in descendants(process_id))


def descendants(process_id: int) -> list[int]:
    """A process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, waiting = [], [process_id]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def _memory(process_id: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def plan(workload: Workload, repetitions: int) -> list[tuple[Variant, int | str]]:
    """The runs of a workload, interleaved: A B C, A B C, ..., and once for memory."""
    count = min(repetitions, workload.repetitions)
    runs: list[tuple[Variant, int | str]] = [
        (variant, number) for number in range(count) for variant in workload.variants
    ]
    if workload.memory:
        runs += [(variant, "memory") for variant in workload.variants]
    return runs


def measure(
    workload: Workload,
    store: Store,
    *,
    repetitions: int,
    quick: bool = False,
    told: Callable[[str], None] = logger.info,
) -> dict[str, str]:
    """Do the runs that are still missing.

    Args:
        workload: The comparison.
        store: Holds what was measured before.
        repetitions: How often each variant is run.
        quick: Pass `--quick`: fewer rounds, for trying things out.
        told: Is told of every run.

    Returns:
        Variants that failed, and why. They are tried once, and again by the next call.
    """
    runs = plan(workload, repetitions)
    began, done, failed = time.monotonic(), 0, {}
    missing = [r for r in runs if store.read(workload.key, r[0].name, r[1]) is None]
    for variant, number in missing:
        if variant.name in failed:
            continue
        try:
            run = run_whole if workload.is_whole else run_variant
            result = run(workload, variant, memory=number == "memory", quick=quick)
            store.write(workload.key, variant.name, number, result=result)
            said = shown(result)
        except FailedRunError as error:
            failed[variant.name] = said = f"failed: {error}"
        done += 1
        left = (time.monotonic() - began) / done * (len(missing) - done)
        told(
            f"{workload.key} {len(runs) - len(missing) + done}/{len(runs)} "
            f"{variant.name} #{number}: {said} · {left:.0f} s left"
        )
    return failed


def run_variant(
    workload: Workload, variant: Variant, *, memory: bool, quick: bool
) -> dict[str, Any]:
    """Run one variant in a process of one thread."""
    command = [sys.executable, "-m", workload.module, variant.name]
    command += workload.quick if quick else ()
    return run_once(command, memory=memory, environment={"OMP_NUM_THREADS": "1"})


def run_whole(
    workload: Workload, variant: Variant, *, memory: bool, quick: bool
) -> dict[str, Any]:
    """Run a module that measures all variants; it may fail by its own checks."""
    del variant
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", workload.module, "--json", str(file)]
        command += workload.quick if quick else workload.repeat
        try:
            run_once(command, memory=memory, needs_object=False)
            return dict(json.loads(file.read_text()))
        except FailedRunError as error:
            if not file.is_file():
                raise
            return {**json.loads(file.read_text()), "problem": str(error)}


def combined(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put the rows of several runs together, by name: medians, widest spread."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        for row in run["rows"]:
            by_name.setdefault(row["name"], []).append(row)
    return [_combined_row(rows) for rows in by_name.values()]


def _combined_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    result = dict(rows[-1])
    for key, value in rows[-1].items():
        seen = [row.get(key) for row in rows]
        numbers = [v for v in seen if isinstance(v, float) and key != "bar"]
        if isinstance(value, float) and numbers:
            result[key] = statistics.median(numbers)
    lows, highs = zip(*(row["spread"] for row in rows), strict=True)
    return result | {"spread": [min(lows), max(highs)]}


def shown(result: Mapping[str, Any]) -> str:
    """Put one result into a few words."""
    if "memory_bytes" in result:
        return f"{result['memory_bytes'] / 2**20:.0f} MB"
    return f"{1e3 * result['seconds']:.2f} ms" if "seconds" in result else "done"


def summarise(workload: Workload, store: Store, repetitions: int) -> list[Row]:
    """Put the repetitions of a workload together.

    A ratio is the median of the ratios within each repetition.
    """
    runs = {
        variant.name: [
            store.read(workload.key, variant.name, number)
            for number in range(min(repetitions, workload.repetitions))
        ]
        for variant in workload.variants
    }
    return [
        _row(workload, variant, runs, store)
        for variant in workload.variants
        if any(runs[variant.name])
    ]


def _row(
    workload: Workload,
    variant: Variant,
    runs: Mapping[str, Sequence[Mapping[str, Any] | None]],
    store: Store,
) -> Row:
    own = runs[variant.name]
    seconds = [run["seconds"] for run in own if run]
    others = runs.get(variant.reference, [None] * len(own))
    factor = variant.cores if variant.per_core else 1
    pairs = [
        (run["seconds"], base_s)
        for run, base in zip(own, others, strict=True)
        if run and (base_s := run.get("reference_seconds", base and base["seconds"]))
    ]
    ratios = [factor * own_s / base_s for own_s, base_s in pairs]
    memory = _peak(store, workload, variant.name)
    base_memory = _peak(store, workload, variant.reference)
    return Row(
        variant,
        statistics.median(seconds),
        (min(seconds), max(seconds)),
        statistics.median(ratios) if ratios else None,
        (min(ratios), max(ratios)) if ratios else None,
        memory,
        memory / base_memory if memory and base_memory else None,
        statistics.median(base_s for _, base_s in pairs) if pairs else None,
        next(run for run in reversed(own) if run),
    )


def _peak(store: Store, workload: Workload, variant: str) -> int | None:
    found = store.read(workload.key, variant, "memory") if variant else None
    return found["memory_bytes"] if found else None
