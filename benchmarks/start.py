"""W0, start: from the start of the process to the end of the first local steps.

    python -m benchmarks.start workers

Four phantom hospitals of which each takes one step; phantoms and prepared cases lie in
the cache, put there by a run of the same study that does not count. The import of torch
is timed apart, in the same process, and taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Variant, Workload

WORKLOAD = Workload(
    key="W0",
    title="Start: to the end of the first local steps at 4 sites, without `import "
    "torch`",
    module="benchmarks.start",
    variants=(
        Variant("import torch"),
        Variant("inprocess", bar_s=1.0),
        Variant("workers", bar_s=1.0),
    ),
    notes="The end of the first exchange is what is timed, so that all four sites have "
    "done a step, and answered.",
)


def since_start_s() -> float:
    """Seconds since this process was started, to a hundredth."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[19])
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return now_s - ticks / os.sysconf("SC_CLK_TCK")


def study_of(transport: str) -> dict[str, Any]:
    """Four hospitals, one step each."""
    return {
        "rounds": 2,
        "sites": {
            "dataset": "phantom",
            "preset": "brain_abcd",
            "cases_per_site": 5,
            "size": [48, 48, 6],
        },
        "preprocess": {"size": [48, 48]},
        "model": {"name": "unet", "base_width": 8, "levels": 3},
        "train": {"batch_size": 8, "local_steps": 1},
        "strategy": {"name": "fedavg"},
        "transport": {"name": transport},
    }


def measured(variant: str) -> Mapping[str, Any]:
    """Measure one variant."""
    before_s = since_start_s()
    import torch  # noqa: F401

    torch_s = since_start_s() - before_s
    if variant == "import torch":
        return {"seconds": torch_s}
    from benchmarks.measured_study import measure_study

    began_s = since_start_s()
    found = measure_study(study_of(variant), skip=0)
    first_s = began_s + found["first_exchange_s"]
    return {"seconds": first_s - torch_s, "start_s": first_s, "torch_s": torch_s}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=[v.name for v in WORKLOAD.variants])
    parser.add_argument("--quick", action="store_true", help="changes nothing")
    parser.add_argument("--warm", action="store_true", help="the cache is warm")
    asked = parser.parse_args()
    if not asked.warm and asked.variant != "import torch":
        command = [sys.executable, "-m", "benchmarks.start", asked.variant, "--warm"]
        # Once to fill the cache, then what counts, in a process that begins afresh.
        subprocess.run(command, check=True, capture_output=True)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        sys.stdout.write(done.stdout.splitlines()[-1] + "\n")
        return
    sys.stdout.write(json.dumps(measured(asked.variant)) + "\n")


if __name__ == "__main__":
    main()
