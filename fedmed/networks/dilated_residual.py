"""Dilated residual network in two dimensions, the network of UMMKD.

Source:
    Dou, Liu, Heng, Glocker, Unpaired Multi-modal Segmentation via Knowledge
    Distillation, IEEE TMI 2020, arXiv:2001.03111, section III (2D).

Differs from the source:
    Kernels start as in He et al. (there: truncated normal of deviation 0.01). Images
    of any size are accepted (padded inside, cropped back). Width is an option.
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
        "base_width": 16,
        "maps_per_class": 8,
        "dropout": 0.25,
        "norm": "batch",
        "norm_eps": 1e-3,
        "norm_momentum": 0.1,
    },
    "tiny": {"base_width": 4, "maps_per_class": 2, "norm_eps": 1e-3},
}
"""The publication's, for `slices: 3`; and one that trains on two cores in minutes."""

STRIDE = 8
"""Input positions per position of the deepest features, along each axis."""

LEAK = 0.2
"""Slope of the leaky ReLU below zero, TensorFlow's default."""

_WIDTHS = ((1,), (2,), (4, 4), (8, 8, 16, 16, 16, 16, 32, 32))
"""Widths of the residual blocks of each size, in units of the base width."""


class DilatedResidual(nn.Module):
    r"""Residual blocks at up to 1/8 of the size, then channels become positions.

    With b = `base_width`: a 3x3 convolution to b; pre-activation residual blocks of
    widths b | 2b | 4b, 4b | 8b, 8b, 16b, 16b, 16b, 16b, 32b, 32b, where | halves the
    size; two more of 32b with dilation 2; twice normalisation, leaky ReLU, 3x3
    convolution; a 3x3 convolution to 64 m N channels (m = `maps_per_class`, N
    classes), normalisation, leaky ReLU; every 64 channels become 8x8 positions; a 5x5
    convolution to N. No bias anywhere. A block that widens pads its skip with zero
    channels, half on each side.

    Base 16, 8 maps, 3 input channels and 5 classes make 39,302,456 kernel weights and
    10,096 normalised channels.

    Args:
        in_channels: Channels of the images (times slices, in 2.5D).
        num_classes: Label classes, background included.
        spatial_dims: 2.
        base_width: Channels of the first convolution.
        maps_per_class: Channels of full size per class before the last convolution.
        dropout: Share of values dropped behind each convolution that follows
            normalisation and leaky ReLU, in [0, 1).
        norm: The normalisation; None is batch normalisation.

    Raises:
        ConfigError: If a number is impossible.

    Example:
        >>> DilatedResidual(1, 3, base_width=2)(torch.zeros(2, 1, 13, 10)).shape
        torch.Size([2, 3, 13, 10])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        spatial_dims: int = 2,
        base_width: int = 16,
        maps_per_class: int = 8,
        dropout: float | int = 0.0,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims != 2:
            raise ConfigError(
                f"dilated residual network of {spatial_dims} dimensions; expected 2",
                hint="Set model.mode: slice, or model.name: unet_3d_pairs.",
            )
        _check_sizes(
            {
                "in_channels": in_channels,
                "num_classes": num_classes,
                "base_width": base_width,
                "maps_per_class": maps_per_class,
            },
            dropout,
        )
        norm = norm or Norm()
        self.size_multiple = STRIDE
        self.encoder = Encoder(in_channels, base_width, dropout=dropout, norm=norm)
        maps = maps_per_class * num_classes
        self.decoder = Unfolding(32 * base_width, maps, norm=norm)
        self.head = SymmetricConvolution(maps, num_classes, kernel_size=5)

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits.

        Args:
            images: (B, C, I, J), any size.
            site: Whose normalisation is used, if the network has one per site.

        Returns:
            Logits (B, L, I, J), of the images' size.
        """
        padded = pad_to_multiple(images, self.size_multiple)
        features = self.decoder(self.encoder(padded, site), site)
        logits: Tensor = self.head(features)
        return logits[:, :, : images.shape[2], : images.shape[3]]


