"""The results page: tables, bars, the machine, and what every floor does."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Row, Verdict, Workload

PACKAGES = ("torch", "numpy", "ray", "flwr", "monai")

INTRODUCTION = """\
# What a study costs

Written by `make bench`; do not edit. Every repetition runs all variants of a workload
one after another, each in a process of its own, so that a machine that slows down
slows all of them. Times are medians of at least {repetitions} repetitions of the
median round, with the fastest and slowest repetition in brackets. Ratios are medians of
the ratios within each repetition, to the time in the column before them. Memory is the
largest sum of proportional set sizes over the process tree, in runs of its own.
"""

DEFINITION = """\
## How a floor is defined

A floor is the same work in a bare PyTorch loop: the same number of sites, drawn in the
same way; the same batches, drawn for each site and round and read from the same kind of
table; the same network, an `nn.Module` that is called as a module; the same optimiser
step; the same weighted mean over all sites. It has forked workers of one thread each
wherever ours has, and every trick that ours has: weights and sums in shared memory,
used in place; one flat vector behind all parameters; fused or one-call steps; channels-
last; bfloat16 where that is what is compared; columns summed by all workers where the
model is large; memory that is kept when it is freed. It is spared what a framework is
for: checks, messages, records, ledgers, checkpoints, private state, failures. One file,
[floor.py](floor.py), is the floor of W1, W2, W3 and W7, here and in [`make bench-
peers`](peers/README.md). W5 and W6 have no floor: their rows are libraries.
"""


def page(
    tables: Sequence[tuple[Workload, Sequence[Row], Mapping[str, str]]],
    wholes: Sequence[tuple[Workload, Sequence[Mapping[str, Any]], Mapping[str, str]]],
    *,
    commit: str,
    repetitions: int,
    quick: bool,
) -> str:
    """Write the page.

    Args:
        tables: Workloads measured variant by variant, their rows and what failed.
        wholes: Workloads that measure themselves, their rows and what failed.
        commit: Of the code that was measured.
        repetitions: Of every variant.
        quick: Whether this was only a try.
    """
    parts = [INTRODUCTION.format(repetitions=repetitions)]
    if quick:
        parts.append("**Measured with `--quick`: too few rounds to be quoted.**\n")
    parts += [machine(commit), bars(tables, wholes), DEFINITION]
    sections = [(w.key, table(w, rows, failed)) for w, rows, failed in tables]
    sections += [(w.key, whole_table(w, rows, failed)) for w, rows, failed in wholes]
    parts += [text for _, text in sorted(sections)]
    parts.append(floors([w for w, *_ in (*wholes, *tables)]))
    return "\n".join(parts)


def bars(
    tables: Sequence[tuple[Workload, Sequence[Row], Mapping[str, str]]],
    wholes: Sequence[tuple[Workload, Sequence[Mapping[str, Any]], Mapping[str, str]]],
) -> str:
    """Say of every bar whether it is held, and by how much."""
    told = []
    for workload, rows, failed in sorted(
        (*tables, *wholes), key=lambda part: part[0].key
    ):
        found: list[Verdict] = []
        if not workload.is_whole:
            found += [v for row in rows if isinstance(row, Row) for v in row.verdicts]
        found += workload.further(rows) if workload.further else ()
        told += [f"* {workload.key}, {verdict}" for verdict in found]
        told += [f"* {workload.key}, {name}: **failed**" for name in failed]
    return "\n".join(["## What was aimed at\n", *told, ""])


def table(workload: Workload, rows: Sequence[Row], failed: Mapping[str, str]) -> str:
    """One workload as a table."""
    has_memory = any(row.memory_bytes for row in rows)
    has_loss = any("loss" in row.facts for row in rows)
    has_its_loss = any("reference_loss" in row.facts for row in rows)
    has_reference = any(row.reference_s for row in rows)
    has_bar = any(row.verdicts for row in rows)
    head = ["", "time", *(["floor", "ratio"] if has_reference else [])]
    head += ["at most"] if has_bar else []
    head += ["memory", "ratio"] if has_memory else []
    head += ["start"] + (["loss"] if has_loss else [])
    head += ["the floor's"] if has_its_loss else []
    lines = [_heading(workload), _cells(head), _cells(["---"] * len(head))]
    for row in rows:
        cells = [row.variant.name, _spread(row.seconds, row.spread)]
        if has_reference:
            shown = row.reference_s
            cells += ["" if shown is None else _spread(shown, None), _ratio(row)]
        cells += [_bar(row)] if has_bar else []
        if has_memory:
            cells += [_megabytes(row.memory_bytes), _number(row.memory_ratio)]
        cells.append(_seconds(row.facts.get("start_s")))
        cells += [_number(row.facts.get("loss"), 4)] if has_loss else []
        if has_its_loss:
            cells.append(_number(row.facts.get("reference_loss"), 4))
        lines.append(_cells(cells))
    return "\n".join([*lines, "", *_failed(failed), *_notes(workload)])


def whole_table(
    workload: Workload, rows: Sequence[Mapping[str, Any]], failed: Mapping[str, str]
) -> str:
    """A workload that measures itself, as a table."""
    known = ("name", "median_s", "spread", "ratio", "bar")
    keys = dict.fromkeys(key for row in rows for key in row if key not in known)
    more = [key for key in keys if not key.endswith("_bar")]
    head = ["", "median", "ratio", "bar", *(key.replace("_", " ") for key in more)]
    lines = [_heading(workload), _cells(head), _cells(["---"] * len(head))]
    for row in rows:
        median, spread = row.get("median_s"), row.get("spread")
        time = _spread(median, spread) if median is not None else ""
        cells = [row["name"], time, _number(row.get("ratio")), _number(row.get("bar"))]
        lines.append(_cells([*cells, *(_any(row.get(key)) for key in more)]))
    return "\n".join([*lines, "", *_failed(failed), *_notes(workload)])


def machine(commit: str) -> str:
    """What it was measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    load = os.getloadavg()[0]
    return (
        f"* Machine: {processor()}, {os.cpu_count()} cores, {memory:.0f} GB, "
        f"{platform.system()} {platform.release()}; load at the end {load:.1f}\n"
        f"* Versions: {', '.join(versions)}\n"
        f"* Commit: {commit}\n"
    )


