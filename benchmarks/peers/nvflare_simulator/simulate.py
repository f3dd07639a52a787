"""FedAvg in NVFlare's simulator, with its PyTorch recipe.

NVFlare's "threads" are client processes. Eight sites get one each, NVFlare's default:
with fewer processes than sites it starts a fresh one for each site and round, which is
slower by far. `SimEnv` takes 100 sites at most, so W2 ends in its error message.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from clock import Clock
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv

from benchmarks import workload

CLIENT = Path(__file__).with_name("client.py")


def simulate(name: str, num_rounds: int, folder: str) -> None:
    work = workload.WORKLOADS[name]
    model = workload.build_model(name)
    recipe = FedAvgRecipe(
        name=name.lower(),
        model={"class_path": "benchmarks.workload.build_model", "args": {"name": name}},
        min_clients=work.num_sampled,
        num_rounds=num_rounds,
        train_script=str(CLIENT),
        train_args=name,
    )
    recipe._job.to_server(Clock(), id="clock")  # as NVFlare's own recipe tools do
    env = SimEnv(
        num_clients=work.num_sites,
        num_threads=work.num_sites if work.num_sites <= 8 else workload.NUM_WORKERS,
        workspace_root=folder,
    )
    recipe.execute(env)
    saved = next(Path(folder).rglob("FL_global_model.pt"))
    model.load_state_dict(torch.load(saved)["model"])
    workload.Rounds().end(workload.probe_loss(name, model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=workload.WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        simulate(arguments.workload, arguments.rounds, scratch)
