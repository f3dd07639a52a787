"""Residual U-Net with normalisation first, the network of MS-Net's table.

Source:
    Liu, Dou, Yu, Heng, MS-Net: Multi-Site Network for Improving Prostate Segmentation
    with Heterogeneous MRI Data, IEEE TMI 2020, arXiv:2002.03366, section III.

Differs from the source:
    Kernels start as in He et al. (there: truncated normal of deviation 0.1). Images of
    any size are accepted (padded inside, cropped back). Widths and depth are options,
    and 3D works alike.
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
from fedmed.networks.unet import MAX_WIDTH, halve, pad_to_multiple

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "base_width": 32,
        "levels": 5,
        "norm": "batch",
        "norm_eps": 1e-3,
        "norm_momentum": 0.1,
    },
    "tiny": {"base_width": 8, "levels": 4, "norm_eps": 1e-3},
}
"""The publication's, for `slices: 3`; and one that trains on two cores in minutes."""

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class ResidualUNet(nn.Module):
    r"""U-Net of pre-activation residual blocks, without any bias.

    Level l has $w_l$ = `base_width * 2**l` channels; with $w_{-1}$ the input channels,
    L levels, N classes and d dimensions there are

    $\sum_{l=0}^{L-1} 3^d (w_{l-1} w_l + 2 w_l^2) + 2 \cdot 3^d w_{L-1}^2$ kernel
    weights in the encoder (the deepest level has two residual blocks),

    $\sum_{l=0}^{L-2} 3^d (w_{l+1} w_l + 2 w_l^2 + 2 w_l^2)$ in the decoder and
    $3^d w_0 N$ in the head, and $\sum_l 2 w_l + 2 w_{L-1}$,
    $\sum_{l=0}^{L-2} w_{l+1} + 2 w_l$ and $w_0$ normalised channels. Base 32, 5
    levels, 3 input channels and 2 classes make 12,571,488 + 4,700,736 = 17,272,224
    kernel weights and 3,008 + 1,952 normalised channels.

    Args:
        in_channels: Channels of the images (times slices, in 2.5D).
        num_classes: Label classes, background included.
        spatial_dims: 2 as published, or 3.
        base_width: Channels of the uppermost level.
        levels: Resolutions; at least 1.
        norm: The normalisation; None is batch normalisation.

    Raises:
        ConfigError: If a number is impossible.

    Example:
        >>> ResidualUNet(1, 3, base_width=4, levels=3)(torch.zeros(2, 1, 13, 10)).shape
        torch.Size([2, 3, 13, 10])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        spatial_dims: int = 2,
        base_width: int = 16,
        levels: int = 5,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_channels, num_classes, base_width, levels)
        if spatial_dims not in _CONV:
            raise ConfigError(
                f"residual U-Net of {spatial_dims} dimensions; expected 2 or 3"
            )
        norm = norm or Norm()
        widths = tuple(base_width * 2**level for level in range(levels))
        kind: Any = {"spatial_dims": spatial_dims, "norm": norm}
        self.encoder = Encoder(in_channels, widths, **kind)
        self.decoder = Decoder(widths, **kind)
        self.head = Head(base_width, num_classes, **kind)
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
        features = self.decoder(self.encoder(padded, site), site)
        logits: Tensor = self.head(features, site)
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
        depths = [1] * (len(widths) - 1) + [2]
        self.levels = nn.ModuleList(
            ResidualLevel(
                before, width, blocks=blocks, spatial_dims=spatial_dims, norm=norm
            )
            for before, width, blocks in zip(inputs, widths, depths, strict=True)
        )

    def forward(self, images: Tensor, site: str | None = None) -> tuple[Tensor, ...]:
        """Give the features of each level; sizes must be multiples of 2**(L-1)."""
        features: list[Tensor] = []
        for level in self.levels:
            below = halve(features[-1]) if features else images
            features.append(level(below, site))
        return tuple(features)


class Decoder(nn.Module):
    """The expanding half: from the features of all levels to full resolution.

    Level 0 is the uppermost, as in the encoder; the deepest is computed first.
    """

    def __init__(
        self, widths: tuple[int, ...], *, spatial_dims: int, norm: Norm
    ) -> None:
        super().__init__()
        shapes = list(zip(widths[1:], widths[:-1], strict=True))
        kind: Any = {"spatial_dims": spatial_dims, "norm": norm}
        self.up = nn.ModuleList(Doubling(deep, width, **kind) for deep, width in shapes)
        self.levels = nn.ModuleList(
            ResidualLevel(2 * width, width, blocks=1, **kind) for _, width in shapes
        )

    def forward(self, features: tuple[Tensor, ...], site: str | None = None) -> Tensor:
        """Give features of full resolution, `base_width` channels."""
        current = features[-1]
        for level in range(len(features) - 2, -1, -1):
            above = self.up[level](current, site)
            joined = torch.cat((features[level], above), 1)
            current = self.levels[level](joined, site)
        return current


class Head(nn.Module):
    """Normalisation, ReLU, 3x3 convolution to the classes."""

    def __init__(
        self, width: int, num_classes: int, *, spatial_dims: int, norm: Norm
    ) -> None:
        super().__init__()
        self.norm = make_norm(norm, width, spatial_dims=spatial_dims)
        self.conv = _convolution(width, num_classes, spatial_dims)

    def forward(self, features: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, ...) to logits (B, L, ...)."""
        activated = functional.relu(normalise(self.norm, features, site))
        logits: Tensor = self.conv(activated)
        return logits


