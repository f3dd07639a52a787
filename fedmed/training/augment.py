"""Random changes of one training example, each a function of a seed.

Everything is off by default. Flips, shifts, rotation and zoom move image and label
together (the label by its nearest voxel); gamma, brightness and noise change the image
alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedmed.case import UNKNOWN_LABEL
from fedmed.errors import ConfigError
from fedmed.seeds import numpy_rng, torch_rng
from fedmed.spelling import nearest

AXES = "IJK"


@dataclass(frozen=True)
class Augmentation:
    """How far an example may be changed; 0 and "" are off.

    Attributes:
        flip_axes: Axes each mirrored with probability 1/2, e.g. "I" or "IJ". The left
            and the right hand are along I.
        rotate_deg: Largest angle either way in the plane of I and J, degrees.
        scale: Largest zoom either way: 0.1 magnifies by 1/1.1 to 1.1, log-uniform.
        gamma: Largest exponent either way: 0.3 raises each channel, scaled to
            [0, 1], to a power of 1/1.3 to 1.3, log-uniform, and scales it back.
        brightness: Largest value added either way, in units of the image.
        noise_std: Largest standard deviation of white noise, in units of the image.
        shift_voxels: Farthest move either way along I and along J, whole voxels.

    Raises:
        ConfigError: If a number is no number, negative or not finite, a shift is not
            whole, or an axis is unknown.
    """

    flip_axes: str = ""
    rotate_deg: float | int = 0.0
    scale: float | int = 0.0
    gamma: float | int = 0.0
    brightness: float | int = 0.0
    noise_std: float | int = 0.0
    shift_voxels: float | int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "flip_axes" and not (
                _is_number(value) and math.isfinite(value) and value >= 0
            ):
                raise ConfigError(
                    f"train.augmentation.{name} is {value!r}; "
                    "expected a number of at least 0"
                )
        if self.shift_voxels != int(self.shift_voxels):
            raise ConfigError(
                f"train.augmentation.shift_voxels is {self.shift_voxels!r}; "
                "expected a whole number"
            )
        axes = self.flip_axes
        if not (isinstance(axes, str) and set(axes) <= set(AXES)):
            raise ConfigError(
                f"train.augmentation.flip_axes is {axes!r}; expected some of 'IJK'"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Augmentation:
        """Read the options of a study.

        Raises:
            ConfigError: Unknown option; the hint names the nearest known.
        """
        known = [field.name for field in fields(cls)]
        for option in options:
            if option not in known:
                near = nearest(option, known, cutoff=0.0)
                raise ConfigError(
                    f"augmentation has no option {option!r}",
                    hint=f"nearest is {near!r}; known are {', '.join(known)}",
                )
        return cls(**options)


def _is_number(value: object) -> bool:
    """Tell numbers from what else YAML may hold; yes and no are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def augment(
    image: Tensor, label: Tensor, augmentation: Augmentation, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Change one example.

    Each change draws from a generator of its own, so that switching one on leaves the
    others' draws as they were.

    Args:
        image: float32 (C, I, J) or (C, I, J, K).
        label: uint8 (I, J) or (I, J, K).
        augmentation: How far.
        seed: Of this example.

    Returns:
        New image and label of equal shapes and dtypes. What comes from outside has the
        image's border value and the label `UNKNOWN_LABEL`.
    """
    image, label = _flip(image, label, augmentation, seed)
    image, label = _shift(image, label, augmentation, seed)
    image, label = _rotate_and_scale(image, label, augmentation, seed)
    image = _gamma(image, augmentation, seed)
    if augmentation.brightness:
        limit = augmentation.brightness
        image = image + float(numpy_rng(seed, "brightness").uniform(-limit, limit))
    if augmentation.noise_std:
        std = float(numpy_rng(seed, "noise_std").uniform(0, augmentation.noise_std))
        noise = torch.randn(image.shape, generator=torch_rng(seed, "noise"))
        image = noise.to(image.dtype).mul_(std).add_(image)
    return image, label


def _flip(
    image: Tensor, label: Tensor, augmentation: Augmentation, seed: int
) -> tuple[Tensor, Tensor]:
    if not augmentation.flip_axes:
        return image, label
    mirrored = numpy_rng(seed, "flip").random(len(AXES)) < 0.5
    axes = [
        axis
        for axis in range(label.ndim)
        if AXES[axis] in augmentation.flip_axes and mirrored[axis]
    ]
    if not axes:
        return image, label
    return image.flip([axis + 1 for axis in axes]), label.flip(axes)


def _shift(
    image: Tensor, label: Tensor, augmentation: Augmentation, seed: int
) -> tuple[Tensor, Tensor]:
    """Move image and label by the same draw; they are one example."""
    farthest = int(augmentation.shift_voxels)
    if not farthest:
        return image, label
    moves = numpy_rng(seed, "shift").integers(-farthest, farthest, 2, endpoint=True)
    for axis, move in enumerate(moves.tolist()):
        size = label.shape[axis]
        source = torch.arange(size) - move
        inside = source.clamp(0, size - 1)
        image = image.index_select(axis + 1, inside)
        label = label.index_select(axis, inside)
        label.index_fill_(axis, torch.nonzero(source != inside)[:, 0], UNKNOWN_LABEL)
    return image, label


def _rotate_and_scale(
    image: Tensor, label: Tensor, augmentation: Augmentation, seed: int
) -> tuple[Tensor, Tensor]:
    if not (augmentation.rotate_deg or augmentation.scale):
        return image, label
    limit = math.radians(augmentation.rotate_deg)
    angle_rad = float(numpy_rng(seed, "rotate").uniform(-limit, limit))
    limit = math.log1p(augmentation.scale)
    zoom = math.exp(float(numpy_rng(seed, "scale").uniform(-limit, limit)))
    return transform(image, label, angle_rad=angle_rad, zoom=zoom)


def transform(
    image: Tensor, label: Tensor, *, angle_rad: float, zoom: float
) -> tuple[Tensor, Tensor]:
    """Turn an example in the plane of I and J and magnify it, around its centre.

    Args:
        image: float (C, I, J) or (C, I, J, K), interpolated linearly.
        label: uint8 (I, J) or (I, J, K), nearest voxel.
        angle_rad: From I towards J. Voxels must be square in that plane.
        zoom: Above 1 magnifies, along all axes.

    Returns:
        New image and label.
    """
    return resampled(
        image, label, sampling_grid(label.shape, angle_rad=angle_rad, zoom=zoom)
    )


def resampled(image: Tensor, label: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Look an example up at the places of a grid, as `sampling_grid` gives one."""
    grid = grid[None]
    moved = functional.grid_sample(
        image[None], grid, mode="bilinear", padding_mode="border", align_corners=True
    )[0]
    # Counted down from the unknown label, so that the zeros from outside stand for it.
    shifted = functional.grid_sample(
        label[None, None].to(grid.dtype) - UNKNOWN_LABEL,
        grid,
        mode="nearest",
        padding_mode="zeros",
        align_corners=True,
    )[0, 0]
    return moved, shifted.add_(UNKNOWN_LABEL).to(label.dtype)


def sampling_grid(shape: torch.Size, *, angle_rad: float, zoom: float) -> Tensor:
    """Say where each voxel of a turned and magnified image is looked up.

    Returns:
        (*shape, axes) in torch's units: -1 is the first voxel's centre, 1 the last
        one's, last axis first.
    """
    i, j, *others = (_centred(axis, shape) for axis in range(len(shape)))
    cos, sin = math.cos(angle_rad) / zoom, math.sin(angle_rad) / zoom
    looked_up = [cos * i + sin * j, cos * j - sin * i, *(k / zoom for k in others)]
    grid = torch.empty(*shape, len(shape))
    for axis, voxels in enumerate(looked_up):
        grid[..., -1 - axis] = voxels / max((shape[axis] - 1) / 2, 0.5)
    return grid


def _centred(axis: int, shape: torch.Size) -> Tensor:
    """Count voxels from the centre of one axis; the other axes have length 1."""
    lengths = [-1 if other == axis else 1 for other in range(len(shape))]
    size = shape[axis]
    counted = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    return counted.reshape(lengths)


def _gamma(image: Tensor, augmentation: Augmentation, seed: int) -> Tensor:
    if not augmentation.gamma:
        return image
    limit = math.log1p(augmentation.gamma)
    exponent = math.exp(float(numpy_rng(seed, "gamma").uniform(-limit, limit)))
    return power(image, exponent)


def power(image: Tensor, exponent: float) -> Tensor:
    """Scale each channel to [0, 1], raise it to a power, and scale it back."""
    channels = image.flatten(1)
    shape = (-1,) + (1,) * (image.ndim - 1)
    low = channels.amin(dim=1).reshape(shape)
    extent = (channels.amax(dim=1).reshape(shape) - low).clamp_min(1e-12)
    scaled = (image - low).div_(extent).clamp_(0, 1)
    return scaled.pow_(exponent).mul_(extent).add_(low)
