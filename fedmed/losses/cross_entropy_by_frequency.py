"""Cross-entropy whose class weights follow from the batch."""

from __future__ import annotations

from torch import Tensor

from fedmed.losses.cross_entropy import cross_entropy
from fedmed.losses.known_voxels import class_sums, one_hot_of_known


def cross_entropy_by_frequency(logits_BL: Tensor, labels_B: Tensor) -> Tensor:
    r"""Average the surprise at the labels, rare classes of the batch counting more.

    $-\frac{1}{N} \sum_n w_{y_n} \log p_{n, y_n}$ with $w_c = 1 - N_c / N$, N the known
    voxels of the batch and N_c those of class c.

    A batch of a single class has weight 0 and no loss.

    Args:
        logits_BL: (B, L, ...), any float dtype; half precision is lifted to float32.
        labels_B: (B, ...), int64 or uint8, `UNKNOWN_LABEL` = takes no part.

    Returns:
        Scalar >= 0, float32 or float64; 0 if no voxel is known.

    Raises:
        DataError: If the shapes do not fit or a label is no class.

    Source:
        Dou, Liu, Heng, Glocker, Unpaired Multi-modal Segmentation via Knowledge
        Distillation, IEEE TMI 39(7), 2020, the weighted cross-entropy.

    Differs from the source:
        Its code clips probabilities at 0.005, below which a voxel has no gradient;
        here the logarithm is exact.

    Example:
        >>> import torch
        >>> logits = torch.zeros(4, 2)
        >>> cross_entropy_by_frequency(logits, torch.tensor([0, 0, 0, 1]))
        tensor(0.2599)
    """
    one_hot_BL = one_hot_of_known(labels_B, num_classes=logits_BL.shape[1])
    counts_L = class_sums(one_hot_BL).double()
    share_L = counts_L / counts_L.sum().clamp(min=1)
    return cross_entropy(logits_BL, labels_B, class_weights=(1 - share_L).tolist())
