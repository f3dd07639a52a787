"""A layer before a network: images of all scanners get the same amplitudes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedmed.errors import ConfigError
from fedmed.training.amplitude import with_amplitude

AMPLITUDE = "amplitude"
"""Name of the part; its one entry is `amplitude.reference`."""
REFERENCE = f"{AMPLITUDE}.reference"

_Convolution = nn.modules.conv._ConvNd


class AmplitudeNormalisation(nn.Module):
    """Replaces the low-frequency amplitudes of images by a reference; phases stay.

    The reference is never learned by gradients, and nothing is measured here: who
    trains sets it. As long as it is zero, images pass unchanged.

    Args:
        channels: Of the images.
        half_width: b >= 0; (2b + 1)^2 frequencies are replaced, 0 is the mean alone.

    Raises:
        ConfigError: If b is negative.

    Source:
        Jiang, Wang, Dou, HarmoFL, AAAI 2022, arXiv:2112.10775, section 3.2.

    Example:
        >>> layer = AmplitudeNormalisation(1, 0)
        >>> _ = layer.reference.fill_(3.0)
        >>> layer(torch.tensor([[[[1.0, 0.0], [1.0, 2.0]]]]))
        tensor([[[[3., 2.],
                  [3., 4.]]]])
    """

    reference: Tensor

    def __init__(self, channels: int, half_width: int) -> None:
        super().__init__()
        if half_width < 0:
            raise ConfigError(f"half_width is {half_width}; it must be at least 0")
        self.half_width = half_width
        size = 2 * half_width + 1
        self.register_buffer("reference", torch.zeros(channels, size, size))

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, I, J) or (B, C, I, J, K) to images of the same shape.

        Raises:
            ConfigError: If the images have fewer pixels than the reference numbers.
        """
        if min(images.shape[2:4], default=0) <= 2 * self.half_width:
            raise ConfigError(
                f"inputs of shape {tuple(images.shape[1:])} cannot have "
                f"{2 * self.half_width + 1} amplitudes each way",
                hint="Lower strategy.half_width; for tables, take another strategy.",
            )
        with torch.no_grad():
            is_known = (self.reference > 0).any()
            return with_amplitude(images, self.reference, is_known)


def normalise_amplitude(network: nn.Module, *, half_width: int) -> nn.Module:
    """Put the layer before a network, which keeps its names and parts.

    Args:
        network: Has a convolution, of which the first tells the number of channels.
        half_width: Of the layer.

    Returns:
        The same network.

    Raises:
        ConfigError: If there is no convolution.
    """
    first = next((m for m in network.modules() if isinstance(m, _Convolution)), None)
    if first is None:
        raise ConfigError(
            f"{type(network).__name__} has no convolution, so that nobody knows the "
            "channels of its images",
            hint="Set model.name: unet or classifier.",
        )
    layer = AmplitudeNormalisation(first.in_channels, half_width)
    network.add_module(AMPLITUDE, layer.to(first.weight.dtype))
    network.register_forward_pre_hook(_normalised)
    return network


def _normalised(network: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    # Looked up by name: copies of the network have a layer of their own.
    return (network.get_submodule(AMPLITUDE)(given[0]), *given[1:])