class Encoder(nn.Module):
    """From the images to features of 1/8 of their size."""

    def __init__(
        self, in_channels: int, base_width: int, *, dropout: float | int, norm: Norm
    ) -> None:
        super().__init__()
        kind: Any = {"dropout": dropout, "norm": norm}
        self.enter = nn.Conv2d(in_channels, base_width, 3, padding=1, bias=False)
        width = base_width
        self.levels = nn.ModuleList()
        for factors in _WIDTHS:
            blocks = nn.ModuleList()
            for factor in factors:
                blocks.append(WideningBlock(width, factor * base_width, **kind))
                width = factor * base_width
            self.levels.append(blocks)
        self.dilated = nn.ModuleList(
            WideningBlock(width, width, dilation=2, **kind) for _ in range(2)
        )
        self.last = nn.ModuleList(
            ActivatedConvolution(width, width, **kind) for _ in range(2)
        )

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, I, J), sizes multiples of 8, to (B, 32 b, I / 8, J / 8)."""
        current: Tensor = self.enter(images)
        for number, blocks in enumerate(self.levels):
            current = halve(current) if number else current
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                current = block(current, site)
        for layer in (*self.dilated, *self.last):
            current = layer(current, site)
        return current


class ActivatedConvolution(nn.Module):
    """Normalisation, leaky ReLU, 3x3 convolution, dropout."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        dilation: int = 1,
        dropout: float | int,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.norm = make_norm(norm, in_channels, spatial_dims=2)
        self.conv = nn.Conv2d(
            in_channels, width, 3, padding=dilation, dilation=dilation, bias=False
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, I, J) to (B, width, I, J)."""
        normalised = normalise(self.norm, features, site)
        convolved: Tensor = self.conv(functional.leaky_relu(normalised, LEAK))
        dropped: Tensor = self.dropout(convolved)
        return dropped


class WideningBlock(Block):
    """Two activated convolutions, added to what came in."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        dilation: int = 1,
        dropout: float | int,
        norm: Norm,
    ) -> None:
        super().__init__()
        kind: Any = {"dilation": dilation, "dropout": dropout, "norm": norm}
        self.width = width
        self.first = ActivatedConvolution(in_channels, width, **kind)
        self.second = ActivatedConvolution(width, width, **kind)

    def forward(self, features: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, I, J) to (B, width, I, J)."""
        missing = self.width - features.shape[1]
        before = missing // 2
        skip = functional.pad(features, (0, 0, 0, 0, before, missing - before))
        inner: Tensor = self.second(self.first(features, site), site)
        return skip + inner


class Unfolding(nn.Module):
    """Convolution, normalisation, leaky ReLU; then 64 channels become 8x8 positions."""

    def __init__(self, in_channels: int, maps: int, *, norm: Norm) -> None:
        super().__init__()
        width = maps * STRIDE**2
        self.conv = SymmetricConvolution(in_channels, width, kernel_size=3)
        self.norm = make_norm(norm, width, spatial_dims=2)

    def forward(self, features: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, I, J) to (B, maps, 8 I, 8 J)."""
        normalised = normalise(self.norm, self.conv(features), site)
        return functional.pixel_shuffle(functional.leaky_relu(normalised, LEAK), STRIDE)


class SymmetricConvolution(nn.Conv2d):
    """Convolution without bias whose border mirrors the image, edge included."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, I, J) to (B, out_channels, I, J)."""
        border = self.kernel_size[0] // 2
        return functional.conv2d(mirrored(features, border), self.weight)


def mirrored(features: Tensor, border: int) -> Tensor:
    """Continue an image beyond its edges by its mirror image, edge included.

    Args:
        features: (B, C, I, J), sizes of at least `border`.
        border: Positions to append on each side.

    Example:
        >>> mirrored(torch.tensor([[[[1.0, 2.0, 3.0]] * 2]]), 2)[0, 0, 0]
        tensor([2., 1., 1., 2., 3., 3., 2.])
    """
    for axis in (2, 3):
        size = features.shape[axis]
        first = features.narrow(axis, 0, border).flip(axis)
        last = features.narrow(axis, size - border, border).flip(axis)
        features = torch.cat((first, features, last), axis)
    return features


def _check_sizes(sizes: Mapping[str, int], dropout: float | int) -> None:
    seen = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if min(sizes.values()) < 1:
        raise ConfigError(f"dilated residual network with {seen}; expected at least 1")
    if 32 * sizes["base_width"] > MAX_WIDTH:
        raise ConfigError(
            f"dilated residual network with {seen}: its deepest level would have "
            f"{32 * sizes['base_width']} channels, at most {MAX_WIDTH} make sense"
        )
    if not 0 <= dropout < 1:
        raise ConfigError(f"model.dropout is {dropout}; expected in [0, 1)")
