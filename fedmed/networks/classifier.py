"""Classifier of whole images in two and three dimensions, with encoder and head.

The encoder is the U-Net's, layer names included: equal seeds start both equal, and the
encoder of one can be loaded into the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fedmed.errors import ConfigError
from fedmed.networks.normalisation import Norm
from fedmed.networks.unet import Encoder, pad_to_multiple

PRESETS: Mapping[str, Mapping[str, Any]] = {"tiny": {"base_width": 8, "levels": 3}}
"""A network that trains on two cores in minutes."""


class Classifier(nn.Module):
    r"""U-Net encoder, mean over all positions, linear head.

    Level l has $w_l$ = `base_width * 2**l` channels. With $w_{-1}$ the input channels,
    L levels, N classes and d dimensions, there are

    $\sum_{l=0}^{L-1} 3^d (w_{l-1} w_l + w_l^2)$ kernel weights in the encoder, two
    normalisations of $w_l$ channels per level (without any: two biases instead), and
    $N w_{L-1} + N$ in the head. Base 16, 4 levels, one channel, 2 classes and 2
    dimensions make 293,970 with batch normalisation.

    Args:
        in_channels: Channels of the images.
        num_classes: Classes.
        spatial_dims: 2 or 3.
        base_width: Channels of the uppermost level.
        levels: Resolutions; 1 has no pooling.
        norm: The normalisation; None is batch normalisation.

    Raises:
        ConfigError: If a number is impossible.

    Example:
        >>> import torch
        >>> Classifier(1, 3, base_width=4, levels=3)(torch.zeros(2, 1, 13, 10)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        spatial_dims: int = 2,
        base_width: int = 16,
        levels: int = 4,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        if min(in_channels, num_classes, base_width, levels) < 1:
            raise ConfigError(
                f"classifier with in_channels {in_channels}, num_classes {num_classes},"
                f" base_width {base_width}, levels {levels}; each must be at least 1"
            )
        if spatial_dims not in (2, 3):
            raise ConfigError(
                f"classifier of {spatial_dims} dimensions; expected 2 or 3"
            )
        widths = tuple(base_width * 2**level for level in range(levels))
        self.encoder = Encoder(
            in_channels, widths, spatial_dims=spatial_dims, norm=norm or Norm()
        )
        self.head = nn.Linear(widths[-1], num_classes)
        self.spatial_dims = spatial_dims
        self.size_multiple = 2 ** (levels - 1)

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits.

        Args:
            images: (B, C, I, J) or (B, C, I, J, K), any size; zeros are appended
                until the size is a multiple of `2**(levels - 1)`.
            site: Whose normalisation is used, if the network has one per site.

        Returns:
            Logits (B, L).

        Raises:
            ConfigError: If the images have another number of dimensions.
        """
        if images.ndim != self.spatial_dims + 2:
            # Torch would take a batch of another dimension for a single image.
            raise ConfigError(
                f"classifier of {self.spatial_dims} dimensions was given images of "
                f"{images.ndim - 2}",
                hint=f"Set model.spatial_dims: {images.ndim - 2}, or leave it out.",
            )
        deepest = self.encoder(pad_to_multiple(images, self.size_multiple), site)[-1]
        logits: Tensor = self.head(deepest.flatten(2).mean(dim=2))
        return logits
