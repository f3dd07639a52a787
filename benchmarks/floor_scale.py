"""The floor of W2: three linear layers, 10,062 parameters, by `floor_rounds`.

The rows are those of `synthetic_sites`, in memory as one tensor. A batch is a slice of
it, without a copy; a network of ours has to draw its batch. The forward pass is three
calls of `linear`, no module, and torch's own cross-entropy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import synthetic_sites
from benchmarks.floor_rounds import Floor

WIDTHS = (64, 100, 32, 10)
NUM_ROWS = 16
BATCH_SIZE = 8


def loss(leaves: Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Three layers and the cross-entropy."""
    hidden = functional.relu(functional.linear(images, leaves[0], leaves[1]))
    hidden = functional.relu(functional.linear(hidden, leaves[2], leaves[3]))
    return functional.cross_entropy(
        functional.linear(hidden, leaves[4], leaves[5]), labels
    )


def rows_of(num_sites: int) -> tuple[Tensor, Tensor]:
    """All rows of all sites: (S, rows, F) and (S, rows)."""
    options = {"num_sites": num_sites, "num_rows": NUM_ROWS, "num_features": WIDTHS[0]}
    opened = synthetic_sites.open_sites(None, **options, num_classes=WIDTHS[-1])
    cases = [[ref.read() for ref in site.cases] for site in opened]
    images = [[torch.as_tensor(case.image) for case in site] for site in cases]
    labels = [[int(case.label) for case in site] for site in cases]
    return torch.stack([torch.stack(site) for site in images]), torch.tensor(labels)


def make_floor(num_sites: int, sampled: int, num_workers: int = 4) -> Floor:
    """The floor of so many sites."""
    images, labels = rows_of(num_sites)
    generator = torch.Generator().manual_seed(0)
    initial = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        scale = (2 / inputs) ** 0.5
        initial.append(torch.randn(outputs, inputs, generator=generator) * scale)
        initial.append(torch.zeros(outputs))

    def batch(site: int, number: int) -> tuple[Tensor, Tensor]:
        first = number % (NUM_ROWS - BATCH_SIZE)
        rows = slice(first, first + BATCH_SIZE)
        return images[site, rows], labels[site, rows]

    return Floor(initial, loss, batch, num_sites, sampled, num_workers=num_workers)
