"""Sliding windows against those of MONAI."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedmed.networks.build import build_network
from fedmed.training.predict import predict_case

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sliding_window_inference():
    # MONAI's imports warn about other packages; that is not what is tested here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "MONAI is not installed: sliding windows are not compared with it"
        return pytest.importorskip(
            "monai.inferers", reason=reason
        ).sliding_window_inference


@dataclass
class Scan:
    case_id: str
    image_CIJK: np.ndarray
    label_IJK: np.ndarray | None = None


@pytest.mark.parametrize(
    ("ours", "theirs"), [("gaussian", "gaussian"), ("uniform", "constant")]
)
def test_patches_are_blended_as_by_monai(sliding_window_inference, ours, theirs):
    # Sizes for which both place the windows alike: 0, 2, 4 of 9; 0, 1, 2 of 5; 0, 1 of
    # 4. Odd patches have their peak of 1 in a voxel; MONAI does not scale an even
    # patch's peak to 1 before it lifts weights to a thousandth.
    image = np.random.default_rng(0).normal(size=(1, 9, 5, 4)).astype(np.float32)
    model = build_network(
        "unet",
        in_channels=1,
        num_classes=3,
        spatial_dims=3,
        base_width=4,
        levels=2,
        seed=0,
    ).eval()
    got = predict_case(
        model,
        Scan("a", image),
        mode="patch",
        patch_size=(5, 3, 3),
        overlap=0.5,
        blending=ours,
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sliding_window_inference(
            torch.from_numpy(image)[None],
            (5, 3, 3),
            4,
            lambda patches: torch.softmax(model(patches), dim=1),
            overlap=0.5,
            mode=theirs,
        )[0]
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-6, rtol=1e-6)
