from __future__ import annotations

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.training.augment import Augmentation, augment, transform


def example(shape=(6, 8), channels=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn((channels, *shape), generator=rng)
    label = torch.randint(0, 4, shape, generator=rng).to(torch.uint8)
    return image, label


def with_seeds(augmentation, count=40, **options):
    image, label = example(**options)
    return [augment(image, label, augmentation, seed=s) for s in range(count)]


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 4)])
def test_by_default_nothing_changes(shape):
    image, label = example(shape)
    new_image, new_label = augment(image, label, Augmentation(), seed=0)
    assert torch.equal(new_image, image)
    assert torch.equal(new_label, label)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 4)])
def test_shape_and_dtype_stay_and_arguments_are_untouched(shape):
    image, label = example(shape)
    kept = image.clone(), label.clone()
    everything = Augmentation("IJK", 20.0, 0.2, 0.5, 0.3, 0.1, 2)
    new_image, new_label = augment(image, label, everything, seed=3)
    assert new_image.shape == image.shape
    assert new_label.shape == label.shape
    assert new_image.dtype == torch.float32
    assert new_label.dtype == torch.uint8
    assert torch.equal(image, kept[0])
    assert torch.equal(label, kept[1])
    again = augment(image, label, everything, seed=3)
    assert torch.equal(again[0], new_image)
    assert torch.equal(again[1], new_label)


def test_flips_move_image_and_label_together_along_the_named_axes():
    image, label = example((3, 4, 5))
    seen = set()
    for seed in range(40):
        new_image, new_label = augment(image, label, Augmentation("IK"), seed=seed)
        matches = [
            axes
            for axes in ((), (0,), (2,), (0, 2))
            if torch.equal(new_label, label.flip(axes))
            and torch.equal(new_image, image.flip([a + 1 for a in axes]))
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 4


def test_axis_k_of_a_slice_does_not_exist():
    image, label = example((3, 4))
    for seed in range(10):
        assert torch.equal(
            augment(image, label, Augmentation("K"), seed=seed)[0], image
        )


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 3)])
def test_a_shift_moves_image_and_label_by_the_same_voxels(shape):
    """Every move is drawn; what comes from outside has no label."""
    image, label = example(shape)
    seen = set()
    for seed in range(150):
        new_image, new_label = augment(
            image, label, Augmentation(shift_voxels=2), seed=seed
        )
        matches = []
        for di in range(-2, 3):
            for dj in range(-2, 3):
                i = (torch.arange(9) - di).clamp(0, 8)
                j = (torch.arange(8) - dj).clamp(0, 7)
                if torch.equal(new_image, image[:, i][:, :, j]):
                    matches.append((di, dj))
        ((di, dj),) = matches
        seen.add((di, dj))
        inner_i = slice(max(di, 0), 9 + min(di, 0))
        inner_j = slice(max(dj, 0), 8 + min(dj, 0))
        expected = torch.full_like(label, 255)
        expected[inner_i, inner_j] = torch.roll(label, (di, dj), (0, 1))[
            inner_i, inner_j
        ]
        assert torch.equal(new_label, expected)
    assert len(seen) == 25


def test_a_shift_beyond_the_image_leaves_no_label():
    image, label = example((4, 5))
    for seed in range(20):
        new_image, new_label = augment(
            image, label, Augmentation(shift_voxels=50), seed=seed
        )
        assert new_image.shape == image.shape
        assert set(new_label.unique().tolist()) <= {0, 1, 2, 3, 255}


def test_a_quarter_turn_is_exact():
    image, label = example((7, 7))
    turned, classes = transform(image, label, angle_rad=torch.pi / 2, zoom=1.0)
    expected = torch.rot90(image, 1, (1, 2))
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(classes, torch.rot90(label, 1, (0, 1)))


def test_turning_leaves_axis_k_alone():
    image, label = example((7, 7, 3))
    turned, classes = transform(image, label, angle_rad=torch.pi / 2, zoom=1.0)
    expected = torch.rot90(image, 1, (1, 2))
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(classes, torch.rot90(label, 1, (0, 1)))


def test_what_comes_from_outside_has_no_label():
    image, label = example((9, 9))
    small, classes = transform(image, label, angle_rad=0.0, zoom=0.5)
    # The 9 voxels now cover 5, from 2 to 6.
    assert (classes[2:7, 2:7] == label[::2, ::2]).all()
    assert int((classes != 255).sum()) == 25
    torch.testing.assert_close(small[:, 0, 0], image[:, 0, 0])
    torch.testing.assert_close(small[:, 2:7, 2:7], image[:, ::2, ::2])


