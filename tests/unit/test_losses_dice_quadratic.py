from __future__ import annotations

import torch

from fedmed.losses.dice_linear import dice_linear
from fedmed.losses.dice_quadratic import dice_quadratic


def test_it_is_not_dice_linear_where_probabilities_are_soft():
    logits = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[:, :2] = 1
    # p = 1/2 and half of the 16 voxels per class: 2 * 4 / (4 + 8) and 2 * 4 / (8 + 8).
    torch.testing.assert_close(
        dice_quadratic(logits, labels).item(), 1 - 8 / 12, rtol=0, atol=1e-8
    )
    torch.testing.assert_close(
        dice_linear(logits, labels).item(), 1 - 8 / 16, rtol=0, atol=1e-8
    )
