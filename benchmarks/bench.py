"""Measure what a study costs, beside bare PyTorch: W0 to W7.

    python -m benchmarks.bench                  all, and write benchmarks/results.md
    python -m benchmarks.bench --only W2,W3     these; others from earlier runs
    python -m benchmarks.bench --quick          a try: few rounds, one repetition

Results of single runs lie in .bench/<commit>/; a bench that was stopped goes on with
the runs that are missing. `--fresh` measures everything anew.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    ROOT,
    STORE,
    Store,
    Variant,
    Verdict,
    Workload,
    combined,
    measure,
    summarise,
)
from benchmarks.results_page import page

RESULTS = ROOT / "benchmarks" / "results.md"
REPETITIONS = 5


def whole_verdicts(rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Bars that stand in the rows of a workload that measures itself."""
    found = []
    for row in rows:
        for key, bar in row.items():
            if key.endswith("bar") and bar is not None:
                measured = {"bar": "ratio", "seconds_bar": "median_s"}
                value = row[measured.get(key, key.removesuffix("_bar"))]
                what = {"bar": "ratio", "seconds_bar": "seconds"}.get(
                    key, key.removesuffix("_bar").replace("_", " ")
                )
                found.append(Verdict(f"{row['name']}, {what}", value, bar))
    return found


SELF_MEASURED = (
    Workload(
        key="W5",
        title="Data: cold and warm start of 200 NIfTI volumes, cases per second",
        module="benchmarks.data",
        variants=(Variant("all"),),
        floors=("benchmarks/data.py",),
        repeat=("--repeats", "1"),
        quick=("--repeats", "1", "--volumes", "20"),
        further=whole_verdicts,
    ),
    Workload(
        key="W6",
        title="Evaluation: Dice, ASD and HD95 of 100 volumes 256x256x40, 4 classes",
        module="benchmarks.evaluation",
        variants=(Variant("all"),),
        floors=("benchmarks/evaluation.py",),
        repeat=("--repeats", "1"),
        quick=("--quick",),
        further=whole_verdicts,
    ),
)
"""Workloads whose module interleaves and repeats by itself."""


def workloads() -> dict[str, Workload]:
    """All workloads by key, in order."""
    from benchmarks import exact_steps, scale, sites_and_cores, size, start, training

    listed = (
        *SELF_MEASURED,
        *(
            m.WORKLOAD
            for m in (start, training, scale, size, exact_steps, sites_and_cores)
        ),
    )
    return {w.key: w for w in sorted(listed, key=lambda w: w.key)}


def code_version() -> str:
    """The commit, and a hash of what was changed since."""
    commit = _git("rev-parse", "--short=12", "HEAD").decode().strip()
    changes = _git("diff", "HEAD", "--", "*.py")
    if not changes:
        return commit
    return f"{commit}-{hashlib.blake2b(changes, digest_size=4).hexdigest()}"


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout


def tell(line: str) -> None:
    """Show one line of progress."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def bench(
    chosen: Mapping[str, Workload],
    known: Mapping[str, Workload],
    *,
    store: Store,
    repetitions: int,
    quick: bool,
) -> dict[str, dict[str, str]]:
    """Measure the chosen workloads; gives what failed, by workload."""
    failed: dict[str, dict[str, str]] = {key: {} for key in known}
    for key, workload in chosen.items():
        failed[key] = measure(
            workload, store, repetitions=repetitions, quick=quick, told=tell
        )
    return failed


def results(
    known: Mapping[str, Workload],
    failed: Mapping[str, Mapping[str, str]],
    *,
    store: Store,
    repetitions: int,
    quick: bool,
    commit: str,
) -> str:
    """Write the page of all that is stored."""
    tables, wholes = [], []
    for key, workload in known.items():
        if workload.is_whole:
            runs = [store.read(key, "all", number) for number in range(repetitions)]
            found = [run for run in runs if run]
            told = {
                f"run {n}": r["problem"] for n, r in enumerate(found) if "problem" in r
            }
            if found or failed[key]:
                wholes.append((workload, combined(found), {**failed[key], **told}))
        elif (rows := summarise(workload, store, repetitions)) or failed[key]:
            tables.append((workload, rows, failed[key]))
    fewest = fewest_repetitions(known, store, most=repetitions)
    return page(tables, wholes, commit=commit, repetitions=fewest, quick=quick)


def fewest_repetitions(
    known: Mapping[str, Workload], store: Store, *, most: int
) -> int:
    """Count what is stored of the workload that was repeated least; 0 if nothing is."""
    counts = []
    for key, workload in known.items():
        name = "all" if workload.is_whole else workload.variants[0].name
        aimed = range(min(most, workload.repetitions))
        found = sum(store.read(key, name, number) is not None for number in aimed)
        # What is repeated less on purpose is no gap.
        counts.append(most if found == len(aimed) else found)
    return min((count for count in counts if count), default=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a run failed."""
    # As with Ctrl-C: what was started is ended before this process is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="workloads, e.g. W2,W3")
    parser.add_argument("--quick", action="store_true", help="few rounds, once")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--fresh", action="store_true", help="measure all anew")
    parser.add_argument("--out", type=Path, default=None, help="the results page")
    asked = parser.parse_args(arguments)
    known = workloads()
    keys = [key for key in asked.only.upper().split(",") if key] or list(known)
    if strangers := sorted(set(keys) - set(known)):
        parser.error(f"unknown: {', '.join(strangers)}; known: {', '.join(known)}")
    repetitions = 1 if asked.quick else asked.repetitions
    commit = code_version()
    store = Store(STORE / (f"{commit}-quick" if asked.quick else commit))
    if asked.fresh:
        for key in keys:
            shutil.rmtree(store.folder / key, ignore_errors=True)
    options = {"store": store, "repetitions": repetitions, "quick": asked.quick}
    failed = bench({key: known[key] for key in keys}, known, **options)
    out = asked.out or (store.folder / "results.md" if asked.quick else RESULTS)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(results(known, failed, **options, commit=commit))
    tell(f"written: {out}")
    return int(any(failed.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        tell("stopped; the same command goes on from here")
        sys.exit(130)
