"""W1, W2 and W3 in plain PyTorch: one code for the floor, for fedmed and for peers.

W1 trains a U-Net, W2 asks many small sites for one step, W3 moves 25 million numbers.
Networks, data, drawn batches and the local step are here; what is measured is what
somebody's framework adds to them. The sites differ (`shift`), so that a model that was
averaged and a model that was trained at one site alone end in visibly different losses:
`probe_loss` shows which. Nothing here imports a framework.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

NUM_WORKERS = 4
NUM_SHIFTS = 8
PROBE_SITE = 10_000
FEATURES, CLASSES = 64, 10
BLOCKS, BLOCK_SIZE = 10, 2_500_000


@dataclass(frozen=True)
class Workload:
    """What one round is: who takes part, and what each of them does.

    Attributes:
        num_sites: All sites.
        num_sampled: Sites of a round.
        num_examples: Of each site.
        batch_size: Examples of a step, drawn without replacement.
        num_steps: Local steps of a round.
        learning_rate: Of plain SGD.
    """

    num_sites: int
    num_sampled: int
    num_examples: int
    batch_size: int
    num_steps: int
    learning_rate: float


WORKLOADS = {
    "W1": Workload(8, 8, 32, 8, 4, 0.02),
    "W2": Workload(1000, 100, 12, 8, 1, 0.2),
    "W3": Workload(8, 8, 12, 8, 1, 0.02),
}


def initialise(model: nn.Module) -> None:
    """Draw kernels, always the same: everybody starts from the same weights."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * (2 / parameter[0].numel()) ** 0.5)
            elif name.endswith("bias"):
                parameter.zero_()


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

    def __init__(self, in_channels: int = 1, num_classes: int = 2) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        sources = (in_channels, *widths)
        self.down = nn.ModuleList(
            conv_block(a, b) for a, b in zip(sources, widths, strict=False)
        )
        self.widen = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(conv_block(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], num_classes, 1)
        initialise(self)

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits (B, L, I, J); `site` changes nothing."""
        del site
        skips, x = [], images
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for level in (2, 1, 0):
            x = self.up[level](torch.cat([skips[level], self.widen[level](x)], 1))
        return self.head(x)


class Perceptron(nn.Module):
    """Three linear layers with 10,062 parameters."""

    def __init__(self, in_channels: int = FEATURES, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.first = nn.Linear(in_channels, 100)
        self.second = nn.Linear(100, 32)
        self.head = nn.Linear(32, num_classes)
        initialise(self)

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits (B, L) of rows (B, F); `site` changes nothing."""
        del site
        return self.head(F.relu(self.second(F.relu(self.first(images)))))


class Ballast(nn.Module):
    """A linear classifier that carries 100 MB of weights.

    Every block is a vector of which the first L x F numbers are used: logits = sum over
    blocks of images @ block[: L * F]. The gradient of a block is dense (zeros behind),
    so that the step, the messages and the sums touch every number, while the arithmetic
    of forward and backward is almost none.
    """

    def __init__(self, in_channels: int = FEATURES, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.used = (num_classes, in_channels)
        self.blocks = nn.ParameterList(
            torch.full((BLOCK_SIZE,), 0.001) for _ in range(BLOCKS)
        )

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits (B, L) of rows (B, F); `site` changes nothing."""
        del site
        count = self.used[0] * self.used[1]
        heads = [images @ block[:count].view(self.used).T for block in self.blocks]
        return torch.stack(heads).sum(0)


NETWORKS = {"W1": UNet, "W2": Perceptron, "W3": Ballast}


def build_model(name: str) -> nn.Module:
    """The model of a workload in training mode."""
    model = NETWORKS[name]().train()
    return model.to(memory_format=torch.channels_last) if name == "W1" else model


def shift(site: int) -> float:
    """How far a site's data lie from the others', in [-1, 1]; 0 for the probe."""
    if site == PROBE_SITE:
        return 0.0
    return 2.0 * (site % NUM_SHIFTS) / (NUM_SHIFTS - 1) - 1.0


@functools.cache
def site_data(name: str, site: int) -> tuple[Tensor, Tensor]:
    """A site's inputs and targets, made once per process from its number."""
    count = 256 if site == PROBE_SITE and name != "W1" else WORKLOADS[name].num_examples
    generator = torch.Generator().manual_seed(1 + site)
    if name == "W1":
        return _discs(count, shift(site), generator)
    x = torch.randn(count, FEATURES, generator=generator)
    y = (x[:, :CLASSES] + shift(site) * torch.linspace(-2, 2, CLASSES)).argmax(1)
    return x, y


def _discs(
    count: int, offset: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Bright discs in noise; the sites draw the border tighter or wider."""
    centre = 30 + 36 * torch.rand(count, 2, 1, 1, generator=generator)
    axis = torch.arange(96)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    distance = (grid[None] - centre).square().sum(1).sqrt()
    image = (distance < 16).float()
    image += 0.5 * torch.randn(count, 96, 96, generator=generator)
    return image[:, None], (distance < 16 + 6 * offset).long()


_GENERATOR = torch.Generator()


def draw_batches(name: str, site: int, round_index: int) -> list[Tensor]:
    """Which examples a site trains on, step by step: the same for everybody."""
    work = WORKLOADS[name]
    _GENERATOR.manual_seed(site * 1_000_003 + round_index)
    order = torch.randperm(work.num_examples, generator=_GENERATOR)
    return list(order.split(work.batch_size)[: work.num_steps])


def train(
    name: str,
    model: nn.Module,
    site: int,
    round_index: int,
    *,
    parameters: Sequence[nn.Parameter] = (),
    bfloat16: bool = False,
) -> tuple[float, int]:
    """Train `model` in place as one site does in one round: loss and examples.

    Args:
        name: The workload.
        model: In training mode.
        site: Whose data.
        round_index: From 0.
        parameters: Those of `model`, for a caller that has listed them before.
        bfloat16: Whether the forward pass is autocast.
    """
    work = WORKLOADS[name]
    inputs, targets = site_data(name, site)
    parameters = parameters or list(model.parameters())
    losses = []
    for chosen in draw_batches(name, site, round_index):
        batch = inputs[chosen]
        if batch.dim() == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        with _autocast() if bfloat16 else contextlib.nullcontext():
            logits = model(batch)
        loss = F.cross_entropy(logits.float(), targets[chosen])
        gradient = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradient, alpha=-work.learning_rate)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean()), work.num_examples


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@torch.no_grad()
def probe_loss(name: str, model: nn.Module) -> float:
    """Loss on data of no site.

    Normalisation uses the batch, not the running statistics, so that frameworks that
    exchange parameters only and frameworks that exchange buffers too are comparable.
    """
    x, y = site_data(name, PROBE_SITE)
    return float(F.cross_entropy(model.train()(x), y))


def draw_sites(name: str, round_index: int) -> list[int]:
    """The sites of a round, for frameworks that let the study choose them."""
    work = WORKLOADS[name]
    return drawn(work.num_sites, work.num_sampled, round_index)


def drawn(num_sites: int, num_sampled: int, round_index: int) -> list[int]:
    """Sites of a round, sorted."""
    if num_sampled == num_sites:
        return list(range(num_sites))
    return sorted(random.Random(round_index).sample(range(num_sites), num_sampled))


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
