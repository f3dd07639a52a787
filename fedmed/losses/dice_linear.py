"""Soft Dice loss with a linear denominator, over the batch as one volume."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmed.losses.known_voxels import (
    at_least_float32,
    check_shapes,
    class_sums,
    one_hot_of_known,
)


def dice_linear(
    logits_BL: Tensor,
    labels_B: Tensor,
    *,
    smooth_numerator: float = 0.0,
    smooth_denominator: float = 1e-7,
) -> Tensor:
    r"""Measure how little the class probabilities overlap with the labels.

    $1 - \frac{1}{L} \sum_c \frac{2 \sum p_c y_c + s}{\sum p_c + \sum y_c + s'}$, where
    p is the softmax of the logits, y the one-hot labels, and the inner sums run over
    the whole batch and all known voxels. The background is one of the L classes.

    The sums make it a loss of the batch: the loss of two sites' batches together is
    not the mean of their losses. A method that is to equal its pooled form takes it
    for each site's batch, on both sides.

    With s = 0 a class without a voxel in the batch has overlap 0 whatever is predicted,
    without a gradient from its numerator: it adds 1 / L to the loss even if the
    prediction is perfect. With s = s' (1e-5 in FedDG) it adds 0 then.

    Args:
        logits_BL: (B, L, ...), any float dtype; half precision is lifted to float32.
        labels_B: (B, ...), int64 or uint8, `UNKNOWN_LABEL` = takes no part.
        smooth_numerator: s >= 0, in voxels.
        smooth_denominator: s' > 0, in voxels.

    Returns:
        Scalar in [0, 1], float32 or float64; 0 if no voxel is known.

    Raises:
        DataError: If the shapes do not fit or a label is no class.

    Source:
        Milletari et al., V-Net, 3DV 2016, with the linear denominator and the sums of
        Liu, Dou, Yu, Heng, MS-Net, IEEE TMI 39(9), 2020.

    Example:
        >>> logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
        >>> dice_linear(logits, torch.tensor([0, 1])).round(decimals=4).abs()
        tensor(0.)
    """
    check_shapes(logits_BL, labels_B)
    probabilities_BL = torch.softmax(at_least_float32(logits_BL), dim=1)
    one_hot_BL = one_hot_of_known(labels_B, num_classes=logits_BL.shape[1])
    known_B1 = one_hot_BL.any(dim=1, keepdim=True)
    overlap_L = class_sums(probabilities_BL * one_hot_BL)
    size_L = class_sums(probabilities_BL * known_B1) + class_sums(one_hot_BL)
    dice_L = (2 * overlap_L + smooth_numerator) / (size_L + smooth_denominator)
    return (1 - dice_L.mean()) * known_B1.any()
