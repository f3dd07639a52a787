r"""Squeeze-and-excitation: a gate that weighs channels by what the image shows.

Source:
    Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, arXiv:1709.01507; placed
    after every block of a U-Net by Rundo et al., USE-Net, Neurocomputing 2019,
    arXiv:1904.08254.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.errors import ConfigError
from fedmed.networks.block import Block


class SqueezeGate(nn.Module):
    r"""Scale each channel by $\sigma(W_2 \max(0, W_1 \bar x))$, $\bar x$ its mean.

    Args:
        channels: Channels c of the features.
        reduction: r; the hidden layer has c / r units.
        least_hidden: But not fewer than this.

    Differs from the source:
        No bias, as in the equation. A hidden unit whose sum is negative for every image
        then is zero for good; a narrow network needs more than the one or two units
        that c / r leaves, or some of its gates never open.

    Example:
        >>> gate = SqueezeGate(4, reduction=2)
        >>> gate(torch.ones(1, 4, 3, 3)).shape
        torch.Size([1, 4, 3, 3])
    """

    def __init__(self, channels: int, *, reduction: int, least_hidden: int = 1) -> None:
        super().__init__()
        hidden = max(least_hidden, channels // reduction)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, channels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, ...) to the same shape."""
        means_BC = features.flatten(2).mean(dim=2)
        gate_BC = torch.sigmoid(self.excite(functional.relu(self.squeeze(means_BC))))
        return features * gate_BC.reshape(*gate_BC.shape, *[1] * (features.ndim - 2))


def add_gates(network: nn.Module, *, reduction: int, least_hidden: int = 1) -> None:
    """Put a gate after every block of a network.

    Blocks keep the names of their own layers; each gets one more child, `gate`.

    Args:
        network: Changed in place.
        reduction: As of `SqueezeGate`.
        least_hidden: As of `SqueezeGate`.

    Raises:
        ConfigError: If the network has no block, or a number is impossible.
    """
    numbers = {"squeeze_reduction": reduction, "squeeze_least_hidden": least_hidden}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1")
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    if not blocks:
        raise ConfigError(
            f"network {type(network).__name__} has no block to put a gate after",
            hint="Set model.name: unet, residual_unet, dilated_residual, "
            "unet_3d_pairs or classifier.",
        )
    for block in blocks:
        gate = SqueezeGate(block.width, reduction=reduction, least_hidden=least_hidden)
        block.add_module("gate", gate)
        block.register_forward_hook(_through_gate)


def _through_gate(block: nn.Module, inputs: Any, features: Tensor) -> Tensor:
    # A function of this module and not a closure: networks are copied and pickled.
    del inputs
    gated: Tensor = block.get_submodule("gate")(features)
    return gated
