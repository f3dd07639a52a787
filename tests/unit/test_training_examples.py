from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedmed.errors import ConfigError, DataError
from fedmed.training.augment import Augmentation
from fedmed.training.examples import (
    ExampleIndex,
    cut_patch,
    patch_corner,
    read_slices,
)


@dataclass
class Scan:
    case_id: str
    image_CIJK: np.ndarray
    label_IJK: np.ndarray | None


@dataclass
class Row:
    case_id: str
    features_F: np.ndarray
    label: int | None


def scan(case_id, shape=(6, 5, 4), *, channels=2, number=0, label=0):
    """Voxel (c, i, j, k) of case n is 1000 n + 100 c + k: it tells where it is from."""
    image = np.empty((channels, *shape), np.float32)
    for c in range(channels):
        image[c] = 1000 * number + 100 * c + np.arange(shape[2])
    return Scan(case_id, image, np.full(shape, label, np.uint8))


def scans():
    return [scan(name, number=n) for n, name in enumerate("abc")]


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def origins(batch):
    """(case, k) of each slice of a plain 2D batch."""
    return [divmod(int(v), 1000) for v in batch.images[:, 0, 0, 0]]


def test_each_slice_comes_once_per_epoch():
    index = ExampleIndex(scans(), "slice")
    assert len(index) == 12
    seen = [o for step in range(3) for o in origins(index.batch(7, step, 4))]
    assert sorted(seen) == [(n, k) for n in range(3) for k in range(4)]
    again = [o for step in range(3, 6) for o in origins(index.batch(7, step, 4))]
    assert sorted(again) == sorted(seen)
    assert again != seen


def test_a_batch_is_a_function_of_seed_and_step_alone():
    index = ExampleIndex(scans(), "slice")
    late = index.batch(3, 5, 4)
    for step in range(5):
        index.batch(3, step, 4)
        index.batch(4, step, 2)
    assert same(index.batch(3, 5, 4), late)
    fresh = ExampleIndex(scans()[::-1], "slice")
    assert same(fresh.batch(3, 5, 4), late)
    assert not same(index.batch(4, 5, 4), late)


def test_batches_do_not_touch_the_global_random_state():
    index = ExampleIndex(
        scans(), "slice", augmentation=Augmentation("IJ", 10, 0.1, 0.2, 0.1, 0.1)
    )
    before = torch.get_rng_state()
    first = index.batch(0, 0, 4)
    assert torch.equal(torch.get_rng_state(), before)
    np.random.seed(1)  # noqa: NPY002 - to show that it changes nothing
    torch.manual_seed(1)
    assert same(index.batch(0, 0, 4), first)


def test_batches_are_full_also_at_the_end_of_an_epoch():
    index = ExampleIndex(scans(), "slice")
    assert index.num_steps(5) == 3
    seen = [o for step in range(12) for o in origins(index.batch(0, step, 5))]
    assert len(seen) == 60
    counts = {origin: seen.count(origin) for origin in seen}
    assert set(counts.values()) == {5}
    assert len(origins(index.batch(0, 0, 30))) == 30


def test_shapes_and_dtypes_of_each_mode():
    flat = ExampleIndex(scans(), "slice", num_slices=3).batch(0, 0, 2)
    assert flat.images.shape == (2, 6, 6, 5)
    assert flat.labels.shape == (2, 6, 5)
    deep = ExampleIndex(scans(), "patch", patch_size=(4, 4, 2)).batch(0, 0, 2)
    assert deep.images.shape == (2, 2, 4, 4, 2)
    assert deep.labels.shape == (2, 4, 4, 2)
    rows = [Row(str(n), np.array([n, np.nan], np.float32), n % 2) for n in range(3)]
    table = ExampleIndex(rows, "row").batch(0, 0, 4)
    assert table.images.shape == (4, 2)
    assert table.labels.shape == (4,)
    assert torch.isnan(table.images[:, 1]).all()
    for batch in (flat, deep, table):
        assert batch.images.dtype == torch.float32
        assert batch.labels.dtype == torch.int64