class ResidualLevel(Block):
    """3x3 convolution to the level's width, then residual blocks."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        blocks: int,
        spatial_dims: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.width = width
        self.enter = _convolution(in_channels, width, spatial_dims)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, spatial_dims=spatial_dims, norm=norm)
            for _ in range(blocks)
        )

    def forward(self, features: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, ...) to (B, width, ...) of the same size."""
        current: Tensor = self.enter(features)
        for block in self.blocks:
            current = block(current, site)
        return current


class ResidualBlock(nn.Module):
    """Twice normalisation, ReLU, 3x3 convolution; added to what came in."""

    def __init__(self, width: int, *, spatial_dims: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, width, spatial_dims=spatial_dims)
        self.conv1 = _convolution(width, width, spatial_dims)
        self.norm2 = make_norm(norm, width, spatial_dims=spatial_dims)
        self.conv2 = _convolution(width, width, spatial_dims)

    def forward(self, features: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, ...) to the same shape."""
        inner = self.conv1(functional.relu(normalise(self.norm1, features, site)))
        inner = self.conv2(functional.relu(normalise(self.norm2, inner, site)))
        added: Tensor = features + inner
        return added


class Doubling(nn.Module):
    """Normalisation, ReLU, transposed 3x3 convolution of stride 2."""

    def __init__(
        self, in_channels: int, width: int, *, spatial_dims: int, norm: Norm
    ) -> None:
        super().__init__()
        self.norm = make_norm(norm, in_channels, spatial_dims=spatial_dims)
        self.conv = _TRANSPOSED[spatial_dims](
            in_channels,
            width,
            kernel_size=3,
            stride=2,
            padding=1,
            output_padding=1,
            bias=False,
        )

    def forward(self, features: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, ...) to (B, width, ...), each spatial size doubled."""
        activated = functional.relu(normalise(self.norm, features, site))
        doubled: Tensor = self.conv(activated)
        return doubled


def _convolution(in_channels: int, width: int, spatial_dims: int) -> nn.Module:
    conv = _CONV[spatial_dims]
    return conv(in_channels, width, kernel_size=3, padding=1, bias=False)


def _check_sizes(*sizes: int) -> None:
    names = ("in_channels", "num_classes", "base_width", "levels")
    seen = ", ".join(f"{n} {s}" for n, s in zip(names, sizes, strict=True))
    if min(sizes) < 1:
        raise ConfigError(f"residual U-Net with {seen}; each must be at least 1")
    widest = sizes[2] * 2 ** (sizes[3] - 1)
    if widest > MAX_WIDTH:
        raise ConfigError(
            f"residual U-Net with {seen}: its deepest level would have {widest} "
            f"channels, at most {MAX_WIDTH} make sense"
        )
