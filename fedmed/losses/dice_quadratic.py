"""Soft Dice loss with the square of the probabilities in its denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmed.losses.known_voxels import (
    at_least_float32,
    check_shapes,
    class_sums,
    one_hot_of_known,
)


def dice_quadratic(
    logits_BL: Tensor, labels_B: Tensor, *, smooth_denominator: float = 1e-7
) -> Tensor:
    r"""Measure how little the class probabilities overlap with the labels.

    $1 - \frac{1}{L} \sum_c \frac{2 \sum p_c y_c}{\sum p_c^2 + \sum y_c + s'}$, where p
    is the softmax of the logits, y the one-hot labels, and the inner sums run over the
    whole batch and all known voxels. The background is one of the L classes, and as
    in `dice_linear` it is a loss of the batch, and a class without a voxel in the batch
    adds 1 / L whatever is predicted.

    Args:
        logits_BL: (B, L, ...), any float dtype; half precision is lifted to float32.
        labels_B: (B, ...), int64 or uint8, `UNKNOWN_LABEL` = takes no part.
        smooth_denominator: s' > 0, in voxels.

    Returns:
        Scalar in [0, 1], float32 or float64; 0 if no voxel is known.

    Raises:
        DataError: If the shapes do not fit or a label is no class.

    Source:
        Milletari et al., V-Net, 3DV 2016; in this form Dou, Liu, Heng, Glocker,
        Unpaired Multi-modal Segmentation via Knowledge Distillation, IEEE TMI 39(7),
        2020.

    Differs from the source:
        The latter's code minimises the loss less 1, which lies in (-1, 0). The
        gradients are the same.

    Example:
        >>> logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
        >>> dice_quadratic(logits, torch.tensor([0, 1])).round(decimals=4).abs()
        tensor(0.)
    """
    check_shapes(logits_BL, labels_B)
    probabilities_BL = torch.softmax(at_least_float32(logits_BL), dim=1)
    one_hot_BL = one_hot_of_known(labels_B, num_classes=logits_BL.shape[1])
    known_B1 = one_hot_BL.any(dim=1, keepdim=True)
    overlap_L = class_sums(probabilities_BL * one_hot_BL)
    squares_L = class_sums(probabilities_BL.square() * known_B1)
    size_L = squares_L + class_sums(one_hot_BL)
    dice_L = 2 * overlap_L / (size_L + smooth_denominator)
    return (1 - dice_L.mean()) * known_B1.any()
