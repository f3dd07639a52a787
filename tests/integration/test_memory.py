"""Memory does not grow with rounds, and hardly with hospitals.

Measured is PSS, which shares out common pages, over the process and its workers. Pages
of files (torch's libraries) are left out: they are shared with whatever else runs on
the machine, so that a process's part of them grows when another one ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROLLUP = Path("/proc/self/smaps_rollup")
HAS_PARTS = ROLLUP.exists() and "Pss_Shmem" in ROLLUP.read_text()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        not HAS_PARTS, reason="needs Linux's /proc, with the parts of PSS"
    ),
]
ROOT = Path(__file__).parents[2]
MEGABYTE = 1e6

SCRIPT = """
import json, logging, sys
from pathlib import Path
import psutil
from fedmed.run import run_study
from fedmed.study import study_from_dict

def own_pss(process):
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return 1024 * (int(kilobytes["Pss_Anon"]) + int(kilobytes["Pss_Shmem"]))

def tree_pss():
    me = psutil.Process()
    return sum(map(own_pss, [me, *me.children(recursive=True)]))

class Scales:
    def __init__(self, rounds):
        self.rounds, self.found = rounds, {}
    def round_started(self, number): pass
    def exchanged(self, number, exchange, losses): pass
    def round_finished(self, record):
        if record["round"] in self.rounds:
            self.found[record["round"]] = tree_pss()

content, folder, rounds = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
logging.disable(logging.WARNING)
scales = Scales(rounds)
run_study(study_from_dict(content), Path(folder), observer=scales)
print(json.dumps(scales.found))
"""


def study(
    num_sites: int,
    rounds: int,
    transport: dict[str, Any],
    widths: tuple[int, ...] = (100, 32),
) -> dict[str, Any]:
    return {
        "name": "memory",
        "rounds": rounds,
        "sites": {
            "dataset": "benchmarks.synthetic_sites",
            "num_sites": num_sites,
            "num_rows": 16,
            "num_features": 64,
            "num_classes": 10,
        },
        "split": {"train": 0.8, "validation": 0.2, "test": 0.0},
        "model": {
            "name": "mlp",
            "mode": "row",
            "widths": list(widths),
            "norm": "none",
            "missing_indicator": False,
        },
        "train": {
            "batch_size": 8,
            "local_steps": 1,
            "loss": "cross_entropy",
            "optimizer": {"name": "sgd", "lr": 0.01},
            "precision": "float32",
        },
        "strategy": {"name": "fedavg"},
        "evaluate": {"every": 1_000_000, "overlays": 0},
        "checkpoint": {"every": 50},
        "transport": transport,
    }


def tree_pss_bytes(
    content: dict[str, Any], rounds: list[int], folder: Path
) -> dict[int, int]:
    """Run a study in a process of its own; PSS of the whole tree after rounds."""
    arguments = [json.dumps(content), str(folder), json.dumps(rounds)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {int(number): pss for number, pss in found.items()}


def test_memory_does_not_grow_with_rounds(tmp_path: Path) -> None:
    # One round more: the last one ends with an evaluation, which the others have not.
    content = study(8, 201, {"name": "workers", "num_workers": 2})
    found = tree_pss_bytes(content, [60, 200], tmp_path / "run")
    growth = found[200] - found[60]
    assert abs(growth) < 0.03 * found[60] + 4 * MEGABYTE, found


@pytest.mark.parametrize("name", ["inprocess", "workers"])
def test_a_tiny_hospital_costs_little(name: str, tmp_path: Path) -> None:
    """A thousand fit in 0.2 GB. The model is small: replies do not count."""
    options = {"num_workers": 2} if name == "workers" else {}
    few, many = (
        tree_pss_bytes(
            study(count, 2, {"name": name, **options}, widths=(8,)),
            [2],
            tmp_path / str(count),
        )[2]
        for count in (10, 1000)
    )
    assert (many - few) / 990 < 200_000, (few, many)
