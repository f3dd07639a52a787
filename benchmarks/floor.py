"""The floor of W1, W2, W3 and W7: federated averaging with no framework at all.

Forked worker processes with one thread each. The weights and one sum per worker lie in
shared memory that is mapped before the fork and read and written in place. A worker
keeps one network whose parameters and running statistics are views of one flat vector,
kernels channels-last within it, so that loading the weights is one copy and adding a
site's result is one pass. The sampled sites are divided evenly; each draws its batches,
and trains, by `workload.train`: the same module, data access and step as everybody's,
gradients by `autograd.grad`, one `_foreach_add_` as the SGD step, no optimiser object,
bfloat16 autocast where that is what is compared. A small model is added up by the
parent, a large one by all workers, each its own columns. Data are in memory before the
fork, and the allocator keeps freed memory, so that pages are touched once.

Nothing is checked, recorded or kept, and a site that fails is lost silently: this is
what the arithmetic costs.

    python -m benchmarks.floor W1 --rounds 5 [--bfloat16]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import workload

LARGE = 1_000_000
"""From so many parameters on, the workers add the sums up themselves."""

TRAIN, ADD = 1, 2


class Floor:
    """Worker processes that wait for rounds.

    Args:
        name: The workload.
        num_workers: Processes.
        num_sites: All sites; None = the workload's.
        num_sampled: Sites of a round; None = the workload's.
        bfloat16: Whether forward passes are autocast.
    """

    def __init__(
        self,
        name: str,
        num_workers: int = workload.NUM_WORKERS,
        *,
        num_sites: int | None = None,
        num_sampled: int | None = None,
        bfloat16: bool = False,
    ) -> None:
        work = workload.WORKLOADS[name]
        self.name, self.bfloat16 = name, bfloat16
        self.num_sites = num_sites or work.num_sites
        self.num_sampled = num_sampled or min(work.num_sampled, self.num_sites)
        for site in range(self.num_sites):
            workload.site_data(name, site)
        initial = flat_entries(workload.build_model(name))
        self.weights = shared_floats(1, initial.numel())[0].copy_(initial)
        self.sums = shared_floats(num_workers, initial.numel())
        del initial
        self.number = 0
        self._answers = os.pipe()
        self._orders, self._children = [], []
        for worker in range(num_workers):
            reader, writer = os.pipe()
            if (child := os.fork()) == 0:
                for other in (writer, *self._orders):
                    os.close(other)
                self._serve(worker, reader)
                os._exit(0)
            os.close(reader)
            self._orders.append(writer)
            self._children.append(child)

    def round(self) -> None:
        """One round of federated averaging."""
        sites = workload.drawn(self.num_sites, self.num_sampled, self.number)
        self._tell([TRAIN, self.number, *sites])
        if self.weights.numel() < LARGE:
            torch.sum(self.sums, 0, out=self.weights)
        else:
            self._tell([ADD])
        self.number += 1

    def _tell(self, order: Sequence[int]) -> None:
        told = np.array(order, np.int64).tobytes()
        for writer in self._orders:
            os.write(writer, told)
        missing = len(self._orders)
        while missing:
            missing -= len(os.read(self._answers[0], missing))

    def _serve(self, worker: int, reader: int) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        model = workload.build_model(self.name)
        flat, parameters = flatten(model), list(model.parameters())
        own, options = self.sums[worker], {"bfloat16": self.bfloat16}
        size, count = self.weights.numel(), len(self.sums)
        part = slice(worker * size // count, (worker + 1) * size // count)
        while told := os.read(reader, 65536):
            order = np.frombuffer(told, np.int64).tolist()
            if order[0] == ADD:
                torch.sum(self.sums[:, part], 0, out=self.weights[part])
            else:
                share = 1.0 / (len(order) - 2)
                for place, site in enumerate(order[2:][worker::count]):
                    flat.copy_(self.weights)
                    workload.train(
                        self.name, model, site, order[1],
                        parameters=parameters, **options,
                    )  # fmt: skip
                    if place:
                        own.add_(flat, alpha=share)
                    else:
                        torch.mul(flat, share, out=own)
            os.write(self._answers[1], b"x")

    def model(self) -> nn.Module:
        """The network with the weights of now."""
        model = workload.build_model(self.name)
        flatten(model).copy_(self.weights)
        return model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for writer in self._orders:
            os.close(writer)
        for child in self._children:
            os.waitpid(child, 0)


def shared_floats(rows: int, columns: int) -> Tensor:
    """Map memory that forked processes see in common."""
    memory = mmap.mmap(-1, 4 * rows * columns)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


def flatten(model: nn.Module) -> Tensor:
    """Move all parameters and running statistics into one vector that they view."""
    flat, position = flat_entries(model), 0
    for entry in entries(model):
        piece = flat[position : position + entry.numel()]
        entry.data = piece.as_strided(
            entry.shape, entry.stride(), piece.storage_offset()
        )
        position += entry.numel()
    return flat


def flat_entries(model: nn.Module) -> Tensor:
    """Copy all parameters and running statistics into one vector, as they lie."""
    pieces = [e.detach().as_strided((e.numel(),), (1,)) for e in entries(model)]
    return torch.cat(pieces)


def entries(model: nn.Module) -> list[Tensor]:
    """Parameters first, then the statistics that are averaged."""
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    return [*model.parameters(), *statistics]


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the kernel."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD, of which some versions refuse the first; M_TRIM_THRESHOLD.
        if not libc.mallopt(-3, 1 << 30):
            libc.mallopt(-3, 1 << 25)
        libc.mallopt(-1, 1 << 30)


def run_floor(floor: Floor, *, rounds: int, skip: int = 3) -> list[float]:
    """Train, and give the seconds of every round after the first few."""
    took = []
    with floor:
        for _ in range(rounds):
            began = time.perf_counter()
            floor.round()
            took.append(time.perf_counter() - began)
    if not bool(floor.weights.isfinite().all()):
        raise FloatingPointError("the floor's weights are not finite")
    return took[skip:]


def failures(name: str, num_rounds: int) -> dict[str, float]:
    """What the final loss would be if nothing was learned, or nothing averaged."""
    model = workload.build_model(name)
    untrained = workload.probe_loss(name, model)
    site = workload.draw_sites(name, num_rounds - 1)[0]
    for number in range(num_rounds):
        workload.train(name, model, site, number)
    return {"loss_untrained": untrained, "loss_one": workload.probe_loss(name, model)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=workload.WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bfloat16", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with Floor(asked.workload, bfloat16=asked.bfloat16) as floor:
        clock = workload.Rounds()
        for _ in range(asked.rounds):
            floor.round()
            clock.done()
        loss = workload.probe_loss(asked.workload, floor.model())
    clock.end(loss, **failures(asked.workload, asked.rounds))


if __name__ == "__main__":
    main()
