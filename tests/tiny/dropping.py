"""A network with dropout: what it gives depends on torch's global random state."""

from __future__ import annotations

from torch import Tensor, nn


class Dropping(nn.Module):
    """Convolution, batch norm, dropout on half of the features, head."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Conv2d(6, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.body(images)))
        return logits
