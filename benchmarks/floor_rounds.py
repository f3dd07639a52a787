"""The floor of W2, W3 and W7: federated averaging with no framework at all.

Forked worker processes with one thread each. The weights and one sum per worker lie in
shared memory that was mapped before the fork. A worker keeps all its parameters as
views of one flat vector, so that loading the weights is one copy and adding a site's
result is one pass; gradients are set to None, one `_foreach_add_` is the SGD step, and
there is no optimiser object. Sampled sites are divided evenly and statically. A small
model is added up by the parent; a large one by all workers, each its own slice. The
allocator keeps freed memory, so that pages are touched once.

Nothing is checked, recorded or kept: this is what the arithmetic costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LARGE = 1_000_000
"""From so many parameters on, the workers add the sums up themselves."""

TRAIN, ADD = 1, 2


@dataclass(frozen=True)
class Floor:
    """What is trained.

    Attributes:
        initial: The parameters, in order.
        loss: Maps the parameters and a site's batch to a scalar.
        batch: Gives the batch of a site and a round: images and labels.
        num_sites: All sites.
        sampled: Sites of a round.
        lr: Of plain SGD.
        num_workers: Processes.
    """

    initial: Sequence[Tensor]
    loss: Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]
    batch: Callable[[int, int], tuple[Tensor, Tensor]]
    num_sites: int
    sampled: int
    lr: float = 0.01
    num_workers: int = 4

    @property
    def num_parameters(self) -> int:
        """Numbers in the model."""
        return sum(tensor.numel() for tensor in self.initial)


def shared_floats(rows: int, columns: int) -> Tensor:
    """Map memory that forked processes see in common."""
    memory = mmap.mmap(-1, 4 * rows * columns)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


def flatten(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copy tensors into one vector; give it and leaves that are views of it."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    sizes = [tensor.numel() for tensor in tensors]
    views = flat.split(sizes)
    return flat, [
        view.view(tensor.shape).detach().requires_grad_()
        for view, tensor in zip(views, tensors, strict=True)
    ]


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the kernel."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def serve(
    floor: Floor, worker: int, weights: Tensor, sums: Tensor, ends: tuple[int, int]
) -> None:
    """Be a worker until the parent closes the pipe."""
    torch.set_num_threads(1)
    keep_freed_memory()
    flat, leaves = flatten(floor.initial)
    own, share = sums[worker], 1.0 / floor.sampled
    start, stop = ((worker + end) * weights.numel() // len(sums) for end in (0, 1))
    while told := os.read(ends[0], 65536):
        order = np.frombuffer(told, np.int64)
        if order[0] == ADD:
            torch.sum(sums[:, start:stop], 0, out=weights[start:stop])
        else:
            for count, site in enumerate(order[2:][worker :: len(sums)]):
                flat.copy_(weights)
                gradient = _gradient(floor, leaves, int(site), int(order[1]))
                with torch.no_grad():
                    torch._foreach_add_(leaves, gradient, alpha=-floor.lr)
                if count:
                    own.add_(flat, alpha=share)
                else:
                    torch.mul(flat, share, out=own)
        os.write(ends[1], b"x")


def _gradient(
    floor: Floor, leaves: Sequence[Tensor], site: int, number: int
) -> list[Tensor | None]:
    for leaf in leaves:
        leaf.grad = None
    images, labels = floor.batch(site, number)
    floor.loss(leaves, images, labels).backward()
    return [leaf.grad for leaf in leaves]


def run_floor(floor: Floor, *, rounds: int, skip: int = 3) -> list[float]:
    """Train, and give the seconds of every round after the first few."""
    took, weights = train_floor(floor, rounds=rounds)
    if not math.isfinite(float(weights.sum())):
        raise FloatingPointError("the floor's weights are not finite")
    return took[skip:]


def train_floor(floor: Floor, *, rounds: int) -> tuple[list[float], Tensor]:
    """Train; give the seconds of every round and the final weights, flat."""
    weights = shared_floats(1, floor.num_parameters)[0]
    sums = shared_floats(floor.num_workers, floor.num_parameters)
    weights.copy_(flatten(floor.initial)[0])
    rng = np.random.default_rng(0)
    took = []
    with _workers(floor, weights, sums) as tell:
        for number in range(rounds):
            began = time.perf_counter()
            chosen = rng.permutation(floor.num_sites)[: floor.sampled]
            tell(np.array([TRAIN, number, *chosen], np.int64).tobytes())
            if floor.num_parameters < LARGE:
                torch.sum(sums, 0, out=weights)
            else:
                tell(np.array([ADD], np.int64).tobytes())
            took.append(time.perf_counter() - began)
    return took, weights


@contextlib.contextmanager
def _workers(
    floor: Floor, weights: Tensor, sums: Tensor
) -> Iterator[Callable[[bytes], None]]:
    orders = [os.pipe() for _ in range(floor.num_workers)]
    answers = os.pipe()
    children = []
    for worker, (reader, _) in enumerate(orders):
        if (child := os.fork()) == 0:
            for _, writer in orders:
                os.close(writer)
            serve(floor, worker, weights, sums, (reader, answers[1]))
            os._exit(0)
        children.append(child)

    def tell(order: bytes) -> None:
        for _, writer in orders:
            os.write(writer, order)
        missing = floor.num_workers
        while missing:
            missing -= len(os.read(answers[0], missing))

    try:
        yield tell
    finally:
        for _, writer in orders:
            os.close(writer)
        for child in children:
            os.waitpid(child, 0)
