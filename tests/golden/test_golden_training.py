"""Augmentation and blending against a few lines of NumPy and SciPy."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import nn

from fedmed.training.augment import transform
from fedmed.training.predict import blending_weights, predict_case


@pytest.mark.parametrize("shape", [(9, 14), (9, 14, 5)])
def test_turning_and_zooming_is_scipys_affine_transform(shape):
    rng = np.random.default_rng(0)
    image = rng.normal(size=shape)
    label = rng.integers(0, 5, shape).astype(np.uint8)
    angle, zoom = 0.4, 1.3
    moved, classes = transform(
        torch.from_numpy(image)[None].float(),
        torch.from_numpy(label),
        angle_rad=angle,
        zoom=zoom,
    )
    forward = np.eye(len(shape)) * zoom
    turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    forward[:2, :2] = zoom * np.array(turn)
    backward = np.linalg.inv(forward)
    centre = (np.array(shape) - 1) / 2
    offset = centre - backward @ centre
    expected = scipy.ndimage.affine_transform(
        image, backward, offset, order=1, mode="nearest"
    )
    np.testing.assert_allclose(moved[0].numpy(), expected, atol=1e-5)
    nearest = scipy.ndimage.affine_transform(
        label, backward, offset, order=0, mode="constant", cval=255
    )
    # SciPy ends the image at its outermost voxel centres, torch half a voxel beyond:
    # there SciPy knows no label, torch has one.
    inside = nearest != 255
    assert inside.mean() > 0.6
    assert (classes.numpy() == nearest)[inside].mean() > 0.999


@dataclass
class Scan:
    case_id: str
    image_CIJK: np.ndarray
    label_IJK: np.ndarray | None = None


class BrightestVoxel(nn.Module):
    """Each voxel's logit is the patch's largest value: every patch says another."""

    def forward(self, images, site=None):  # noqa: ARG002
        top = images.amax(dim=(1, 2, 3, 4), keepdim=True).expand_as(images)
        return torch.cat((top, torch.zeros_like(top)), dim=1)


@pytest.mark.parametrize("blending", ["gaussian", "uniform"])
def test_overlapping_patches_are_averaged_by_weight(blending):
    image = np.random.default_rng(1).normal(size=(1, 9, 6, 4)).astype(np.float32)
    got = predict_case(
        BrightestVoxel(),
        Scan("a", image),
        mode="patch",
        patch_size=(5, 4, 4),
        overlap=0.5,
        blending=blending,
        batch_size=4,
    )
    weights = blending_weights((5, 4, 4), blending).astype(np.float64)
    total, norm = np.zeros((9, 6, 4)), np.zeros((9, 6, 4))
    # 5 of 9 voxels every 2: 0, 2, 4; 4 of 6 every 2: 0, 2; 4 of 4: 0.
    for i, j in itertools.product((0, 2, 4), (0, 2)):
        top = float(image[0, i : i + 5, j : j + 4].max())
        probability = 1 / (1 + np.exp(-top))
        total[i : i + 5, j : j + 4] += probability * weights
        norm[i : i + 5, j : j + 4] += weights
    np.testing.assert_allclose(got[0], total / norm, rtol=1e-5)
    np.testing.assert_allclose(got.sum(axis=0), 1.0, rtol=1e-5)
