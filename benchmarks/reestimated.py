"""Finished runs, tested once more with running values estimated at the hospital.

A federated step normalises each hospital's batch by itself; what prediction uses is one
set of running values, the mean over hospitals, which need fit none of them. How much of
a result at a hospital left out is due to that shows when its own images, without
labels, give the running values (AdaBN). Nothing is trained.
"""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fedmed.message import SiteId
from fedmed.preflight import study_of_lock
from fedmed.report.run_folder import COMPARE_FILE
from fedmed.run import cache_folder
from fedmed.runfolder import RunFolder
from fedmed.storage import read_state
from fedmed.strategy import Private
from sites.calibration import calibrate
from sites.context import Workbench
from sites.evaluation import evaluate

NOTE = "running statistics re-estimated at the hospital left out"


def reestimate(source: Path, target: Path, methods: Sequence[str], jobs: int) -> None:
    """Test the runs of a comparison once more at the hospitals that they left out.

    Args:
        source: A comparison folder, finished.
        target: Becomes one; what lies there already is not done again.
        methods: Of its runs that left a hospital out; their strategies share all that
            they train.
        jobs: Processes; 1 is this one.
    """
    content = json.loads((source / COMPARE_FILE).read_text())
    content["runs"] = [
        run
        for run in content["runs"]
        if run["strategy"] in methods and run["held_out"] is not None
    ]
    target.mkdir(parents=True, exist_ok=True)
    (target / COMPARE_FILE).write_text(json.dumps(content, indent=1))
    names = [run["folder"] for run in content["runs"]]
    left = [
        name for name in names if not RunFolder(target / name).summary_file.exists()
    ]
    pairs = [(source / name, target / name) for name in left]
    with contextlib.ExitStack() as stack:
        done = map(_again, pairs)
        if jobs > 1:
            # A network holds threads and locks that a fork would copy in any state.
            pool = ProcessPoolExecutor(jobs, get_context("spawn"))
            done = stack.enter_context(pool).map(_again, pairs)
        for number, name in enumerate(done, start=1):
            sys.stdout.write(f"{name}: tested again · {number} of {len(left)}\n")


def _again(folders: tuple[Path, Path]) -> str:
    """Test one run at the hospital that it left out; gives the folder's name."""
    source, target = map(RunFolder, folders)
    torch.set_num_threads(1)
    study = study_of_lock(source.read_lock())
    (site,) = study.split.held_out
    bench = Workbench(study, site, cache_folder(study))
    weights = dict(read_state(source.model_file)[0])
    model = bench.load(weights, Private())
    calibrate(bench, model)
    weights = dict(bench.entries(model, weights))
    rows = evaluate(bench, Private(), weights=weights, splits=("test",))
    target.path.mkdir(parents=True, exist_ok=True)
    for file in (source.lock_file, source.rounds_file):
        shutil.copy(file, target.path)
    _write_cases(source, target, site, rows)
    # Last: it says that all is there.
    summary = {"profile": source.read_summary()["profile"], "note": NOTE}
    target.write_summary(summary)
    return target.path.name


def _write_cases(
    source: RunFolder,
    target: RunFolder,
    site: SiteId,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write `cases.csv` with other rows of one site's test cases, in their places."""
    with source.cases_file.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns, known = tuple(reader.fieldnames or ()), list(reader)
    found = {(str(row["case_id"]), str(row["class"])): row for row in rows}
    ours = [row for row in known if row["site"] == site and row["split"] == "test"]
    names = {(row["case_id"], row["class"]) for row in ours}
    if names != set(found):
        raise ValueError(f"{source.path.name} tested other cases of site {site}")
    for row in ours:
        row.update(found[row["case_id"], row["class"]])
    target.cases_file.unlink(missing_ok=True)
    target.append_cases(columns, known)
