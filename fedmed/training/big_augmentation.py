"""Nine random changes stacked on each training example, for hospitals never seen.

Three of image quality, three of contrast and three of shape, in a fixed order, each
with the same probability. Shape moves image and label together (the label by its
nearest voxel, `UNKNOWN_LABEL` from outside); the others change the image alone.

Source:
    Zhang et al., Generalizing Deep Learning for Medical Image Segmentation to Unseen
    Domains via Deep Stacked Transformation, IEEE TMI 39(7), 2020, arXiv:1906.03347.

Differs from the source:
    The ranges are those of a public reimplementation for standardised images (mean 0,
    deviation 1); the published ones were not checked. It states none for the elastic
    deformation: here points of a coarse grid move by up to 4 % of the shorter side.
    Brightness and intensity perturbation are in units of the image; contrast is a
    power of the image scaled to [0, 1], because standardised images have negative
    values. The three changes of shape are one look-up: the image is blurred once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from fedmed.errors import ConfigError
from fedmed.seeds import derive, numpy_rng, torch_rng
from fedmed.training.augment import power, resampled, sampling_grid
from fedmed.training.examples import Batch
from fedmed.training.trainer import TrainingBatch

Range = tuple[float | int, float | int]

NAMES = (
    "blur",
    "sharpen",
    "noise",
    "brightness",
    "contrast",
    "perturb",
    "rotate",
    "scale",
    "deform",
)
"""The nine, in the order in which they are applied."""

_CONTROL_POINTS = 7
"""Points of the elastic deformation along each axis."""
_REACH = 4.0
"""Deviations of a Gaussian after which its kernel is cut off, as SciPy's."""


@dataclass(frozen=True)
class BigAugmentation:
    """How the nine changes are drawn: uniformly from a range each.

    Attributes:
        probability: Of each change, in [0, 1]; 0 changes nothing.
        blur_sigma: Of a Gaussian, in voxels.
        sharpen_sigma: Of both Gaussians of the unsharp mask, in voxels.
        sharpen_strength: Of the unsharp mask.
        noise_std: Deviation of white noise, in units of the image.
        brightness: Value added.
        contrast: Exponent.
        perturb_scale: s of x (1 + s) + t.
        perturb_shift: t, in units of the image.
        rotate_deg: Angle in the plane of I and J, degrees.
        scale: Magnification.
        deform: Farthest that a control point moves, as a share of the shortest side.

    Raises:
        ConfigError: If the probability is none, or a range is empty or impossible.
    """

    probability: float | int = 0.5
    blur_sigma: Range = (0.25, 1.5)
    sharpen_sigma: Range = (0.25, 1.5)
    sharpen_strength: Range = (10, 30)
    noise_std: Range = (0.1, 1.0)
    brightness: Range = (-0.1, 0.1)
    contrast: Range = (0.5, 4.5)
    perturb_scale: Range = (-0.1, 0.1)
    perturb_shift: Range = (-0.1, 0.1)
    rotate_deg: Range = (-20, 20)
    scale: Range = (0.4, 1.6)
    deform: Range = (0, 0.04)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.probability <= 1:
            raise ConfigError(
                f"a probability of {self.probability}; expected one in [0, 1]"
            )
        for field in fields(self)[1:]:
            low, high = getattr(self, field.name)
            least = -math.inf if field.name in _SIGNED else 0.0
            if not (least <= low <= high < math.inf) or (
                field.name in {"contrast", "scale"} and low <= 0
            ):
                raise ConfigError(
                    f"big augmentation draws {field.name} from [{low}, {high}]; "
                    "expected a range that is not empty, of numbers that make sense"
                )


_SIGNED = {"brightness", "perturb_scale", "perturb_shift", "rotate_deg"}


def drawn_changes(settings: BigAugmentation, seed: int) -> tuple[str, ...]:
    """Name the changes that an example of this seed gets, in order.

    Example:
        >>> drawn_changes(BigAugmentation(probability=1), 0) == NAMES
        True
    """
    chances = numpy_rng(seed, "which").random(len(NAMES))
    return tuple(
        name
        for name, chance in zip(NAMES, chances, strict=True)
        if chance < settings.probability
    )


