"""Training examples from prepared cases: slices, patches, whole images or rows.

Which examples are in batch t of a stream is a function of the seed and of t alone: no
iterator has to be saved, and a run that is resumed sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import ConfigError, DataError
from fedmed.seeds import derive, numpy_rng
from fedmed.training.augment import Augmentation, augment

Mode = Literal["slice", "patch", "image", "row"]
MODES: tuple[Mode, ...] = ("slice", "patch", "image", "row")

MAX_POSITIONS = 20_000
"""Voxels of one case that patches may be centred on, where not all may be."""


@runtime_checkable
class PreparedCase(Protocol):
    """What is read of a prepared case.

    Attributes:
        case_id: Unique in the site.
        image_CIJK: float32, maybe memory-mapped; a table's row is (F,), NaN = missing.
        label_IJK: uint8, `UNKNOWN_LABEL` where nobody annotated; a class is 0-d.
            None: no label.
    """

    @property
    def case_id(self) -> str:
        """Unique in the site."""

    @property
    def image_CIJK(self) -> np.ndarray:
        """Voxels of every channel, or a row."""

    @property
    def label_IJK(self) -> np.ndarray | None:
        """Label of every voxel, or one class."""


@runtime_checkable
class PreparedRow(Protocol):
    """A table's row that calls its content by its own names."""

    @property
    def case_id(self) -> str:
        """Unique in the site."""

    @property
    def features_F(self) -> np.ndarray:
        """Features, NaN = missing."""

    @property
    def label(self) -> int | np.integer[Any] | np.ndarray | None:
        """The class."""


@dataclass(frozen=True)
class Batch:
    """Examples of one training step.

    Attributes:
        images: float32; (B, C, I, J), (B, C, I, J, K) or (B, F).
        labels: int64; (B, I, J), (B, I, J, K) or, one class each, (B,).
            `UNKNOWN_LABEL` = no label.
    """

    images: Tensor
    labels: Tensor


