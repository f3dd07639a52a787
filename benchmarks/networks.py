"""Networks whose step costs nearly nothing, to measure what their size costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ballast(nn.Module):
    """A linear classifier that carries 100 MB of weights.

    Every block is a vector of `block_size` numbers of which the first L x F are used:
    logits = sum over blocks of images @ block[: L * F]. The gradient of a block is
    dense (zeros behind), so that the step, the messages and the sums touch every
    number, while the arithmetic of forward and backward is almost none.

    Args:
        in_channels: Features F.
        num_classes: Classes L.
        num_blocks: Tensors.
        block_size: Numbers in each.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        num_blocks: int = 10,
        block_size: int = 2_500_000,
    ) -> None:
        super().__init__()
        self.used = (num_classes, in_channels)
        self.blocks = nn.ParameterList(
            nn.Parameter(0.01 * torch.randn(block_size)) for _ in range(num_blocks)
        )

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits (B, L) of rows (B, F); `site` changes nothing."""
        del site
        return sum_of_heads(list(self.blocks), images, self.used)


def sum_of_heads(blocks: list[Tensor], images: Tensor, used: tuple[int, int]) -> Tensor:
    """Sum over blocks of the linear map that each begins with."""
    count = used[0] * used[1]
    heads = [images @ block[:count].view(used).T for block in blocks]
    return torch.stack(heads).sum(0)
