"""U-Net in three dimensions for thin stacks, the 3D network of UMMKD.

Source:
    Dou, Liu, Heng, Glocker, Unpaired Multi-modal Segmentation via Knowledge
    Distillation, IEEE TMI 2020, arXiv:2001.03111, section III (3D).

Differs from the source:
    Kernels start as in He et al. Images of any size are accepted (padded inside,
    cropped back). Width is an option. The kernels of the transposed convolutions are
    the reading of the text that gives the published number of weights: flat wherever
    a deep level is involved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.errors import ConfigError
from fedmed.networks.block import Block
from fedmed.networks.dilated_residual import LEAK
from fedmed.networks.normalisation import Norm, make_norm, normalise
from fedmed.networks.unet import MAX_WIDTH, halve, pad_to_multiple

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "base_width": 16,
        "norm": "batch",
        "norm_eps": 1e-3,
        "norm_momentum": 0.1,
    },
    "tiny": {"base_width": 4, "norm_eps": 1e-3},
}
"""The publication's, for patches of 256x256x8; and a small one."""

_Kernel = tuple[int, int, int]
_CUBE: _Kernel = (3, 3, 3)
_FLAT: _Kernel = (3, 3, 1)
_PAIRS = (((1, 2), _CUBE), ((2, 4), _CUBE), ((4, 8), _FLAT), ((8, 16), _FLAT))
_WAYS_UP = ((8, 8, _FLAT, _FLAT), (8, 4, _FLAT, _CUBE), (4, 2, _CUBE, _CUBE))
"""Width and kernel behind each doubling, deepest first: doubled, then convolved."""


class UNet3DPairs(nn.Module):
    r"""U-Net whose levels widen within the pair of convolutions, four levels deep.

    With b = `base_width`: pairs of convolution, normalisation, leaky ReLU of widths
    b, 2b | 2b, 4b | 4b, 8b | 8b, 16b, where | halves all three axes; kernels are
    3x3x3 in the two upper and 3x3x1 in the two lower levels. Transposed convolutions
    of 8b, 8b, 4b channels double the size, each followed by normalisation, leaky ReLU,
    concatenation with the level's features and a pair of 8b, 4b, 2b. A 1x1x1
    convolution with bias ends it.

    Base 16, one input channel and 5 classes make 2,198,613 weights (the 5 biases
    included) and 1,488 normalised channels.

    Args:
        in_channels: Channels of the images.
        num_classes: Label classes, background included.
        spatial_dims: 3.
        base_width: Channels of the first convolution.
        norm: The normalisation; None is batch normalisation.

    Raises:
        ConfigError: If a number is impossible.

    Example:
        >>> UNet3DPairs(1, 3, base_width=2)(torch.zeros(2, 1, 13, 10, 4)).shape
        torch.Size([2, 3, 13, 10, 4])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        spatial_dims: int = 3,
        base_width: int = 16,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims != 3:
            raise ConfigError(
                f"unet_3d_pairs of {spatial_dims} dimensions; expected 3",
                hint="Set model.mode: patch, or model.name: dilated_residual.",
            )
        if min(in_channels, num_classes, base_width) < 1 or base_width > MAX_WIDTH / 16:
            raise ConfigError(
                f"unet_3d_pairs with in_channels {in_channels}, num_classes "
                f"{num_classes}, base_width {base_width}; each must be at least 1, and "
                f"the width at most {MAX_WIDTH // 16}"
            )
        self.size_multiple = 2 ** (len(_PAIRS) - 1)
        self.encoder = Encoder(in_channels, base_width, norm=norm or Norm())
        self.decoder = Decoder(base_width, norm=norm or Norm())
        self.head = nn.Conv3d(2 * base_width, num_classes, kernel_size=1)

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits.

        Args:
            images: (B, C, I, J, K), any size.
            site: Whose normalisation is used, if the network has one per site.

        Returns:
            Logits (B, L, I, J, K), of the images' size.
        """
        padded = pad_to_multiple(images, self.size_multiple)
        logits: Tensor = self.head(self.decoder(self.encoder(padded, site), site))
        for axis in (2, 3, 4):
            logits = logits.narrow(axis, 0, images.shape[axis])
        return logits