def processor() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def floors(workloads: Iterable[Workload]) -> str:
    """Say what every floor does, in the words of its own file."""
    files = dict.fromkeys(file for w in workloads for file in w.floors)
    parts = ["## The floors\n"]
    for file in files:
        path = ROOT / file
        if not path.is_file():
            continue
        text = path.read_text()
        words = ast.get_docstring(ast.parse(text)) or "No description."
        parts.append(
            f"### `{file}`\n\n{words}\n\n{code_lines(text)} lines of code, listed in "
            f"[{path.name}]({path.name}).\n"
        )
    return "\n".join(parts)


def code_lines(text: str) -> int:
    """Count the lines that are neither empty, comment nor docstring."""
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    words: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            first = node.body[0]
            words |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in words
        for number, line in lines
    )


def _heading(workload: Workload) -> str:
    return f"## {workload.key} {workload.title}\n"


def _notes(workload: Workload) -> list[str]:
    return [workload.notes + "\n"] if workload.notes else []


def _failed(failed: Mapping[str, str]) -> list[str]:
    return [f"* **{name} failed**: {why}\n" for name, why in failed.items()]


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(row: Row) -> str:
    if row.ratio is None or row.ratio_spread is None:
        return ""
    low, high = row.ratio_spread
    unit = " per core" if row.variant.per_core else ""
    return f"**{row.ratio:.2f}**{unit} [{low:.2f}-{high:.2f}]"


def _bar(row: Row) -> str:
    told = [
        f"{verdict.bar:.3g}{'' if verdict.is_held else ' **missed**'}"
        for verdict in row.verdicts
    ]
    return ", ".join(told)


def _spread(seconds: float, spread: Sequence[float] | None) -> str:
    unit, factor = ("ms", 1e3) if seconds < 1 else ("s", 1.0)
    shown = f"{factor * seconds:.3g} {unit}"
    if not spread:
        return shown
    return f"{shown} [{factor * spread[0]:.3g}-{factor * spread[1]:.3g}]"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f} MB"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _any(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
