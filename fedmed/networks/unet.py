"""U-Net in two and three dimensions, with the parts encoder, decoder and head.

Source:
    Ronneberger et al., U-Net, MICCAI 2015, arXiv:1505.04597; Cicek et al., 3D U-Net,
    MICCAI 2016, arXiv:1606.06650.

Differs from the source:
    Convolutions are padded, a normalisation stands between convolution and ReLU, and
    images of any size are accepted (padded inside, cropped back).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.errors import ConfigError
from fedmed.networks.block import Block
from fedmed.networks.normalisation import Norm, make_norm, normalise

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"base_width": 64, "levels": 5},
    "tiny": {"base_width": 8, "levels": 3},
}
"""Ronneberger et al.'s widths; and a network that trains on two cores in minutes."""

MAX_WIDTH = 4096
"""Channels of the deepest level; more is a slip of the pen and fills the memory."""


class UNet(nn.Module):
    r"""U-Net whose level l has `base_width * 2**l` channels.

    With $w_l$ that width, $w_{-1}$ the input channels, L levels, N classes and d
    dimensions, there are

    $\sum_{l=0}^{L-1} 3^d (w_{l-1} w_l + w_l^2)$ kernel weights in the encoder,

    $\sum_{l=0}^{L-2} 2^d w_{l+1} w_l + w_l + 3^d (2 w_l w_l + w_l^2)$ in the decoder
    and $N w_0 + N$ in the head, and a normalisation of $w_l$ channels behind every
    3x3 convolution: two per level on each side. Base 32, 5 levels, 3 input channels
    and 2 classes make 7,757,186 weights without normalisation.

    2.5D: feed `in_channels = channels * slices`.

    Args:
        in_channels: Channels of the images.
        num_classes: Label classes, background included.
        spatial_dims: 2 or 3.
        base_width: Channels of the uppermost level.
        levels: Resolutions; 1 has no pooling.
        norm: The normalisation; None is batch normalisation.

    Raises:
        ConfigError: If a number is impossible.

    Example:
        >>> UNet(1, 3, base_width=4, levels=3)(torch.zeros(2, 1, 13, 10)).shape
        torch.Size([2, 3, 13, 10])
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
        _check_sizes(in_channels, num_classes, base_width, levels)
        if spatial_dims not in _CONV:
            raise ConfigError(f"U-Net of {spatial_dims} dimensions; expected 2 or 3")
        norm = norm or Norm()
        widths = tuple(base_width * 2**level for level in range(levels))
        self.encoder = Encoder(
            in_channels, widths, spatial_dims=spatial_dims, norm=norm
        )
        self.decoder = Decoder(widths, spatial_dims=spatial_dims, norm=norm)
        self.head = _CONV[spatial_dims](base_width, num_classes, kernel_size=1)
        self.size_multiple = 2 ** (levels - 1)

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits.

        Args:
            images: (B, C, I, J) or (B, C, I, J, K), any size.
            site: Whose normalisation is used, if the network has one per site.

        Returns:
            Logits (B, L, I, J) or (B, L, I, J, K), of the images' size.
        """
        padded = pad_to_multiple(images, self.size_multiple)
        logits: Tensor = self.head(self.decoder(self.encoder(padded, site), site))
        for axis in range(2, images.ndim):
            logits = logits.narrow(axis, 0, images.shape[axis])
        return logits


class Encoder(nn.Module):
    """The contracting half: features of each level, the deepest last."""

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...],
        *,
        spatial_dims: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        inputs = (in_channels, *widths[:-1])
        self.levels = nn.ModuleList(
            DoubleConvolution(before, width, spatial_dims=spatial_dims, norm=norm)
            for before, width in zip(inputs, widths, strict=True)
        )

    def forward(self, images: Tensor, site: str | None = None) -> tuple[Tensor, ...]:
        """Give the features of each level; sizes must be multiples of 2**(L-1)."""
        features: list[Tensor] = []
        for level in self.levels:
            below = halve(features[-1]) if features else images
            features.append(level(below, site))
        return tuple(features)


