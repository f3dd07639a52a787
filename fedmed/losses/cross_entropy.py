"""Cross-entropy over the known voxels, with optional class weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import ConfigError
from fedmed.losses.known_voxels import (
    at_least_float32,
    check_shapes,
    one_hot_of_known,
)


def cross_entropy(
    logits_BL: Tensor,
    labels_B: Tensor,
    *,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Average the surprise at the labels over the known voxels.

    $-\frac{1}{N} \sum_n w_{y_n} \log p_{n, y_n}$ over the N known voxels of the batch,
    p the softmax of the logits.

    The sum is divided by N, not by the sum of the weights as in
    `torch.nn.CrossEntropyLoss`, so a voxel's weight does not depend on the others in
    its batch. On a GPU it is written out, because torch documents its own as not
    deterministic there.

    Args:
        logits_BL: (B, L, ...), any float dtype; half precision is lifted to float32.
        labels_B: (B, ...), int64 or uint8, `UNKNOWN_LABEL` = takes no part.
        class_weights: One per class, >= 0; None: all 1.

    Returns:
        Scalar >= 0, float32 or float64; 0 if no voxel is known.

    Raises:
        ConfigError: If there is not one usable weight per class.
        DataError: If the shapes do not fit or a label is no class.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([1]))
        tensor(0.6931)
    """
    check_shapes(logits_BL, labels_B)
    logits_BL = at_least_float32(logits_BL)
    if logits_BL.device.type == "cpu" and labels_B.numel():
        return _picked(logits_BL, labels_B, class_weights)
    one_hot_BL = one_hot_of_known(labels_B, num_classes=logits_BL.shape[1])
    surprise_BL = -torch.log_softmax(logits_BL, dim=1)
    # Filled, not multiplied: the surprise of an impossible class is infinite.
    surprise_BL = surprise_BL.masked_fill(~one_hot_BL, 0.0)
    if class_weights is not None:
        surprise_BL = surprise_BL * _weights_like(surprise_BL, class_weights)
    return surprise_BL.sum() / one_hot_BL.sum().clamp(min=1)


def _picked(
    logits_BL: Tensor, labels_B: Tensor, class_weights: Sequence[float] | None
) -> Tensor:
    """The same with torch's own operation, which picks one class of each voxel."""
    lowest, highest = (int(value) for value in torch.aminmax(labels_B))
    num_known = labels_B.numel()
    if lowest < 0 or highest >= logits_BL.shape[1]:
        known = one_hot_of_known(labels_B, num_classes=logits_BL.shape[1]).any(dim=1)
        num_known = max(1, int(known.sum()))
    weights = None
    if class_weights is not None:
        _check_weights(class_weights, logits_BL.shape[1])
        weights = logits_BL.new_tensor(class_weights)
    surprise = functional.nll_loss(
        torch.log_softmax(logits_BL, dim=1),
        labels_B.long(),
        weights,
        ignore_index=UNKNOWN_LABEL,
        reduction="sum",
    )
    return surprise / num_known


def _weights_like(logits_BL: Tensor, class_weights: Sequence[float]) -> Tensor:
    """Give the weights a shape that multiplies (B, L, ...)."""
    num_classes = logits_BL.shape[1]
    _check_weights(class_weights, num_classes)
    shape = (num_classes,) + (1,) * (logits_BL.ndim - 2)
    return logits_BL.new_tensor(class_weights).reshape(shape)


def _check_weights(class_weights: Sequence[float], num_classes: int) -> None:
    if len(class_weights) != num_classes or not all(
        0 <= w < math.inf for w in class_weights
    ):
        raise ConfigError(
            f"class_weights are {list(class_weights)}; {num_classes} numbers >= 0 "
            "were expected.",
            hint="Give one weight per class, the background first.",
        )
