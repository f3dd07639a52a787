from __future__ import annotations

import pytest
import torch

from fedmed.losses.dice_linear import dice_linear


def perfect_logits(labels_B, *, num_classes, margin=60.0):
    one_hot = torch.nn.functional.one_hot(labels_B.long(), num_classes)
    return margin * one_hot.movedim(-1, 1).double()


def test_an_empty_foreground_costs_one_class_share_without_smoothing():
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    logits = perfect_logits(labels, num_classes=2)
    assert float(dice_linear(logits, labels)) == pytest.approx(0.5)
    smooth = dice_linear(logits, labels, smooth_numerator=1e-5, smooth_denominator=1e-5)
    assert float(smooth) == pytest.approx(0.0, abs=1e-6)


def test_the_batch_counts_as_one_volume():
    # A slice without foreground adds to the sums; it is no Dice of its own.
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[0, :2] = 1
    logits = torch.randn(
        2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    as_batch = dice_linear(logits, labels)
    as_one = dice_linear(
        logits.movedim(0, 1).reshape(1, 2, 8, 4), labels.reshape(1, 8, 4)
    )
    per_slice = torch.stack(
        [dice_linear(logits[b : b + 1], labels[b : b + 1]) for b in range(2)]
    )
    torch.testing.assert_close(as_batch, as_one)
    assert abs(float(as_batch - per_slice.mean())) > 1e-3