def test_neighbours_stand_side_by_side_and_ends_repeat():
    image = scan("a").image_CIJK
    wanted = {
        0: [0, 0, 1, 100, 100, 101],
        1: [0, 1, 2, 100, 101, 102],
        3: [2, 3, 3, 102, 103, 103],
    }
    for k, values in wanted.items():
        slices = read_slices(image, k, num_slices=3)
        assert slices.shape == (6, 6, 5)
        assert slices[:, 2, 2].tolist() == values
    assert read_slices(image, 0, num_slices=5)[:5, 0, 0].tolist() == [0, 0, 0, 1, 2]
    assert np.array_equal(read_slices(image, 2, num_slices=1), image[..., 2])


def test_the_label_of_a_stack_is_that_of_its_middle():
    case = scan("a")
    case.label_IJK[:] = np.arange(4)
    batch = ExampleIndex([case], "slice", num_slices=3).batch(0, 0, 4)
    for image, label in zip(batch.images, batch.labels, strict=True):
        assert (label == image[1, 0, 0]).all()


def test_slices_that_nobody_annotated_are_no_examples():
    case = scan("a")
    case.label_IJK[..., 1] = 255
    case.label_IJK[..., 2] = 255
    case.label_IJK[3, 3, 2] = 1
    unlabelled = Scan("b", case.image_CIJK, None)
    index = ExampleIndex([case, unlabelled], "slice")
    seen = {k for _, k in origins(index.batch(0, 0, len(index)))}
    assert seen == {0, 2, 3}


def test_a_site_without_examples_is_an_error():
    with pytest.raises(DataError, match="2 cases"):
        ExampleIndex([scan("a", label=255), scan("b", label=255)], "slice")
    with pytest.raises(DataError):
        ExampleIndex([Row("a", np.zeros(2, np.float32), None)], "row")


@pytest.mark.parametrize("label", [np.array(1), np.zeros((6, 5, 3), np.uint8)])
def test_a_label_that_is_not_one_per_voxel_is_refused(label):
    case = scan("a")
    case.label_IJK = label
    with pytest.raises(ConfigError, match="label for every voxel; case 'a'"):
        ExampleIndex([case], "slice")


def test_rows_may_use_the_names_of_images():
    rows = [Scan(str(n), np.full(2, n, np.float32), np.array(n)) for n in range(3)]
    batch = ExampleIndex(rows, "row").batch(0, 0, 3)
    assert batch.images[:, 0].tolist() == batch.labels.tolist()
    assert sorted(batch.labels.tolist()) == [0, 1, 2]


def test_slices_of_different_sizes_are_padded_without_label():
    cases = [scan("a", (6, 5, 1), number=1), scan("b", (3, 8, 1), number=2)]
    batch = ExampleIndex(cases, "slice").batch(0, 0, 2)
    assert batch.images.shape == (2, 2, 6, 8)
    for image, label in zip(batch.images, batch.labels, strict=True):
        first = int(image[0, 0, 0]) == 1000
        known = label != 255
        assert known[: 6 if first else 3, : 5 if first else 8].all()
        assert int(known.sum()) == (30 if first else 24)
        assert (image[0] == image[0, 0, 0]).all()


def test_patches_come_from_inside_and_are_new_each_epoch():
    case = scan("a", (8, 8, 8), channels=1)
    case.image_CIJK[0] = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
    index = ExampleIndex([case], "patch", patch_size=(4, 4, 4), patches_per_case=5)
    assert len(index) == 5
    batch = index.batch(0, 0, 10)
    corners = set()
    for patch in batch.images[:, 0]:
        found = np.unravel_index(int(patch[0, 0, 0]), (8, 8, 8))
        corner = tuple(int(c) for c in found)
        corners.add(corner)
        expected = cut_patch(case.image_CIJK, corner, (4, 4, 4), label=False)[0]
        assert np.array_equal(patch.numpy(), expected)
    assert len(corners) > 5
    assert same(index.batch(0, 0, 10), batch)


def test_patches_can_be_centred_on_the_foreground():
    case = scan("a", (12, 12, 12))
    case.label_IJK[9, 2, 5] = 1
    options = {"patch_size": (3, 3, 3), "patches_per_case": 8}
    always = ExampleIndex([case], "patch", foreground_fraction=1.0, **options)
    assert (always.batch(0, 0, 8).labels[:, 1, 1, 1] == 1).all()
    never = ExampleIndex([case], "patch", **options)
    assert int((never.batch(0, 0, 8).labels == 1).sum()) < 8
    half = ExampleIndex([case], "patch", foreground_fraction=0.5, **options)
    centred = (half.batch(0, 0, 64).labels[:, 1, 1, 1] == 1).sum()
    assert 16 < int(centred) < 48


