"""Training examples from prepared cases: slices, patches, whole images or rows.

Which examples are in batch t of a stream is a function of the seed and of t alone: no
iterator has to be saved, and a run that is resumed sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

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


class _Order(NamedTuple):
    """The order of the examples in one epoch of one stream."""

    seed: int
    epoch: int
    numbers: np.ndarray


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
        self._augments = augmentation != Augmentation()
        self.examples = _list_examples(self.cases, mode, patches_per_case)
        self._orders: tuple[_Order, ...] = ()
        self._table: tuple[Tensor, Tensor] | None = None
        self._positions: dict[tuple[int, bool], np.ndarray] = {}
        if not len(self.examples):
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
        positions = range(step * batch_size, (step + 1) * batch_size)
        numbers = self._chosen(seed, positions)
        if self.mode == "row":
            return self._rows(numbers)
        chosen = numbers.tolist()
        seeds = [derive(seed, "example", position) for position in positions]
        if self.mode == "slice" and not self._augments:
            plain = self._plain_slices(chosen)
            if plain is not None:
                return plain
        drawn = [
            self._read(*self.examples[n], seed=s)
            for n, s in zip(chosen, seeds, strict=True)
        ]
        images, labels = map(list, zip(*drawn, strict=True))
        if self.mode in {"slice", "image"}:
            images = pad_alike(images)
        if self.mode == "slice":
            labels = pad_alike(labels, value=UNKNOWN_LABEL)
        return Batch(torch.stack(images), torch.stack(labels).to(torch.int64))

    def _chosen(self, seed: int, positions: range) -> np.ndarray:
        """Numbers of the examples at some neighbouring positions of a stream."""
        pieces: list[np.ndarray] = []
        start = positions.start
        while start < positions.stop:
            epoch, place = divmod(start, len(self))
            order = self._order(seed, epoch)
            pieces.append(order.numbers[place : place + positions.stop - start])
            start += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _order(self, seed: int, epoch: int) -> _Order:
        """The order of the examples in one epoch of a stream."""
        for order in self._orders:
            if (order.seed, order.epoch) == (seed, epoch):
                return order
        numbers = numpy_rng(seed, "order", epoch).permutation(len(self))
        # A batch may lie across two epochs, and no other is asked for soon.
        self._orders = (_Order(seed, epoch, numbers), *self._orders[:1])
        return self._orders[0]

    def _rows(self, chosen: np.ndarray) -> Batch:
        if self._table is None:
            rows = [read_row(self.cases[case]) for case, _ in self.examples]
            features = np.stack([np.asarray(row, np.float32) for row, _ in rows])
            labels = torch.tensor([int(label) for _, label in rows], dtype=torch.int64)
            self._table = torch.from_numpy(features), labels
        numbers = torch.from_numpy(chosen)
        return Batch(*(whole.index_select(0, numbers) for whole in self._table))

    def _plain_slices(self, chosen: Sequence[int]) -> Batch | None:
        """Copy slices straight into a batch; None if they are not all of one size."""
        pairs = [self.examples[number] for number in chosen]
        images = [self.cases[case].image_CIJK for case, _ in pairs]
        if len({image.shape[:3] for image in images}) > 1:
            return None
        channels, *size = images[0].shape[:3]
        batch = np.empty((len(pairs), channels, self.num_slices, *size), np.float32)
        labels = np.empty((len(pairs), *size), np.int64)
        for number, (image, (case, k)) in enumerate(zip(images, pairs, strict=True)):
            for s, near in enumerate(_near(k, self.num_slices, image.shape[3])):
                batch[number, :, s] = image[..., near]
            labels[number] = self.cases[case].label_IJK[:, :, k]
        flat = batch.reshape(len(pairs), -1, *size)
        return Batch(torch.from_numpy(flat), torch.from_numpy(labels))

    def _read(self, case: int, part: int, *, seed: int) -> tuple[Tensor, Tensor]:
        prepared = self.cases[case]
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
        return augment(
            torch.from_numpy(image),
            torch.from_numpy(label),
            self.augmentation,
            seed=seed,
        )

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
            self._positions[key] = wanted[::stride].astype(np.int32)
        return self._positions[key]


def read_row(case: Any) -> tuple[np.ndarray, Any]:
    """Give the features (F,) and the class (or None) of a table's row."""
    # Asked for by name: an isinstance of a protocol costs more than reading the row.
    features = getattr(case, "features_F", None)
    if features is None:
        return case.image_CIJK, case.label_IJK
    return features, case.label


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
    channels, *size, size_k = image_CIJK.shape
    slices = np.empty((channels, num_slices, *size), np.float32)
    for number, near in enumerate(_near(k, num_slices, size_k)):
        slices[:, number] = image_CIJK[..., near]
    return slices.reshape(-1, *size)


def _near(k: int, num_slices: int, size_k: int) -> list[int]:
    """Number a slice and its neighbours, the ends repeated."""
    half = num_slices // 2
    return [min(max(n, 0), size_k - 1) for n in range(k - half, k + half + 1)]


def read_image(image_CIJK: np.ndarray) -> np.ndarray:
    """Copy a whole image, without its axis K if that holds one slice.

    Returns:
        float32 (C, I, J) or (C, I, J, K).
    """
    flat = image_CIJK.shape[3] == 1
    image = image_CIJK[..., 0] if flat else image_CIJK
    return np.array(image, dtype=np.float32, order="C")


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
    patch = np.array(array[..., i, j, k], order="C")
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
        else:
            known = _known_slices(case, mode)
            if mode == "slice":
                examples += [(number, k) for k in known]
            elif known:
                examples += [(number, part) for part in range(patches_per_case)]
    return examples


def _known_slices(case: Any, mode: Mode) -> Sequence[int]:
    """Slices with a known label voxel: measured already, or looked for here."""
    image_shape, label_shape = _shapes(case)
    if label_shape is None:
        return ()
    _check_label(case.case_id, mode, image_shape, label_shape)
    known: Sequence[int] | None = getattr(case, "known_slices", None)
    if known is not None:
        return known
    known_K = (np.asarray(case.label_IJK) != UNKNOWN_LABEL).any(axis=(0, 1))
    return [int(k) for k in np.flatnonzero(known_K)]


def _shapes(case: Any) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of image and label, from the case's own word if it gives one."""
    if hasattr(case, "image_shape") and hasattr(case, "label_shape"):
        return case.image_shape, case.label_shape
    label = case.label_IJK
    return case.image_CIJK.shape, None if label is None else np.shape(label)


def _check_label(
    case_id: str,
    mode: Mode,
    image_shape: tuple[int, ...],
    label_shape: tuple[int, ...],
) -> None:
    if label_shape != image_shape[1:]:
        raise ConfigError(
            f"mode {mode!r} needs a label for every voxel; case {case_id!r} has "
            f"an image of shape {image_shape} and a label of shape {label_shape}",
            hint="one class per case: mode 'image', and for a table mode 'row'",
        )


def _check_images(cases: Sequence[PreparedCase]) -> None:
    is_flat = set()
    for case in cases:
        image_shape, label_shape = _shapes(case)
        if label_shape not in {None, ()} or len(image_shape) != 4:
            raise ConfigError(
                f"mode 'image' needs images with one class each; case {case.case_id!r} "
                f"has an image of shape {image_shape} and a label of shape "
                f"{label_shape}",
                hint="a label per voxel: mode 'slice' or 'patch'; a table: mode 'row'",
            )
        is_flat.add(image_shape[3] == 1)
    if len(is_flat) > 1:
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
    if all(tuple(array.shape[spatial]) == tuple(sizes) for array in arrays):
        return list(arrays)
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