class Decoder(nn.Module):
    """The expanding half: from the features of all levels to full resolution."""

    def __init__(
        self, widths: tuple[int, ...], *, spatial_dims: int, norm: Norm
    ) -> None:
        super().__init__()
        transposed = _TRANSPOSED[spatial_dims]
        shapes = list(zip(widths[1:], widths[:-1], strict=True))
        self.up = nn.ModuleList(
            transposed(deep, width, kernel_size=2, stride=2) for deep, width in shapes
        )
        self.levels = nn.ModuleList(
            DoubleConvolution(2 * width, width, spatial_dims=spatial_dims, norm=norm)
            for _, width in shapes
        )

    def forward(self, features: tuple[Tensor, ...], site: str | None = None) -> Tensor:
        """Give features of full resolution, `base_width` channels."""
        current = features[-1]
        for level in range(len(features) - 2, -1, -1):
            above = self.up[level](current)
            current = self.levels[level](torch.cat((features[level], above), 1), site)
        return current


class DoubleConvolution(Block):
    """Twice: 3x3 convolution without bias, normalisation, ReLU."""

    def __init__(
        self, in_channels: int, width: int, *, spatial_dims: int, norm: Norm
    ) -> None:
        super().__init__()
        self.width = width
        conv = _CONV[spatial_dims]
        bias = norm.kind == "none"
        self.conv1 = conv(in_channels, width, kernel_size=3, padding=1, bias=bias)
        self.norm1 = make_norm(norm, width, spatial_dims=spatial_dims)
        self.conv2 = conv(width, width, kernel_size=3, padding=1, bias=bias)
        self.norm2 = make_norm(norm, width, spatial_dims=spatial_dims)

    def forward(self, features: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, ...) to (B, width, ...) of the same size."""
        features = functional.relu(normalise(self.norm1, self.conv1(features), site))
        return functional.relu(normalise(self.norm2, self.conv2(features), site))


def halve(features: Tensor) -> Tensor:
    """Keep the largest of each 2x2(x2) block.

    The gradient of torch's max pooling on a GPU is a race of atomic additions; where
    deterministic algorithms are asked for, maxima of slices take its place there.

    Args:
        features: (B, C, ...), even sizes.

    Returns:
        (B, C, ...), each spatial size halved.
    """
    if features.is_cuda and torch.are_deterministic_algorithms_enabled():
        return halve_by_slices(features)
    pool = functional.max_pool2d if features.ndim == 4 else functional.max_pool3d
    return pool(features, 2)


def halve_by_slices(features: Tensor) -> Tensor:
    """Do as `halve`, three times slower, with a gradient that is reproducible."""
    for axis in range(2, features.ndim):
        before = (slice(None),) * axis
        even = features[(*before, slice(0, None, 2))]
        odd = features[(*before, slice(1, None, 2))]
        features = torch.maximum(even, odd)
    return features


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Append zeros behind each spatial axis until its size is a multiple.

    Example:
        >>> pad_to_multiple(torch.ones(1, 1, 5, 8), 4).shape
        torch.Size([1, 1, 8, 8])
    """
    missing = [-size % multiple for size in images.shape[2:]]
    if not any(missing):
        return images
    return functional.pad(images, [n for m in reversed(missing) for n in (0, m)])


def _check_sizes(*sizes: int) -> None:
    if min(sizes) < 1:
        names = ("in_channels", "num_classes", "base_width", "levels")
        seen = ", ".join(f"{n} {s}" for n, s in zip(names, sizes, strict=True))
        raise ConfigError(f"U-Net with {seen}; each must be at least 1")
    widest = sizes[2] * 2 ** (sizes[3] - 1)
    if widest > MAX_WIDTH:
        raise ConfigError(
            f"U-Net with base_width {sizes[2]} and levels {sizes[3]}: its deepest "
            f"level would have {widest} channels, at most {MAX_WIDTH} make sense"
        )