def big_augment(
    image: Tensor, label: Tensor, settings: BigAugmentation, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Change one example; a function of the arguments.

    Args:
        image: float32 (C, I, J) or (C, I, J, K).
        label: Integers (I, J) or (I, J, K), moved with the image.
        settings: The ranges.
        seed: Of this example; each change draws from it by its own name.

    Returns:
        New image and label of equal shapes and dtypes.
    """
    changes = drawn_changes(settings, seed)
    for name in changes:
        if name in _OF_IMAGE:
            image = _OF_IMAGE[name](image, settings, seed)
    shapes = [name for name in changes if name not in _OF_IMAGE]
    if not shapes:
        return image, label
    grid = _shape_grid(label.shape, settings, seed, shapes)
    return resampled(image, label, grid)


def big_augmented(
    batch: TrainingBatch, settings: BigAugmentation, *, seed: int
) -> Batch:
    """Change every example of a batch, each with a seed of its own.

    Args:
        batch: Images (B, C, I, J) or (B, C, I, J, K), changed in float32 whatever
            their dtype, and labels: of voxels, or one class each.
        settings: The ranges.
        seed: Of this batch.

    Raises:
        ConfigError: If the batch holds rows of a table.
    """
    images, labels = batch.images, batch.labels
    if images.ndim < 4:
        raise ConfigError(
            "big augmentation changes images, and the data are a table",
            hint="Set another strategy than bigaug.",
        )
    if not settings.probability:
        return Batch(images, labels)
    is_classes = labels.ndim == 1
    blank = torch.zeros(images.shape[2:], dtype=labels.dtype)
    changed = [
        big_augment(
            image.to("cpu", torch.float32),
            blank if is_classes else labels[number].cpu(),
            settings,
            seed=derive(seed, "example", number),
        )
        for number, image in enumerate(images)
    ]
    new_images, new_labels = (
        torch.stack(list(part)) for part in zip(*changed, strict=True)
    )
    return Batch(
        new_images.to(images.device, images.dtype),
        labels if is_classes else new_labels.to(labels.device),
    )


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur every channel alike along all axes, the border values repeated.

    Args:
        image: (C, I, J) or (C, I, J, K).
        sigma: Deviation in voxels, > 0.
    """
    reach = int(_REACH * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(1, image.ndim):
        lines = image.movedim(axis, -1)
        padded = functional.pad(
            lines.reshape(-1, lines.shape[-1]), (reach, reach), mode="replicate"
        )
        blurred = padded.unfold(-1, 2 * reach + 1, 1) @ kernel
        image = blurred.reshape(lines.shape).movedim(-1, axis)
    return image.contiguous()


def _uniform(seed: int, purpose: str, between: Range) -> float:
    return float(numpy_rng(seed, purpose).uniform(*between))


def _blur(image: Tensor, settings: BigAugmentation, seed: int) -> Tensor:
    return gaussian_blur(image, _uniform(seed, "blur", settings.blur_sigma))


def _sharpen(image: Tensor, settings: BigAugmentation, seed: int) -> Tensor:
    """Unsharp mask of a blurred image: b + a (b - blurred b)."""
    first = _uniform(seed, "sharpen first", settings.sharpen_sigma)
    second = _uniform(seed, "sharpen second", settings.sharpen_sigma)
    blurred = gaussian_blur(image, first)
    strength = _uniform(seed, "sharpen strength", settings.sharpen_strength)
    return blurred + strength * (blurred - gaussian_blur(blurred, second))


def _noise(image: Tensor, settings: BigAugmentation, seed: int) -> Tensor:
    std = _uniform(seed, "noise std", settings.noise_std)
    white = torch.randn(image.shape, generator=torch_rng(seed, "noise"))
    return image + std * white


def _brightness(image: Tensor, settings: BigAugmentation, seed: int) -> Tensor:
    return image + _uniform(seed, "brightness", settings.brightness)


def _contrast(image: Tensor, settings: BigAugmentation, seed: int) -> Tensor:
    return power(image, _uniform(seed, "contrast", settings.contrast))


def _perturb(image: Tensor, settings: BigAugmentation, seed: int) -> Tensor:
    factor = 1 + _uniform(seed, "perturb scale", settings.perturb_scale)
    return image * factor + _uniform(seed, "perturb shift", settings.perturb_shift)


_OF_IMAGE: Mapping[str, Callable[[Tensor, BigAugmentation, int], Tensor]] = {
    "blur": _blur,
    "sharpen": _sharpen,
    "noise": _noise,
    "brightness": _brightness,
    "contrast": _contrast,
    "perturb": _perturb,
}


def _shape_grid(
    shape: torch.Size, settings: BigAugmentation, seed: int, changes: Sequence[str]
) -> Tensor:
    """Where each voxel of the result is looked up, for the drawn changes of shape."""
    angle_rad, zoom = 0.0, 1.0
    if "rotate" in changes:
        angle_rad = math.radians(_uniform(seed, "rotate", settings.rotate_deg))
    if "scale" in changes:
        zoom = _uniform(seed, "scale", settings.scale)
    grid = sampling_grid(shape, angle_rad=angle_rad, zoom=zoom)
    if "deform" in changes:
        grid = grid + _displacements(shape, settings, seed)
    return grid


def _displacements(shape: torch.Size, settings: BigAugmentation, seed: int) -> Tensor:
    """Smooth random shifts of the look-up, in torch's units, last axis first."""
    farthest = _uniform(seed, "deform", settings.deform) * min(shape)
    points = (len(shape), *[_CONTROL_POINTS] * len(shape))
    drawn = torch.rand(points, generator=torch_rng(seed, "control points"))
    voxels = functional.interpolate(
        (2 * drawn - 1)[None] * farthest,
        size=tuple(shape),
        mode="bilinear" if len(shape) == 2 else "trilinear",
        align_corners=True,
    )[0]
    units = [
        voxels[axis] / max((shape[axis] - 1) / 2, 0.5)
        for axis in reversed(range(len(shape)))
    ]
    return torch.stack(units, dim=-1)
