from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError
from fedmed.networks.build import build_network
from fedmed.training.predict import (
    blending_weights,
    evaluating,
    predict_case,
    window_starts,
)


@dataclass
class Scan:
    case_id: str
    image_CIJK: np.ndarray
    label_IJK: np.ndarray | None = None


def scan(shape=(7, 6, 5), channels=2):
    rng = np.random.default_rng(0)
    return Scan("a", rng.normal(size=(channels, *shape)).astype(np.float32))


class Pointwise(nn.Module):
    """Logits of a voxel are a linear map of its own values."""

    def __init__(self, channels, classes, dims):
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.map = conv(channels, classes, 1)
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.map.weight.normal_(generator=rng)
            self.map.bias.normal_(generator=rng)
        self.sizes = []

    def forward(self, images, site=None):  # noqa: ARG002
        self.sizes.append(tuple(images.shape))
        assert torch.is_inference_mode_enabled()
        return self.map(images)

    def expected(self, channels_C):
        weight = self.map.weight.detach().double().numpy().reshape(-1, len(channels_C))
        logits = np.tensordot(weight, channels_C.astype(np.float64), 1)
        logits += self.map.bias.detach().double().numpy().reshape(-1, 1, 1, 1)
        odds = np.exp(logits)
        return odds / odds.sum(axis=0)


def test_slices_come_back_in_their_places():
    case = scan()
    model = Pointwise(2, 3, 2)
    for batch_size in (1, 2, 8):
        got = predict_case(model, case, batch_size=batch_size)
        assert got.shape == (3, 7, 6, 5)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, model.expected(case.image_CIJK), atol=1e-6)
    assert model.sizes[0] == (1, 2, 7, 6)
    assert model.sizes[-1] == (5, 2, 7, 6)


def test_neighbouring_slices_are_fed_as_in_training():
    case = scan()
    model = Pointwise(6, 3, 2)
    got = predict_case(model, case, num_slices=3)
    ks = [np.clip(np.arange(5) + d, 0, 4) for d in (-1, 0, 1)]
    stacked = np.concatenate(
        [np.stack([case.image_CIJK[c][..., k] for k in ks]) for c in range(2)]
    )
    np.testing.assert_allclose(got, model.expected(stacked), atol=1e-6)


@pytest.mark.parametrize("blending", ["gaussian", "uniform"])
@pytest.mark.parametrize("patch_size", [(4, 4, 4), (3, 6, 2), (16, 4, 8)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_patches_cover_every_voxel_in_its_place(patch_size, overlap, blending):
    # Where each voxel decides for itself, no way of cutting may change the result.
    case = scan()
    model = Pointwise(2, 3, 3)
    got = predict_case(
        model,
        case,
        mode="patch",
        patch_size=patch_size,
        overlap=overlap,
        blending=blending,
        batch_size=3,
    )
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, model.expected(case.image_CIJK), atol=1e-6)
    assert {size[2:] for size in model.sizes} == {patch_size}


def test_a_row_gives_its_classes():
    model = build_network("mlp", in_channels=3, num_classes=2, seed=0, widths=(4,))
    row = Scan("a", np.array([1.0, np.nan, 2.0], np.float32))
    got = predict_case(model, row, mode="row")
    assert got.shape == (2,)
    assert got.sum() == pytest.approx(1.0)


def test_the_model_is_evaluated_and_left_as_it_was():
    model = build_network(
        "unet", in_channels=2, num_classes=2, base_width=4, levels=2, seed=0
    )
    model.encoder.levels[0].norm1.eval()  # frozen by its owner
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    first = predict_case(model, scan())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert np.array_equal(predict_case(model, scan()), first)
    model.eval()
    assert np.array_equal(predict_case(model, scan()), first)


def test_modes_are_restored_after_an_error():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1).eval())
    seen = []

    def fail():
        with evaluating(model):
            seen.extend(m.training for m in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [False, False, False]
    assert model.training
    assert model[0].training
    assert not model[1].training


def test_the_site_chooses_the_normalisation():
    options = {"in_channels": 2, "num_classes": 2, "base_width": 4, "levels": 2}
    model = build_network(
        "unet", **options, seed=0, norm="batch_per_site", site_ids=("a", "b")
    )
    for step in range(3):
        rng = torch.Generator().manual_seed(step)
        model(torch.randn(4, 2, 8, 8, generator=rng) * 5, site="a")
    a, b = (predict_case(model, scan(), site=site) for site in "ab")
    assert not np.allclose(a, b)
    with pytest.raises(ConfigError):
        predict_case(model, scan())


def test_images_follow_the_dtype_of_the_model():
    model = build_network(
        "unet",
        in_channels=2,
        num_classes=2,
        base_width=4,
        levels=2,
        seed=0,
        dtype=torch.float64,
    )
    assert predict_case(model, scan()).dtype == np.float32


@pytest.mark.parametrize("size", range(1, 30))
@pytest.mark.parametrize("patch", [1, 4, 7])
def test_windows_reach_both_ends_and_leave_no_gap(size, patch):
    for overlap in (0.0, 0.3, 0.5, 0.75):
        starts = window_starts(size, patch, overlap)
        assert starts[0] == 0
        assert starts == sorted(set(starts))
        assert all(b - a <= patch for a, b in itertools.pairwise(starts))
        assert starts[-1] == max(0, size - patch)
        if size > patch:
            wanted = patch * (1 - overlap)
            assert max(np.diff(starts)) <= max(1, wanted) + 1


def test_gaussian_weights_follow_the_formula():
    weights = blending_weights((8, 4, 1), "gaussian")
    assert weights.shape == (8, 4, 1)
    assert weights[3, 1, 0] == 1.0
    # Standard deviation 1; voxels 1 and 3 are 2.5 and 0.5 from the centre.
    expected = np.exp(-0.5 * (2.5**2 - 0.5**2))
    assert weights[1, 1, 0] == pytest.approx(expected, rel=1e-6)
    assert weights.min() >= 1e-3
    assert (blending_weights((3, 3, 3), "uniform") == 1).all()


@pytest.mark.parametrize(
    "options", [{"overlap": 1.0}, {"batch_size": 0}, {"mode": "patch"}]
)
def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(ConfigError):
        predict_case(Pointwise(2, 2, 2), scan(), **options)
