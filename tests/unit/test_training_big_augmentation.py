from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import ConfigError
from fedmed.seeds import numpy_rng
from fedmed.training.augment import transform
from fedmed.training.big_augmentation import (
    NAMES,
    BigAugmentation,
    big_augment,
    big_augmented,
    drawn_changes,
    gaussian_blur,
)
from fedmed.training.examples import Batch

ALWAYS = BigAugmentation(probability=1)


def example(shape=(12, 10), channels=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn((channels, *shape), generator=rng)
    return image, torch.randint(0, 3, shape, generator=rng).to(torch.uint8)


def seed_with_only(name, settings=BigAugmentation()):  # noqa: B008
    """A seed whose draw is one change alone."""
    return next(s for s in range(9999) if drawn_changes(settings, s) == (name,))


@pytest.mark.parametrize("shape", [(12, 10), (9, 10, 8)])
@pytest.mark.parametrize("sigma", [0.25, 0.8, 1.5])
def test_the_blur_is_scipys(shape, sigma):
    image, _ = example(shape)
    expected = [
        ndimage.gaussian_filter(channel.double().numpy(), sigma, mode="nearest")
        for channel in image
    ]
    found = gaussian_blur(image.double(), sigma)
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-12)


def test_each_change_comes_half_of_the_time_and_independently():
    drawn = [drawn_changes(BigAugmentation(), s) for s in range(2000)]
    shares = {name: np.mean([name in d for d in drawn]) for name in NAMES}
    # Five standard deviations of a mean of 2,000 coins.
    assert all(abs(share - 0.5) < 0.056 for share in shares.values())
    both = np.mean(["blur" in d and "scale" in d for d in drawn])
    assert abs(both - 0.25) < 0.05
    assert all(list(d) == [n for n in NAMES if n in d] for d in drawn)


@pytest.mark.parametrize("name", NAMES[:6])
def test_quality_and_contrast_leave_the_label(name):
    image, label = example()
    new_image, new_label = big_augment(
        image, label, BigAugmentation(), seed=seed_with_only(name)
    )
    assert torch.equal(new_label, label)
    assert not torch.allclose(new_image, image)
    assert new_image.dtype == torch.float32


def test_contrast_is_a_power_of_the_scaled_image():
    image, label = example()
    seed = seed_with_only("contrast")
    found, _ = big_augment(image, label, BigAugmentation(), seed=seed)
    exponent = numpy_rng(seed, "contrast").uniform(0.5, 4.5)
    for channel, new in zip(image.numpy(), found.numpy(), strict=True):
        low, high = channel.min(), channel.max()
        expected = ((channel - low) / (high - low)) ** exponent * (high - low) + low
        np.testing.assert_allclose(new, expected, atol=1e-5)


def test_perturbation_is_linear():
    image, label = example()
    seed = seed_with_only("perturb")
    found, _ = big_augment(image, label, BigAugmentation(), seed=seed)
    s = numpy_rng(seed, "perturb scale").uniform(-0.1, 0.1)
    t = numpy_rng(seed, "perturb shift").uniform(-0.1, 0.1)
    np.testing.assert_allclose(found.numpy(), image.numpy() * (1 + s) + t, atol=1e-6)


def test_sharpening_is_an_unsharp_mask():
    image, label = example()
    seed = seed_with_only("sharpen")
    found, _ = big_augment(image, label, BigAugmentation(), seed=seed)
    first = numpy_rng(seed, "sharpen first").uniform(0.25, 1.5)
    second = numpy_rng(seed, "sharpen second").uniform(0.25, 1.5)
    strength = numpy_rng(seed, "sharpen strength").uniform(10, 30)
    for channel, new in zip(image.double().numpy(), found.numpy(), strict=True):
        once = ndimage.gaussian_filter(channel, first, mode="nearest")
        twice = ndimage.gaussian_filter(once, second, mode="nearest")
        np.testing.assert_allclose(new, once + strength * (once - twice), atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 10), (9, 10, 8)])
def test_shape_moves_image_and_label_together(shape):
    """An image that is its own label stays one, but where the outside comes in."""
    label = torch.zeros(shape, dtype=torch.uint8)
    label[3:7, 3:7] = 1
    for name in NAMES[6:]:
        image, new_label = big_augment(
            label[None].float(), label, BigAugmentation(), seed=seed_with_only(name)
        )
        known = new_label != UNKNOWN_LABEL
        # Linear and nearest interpolation agree up to a half at an edge.
        assert ((image[0] - new_label.float()).abs()[known] <= 0.8).all()
        assert set(new_label.unique().tolist()) <= {0, 1, UNKNOWN_LABEL}


def test_shrinking_brings_in_unknown_labels():
    image, label = example()
    settings = BigAugmentation(scale=(0.5, 0.5))
    seed = seed_with_only("scale", settings)
    found, new_label = big_augment(image, label, settings, seed=seed)
    expected = transform(image, label, angle_rad=0.0, zoom=0.5)
    torch.testing.assert_close(found, expected[0])
    assert torch.equal(new_label, expected[1])
    assert (new_label == UNKNOWN_LABEL).any()


def test_a_deformation_of_zero_changes_nothing():
    image, label = example()
    settings = BigAugmentation(deform=(0, 0))
    seed = seed_with_only("deform", settings)
    found, new_label = big_augment(image, label, settings, seed=seed)
    torch.testing.assert_close(found, image, atol=1e-5, rtol=0)
    assert torch.equal(new_label, label)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_examples_of_a_batch_differ_and_can_be_redone(dtype):
    image, label = example()
    images, labels = torch.stack([image, image]), torch.stack([label, label]).long()
    batch = Batch(images.to(dtype), labels)
    first = big_augmented(batch, ALWAYS, seed=4)
    again = big_augmented(batch, ALWAYS, seed=4)
    other = big_augmented(batch, ALWAYS, seed=5)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images[0], first.images[1])
    assert not torch.equal(first.images, other.images)
    assert first.images.dtype == dtype
    assert first.labels.dtype == torch.int64
    assert torch.equal(batch.images, images.to(dtype))
    # What is computed does not depend on the dtype that it is given in.
    single = big_augmented(Batch(images, labels), ALWAYS, seed=4)
    assert torch.equal(first.images.float(), single.images)


def test_probability_zero_changes_no_bit():
    image, label = example()
    batch = Batch(image[None], label[None].long())
    found = big_augmented(batch, BigAugmentation(probability=0), seed=1)
    assert torch.equal(found.images, batch.images)
    assert torch.equal(found.labels, batch.labels)


def test_classes_of_images_stay():
    images, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 1])
    found = big_augmented(Batch(images, labels), ALWAYS, seed=1)
    assert torch.equal(found.labels, labels)
    assert not torch.equal(found.images, images)


def test_a_table_is_refused():
    with pytest.raises(ConfigError, match="table"):
        big_augmented(Batch(torch.zeros(2, 4), torch.zeros(2)), ALWAYS, seed=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"probability": 1.5},
        {"scale": (0.0, 1.0)},
        {"blur_sigma": (2.0, 1.0)},
        {"noise_std": (-1.0, 1.0)},
        {"brightness": (0.0, float("nan"))},
    ],
)
def test_impossible_ranges_are_refused(wrong):
    with pytest.raises(ConfigError):
        BigAugmentation(**wrong)
