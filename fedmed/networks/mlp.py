"""Multilayer perceptron for tables, with the parts encoder and head.

A missing value (NaN) becomes 0, the mean of a standardised feature; an indicator per
feature tells the network that it was missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed.errors import ConfigError
from fedmed.networks.normalisation import Norm, make_norm, normalise

PRESETS: Mapping[str, Mapping[str, Any]] = {"tiny": {"widths": (16,)}}
"""One small hidden layer."""


class MLP(nn.Module):
    r"""Hidden layers of linear map, normalisation and ReLU, then a linear head.

    With $w_0$ = F inputs (2F with indicators), hidden widths $w_1...w_H$ and N
    classes: $\sum_h w_{h-1} w_h$ weights without bias and a normalisation of $w_h$
    channels for each hidden layer, and $N w_H + N$ in the head. No hidden layer is
    logistic regression.

    Args:
        in_channels: Features F of the table.
        num_classes: Classes.
        widths: Widths of the hidden layers.
        missing_indicator: Give the network one more input per feature, 1 if missing.
        norm: The normalisation; None is batch normalisation.

    Example:
        >>> MLP(5, 2, widths=(8,))(torch.full((3, 5), torch.nan)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: Sequence[int] = (64, 32),
        missing_indicator: bool = True,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        if min((in_channels, num_classes, *widths)) < 1:
            raise ConfigError(
                f"MLP with in_channels {in_channels}, num_classes {num_classes}, "
                f"widths {tuple(widths)}; each must be at least 1"
            )
        inputs = in_channels * (2 if missing_indicator else 1)
        self.encoder = TableEncoder(
            (inputs, *widths), missing_indicator=missing_indicator, norm=norm or Norm()
        )
        self.head = nn.Linear((inputs, *widths)[-1], num_classes)

    def forward(self, images: Tensor, site: str | None = None) -> Tensor:
        """Compute the logits.

        Args:
            images: Rows of the table (B, F), NaN where missing.
            site: Whose normalisation is used, if the network has one per site.

        Returns:
            Logits (B, L).
        """
        logits: Tensor = self.head(self.encoder(images, site))
        return logits


class TableEncoder(nn.Module):
    """Impute, then the hidden layers; widths include the input's."""

    def __init__(
        self, widths: Sequence[int], *, missing_indicator: bool, norm: Norm
    ) -> None:
        super().__init__()
        self.missing_indicator = missing_indicator
        bias = norm.kind == "none"
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairs)
        self.norms = nn.ModuleList(make_norm(norm, b, spatial_dims=0) for _, b in pairs)

    def forward(self, rows_BF: Tensor, site: str | None = None) -> Tensor:
        """Map rows (B, F) to features (B, last width)."""
        features = impute(rows_BF, missing_indicator=self.missing_indicator)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            features = functional.relu(normalise(norm, layer(features), site))
        return features


def impute(rows_BF: Tensor, *, missing_indicator: bool) -> Tensor:
    """Replace NaN by 0, and append which values were missing.

    Example:
        >>> impute(torch.tensor([[1.0, torch.nan]]), missing_indicator=True)
        tensor([[1., 0., 0., 1.]])
    """
    missing = torch.isnan(rows_BF)
    rows = rows_BF.masked_fill(missing, 0.0)
    if not missing_indicator:
        return rows
    return torch.cat((rows, missing.to(rows.dtype)), dim=1)