class Encoder(nn.Module):
    """The contracting half: features of each level, the deepest last."""

    def __init__(self, in_channels: int, base_width: int, *, norm: Norm) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        before = in_channels
        for factors, kernel in _PAIRS:
            widths = [before, *(factor * base_width for factor in factors)]
            self.levels.append(Pair(widths, kernel, norm=norm))
            before = widths[-1]

    def forward(self, images: Tensor, site: str | None = None) -> tuple[Tensor, ...]:
        """Give the features of each level; sizes must be multiples of 8."""
        features: list[Tensor] = []
        for level in self.levels:
            below = halve(features[-1]) if features else images
            features.append(level(below, site))
        return tuple(features)


class Decoder(nn.Module):
    """The expanding half; level 0 is the uppermost, the deepest is computed first."""

    def __init__(self, base_width: int, *, norm: Norm) -> None:
        super().__init__()
        up, levels, before = [], [], 16 * base_width
        skips = [pair[-1] * base_width for pair, _ in _PAIRS[-2::-1]]
        for skip, (doubled, width, up_kernel, kernel) in zip(
            skips, _WAYS_UP, strict=True
        ):
            inner, outer = doubled * base_width, width * base_width
            up.append(Doubling(before, inner, up_kernel, norm=norm))
            levels.append(Pair([inner + skip, outer, outer], kernel, norm=norm))
            before = outer
        self.up = nn.ModuleList(reversed(up))
        self.levels = nn.ModuleList(reversed(levels))

    def forward(self, features: tuple[Tensor, ...], site: str | None = None) -> Tensor:
        """Give features of full resolution, `2 base_width` channels."""
        current = features[-1]
        for level in range(len(features) - 2, -1, -1):
            above = self.up[level](current, site)
            joined = torch.cat((features[level], above), 1)
            current = self.levels[level](joined, site)
        return current


class Pair(Block):
    """Twice convolution without bias, normalisation, leaky ReLU.

    Args:
        widths: Channels before, between and after.
        kernel: Size of both kernels.
        norm: The normalisation.
    """

    def __init__(self, widths: list[int], kernel: _Kernel, *, norm: Norm) -> None:
        super().__init__()
        before, between, self.width = widths
        kind: Any = {"padding": _half(kernel), "bias": False}
        self.conv1 = nn.Conv3d(before, between, kernel, **kind)
        self.norm1 = make_norm(norm, between, spatial_dims=3)
        self.conv2 = nn.Conv3d(between, self.width, kernel, **kind)
        self.norm2 = make_norm(norm, self.width, spatial_dims=3)

    def forward(self, features: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, ...) to (B, width, ...) of the same size."""
        features = _activated(normalise(self.norm1, self.conv1(features), site))
        return _activated(normalise(self.norm2, self.conv2(features), site))


class Doubling(nn.Module):
    """Transposed convolution of stride 2, normalisation, leaky ReLU."""

    def __init__(
        self, in_channels: int, width: int, kernel: _Kernel, *, norm: Norm
    ) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(
            in_channels,
            width,
            kernel,
            stride=2,
            padding=_half(kernel),
            output_padding=1,
            bias=False,
        )
        self.norm = make_norm(norm, width, spatial_dims=3)

    def forward(self, features: Tensor, site: str | None = None) -> Tensor:
        """Map (B, C, ...) to (B, width, ...), each spatial size doubled."""
        return _activated(normalise(self.norm, self.conv(features), site))


def _half(kernel: _Kernel) -> _Kernel:
    return (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)


def _activated(features: Tensor) -> Tensor:
    return functional.leaky_relu(features, LEAK)
