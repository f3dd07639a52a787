"""The floor: four forked workers, shared memory, two barriers a round, no framework.

`python floor.py W1 --rounds 5`. Each worker keeps its model and its data, reads the
round's weights from shared memory, adds its sites' results into its own shared row,
and then sums a quarter of all rows.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
from multiprocessing.synchronize import Barrier

import torch
import workload
from torch import Tensor, nn

fork = mp.get_context("fork")


def float_tensors(model: nn.Module) -> list[Tensor]:
    return [t for t in model.state_dict().values() if t.is_floating_point()]


def views(row: Tensor, model: nn.Module) -> list[Tensor]:
    """A flat row seen as the model's float arrays, in their order."""
    tensors = float_tensors(model)
    parts = row.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def work(
    rank: int,
    name: str,
    num_rounds: int,
    *,
    shared: tuple[Tensor, Tensor],
    wait: Barrier,
) -> None:
    torch.set_num_threads(1)
    weights, rows = shared
    model = workload.build_model(name)
    local, mine = float_tensors(model), views(rows[rank], model)
    received = views(weights, model)
    part = slice(*(weights.numel() * r // len(rows) for r in (rank, rank + 1)))
    wait.wait()
    for index in range(num_rounds):
        sites = workload.draw_sites(name, index)
        share = 1.0 / len(sites)
        own = sites[rank :: len(rows)]
        for site in own:
            torch._foreach_copy_(local, received)
            workload.train(name, model, site)
            if site == own[0]:
                torch._foreach_copy_(mine, local)
                torch._foreach_mul_(mine, share)
            else:
                torch._foreach_add_(mine, local, alpha=share)
        wait.wait()
        torch.sum(rows[:, part], 0, out=weights[part])
        wait.wait()


def run(name: str, num_rounds: int, num_workers: int = workload.NUM_WORKERS) -> None:
    model = workload.build_model(name)
    tensors = float_tensors(model)
    size = sum(t.numel() for t in tensors)
    weights = torch.empty(size).share_memory_()
    rows = torch.zeros(num_workers, size).share_memory_()
    torch._foreach_copy_(views(weights, model), tensors)
    wait = fork.Barrier(num_workers + 1)
    processes = [
        fork.Process(
            target=work,
            args=(r, name, num_rounds),
            kwargs={"shared": (weights, rows), "wait": wait},
            daemon=True,
        )
        for r in range(num_workers)
    ]
    for process in processes:
        process.start()
    wait.wait()
    rounds = workload.Rounds()
    for _ in range(num_rounds):
        wait.wait()
        wait.wait()
        rounds.done()
    for process in processes:
        process.join()
    torch._foreach_copy_(tensors, views(weights, model))
    rounds.end(workload.probe_loss(name, model), **failures(name, num_rounds))


def failures(name: str, num_rounds: int) -> dict[str, float]:
    """What the final loss would be if nothing was learned, or nothing averaged."""
    model = workload.build_model(name)
    untrained = workload.probe_loss(name, model)
    site = workload.draw_sites(name, num_rounds - 1)[0]
    for _ in range(num_rounds):
        workload.train(name, model, site)
    return {"loss_untrained": untrained, "loss_one": workload.probe_loss(name, model)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=workload.WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.workload, arguments.rounds)
