"""Frequency-space interpolation against NumPy's transform of the whole image.

Liu et al., FedDG, CVPR 2021, eq. (2) in its author's corrected form, and FedDG's
boundary contrast.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from fedmed.errors import ConfigError
from fedmed.losses.boundary_contrast import boundary_embeddings, nt_xent
from fedmed.losses.metric import Labelled
from fedmed.training.amplitude import (
    COVARIANCE,
    MEAN,
    amplitude_centre,
    drawn_centres,
    half_width,
    independent_half,
    log_distribution,
    mirrored,
    with_amplitude,
)

SIZES = [(16, 16), (15, 12), (9, 21)]
every_size = pytest.mark.parametrize("size", SIZES)


def images_of(size, *, channels=2, count=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn((count, channels, *size), generator=rng).double()


def shifted_amplitude(image):
    """Amplitude of one channel by the FFT, frequency 0 in the middle."""
    return np.abs(np.fft.fftshift(np.fft.fft2(image))) / image.size


def whole_swap(image, other_amplitude, share, half):
    """Eq. (2), on whole spectra: A (1-M) + (1-l) A M + l A_n M, with the phase of x."""
    spectrum = np.fft.fftshift(np.fft.fft2(image))
    amplitude, phase = np.abs(spectrum), np.angle(spectrum)
    i, j = (np.arange(n) - n // 2 for n in image.shape)
    mask = (abs(i)[:, None] <= half) & (abs(j)[None, :] <= half)
    mixed = amplitude * (1 - mask) + (1 - share) * amplitude * mask
    mixed = mixed + share * other_amplitude * image.size * mask
    return np.fft.ifft2(np.fft.ifftshift(mixed * np.exp(1j * phase))).real


@every_size
@pytest.mark.parametrize("half", [0, 1, 3])
def test_the_centre_is_that_of_the_whole_transform(size, half):
    images = images_of(size)
    found = amplitude_centre(images, half).numpy()
    for image, centres in zip(images.numpy(), found, strict=True):
        for channel, centre in zip(image, centres, strict=True):
            whole = shifted_amplitude(channel)
            i, j = (n // 2 for n in size)
            expected = whole[i - half : i + half + 1, j - half : j + half + 1]
            np.testing.assert_allclose(centre, expected, atol=1e-12)


@every_size
@pytest.mark.parametrize("half", [0, 1, 3])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_mix_is_the_inverse_transform_of_the_mixed_spectrum(size, half, share):
    images, others = images_of(size), images_of(size, seed=1)
    centres = amplitude_centre(others, half)
    found = with_amplitude(images, centres, share).numpy()
    for n in range(len(images)):
        for c in range(images.shape[1]):
            expected = whole_swap(
                images[n, c].numpy(), shifted_amplitude(others[n, c].numpy()), share,
                half,
            )  # fmt: skip
            np.testing.assert_allclose(found[n, c], expected, atol=1e-12)


def test_with_the_lowest_frequency_alone_a_constant_per_channel_is_added():
    images, others = images_of((16, 12)), images_of((16, 12), seed=1)
    change = with_amplitude(images, amplitude_centre(others, 0), 1.0) - images
    spread = change.amax((2, 3)) - change.amin((2, 3))
    assert float(spread.max()) < 1e-14
    assert float(change.abs().max()) > 1e-3


@every_size
def test_a_share_of_zero_changes_no_bit(size):
    images = images_of(size).float()
    others = amplitude_centre(images_of(size, seed=1).float(), 2)
    assert torch.equal(with_amplitude(images, others, 0.0), images)


@every_size
def test_the_own_amplitude_changes_nothing(size):
    images = images_of(size)
    found = with_amplitude(images, amplitude_centre(images, 2), 1.0)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-14)


def test_every_image_has_a_share_of_its_own():
    images, others = images_of((16, 16)), images_of((16, 16), seed=1)
    centres, shares = amplitude_centre(others, 2), torch.tensor([0.0, 0.4, 1.0])
    found = with_amplitude(images, centres, shares)
    for n, share in enumerate(shares.tolist()):
        alone = with_amplitude(images[n : n + 1], centres[n : n + 1], share)
        # Shares are float32 where they are drawn.
        torch.testing.assert_close(found[n], alone[0], rtol=0, atol=1e-7)
    assert torch.equal(found[0], images[0])
    moved = amplitude_centre(found, 2)
    torch.testing.assert_close(moved[2], centres[2], rtol=0, atol=1e-12)


def test_volumes_are_changed_slice_by_slice():
    volumes = torch.stack([images_of((12, 10), seed=s) for s in range(4)], dim=-1)
    centres = amplitude_centre(images_of((12, 10), seed=9), 1)
    found = with_amplitude(volumes, centres, 0.5)
    for k in range(4):
        expected = with_amplitude(volumes[..., k], centres, 0.5)
        torch.testing.assert_close(found[..., k], expected, rtol=0, atol=1e-14)
    slices = [amplitude_centre(volumes[..., k], 1) for k in range(4)]
    torch.testing.assert_close(
        amplitude_centre(volumes, 1), torch.stack(slices).mean(dim=0)
    )


@pytest.mark.parametrize(
    ("band", "touched"), [(0.0, 1), (0.003, 9), (0.01, 49), (0.1, 5929)]
)
def test_the_number_of_frequencies_at_384_pixels(band, touched):
    half = half_width((384, 384), band)
    assert (2 * half + 1) ** 2 == touched
    if touched > 49:
        return
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(size=(1, 1, 384, 384)))
    target = torch.full((1, 1, 2 * half + 1, 2 * half + 1), 0.5).double()
    changed = with_amplitude(image, target, 1.0)
    before, after = (np.fft.fft2(x[0, 0].numpy()) for x in (image, changed))
    assert int((np.abs(after - before) > 1e-6).sum()) == touched


def test_small_images_exchange_one_frequency_at_least():
    assert half_width((32, 40), 0.01) == 1
    assert half_width((32, 40), 0.0) == 0
    with pytest.raises(ConfigError, match="frequencies"):
        half_width((2, 40), 0.01)


@pytest.mark.parametrize("half", [0, 1, 3])
def test_half_of_the_centre_says_it_all(half):
    centres = amplitude_centre(images_of((16, 16)), half)
    told = independent_half(centres)
    assert told.shape[-1] == ((2 * half + 1) ** 2 + 1) // 2
    torch.testing.assert_close(mirrored(told), centres, rtol=0, atol=1e-14)


def test_the_distribution_is_numpys_mean_and_covariance():
    centres = amplitude_centre(images_of((16, 16), count=9), 1)
    told = log_distribution(centres)
    logs = np.log(independent_half(centres).reshape(9, -1).numpy())
    np.testing.assert_allclose(told[MEAN], logs.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(told[COVARIANCE], np.cov(logs.T), atol=1e-6)
    assert {t.dtype for t in told.values()} == {torch.float32}


def test_drawn_centres_have_the_distribution_they_are_drawn_from():
    rng = torch.Generator().manual_seed(0)
    root = 0.3 * torch.randn(10, 10, generator=rng)
    told = {MEAN: torch.linspace(-2, 0, 10), COVARIANCE: root @ root.T}
    noise = torch.randn(40_000, 10, generator=rng)
    drawn = drawn_centres(told, noise, channels=2)
    assert drawn.shape == (40_000, 2, 3, 3)
    assert torch.equal(drawn, drawn.flip(-1, -2))
    found = log_distribution(drawn)
    # Five standard errors of a mean and of a covariance of 40,000 draws.
    limit = 5 * float(told[COVARIANCE].diagonal().max()) / math.sqrt(40_000)
    np.testing.assert_allclose(found[COVARIANCE], told[COVARIANCE], atol=2 * limit)
    np.testing.assert_allclose(found[MEAN], told[MEAN], atol=2 * limit)


def test_one_example_is_drawn_as_it_was():
    centres = amplitude_centre(images_of((16, 16), count=1), 1)
    drawn = drawn_centres(log_distribution(centres), torch.ones(1, 10), channels=2)
    torch.testing.assert_close(drawn, centres.float(), rtol=1e-4, atol=1e-6)


def test_nt_xent_is_its_definition():
    rng = np.random.default_rng(0)
    vectors, labels, tau = rng.normal(size=(6, 4)), np.array([0, 1, 0, 1, 1, 0]), 0.3
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    s = np.exp(unit @ unit.T / tau)
    terms = [
        -np.log(s[i, p] / (s[i, p] + s[i, labels != labels[i]].sum()))
        for i in range(6)
        for p in range(6)
        if i != p and labels[i] == labels[p]
    ]
    given = Labelled(torch.from_numpy(vectors), torch.from_numpy(labels))
    found = nt_xent(given, temperature=tau)
    np.testing.assert_allclose(float(found), np.mean(terms), rtol=1e-12)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], []])
def test_without_pairs_or_without_negatives_there_is_no_contrast(labels):
    vectors = torch.randn(len(labels), 4, requires_grad=True)
    loss = nt_xent(Labelled(vectors, torch.tensor(labels).long()), temperature=0.05)
    loss.backward()
    assert float(loss.detach()) == 0
    assert vectors.grad is None or bool((vectors.grad == 0).all())


def test_boundary_embeddings_are_means_over_contour_and_ring():
    rng = np.random.default_rng(0)
    labels = np.zeros((2, 14, 14), np.int64)
    labels[0, 5:9, 4:9] = 2
    labels[0, 0:2, 0:2] = 1  # another class is background
    labels[0, 12:, 12:] = 255
    features = rng.normal(size=(2, 3, 14, 14))
    is_class = labels[0] == 2
    cross = ndimage.generate_binary_structure(2, 1)
    contour = is_class & ~ndimage.binary_erosion(is_class, cross)
    ring = ndimage.binary_dilation(is_class, cross, iterations=5) & ~is_class
    ring &= labels[0] != 255
    found = boundary_embeddings(
        torch.from_numpy(features), torch.from_numpy(labels), label=2
    )
    expected = [features[0][:, mask].mean(axis=1) for mask in (contour, ring)]
    np.testing.assert_allclose(found.vectors_NF, expected, rtol=1e-12)
    assert found.labels_N.tolist() == [0, 1]


def test_boundaries_of_volumes_are_those_of_their_slices():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 9, 9, 4, generator=rng).double()
    labels = (torch.rand(2, 9, 9, 4, generator=rng) > 0.7).long()
    found = boundary_embeddings(features, labels, label=1).vectors_NF
    cross = ndimage.generate_binary_structure(2, 1)
    expected = []
    for b in range(2):
        shape = labels[b].numpy().astype(bool)
        inner, outer = np.zeros_like(shape), np.zeros_like(shape)
        for k in range(4):
            inner[..., k] = ndimage.binary_erosion(shape[..., k], cross)
            outer[..., k] = ndimage.binary_dilation(shape[..., k], cross, iterations=5)
        for mask in (shape & ~inner, outer & ~shape):
            expected.append(features[b].numpy()[:, mask].mean(axis=1))  # noqa: PERF401
    np.testing.assert_allclose(found, expected, rtol=1e-10)
