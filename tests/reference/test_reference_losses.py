"""Losses against MONAI's and torch's on the same input."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch

from fedmed.losses.cross_entropy import cross_entropy
from fedmed.losses.dice_linear import dice_linear
from fedmed.losses.dice_quadratic import dice_quadratic

every_shape = pytest.mark.parametrize("shape", [(2, 9, 8), (2, 5, 4, 3)])


@pytest.fixture(scope="module")
def dice_loss():
    # Its import warns about its own dependencies, on some versions.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("monai", reason="MONAI is not installed")
        return importlib.import_module("monai.losses").DiceLoss


def draw(shape):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(
        shape[0], 3, *shape[1:], generator=generator, dtype=torch.float64
    )
    return logits, torch.randint(0, 3, shape, generator=generator)


@every_shape
@pytest.mark.parametrize("squared", [False, True])
def test_dice_equals_monai(dice_loss, shape, squared):
    logits, labels = draw(shape)
    theirs = dice_loss(
        softmax=True,
        to_onehot_y=True,
        batch=True,
        squared_pred=squared,
        smooth_nr=0.0,
        smooth_dr=1e-7,
    )(logits, labels.unsqueeze(1))
    ours = (dice_quadratic if squared else dice_linear)(logits, labels)
    torch.testing.assert_close(ours, theirs)


@every_shape
def test_cross_entropy_equals_torch(shape):
    logits, labels = draw(shape)
    labels[0, 0] = 255
    theirs = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, labels), theirs)


@every_shape
def test_weighted_cross_entropy_is_torchs_sum_over_known_voxels(shape):
    logits, labels = draw(shape)
    labels[0, 0] = 255
    weights = [0.1, 1.0, 2.5]
    theirs = torch.nn.functional.cross_entropy(
        logits,
        labels,
        weight=logits.new_tensor(weights),
        ignore_index=255,
        reduction="sum",
    )
    ours = cross_entropy(logits, labels, class_weights=weights)
    torch.testing.assert_close(ours, theirs / (labels != 255).sum())
