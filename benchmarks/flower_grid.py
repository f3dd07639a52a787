"""One Flower app on three engines: `WorkerGrid`, Flower's simulation, no framework.

    python -m benchmarks.flower_grid W2 --rounds 5 --repeats 3

The app is `peers/flower/simulate.py`, unchanged. Engines take turns in one run, all
in this environment; a round's time is the median over all but each run's first round.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

FLOWER = Path(__file__).parent / "peers" / "flower"
sys.path.insert(0, str(FLOWER))

ENGINES = ("grid", "flower", "floor")


def __getattr__(name: str) -> object:
    """Give the client app of a workload under its name: what workers import."""
    if name not in ("W1", "W2", "W3"):
        raise AttributeError(name)
    return importlib.import_module("simulate").client_app(name)


def run_grid(name: str, num_rounds: int) -> None:
    """Run the app's server function on a `WorkerGrid`, in this process."""
    simulate = importlib.import_module("simulate")
    from flwr.app import Context, RecordDict

    from benchmarks import workload
    from fedmed.grid import WorkerGrid

    num_sites = workload.WORKLOADS[name].num_sites
    server = simulate.server_app(name, num_rounds)
    app = f"benchmarks.flower_grid:{name}"
    with WorkerGrid(app, num_sites, workload.NUM_WORKERS) as grid:
        context = Context(grid.run.run_id, 1, {}, RecordDict(), {})
        server(grid=grid, context=context)


def command(engine: str, name: str, num_rounds: int) -> list[str]:
    rounds = [name, "--rounds", str(num_rounds)]
    if engine == "grid":
        module = ["-m", "benchmarks.flower_grid", *rounds, "--engine", "grid"]
        return [sys.executable, *module]
    if engine == "floor":
        return [sys.executable, "-m", "benchmarks.floor", *rounds]
    return [sys.executable, str(FLOWER / "simulate.py"), *rounds]


def measure(engine: str, name: str, num_rounds: int) -> tuple[list[float], float]:
    """Run an engine in a process of its own: seconds of its rounds, and the loss."""
    root = Path(__file__).parent.parent
    paths = [str(root), str(FLOWER)]
    done = subprocess.run(
        command(engine, name, num_rounds),
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    told = [json.loads(line) for line in lines]
    seconds = [line["seconds"] for line in told if "seconds" in line]
    return seconds[1:], next(line["loss"] for line in told if "loss" in line)


def compare(name: str, num_rounds: int, repeats: int) -> None:
    """Let the engines take turns, and print what a round takes with each."""
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    losses = {}
    for _ in range(repeats):
        for engine in ENGINES:
            found, losses[engine] = measure(engine, name, num_rounds)
            seconds[engine] += found
    floor_s = statistics.median(seconds["floor"])
    print(f"{name}: one round, median of {len(seconds['grid'])}")
    for engine in ENGINES:
        median_s = statistics.median(seconds[engine])
        print(
            f"  {engine:7} {1000 * median_s:9.1f} ms  {median_s / floor_s:6.2f} floors"
            f"  loss {losses[engine]:.6f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=("W1", "W2", "W3"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", choices=("grid",))
    arguments = parser.parse_args()
    if arguments.engine:
        importlib.import_module("torch").set_num_threads(1)
        run_grid(arguments.workload, arguments.rounds)
    else:
        compare(arguments.workload, arguments.rounds, arguments.repeats)
