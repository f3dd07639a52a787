"""The floor of W3: 25 million parameters in ten tensors, by `floor_rounds`.

The forward pass is that of `networks.Ballast`: ten small matrix products on the first
numbers of each tensor. Its gradient is dense, so every site costs one copy of 100 MB
of weights, one gradient of 100 MB, one SGD step and one pass of adding; the four sums
are added by the four workers, each a quarter of the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.floor_rounds import Floor
from benchmarks.floor_scale import BATCH_SIZE, WIDTHS, rows_of
from benchmarks.networks import sum_of_heads

USED = (WIDTHS[-1], WIDTHS[0])


def loss(leaves: Sequence[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the summed linear maps."""
    return functional.cross_entropy(sum_of_heads(list(leaves), images, USED), labels)


def make_floor(num_sites: int, *, num_blocks: int = 10, block_size: int) -> Floor:
    """The floor of so many sites and numbers."""
    images, labels = rows_of(num_sites)
    generator = torch.Generator().manual_seed(0)
    initial = [
        0.01 * torch.randn(block_size, generator=generator) for _ in range(num_blocks)
    ]

    def batch(site: int, number: int) -> tuple[Tensor, Tensor]:
        del number
        return images[site, :BATCH_SIZE], labels[site, :BATCH_SIZE]

    return Floor(initial, loss, batch, num_sites, num_sites)
