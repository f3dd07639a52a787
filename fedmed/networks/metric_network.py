"""A small network on the features of another: the space in which it is compared.

Source:
    Dou et al., MASF, NeurIPS 2019, arXiv:1910.13580; Liu, Dou, Heng, SAML, MICCAI 2020,
    arXiv:2007.02035.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from fedmed.errors import ConfigError

METRIC = "metric"
"""Name of the part; its entries are `metric.*`."""
HEAD = "head"
"""The part whose input are the features."""

_SLOPE = 0.2
_Convolution = nn.modules.conv._ConvNd


class MetricNetwork(nn.Module):
    """Linear maps, each followed by a leaky ReLU of slope 0.2, the last one too.

    F features and the widths (24, 16) make 24 F + 424 numbers; the 48 features of SAML
    make 1,576.

    Args:
        num_features: F.
        widths: Of its layers; the last is the dimension of the embedding.

    Raises:
        ConfigError: If a number is impossible.

    Example:
        >>> sum(p.numel() for p in MetricNetwork(48, (24, 16)).parameters())
        1576
    """

    def __init__(self, num_features: int, widths: Sequence[int]) -> None:
        super().__init__()
        if not widths or min((num_features, *widths)) < 1:
            raise ConfigError(
                f"metric network with {num_features} features and widths "
                f"{tuple(widths)}; each must be at least 1"
            )
        self.layers = nn.ModuleList(
            nn.Linear(before, width)
            for before, width in itertools.pairwise((num_features, *widths))
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, F) to embeddings (N, widths[-1])."""
        for layer in self.layers:
            features = nn.functional.leaky_relu(layer(features), _SLOPE)
        return features


def features_before_head(network: nn.Module) -> int:
    """Count the channels that enter a network's head.

    Args:
        network: Any with a part "head"; all networks of this package have one.

    Raises:
        ConfigError: If there is no such part, or no layer in it.
    """
    head = dict(network.named_children()).get(HEAD)
    for layer in head.modules() if head is not None else ():
        if isinstance(layer, _Convolution):
            return layer.in_channels
        if isinstance(layer, nn.Linear):
            return layer.in_features
    raise ConfigError(
        f"embeddings are made of what enters a network's head, and "
        f"{type(network).__name__} has no part of that name",
        hint="Set model.name: unet, residual_unet, classifier or mlp; or the weight of "
        "what compares embeddings to 0.",
    )
