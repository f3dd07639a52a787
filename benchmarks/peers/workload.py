"""Three pieces of federated work in plain PyTorch, one code for floor and peers.

W1 trains a U-Net, W2 asks many small sites for one step, W3 moves 25 million numbers.
The sites differ (`shift`), so that a model that was averaged and a model that was
trained at one site alone end in visibly different losses: `probe_loss` shows which.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import time
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

NUM_WORKERS = 4
NUM_SHIFTS = 8
PROBE_SITE = 10_000


@dataclass(frozen=True)
class Workload:
    """What one round is: who takes part, and what each of them does."""

    num_sites: int
    num_sampled: int
    num_examples: int
    batch_size: int
    learning_rate: float


WORKLOADS = {
    "W1": Workload(8, 8, 32, 8, 0.02),
    "W2": Workload(1000, 100, 32, 32, 1.0),
    "W3": Workload(8, 8, 1, 1, 0.1),
}


def conv_block(num_in: int, num_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for source in (num_in, num_out):
        layers += [
            nn.Conv2d(source, num_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """2D U-Net of four levels, 16 channels at the top, batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        self.down = nn.ModuleList(
            conv_block(a, b) for a, b in zip((1, *widths), widths, strict=False)
        )
        self.widen = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(conv_block(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for level in (2, 1, 0):
            x = self.up[level](torch.cat([skips[level], self.widen[level](x)], 1))
        return self.head(x)


class Bulk(nn.Module):
    """25 arrays of one million float32 numbers, which do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.arrays = nn.ParameterList(torch.zeros(1000, 1000) for _ in range(25))


def build_model(name: str) -> nn.Module:
    """The model of a workload, always with the same initial numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if name == "W1":
            return UNet().to(memory_format=torch.channels_last)
        if name == "W2":
            sizes = (64, 96, 32, 10)  # 9,674 parameters
            layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
            return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        return Bulk()


def shift(site: int) -> float:
    """How far a site's data lie from the others', in [-1, 1]; 0 for the probe."""
    if site == PROBE_SITE:
        return 0.0
    return 2.0 * (site % NUM_SHIFTS) / (NUM_SHIFTS - 1) - 1.0


@functools.cache
def site_data(name: str, site: int) -> tuple[Tensor, Tensor]:
    """A site's inputs and targets, made once per process from its number."""
    work = WORKLOADS[name]
    generator = torch.Generator().manual_seed(1 + site)
    if name == "W1":
        return _discs(work.num_examples, shift(site), generator)
    if name == "W2":
        x = torch.randn(work.num_examples, 64, generator=generator)
        y = (x[:, :10] + shift(site) * torch.linspace(-2, 2, 10)).argmax(1)
        return x, y
    return torch.zeros(1, 1), torch.full((1,), 2.0 + shift(site))


def _discs(count: int, offset: float, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Bright discs in noise; the sites draw the border tighter or wider."""
    centre = 30 + 36 * torch.rand(count, 2, 1, 1, generator=generator)
    axis = torch.arange(96)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    distance = (grid[None] - centre).square().sum(1).sqrt()
    image = (distance < 16).float()
    image += 0.5 * torch.randn(count, 96, 96, generator=generator)
    return image[:, None], (distance < 16 + 6 * offset).long()


def train(name: str, model: nn.Module, site: int) -> tuple[float, int]:
    """Train `model` in place as one site does in one round: loss and examples."""
    work = WORKLOADS[name]
    x, y = site_data(name, site)
    if name == "W3":
        with torch.no_grad():
            for array in model.parameters():
                array.mul_(0.9).add_(0.1 * float(y))
        return 0.0, work.num_examples
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=work.learning_rate)
    for start in range(0, work.num_examples, work.batch_size):
        batch = x[start : start + work.batch_size]
        if name == "W1":
            batch = batch.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(batch), y[start : start + work.batch_size])
        loss.backward()
        optimizer.step()
    return float(loss.detach()), work.num_examples


@torch.no_grad()
def probe_loss(name: str, model: nn.Module) -> float:
    """Loss on data of no site.

    Normalisation uses the batch, not the running statistics, so that frameworks that
    exchange parameters only and frameworks that exchange buffers too are comparable.
    """
    if name == "W3":
        first = next(iter(model.parameters()))
        return float((first - 2.0).square().mean())
    x, y = site_data(name, PROBE_SITE)
    return float(F.cross_entropy(model.train()(x), y))


def draw_sites(name: str, round_index: int) -> list[int]:
    """The sites of a round, for frameworks that let the study choose them."""
    work = WORKLOADS[name]
    if work.num_sampled == work.num_sites:
        return list(range(work.num_sites))
    drawn = random.Random(f"{name} {round_index}")
    return sorted(drawn.sample(range(work.num_sites), work.num_sampled))


class Rounds:
    """Print one JSON line at the end of each round, and one at the end of all.

    `end_unix_s` lets the driver, which knows when it started the process, tell the
    start-up from the work.
    """

    def __init__(self) -> None:
        self.last_s = time.perf_counter()
        self.count = 0

    def done(self) -> None:
        now_s = time.perf_counter()
        self.count += 1
        self._print(round=self.count, seconds=now_s - self.last_s)
        self.last_s = time.perf_counter()

    def end(self, loss: float, **more: float) -> None:
        self._print(loss=loss, **more)

    @staticmethod
    def _print(**line: float) -> None:
        print(json.dumps(line | {"end_unix_s": time.time()}), flush=True)