class ExampleIndex:
    """The training examples of a site.

    Args:
        cases: Prepared cases; their order does not matter.
        mode: "slice": one slice of axis K is an example, one without any known label
            voxel is none. "patch": each case gives `patches_per_case` patches, drawn
            anew every epoch. "image": one image with its class is an example, flat
            if K is 1. "row": one row of a table with its class is an example.
        num_slices: Odd number of adjacent slices fed as channels (2.5D), c * num_slices
            + s; the first and the last slice are repeated beyond the ends, the label
            is that of the middle.
        patch_size: (I, J, K) voxels, "patch" only; a smaller case is padded.
        patches_per_case: Examples of one case in an epoch, "patch" only.
        foreground_fraction: Share of the patches centred on a voxel of some class
            other than 0, "patch" only.
        augmentation: Applied to each example with a seed of its own; a mapping holds
            options of `Augmentation`.

    Raises:
        ConfigError: If options do not fit the mode.
        DataError: If there is no example.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase | PreparedRow],
        mode: Mode,
        *,
        num_slices: int = 1,
        patch_size: Sequence[int] | None = None,
        patches_per_case: int = 1,
        foreground_fraction: float | int = 0.0,
        augmentation: Augmentation | Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(augmentation, Augmentation):
            augmentation = Augmentation.of(augmentation or {})
        check_options(mode, num_slices=num_slices, patch_size=patch_size)
        _check_drawing(mode, patches_per_case, foreground_fraction, augmentation)
        self.cases: tuple[Any, ...] = tuple(
            sorted(cases, key=lambda case: case.case_id)
        )
        self.mode = mode
        self.num_slices = num_slices
        self.patch_size = tuple(patch_size or ())
        self.foreground_fraction = foreground_fraction
        self.augmentation = augmentation
        self.examples = _list_examples(self.cases, mode, patches_per_case)
        self._positions: dict[tuple[int, bool], np.ndarray] = {}
        if not self.examples:
            raise DataError(
                f"no training example of mode {mode!r} in {len(self.cases)} cases",
                hint="a case trains only if some of its voxels have a known label",
            )

    def __len__(self) -> int:
        return len(self.examples)

    def num_steps(self, batch_size: int) -> int:
        """Steps after which every example was seen: an epoch, rounded up."""
        return -(-len(self) // batch_size)

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Draw batch `step` of the stream `seed`.

        Epoch after epoch all examples are permuted anew and laid end to end; batch t
        is the t-th run of `batch_size` of them, so all batches are full.

        Args:
            seed: Names the stream.
            step: Counts batches from 0.
            batch_size: Examples in a batch.

        Returns:
            The batch. Slices and whole images of different sizes are padded to the
            largest among them: the image with its border values, the label of a
            slice with `UNKNOWN_LABEL`.
        """
        orders: dict[int, np.ndarray] = {}
        pairs = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(position, len(self))
            if epoch not in orders:
                rng = numpy_rng(seed, "order", epoch)
                orders[epoch] = rng.permutation(len(self))
            case, part = self.examples[int(orders[epoch][place])]
            pairs.append(self._read(case, part, derive(seed, "example", position)))
        images, labels = map(list, zip(*pairs, strict=True))
        if self.mode in {"slice", "image"}:
            images = pad_alike(images)
        if self.mode == "slice":
            labels = pad_alike(labels, value=UNKNOWN_LABEL)
        return Batch(torch.stack(images), torch.stack(labels))

    def _read(self, case: int, part: int, seed: int) -> tuple[Tensor, Tensor]:
        prepared = self.cases[case]
        if self.mode == "row":
            features, label = read_row(prepared)
            return (
                torch.from_numpy(np.array(features, dtype=np.float32)),
                torch.tensor(int(label), dtype=torch.int64),
            )
        if self.mode == "image":
            whole = torch.from_numpy(read_image(prepared.image_CIJK))
            nothing = torch.zeros(whole.shape[1:], dtype=torch.uint8)
            changed, _ = augment(whole, nothing, self.augmentation, seed=seed)
            return changed, torch.tensor(int(prepared.label_IJK), dtype=torch.int64)
        if self.mode == "slice":
            image = read_slices(prepared.image_CIJK, part, num_slices=self.num_slices)
            label = np.array(prepared.label_IJK[:, :, part])
        else:
            image, label = self._read_patch(case, seed)
        image_t, label_t = augment(
            torch.from_numpy(image),
            torch.from_numpy(label),
            self.augmentation,
            seed=seed,
        )
        return image_t, label_t.to(torch.int64)

    def _read_patch(self, case: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        prepared = self.cases[case]
        rng = numpy_rng(seed, "patch")
        foreground = bool(rng.random() < self.foreground_fraction)
        positions = self._centres(case, foreground)
        shape = prepared.label_IJK.shape
        count = len(positions) if len(positions) else int(np.prod(shape))
        chosen = int(rng.integers(count))
        flat = int(positions[chosen]) if len(positions) else chosen
        corner = patch_corner(np.unravel_index(flat, shape), self.patch_size, shape)
        image = cut_patch(prepared.image_CIJK, corner, self.patch_size, label=False)
        label = cut_patch(prepared.label_IJK, corner, self.patch_size, label=True)
        return image, label

    def _centres(self, case: int, foreground: bool) -> np.ndarray:
        # Flat indices of the voxels to centre on; none means every voxel.
        key = (case, foreground)
        if key not in self._positions:
            label = np.asarray(self.cases[case].label_IJK)
            known = label != UNKNOWN_LABEL
            wanted = np.flatnonzero(known & (label != 0)) if foreground else None
            if wanted is None or not len(wanted):
                wanted = np.flatnonzero(known) if not known.all() else np.empty(0, int)
            stride = -(-len(wanted) // MAX_POSITIONS) or 1
            self._positions[key] = wanted[::stride].copy()
        return self._positions[key]


def read_row(case: Any) -> tuple[np.ndarray, Any]:
    """Give the features (F,) and the class (or None) of a table's row."""
    if isinstance(case, PreparedRow):
        return case.features_F, case.label
    return case.image_CIJK, case.label_IJK


def is_class(label: Any) -> bool:
    """Whether a case's label is a class; neither None nor `UNKNOWN_LABEL`."""
    return label is not None and int(label) != UNKNOWN_LABEL


def check_options(
    mode: str, *, num_slices: int, patch_size: Sequence[int] | None
) -> None:
    """Check that the options of examples or of a prediction fit the mode.

    Raises:
        ConfigError: If not.
    """
    if mode not in MODES:
        raise ConfigError(
            f"unknown mode {mode!r} of examples", hint=f"known are {', '.join(MODES)}"
        )
    if num_slices < 1 or num_slices % 2 == 0 or (num_slices > 1 and mode != "slice"):
        raise ConfigError(
            f"num_slices {num_slices} in mode {mode!r}; expected an odd number, "
            "and more than 1 only in mode 'slice'"
        )
    if mode == "patch" and (
        patch_size is None or len(patch_size) != 3 or min(patch_size) < 1
    ):
        raise ConfigError(
            f"patch_size {patch_size} in mode 'patch'; expected three numbers I, J, K "
            "of voxels, each at least 1"
        )
    if mode != "patch" and patch_size is not None:
        raise ConfigError(
            f"patch_size {tuple(patch_size)} in mode {mode!r}; only "
            "mode 'patch' has one"
        )


def read_slices(image_CIJK: np.ndarray, k: int, *, num_slices: int) -> np.ndarray:
    """Read slice `k` and its neighbours as channels.

    Args:
        image_CIJK: A prepared image, maybe memory-mapped.
        k: The middle slice.
        num_slices: Odd; slices beyond the ends repeat the first or the last.

    Returns:
        float32 (C * num_slices, I, J), the slices of one channel side by side.

    Example:
        >>> read_slices(np.arange(3.0).reshape(1, 1, 1, 3), 0, num_slices=3).ravel()
        array([0., 0., 1.], dtype=float32)
    """
    half = num_slices // 2
    ks = np.clip(np.arange(k - half, k + half + 1), 0, image_CIJK.shape[3] - 1)
    slices = np.stack([image_CIJK[..., int(i)] for i in ks], axis=1)
    return slices.reshape(-1, *slices.shape[2:]).astype(np.float32, copy=False)


def read_image(image_CIJK: np.ndarray) -> np.ndarray:
    """Copy a whole image, without its axis K if that holds one slice.

    Returns:
        float32 (C, I, J) or (C, I, J, K).
    """
    flat = image_CIJK.shape[3] == 1
    return np.array(image_CIJK[..., 0] if flat else image_CIJK, dtype=np.float32)


def patch_corner(
    centre: Sequence[Any], size: Sequence[int], shape: Sequence[int]
) -> tuple[int, ...]:
    """Place a patch around a voxel, moved inside the image where that is possible.

    Example:
        >>> patch_corner((0, 9, 1), (4, 4, 4), (10, 10, 2))
        (0, 6, 0)
    """
    return tuple(
        max(0, min(int(c) - p // 2, n - p))
        for c, p, n in zip(centre, size, shape, strict=True)
    )


def cut_patch(
    array: np.ndarray, corner: Sequence[int], size: Sequence[int], *, label: bool
) -> np.ndarray:
    """Copy a patch of the last three axes, padded behind the end of the image.

    Returns:
        The patch: a label is padded with `UNKNOWN_LABEL`, an image with its border.
    """
    i, j, k = (slice(c, c + p) for c, p in zip(corner, size, strict=True))
    patch = np.array(array[..., i, j, k])
    missing = [p - n for p, n in zip(size, patch.shape[-3:], strict=True)]
    if not any(missing):
        return patch
    widths = [(0, 0)] * (array.ndim - 3) + [(0, m) for m in missing]
    if label:
        return np.pad(patch, widths, constant_values=UNKNOWN_LABEL)
    return np.pad(patch, widths, mode="edge")


def _list_examples(
    cases: Sequence[Any], mode: Mode, patches_per_case: int
) -> list[tuple[int, int]]:
    examples: list[tuple[int, int]] = []
    if mode == "image":
        _check_images(cases)
    for number, case in enumerate(cases):
        if mode in {"row", "image"}:
            label = read_row(case)[1] if mode == "row" else case.label_IJK
            examples += [(number, 0)] if is_class(label) else []
        elif case.label_IJK is not None:
            _check_label(case, mode)
            known_K = (np.asarray(case.label_IJK) != UNKNOWN_LABEL).any(axis=(0, 1))
            if mode == "slice":
                examples += [(number, int(k)) for k in np.flatnonzero(known_K)]
            elif known_K.any():
                examples += [(number, part) for part in range(patches_per_case)]
    return examples


def _check_label(case: PreparedCase, mode: Mode) -> None:
    label_shape = np.asarray(case.label_IJK).shape
    if label_shape != case.image_CIJK.shape[1:]:
        raise ConfigError(
            f"mode {mode!r} needs a label for every voxel; case {case.case_id!r} has "
            f"an image of shape {case.image_CIJK.shape} and a label of shape "
            f"{label_shape}",
            hint="one class per case: mode 'image', and for a table mode 'row'",
        )


def _check_images(cases: Sequence[PreparedCase]) -> None:
    for case in cases:
        label_shape = np.shape(case.label_IJK) if case.label_IJK is not None else ()
        if label_shape != () or case.image_CIJK.ndim != 4:
            raise ConfigError(
                f"mode 'image' needs images with one class each; case {case.case_id!r} "
                f"has an image of shape {case.image_CIJK.shape} and a label of shape "
                f"{label_shape}",
                hint="a label per voxel: mode 'slice' or 'patch'; a table: mode 'row'",
            )
    if len({case.image_CIJK.shape[3] == 1 for case in cases}) > 1:
        raise ConfigError(
            "mode 'image': some images have one slice and others have several",
            hint="set preprocess.size: [I, J, K]",
        )


def pad_alike(arrays: Sequence[Tensor], *, value: int | None = None) -> list[Tensor]:
    """Pad behind each axis but the first of images until all have one size.

    Args:
        arrays: Images (C, I, J) or (C, I, J, K); with `value`, labels (I, J).
        value: What to pad labels with; None: an image, with its border values.

    Returns:
        As many arrays, of the largest size along each axis.
    """
    spatial = slice(1 if value is None else 0, None)
    sizes = [
        max(axis) for axis in zip(*(a.shape[spatial] for a in arrays), strict=True)
    ]
    pad = torch.nn.functional.pad
    padded = []
    for array in arrays:
        missing = [n - m for n, m in zip(sizes, array.shape[spatial], strict=True)]
        widths = [n for m in reversed(missing) for n in (0, m)]
        if value is None:
            padded.append(pad(array[None], widths, mode="replicate")[0])
        else:
            padded.append(pad(array, widths, value=value))
    return padded


def _check_drawing(
    mode: str, patches: int, foreground: float | int, augmentation: Augmentation
) -> None:
    if patches < 1 or not 0 <= foreground <= 1:
        raise ConfigError(
            f"patches_per_case {patches}, foreground_fraction {foreground}; expected "
            "at least 1, and a fraction in [0, 1]"
        )
    if mode != "patch" and (patches != 1 or foreground != 0):
        raise ConfigError(
            f"patches_per_case and foreground_fraction in mode {mode!r}; only mode "
            "'patch' draws patches"
        )
    if mode == "row" and augmentation != Augmentation():
        raise ConfigError("augmentation of a table; it is for images only")
