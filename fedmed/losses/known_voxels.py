"""What the losses have in common: which voxels take part, in what precision."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import DataError


def at_least_float32(logits_BL: Tensor) -> Tensor:
    """Lift half precision to float32, in which softmax and sums are taken."""
    if logits_BL.dtype in (torch.float16, torch.bfloat16):
        return logits_BL.float()
    return logits_BL


def one_hot_of_known(labels_B: Tensor, *, num_classes: int) -> Tensor:
    """Mark each voxel's class; no class where the label is unknown.

    Args:
        labels_B: int64 or uint8, shape (B, ...), `UNKNOWN_LABEL` where unknown.
        num_classes: L, at most `UNKNOWN_LABEL`.

    Returns:
        bool, shape (B, L, ...). Its `any(dim=1)` says which voxels are known.

    Raises:
        DataError: If a known label is not one of 0 to L - 1. It would silently be no
            class at all; so would the zones of a label that nobody merged.
    """
    is_class = (labels_B < num_classes) & (labels_B >= 0)
    if not bool((is_class | (labels_B == UNKNOWN_LABEL)).all()):
        strange = sorted(set(labels_B[~is_class].tolist()) - {UNKNOWN_LABEL})
        raise DataError(
            f"Labels {strange[:5]} in a batch; the model knows the classes 0 to "
            f"{num_classes - 1}, and {UNKNOWN_LABEL} for unknown voxels.",
            hint="Merge or rename labels when the case is read, or add classes.",
        )
    shape = (1, num_classes) + (1,) * (labels_B.ndim - 1)
    classes = torch.arange(num_classes, device=labels_B.device).reshape(shape)
    return labels_B.unsqueeze(1) == classes


def check_shapes(logits_BL: Tensor, labels_B: Tensor) -> None:
    """Refuse labels that are not those of the logits' voxels.

    Broadcasting would otherwise give a plausible, wrong number.

    Raises:
        DataError: With both shapes.
    """
    expected = (*logits_BL.shape[:1], *logits_BL.shape[2:])
    if logits_BL.ndim < 2 or labels_B.shape != expected:
        raise DataError(
            f"Logits of shape {tuple(logits_BL.shape)} were given with labels of "
            f"shape {tuple(labels_B.shape)}.",
            hint="Expected logits (B, L, ...) and labels (B, ...), without a channel.",
        )


def class_sums(values_BL: Tensor) -> Tensor:
    """Sum over the batch and all voxels: (B, L, ...) -> (L,)."""
    return values_BL.sum(dim=[axis for axis in range(values_BL.ndim) if axis != 1])