def test_unknown_labels_stay_unknown_and_no_label_is_invented():
    image, _ = example((16, 16))
    label = torch.zeros(16, 16, dtype=torch.uint8)
    label[4:9, 4:9] = 3
    label[10:, 10:] = 255
    for seed in range(20):
        _, classes = augment(image, label, Augmentation("", 30.0, 0.3), seed=seed)
        assert set(classes.unique().tolist()) <= {0, 3, 255}
        assert (classes == 3).any()


def test_limits_of_the_angle_are_kept_on_both_sides():
    image = torch.zeros(1, 41, 41)
    image[0, 35, 20] = 1.0
    image[0, 34:37, 19:22] += 1.0
    label = torch.zeros(41, 41, dtype=torch.uint8)
    angles = []
    for seed in range(40):
        turned, _ = augment(image, label, Augmentation(rotate_deg=30.0), seed=seed)
        i, j = divmod(int(turned[0].argmax()), 41)
        angles.append(
            float(
                torch.rad2deg(
                    torch.atan2(torch.tensor(j - 20.0), torch.tensor(i - 20.0))
                )
            )
        )
    assert max(map(abs, angles)) < 35
    assert min(angles) < -15
    assert max(angles) > 15


def test_gamma_keeps_range_and_order_of_each_channel():
    image, _ = example((16, 16))
    image[1] = image[1] * 50 + 1000
    changed = 0
    for new, _ in [
        augment(
            image,
            torch.zeros(16, 16, dtype=torch.uint8),
            Augmentation(gamma=0.5),
            seed=s,
        )
        for s in range(5)
    ]:
        for before, after in zip(image, new, strict=True):
            torch.testing.assert_close(after.min(), before.min())
            torch.testing.assert_close(after.max(), before.max())
            order = before.flatten().argsort()
            assert (after.flatten()[order].diff() >= -1e-3).all()
            changed += int((after - before).abs().max() > 0.01)
    assert changed == 10


def test_a_constant_image_survives_gamma():
    image = torch.full((1, 4, 4), 7.0)
    label = torch.zeros(4, 4, dtype=torch.uint8)
    new, _ = augment(image, label, Augmentation(gamma=0.5), seed=0)
    torch.testing.assert_close(new, image)


def test_brightness_is_one_number_within_its_limit():
    image, _ = example()
    shifts = []
    for new, _ in with_seeds(Augmentation(brightness=0.5)):
        shift = (new - image).flatten()
        assert shift.std() < 1e-5
        shifts.append(float(shift.mean()))
    assert max(map(abs, shifts)) <= 0.5
    assert min(shifts) < -0.2
    assert max(shifts) > 0.2


def test_noise_is_white_and_within_its_limit():
    image, label = example((64, 64))
    for seed in range(5):
        new, new_label = augment(image, label, Augmentation(noise_std=0.5), seed=seed)
        noise = new - image
        assert 0 < float(noise.std()) < 0.55
        assert abs(float(noise.mean())) < 0.05
        assert torch.equal(new_label, label)


def test_one_change_does_not_shift_the_draws_of_another():
    image, label = example()
    alone, _ = augment(image, label, Augmentation(brightness=1.0), seed=4)
    both, _ = augment(image, label, Augmentation("IJ", brightness=1.0), seed=4)
    torch.testing.assert_close(alone.sum(), both.sum())


@pytest.mark.parametrize(
    "options",
    [
        {"scale": -0.1},
        {"gamma": float("nan")},
        {"noise_std": True},
        {"flip_axes": "X"},
        {"shift_voxels": 1.5},
        {"shift_voxels": -1},
    ],
)
def test_impossible_options_are_refused(options):
    key = next(iter(options))
    with pytest.raises(ConfigError, match=rf"train\.augmentation\.{key} is"):
        Augmentation(**options)


def test_options_of_a_study_are_read_by_name():
    assert Augmentation.of({"gamma": 0.2}) == Augmentation(gamma=0.2)
    with pytest.raises(ConfigError, match="nearest is 'rotate_deg'"):
        Augmentation.of({"rotate": 0.2})
