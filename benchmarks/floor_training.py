"""The floor of W1: federated averaging in bare PyTorch, with no framework at all.

Forked processes with one thread each; every weight and running statistic in one flat
vector, in shared memory, read in place; each process trains its own share of the sites
and adds up their results, and the parent adds one sum per process. Weights lie
channels-last within the vector, and a step of SGD is one operation on all of it. The C
library is told to keep what is freed.
The network and the sites' slices are those of the study that is compared.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.training.allocator import keep_freed_memory

Slices = tuple[Tensor, Tensor]
"""Images (N, 1, I, J), channels-last, and labels (N, I, J) of one site."""


class Floor:
    """Worker processes that wait for rounds.

    Args:
        make_network: Gives the network, in training mode.
        sites: Every site's slices, in memory before the processes fork.
        num_workers: Processes; sites are dealt out to them once.
        batch_size: Slices in a step; a round is one pass over each site's own.
        lr: Of SGD.
        bfloat16: Whether forward passes are autocast.
    """

    def __init__(
        self,
        make_network: Callable[[], nn.Module],
        sites: Sequence[Slices],
        *,
        num_workers: int = 4,
        batch_size: int = 8,
        lr: float = 0.01,
        bfloat16: bool = False,
    ) -> None:
        self.options: dict[str, Any] = {
            "batch_size": batch_size,
            "lr": lr,
            "bfloat16": bfloat16,
        }
        self.num_sites = len(sites)
        self.shared = flat_entries(make_network()).share_memory_()
        self.sums = torch.zeros(num_workers, len(self.shared)).share_memory_()
        fork = multiprocessing.get_context("fork")
        self.pipes, self.processes = [], []
        for rank in range(num_workers):
            ours, theirs = fork.Pipe()
            own = sites[rank::num_workers]
            arguments = (rank, make_network, own, theirs)
            process = fork.Process(target=self._work, args=arguments, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def round(self) -> float:
        """One round of FedAvg over all sites; gives the mean loss."""
        for pipe in self.pipes:
            pipe.send(True)
        loss = sum(pipe.recv() for pipe in self.pipes) / self.num_sites
        torch.sum(self.sums, 0, out=self.shared).div_(self.num_sites)
        return loss

    def _work(
        self, rank: int, make_network: Any, sites: Sequence[Slices], pipe: Any
    ) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        network = make_network()
        flat = flatten(network)
        total = self.sums[rank]
        generator = torch.Generator().manual_seed(rank)
        while pipe.recv():
            total.zero_()
            loss = 0.0
            for slices in sites:
                flat.copy_(self.shared)
                loss += train_epoch(
                    network, flat, slices, generator=generator, **self.options
                )
                total += flat
            pipe.send(loss)
        os._exit(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(False)
            process.join()


def train_epoch(
    network: nn.Module,
    flat: Tensor,
    slices: Slices,
    *,
    generator: torch.Generator,
    batch_size: int,
    lr: float,
    bfloat16: bool,
) -> float:
    """One pass over a site's slices in random order; gives the mean loss."""
    images, labels = slices
    parameters = list(network.parameters())
    size = sum(p.numel() for p in parameters)
    weights, gradient = flat[:size], torch.empty(size)
    losses = []
    order = torch.randperm(len(images), generator=generator)
    for chosen in order.split(batch_size):
        batch = images[chosen].to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            logits = network(batch)
        loss = functional.cross_entropy(logits.float(), labels[chosen])
        gradients = torch.autograd.grad(loss, parameters)
        torch.cat([in_memory_order(g) for g in gradients], out=gradient)
        weights.sub_(gradient, alpha=lr)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def flatten(network: nn.Module) -> Tensor:
    """Move all parameters and running statistics into one vector that they view."""
    flat = flat_entries(network)
    position = 0
    for entry in entries(network):
        like = channels_last(entry)
        size = entry.numel()
        piece = flat[position : position + size]
        entry.data = piece.as_strided(like.shape, like.stride(), piece.storage_offset())
        position += size
    return flat


def flat_entries(network: nn.Module) -> Tensor:
    """Copy all parameters and running statistics into one vector."""
    pieces = [in_memory_order(channels_last(e.detach())) for e in entries(network)]
    return torch.cat(pieces)


def entries(network: nn.Module) -> list[Tensor]:
    """Parameters first, then the statistics that are averaged."""
    statistics = [b for b in network.buffers() if b.is_floating_point()]
    return [*network.parameters(), *statistics]


def channels_last(tensor: Tensor) -> Tensor:
    """Lay out a convolution's kernel as its images are."""
    if tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor as the vector that it is in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))
