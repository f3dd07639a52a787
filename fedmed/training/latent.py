"""Latent vectors: one short vector for each example, from the deepest features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedmed.errors import ConfigError

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def latent_vectors(output: Any) -> Tensor:
    """Average features over all positions.

    Args:
        output: What an encoder gave: features (B, F, ...), or a tuple of those of each
            level, the deepest last.

    Returns:
        (B, F), differentiable.

    Example:
        >>> import torch
        >>> latent_vectors((torch.ones(1, 4, 8, 8), torch.ones(1, 2, 4, 4)))
        tensor([[1., 1.]])
    """
    features: Tensor = output[-1] if isinstance(output, tuple | list) else output
    return features.flatten(2).mean(dim=2) if features.ndim > 2 else features


def latent_width(network: nn.Module, layer: str) -> int:
    """Tell the number F of features that a layer gives: its last convolution's.

    Args:
        network: Any network whose last map within the layer makes its output.
        layer: Path of the module.

    Raises:
        ConfigError: If there is no such module, or it holds no map.

    Example:
        >>> from fedmed.networks.unet import UNet
        >>> latent_width(UNet(1, 2, base_width=4, levels=3), "encoder")
        16
    """
    known = dict(network.named_modules())
    if layer not in known:
        parts = ", ".join(name for name, _ in network.named_children())
        raise ConfigError(
            f"strategy.layer is {layer!r}, which is no module of the network",
            hint=f"Its parts are {parts}.",
        )
    maps = [module for module in known[layer].modules() if isinstance(module, _LAYERS)]
    if not maps:
        raise ConfigError(
            f"strategy.layer is {layer!r}, which holds no convolution or linear map",
            hint="Name a module that has one.",
        )
    last = maps[-1]
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels
