"""Mode "image" of examples and predictions: one image with one class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError, DataError
from fedmed.networks.build import build_network
from fedmed.training.augment import Augmentation
from fedmed.training.examples import ExampleIndex, pad_alike, read_image
from fedmed.training.predict import predict_case


@dataclass
class Picture:
    case_id: str
    image_CIJK: np.ndarray
    label_IJK: np.ndarray | None


def picture(number, shape=(6, 5, 1), *, channels=1, label=None):
    """Every voxel of case n is n, and its class is n % 3."""
    image = np.full((channels, *shape), number, np.float32)
    value = number % 3 if label is None else label
    return Picture(f"case{number}", image, np.array(value, np.int64))


def pictures(count=6, shape=(6, 5, 1)):
    return [picture(n, shape) for n in range(count)]


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize(
    ("shape", "expected"), [((6, 5, 1), (4, 1, 6, 5)), ((6, 5, 3), (4, 1, 6, 5, 3))]
)
def test_shapes_and_dtypes(shape, expected):
    batch = ExampleIndex(pictures(shape=shape), "image").batch(0, 0, 4)
    assert batch.images.shape == expected
    assert batch.images.dtype == torch.float32
    assert batch.labels.shape == (4,)
    assert batch.labels.dtype == torch.int64


def test_each_image_comes_once_per_epoch_with_its_own_class():
    index = ExampleIndex(pictures(), "image")
    assert len(index) == 6
    batch = index.batch(3, 0, 6)
    numbers = batch.images[:, 0, 0, 0].to(torch.int64)
    assert sorted(numbers.tolist()) == list(range(6))
    assert torch.equal(batch.labels, numbers % 3)
    assert same(ExampleIndex(pictures()[::-1], "image").batch(3, 0, 6), batch)


def test_images_that_nobody_classified_are_no_examples():
    unknown = Picture("case7", picture(7).image_CIJK, None)
    cases = [picture(1), unknown, picture(8, label=255)]
    assert len(ExampleIndex(cases, "image")) == 1
    with pytest.raises(DataError, match="'image' in 2 cases"):
        ExampleIndex(cases[1:], "image")


@pytest.mark.parametrize("deep", [1, 2])
def test_images_of_different_sizes_are_padded_with_their_border(deep):
    cases = [picture(1, (6, 5, deep)), picture(2, (3, 8, deep))]
    cases[0].image_CIJK[0, -1, 0] = 7
    batch = ExampleIndex(cases, "image").batch(0, 0, 2)
    assert batch.images.shape[2:4] == (6, 8)
    for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
        values = set(image[0].flatten().tolist())
        assert values == ({1.0, 7.0} if label == 1 else {2.0})
    assert sorted(batch.labels.tolist()) == [1, 2]


def test_padding_repeats_the_end_of_each_axis():
    small = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    padded, large = pad_alike([small, torch.zeros(1, 3, 4)])
    assert padded[0].tolist() == [[1, 2, 2, 2], [3, 4, 4, 4], [3, 4, 4, 4]]
    assert large.shape == padded.shape
    label = pad_alike([small[0], torch.zeros(2, 3)], value=255)[0]
    assert label.tolist() == [[1, 2, 255], [3, 4, 255]]


@pytest.mark.parametrize("deep", [1, 3])
def test_augmentation_changes_the_image_and_never_the_class(deep):
    rng = np.random.default_rng(0)
    case = Picture("a", rng.normal(size=(1, 6, 6, deep)), np.array(2, np.int64))
    every = Augmentation("IJK", 10, 0.1, 0.2, 0.1, 0.1)
    plain = ExampleIndex([case], "image").batch(0, 0, 8)
    changed = ExampleIndex([case], "image", augmentation=every).batch(0, 0, 8)
    assert changed.images.shape == plain.images.shape
    assert not torch.allclose(changed.images, plain.images)
    assert changed.labels.tolist() == [2] * 8
    flipped = ExampleIndex([case], "image", augmentation={"flip_axes": "I"})
    images = flipped.batch(0, 0, 8).images
    whole = torch.from_numpy(read_image(case.image_CIJK))
    kinds = [torch.equal(i, whole) or 2 * torch.equal(i, whole.flip(1)) for i in images]
    assert set(kinds) == {1, 2}


def test_examples_are_not_views_of_the_prepared_case():
    case = picture(1)
    ExampleIndex([case], "image").batch(0, 0, 2).images.add_(1.0)
    assert (case.image_CIJK == 1).all()


def test_a_label_per_voxel_a_row_and_a_mixture_are_refused():
    mask = Picture("a", np.zeros((1, 4, 4, 1), np.float32), np.zeros((4, 4, 1)))
    with pytest.raises(ConfigError, match=r"'a'.*\n.*mode 'slice'"):
        ExampleIndex([mask], "image")
    row = Picture("a", np.zeros(4, np.float32), np.array(1))
    with pytest.raises(ConfigError, match="mode 'row'"):
        ExampleIndex([row], "image")
    with pytest.raises(ConfigError, match="one slice and others have several"):
        ExampleIndex([picture(1), picture(2, (6, 5, 2))], "image")
    with pytest.raises(ConfigError, match="one class per case: mode 'image'"):
        ExampleIndex([picture(1)], "slice")


@pytest.mark.parametrize(
    "options", [{"num_slices": 3}, {"patch_size": (2, 2, 2)}, {"patches_per_case": 2}]
)
def test_options_of_other_modes_are_refused(options):
    with pytest.raises(ConfigError):
        ExampleIndex(pictures(), "image", **options)


class MeanOfChannels(nn.Module):
    """Logits are the means of the channels."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, images, site=None):  # noqa: ARG002
        self.shapes.append(tuple(images.shape))
        return images.flatten(2).mean(2)


@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 3, 2)])
def test_a_whole_image_gives_one_probability_per_class(shape):
    rng = np.random.default_rng(0)
    case = Picture("a", rng.normal(size=(3, *shape)).astype(np.float32), None)
    model = MeanOfChannels()
    got = predict_case(model, case, mode="image")
    odds = np.exp(case.image_CIJK.astype(np.float64).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(got, odds / odds.sum(), atol=1e-6)
    assert got.dtype == np.float32
    assert model.shapes == [(1, 3, *shape[: 2 if shape[2] == 1 else 3])]


@pytest.mark.parametrize("shape", [(9, 7, 1), (9, 7, 3)])
def test_our_classifier_learns_to_tell_two_images_apart(shape):
    rng = np.random.default_rng(1)
    cases = [
        Picture(str(n), rng.normal(size=(1, *shape)).astype(np.float32), np.array(n))
        for n in range(2)
    ]
    dims = 2 if shape[2] == 1 else 3
    sizes = {"base_width": 4, "levels": 2, "spatial_dims": dims, "norm": "none"}
    model = build_network("classifier", in_channels=1, num_classes=2, seed=0, **sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    index = ExampleIndex(cases, "image")
    for step in range(60):
        batch = index.batch(0, step, 2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.step()
    for number, case in enumerate(cases):
        assert predict_case(model, case, mode="image").argmax() == number
