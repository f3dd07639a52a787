from __future__ import annotations

import contextlib

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.training.amplitude import amplitude_centre
from fedmed.training.styles import restyled, styles_of_others, told_styles


def images_of(count, *, seed=0, size=(16, 16)):
    return torch.randn(count, 1, *size, generator=torch.Generator().manual_seed(seed))


def told_by(seed, bank="distribution"):
    images = list(images_of(6, seed=seed) + seed)
    return told_styles(images, band=0.01, bank=bank, share=0.5)[0]


def changed(images, styles, seed, interpolation=1.0):
    torch.manual_seed(seed)
    return restyled(
        images, styles, interpolation=interpolation, draws=contextlib.nullcontext()
    )


@pytest.mark.parametrize("bank", ["distribution", "examples"])
def test_styles_come_from_the_draws_alone(bank):
    images = images_of(3)
    styles = styles_of_others({s: told_by(n, bank) for n, s in enumerate("abc")}, "a")
    found = [changed(images, styles, seed) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    # Only the nine lowest frequencies differ from the image's.
    change = torch.fft.fft2(found[0].double() - images.double()).abs()
    assert int((change > 1e-3).sum(dim=(1, 2, 3)).max()) <= 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_changes_no_number(dtype):
    images = images_of(3)
    styles = {f"0|{name}": tensor for name, tensor in told_by(1).items()}
    found = changed(images.to(dtype), styles, seed=1)
    assert found.dtype == dtype
    assert torch.equal(found.float(), changed(images, styles, seed=1))


def test_drawn_looks_are_those_of_the_source():
    """At lambda near 1, the mean intensity is that of the other site's images."""
    images = images_of(200)
    styles = {f"0|{name}": tensor for name, tensor in told_by(5).items()}
    found = changed(images, styles, seed=0)
    own, moved = (amplitude_centre(x, 0).mean() for x in (images, found))
    assert float(own) < 0.2
    # Half way on average, to a mean amplitude of 5.
    assert 2.0 < float(moved) < 3.0


def test_without_others_or_interpolation_nothing_changes():
    images = images_of(2)
    assert changed(images, {}, seed=0) is images
    styles = {f"0|{name}": tensor for name, tensor in told_by(1).items()}
    assert changed(images, styles, seed=0, interpolation=0.0) is images


def test_a_site_draws_from_the_others_alone():
    known = {site: {"mean": torch.tensor([float(n)])} for n, site in enumerate("abc")}
    found = styles_of_others(known, "b")
    assert {name: float(t) for name, t in found.items()} == {"0|mean": 0, "1|mean": 2}


def test_single_examples_are_a_share_and_one_is_behind_each():
    state, behind = told_styles(images_of(8), band=0.01, bank="examples", share=0.25)
    assert state["centres"].shape == (2, 1, 5)
    assert behind == 1
    _, behind = told_styles(images_of(8), band=0.01, bank="distribution", share=1.0)
    assert behind == 8


def test_images_of_different_sizes_are_refused():
    images = [torch.zeros(1, 99, 99), torch.zeros(1, 250, 250)]
    with pytest.raises(ConfigError, match="size"):
        told_styles(images, band=0.01, bank="distribution", share=1.0)


def test_styles_of_many_frequencies_and_few_examples_can_be_drawn():
    """In 32 bits such a covariance has directions a little below zero."""
    loud = torch.exp(0.5 * torch.randn(3, 1, 1, 1, generator=torch.manual_seed(0)))
    images = list(loud * torch.rand(3, 1, 52, 52))
    styles = told_styles(images, band=0.45, bank="distribution", share=1.0)[0]
    found = changed(torch.stack(images), {f"0|{n}": t for n, t in styles.items()}, 0)
    assert torch.isfinite(found).all()