def test_patches_of_a_partly_annotated_case_hold_known_voxels():
    case = scan("a", (12, 12, 12), label=255)
    case.label_IJK[3, 8, 1] = 0
    options = {"patch_size": (3, 3, 3), "foreground_fraction": 0.5}
    index = ExampleIndex([case], "patch", **options)
    assert ((index.batch(0, 0, 6).labels != 255).sum(dim=(1, 2, 3)) == 1).all()


def test_a_patch_larger_than_the_image_is_padded():
    case = scan("a", (3, 5, 2), label=1)
    batch = ExampleIndex([case], "patch", patch_size=(4, 4, 4)).batch(0, 0, 1)
    assert batch.images.shape == (1, 2, 4, 4, 4)
    assert (batch.labels[0, :3, :, :2] == 1).all()
    assert int((batch.labels != 255).sum()) == 3 * 4 * 2
    assert batch.images[0, 0, 0, 0].tolist() == [0, 1, 1, 1]


def test_corners_stay_inside():
    assert patch_corner((0, 0, 0), (3, 3, 3), (9, 9, 9)) == (0, 0, 0)
    assert patch_corner((4, 8, 5), (3, 3, 4), (9, 9, 9)) == (3, 6, 3)
    assert patch_corner((1, 1, 1), (3, 3, 3), (2, 2, 2)) == (0, 0, 0)


def test_examples_are_not_views_of_the_prepared_case():
    case = scan("a", (4, 4, 1))
    before = case.image_CIJK.copy()
    for mode, options in (("slice", {}), ("patch", {"patch_size": (4, 4, 1)})):
        batch = ExampleIndex([case], mode, **options).batch(0, 0, 2)
        batch.images.add_(1.0)
        batch.labels.add_(1)
        assert np.array_equal(case.image_CIJK, before)
        assert not case.label_IJK.any()


def test_memory_mapped_cases_are_read(tmp_path):
    plain = scans()
    mapped = []
    for case in plain:
        np.save(tmp_path / f"{case.case_id}.npy", case.image_CIJK)
        image = np.load(tmp_path / f"{case.case_id}.npy", mmap_mode="r")
        mapped.append(Scan(case.case_id, image, case.label_IJK))
    for mode, options in (
        ("slice", {"num_slices": 3}),
        ("patch", {"patch_size": (2, 2, 2)}),
    ):
        one = ExampleIndex(plain, mode, **options).batch(0, 0, 4)
        assert same(one, ExampleIndex(mapped, mode, **options).batch(0, 0, 4))


def test_augmentation_differs_from_example_to_example_and_epoch_to_epoch():
    options = Augmentation(brightness=10.0)
    index = ExampleIndex([scan("a", (2, 2, 1))], "slice", augmentation=options)
    shifts = index.batch(0, 0, 6).images[:, 0, 0, 0].tolist()
    assert len(set(shifts)) == 6
    named = ExampleIndex(
        [scan("a", (2, 2, 1))], "slice", augmentation={"brightness": 10.0}
    )
    assert same(named.batch(0, 0, 6), index.batch(0, 0, 6))


@pytest.mark.parametrize(
    ("mode", "options", "words"),
    [
        ("slice", {"num_slices": 2}, "odd"),
        ("patch", {"num_slices": 3, "patch_size": (2, 2, 2)}, "slice"),
        ("patch", {}, "three numbers"),
        ("patch", {"patch_size": (4, 4)}, "three numbers"),
        ("slice", {"patch_size": (4, 4, 4)}, "only mode 'patch'"),
        ("slice", {"foreground_fraction": 0.5}, "only mode 'patch'"),
        ("patch", {"patch_size": (2, 2, 2), "foreground_fraction": 1.5}, "fraction"),
        ("row", {"augmentation": Augmentation(noise_std=1.0)}, "images only"),
        ("slice", {"augmentation": {"rotate": 3}}, "rotate_deg"),
    ],
)
def test_options_that_do_not_fit_are_refused(mode, options, words):
    with pytest.raises(ConfigError, match=words):
        ExampleIndex(scans(), mode, **options)
