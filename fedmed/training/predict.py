"""Probabilities of every class: in every voxel by slices or patches, or of a case."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedmed.errors import ConfigError
from fedmed.training.examples import (
    Mode,
    check_options,
    cut_patch,
    read_image,
    read_row,
    read_slices,
)
from fedmed.training.trainer import Precision

Blending = Literal["gaussian", "uniform"]


def predict_case(
    model: nn.Module,
    case: Any,
    *,
    site: str | None = None,
    mode: Mode = "slice",
    num_slices: int = 1,
    batch_size: int = 8,
    patch_size: Sequence[int] | None = None,
    overlap: float | int = 0.5,
    blending: Blending = "gaussian",
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> np.ndarray:
    """Predict one case.

    The model works in evaluation mode and is left as it was, module by module.

    Args:
        model: Called as `model(images, site=site)`, on `device`.
        case: A prepared image or row; its label is not read.
        site: Whose normalisation is used, if the network has one per site.
        mode: As the model was trained: "slice", "patch", "image" or "row".
        num_slices: As the model was trained.
        batch_size: Slices or patches computed at a time.
        patch_size: (I, J, K), "patch" only.
        overlap: Share of a patch that its neighbour covers too, in [0, 1).
        blending: Weights of overlapping patches.
        device: Where to send the images.
        precision: "bfloat16" autocasts the network as in training; else it computes
            in the type of its weights.

    Returns:
        float32 (L, I, J, K), in modes "image" and "row" (L,); adds up to 1 over the
        classes.

    Raises:
        ConfigError: If the options do not fit the mode.
    """
    check_options(mode, num_slices=num_slices, patch_size=patch_size)
    if batch_size < 1 or not 0 <= overlap < 1:
        raise ConfigError(
            f"batch_size {batch_size}, overlap {overlap}; expected at least 1, and a "
            "fraction in [0, 1)"
        )
    with evaluating(model), torch.inference_mode():
        network = _Probabilities(model, site, torch.device(device), precision)
        if mode == "row":
            row: np.ndarray = network(np.array(read_row(case)[0])[None])[0]
            return row
        if mode == "image":
            whole: np.ndarray = network(read_image(case.image_CIJK)[None])[0]
            return whole
        if mode == "slice":
            return _by_slices(network, case.image_CIJK, num_slices, batch_size)
        windows = _Windows(tuple(patch_size or ()), overlap, blending)
        return _by_patches(network, case.image_CIJK, windows, batch_size)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode and restore each module's mode afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def window_starts(size: int, patch: int, overlap: float | int) -> list[int]:
    """Place windows along one axis, evenly, from the first voxel to the last.

    Example:
        >>> window_starts(10, 4, 0.5)
        [0, 2, 4, 6]
        >>> window_starts(3, 4, 0.5)
        [0]
    """
    if size <= patch:
        return [0]
    stride = max(1, int(patch * (1 - overlap)))
    count = -(-(size - patch) // stride) + 1
    return [round(i * (size - patch) / (count - 1)) for i in range(count)]


def blending_weights(patch_size: Sequence[int], blending: Blending) -> np.ndarray:
    """Give the weight of each voxel of a patch, positive, at most 1.

    Args:
        patch_size: (I, J, K).
        blending: "uniform", or "gaussian" with a standard deviation of an eighth of
            the patch, no less than a thousandth anywhere.

    Returns:
        float32 (I, J, K).

    Source:
        Isensee et al., nnU-Net, Nature Methods 2021: Gaussian importance weighting.
    """
    if blending == "uniform":
        return np.ones(tuple(patch_size), np.float32)
    weights = np.ones(())
    for size in patch_size:
        offset = np.arange(size) - (size - 1) / 2
        bell = np.exp(-0.5 * (offset / (size / 8)) ** 2)
        weights = weights[..., None] * (bell / bell.max())
    return np.maximum(weights, 1e-3).astype(np.float32)


class _Windows:
    def __init__(
        self, size: tuple[int, ...], overlap: float | int, blending: Blending
    ) -> None:
        self.size = size
        self.overlap = overlap
        self.weights = blending_weights(size, blending)

    def corners(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        starts = (
            window_starts(n, p, self.overlap)
            for n, p in zip(shape, self.size, strict=True)
        )
        return list(itertools.product(*starts))


class _Probabilities:
    """A model as a function from NumPy images to NumPy probabilities."""

    def __init__(
        self,
        model: nn.Module,
        site: str | None,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.model = model
        self.site = site
        self.device = device
        self.is_autocast = precision == "bfloat16"
        first = next(model.parameters(), None)
        self.dtype = torch.float32 if first is None else first.dtype

    def __call__(self, images: np.ndarray) -> np.ndarray:
        is_flat = images.ndim == 4
        sent = torch.from_numpy(images).to(
            self.device,
            self.dtype,
            memory_format=torch.channels_last if is_flat else torch.preserve_format,
        )
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.is_autocast
        ):
            logits: Tensor = self.model(sent, site=self.site)
        probabilities = torch.softmax(logits.to(torch.float32), dim=1)
        result: np.ndarray = probabilities.cpu().numpy()
        return result


def _by_slices(
    network: _Probabilities, image_CIJK: np.ndarray, num_slices: int, batch_size: int
) -> np.ndarray:
    parts = []
    size_k = image_CIJK.shape[3]
    for start in range(0, size_k, batch_size):
        ks = range(start, min(start + batch_size, size_k))
        images = [read_slices(image_CIJK, k, num_slices=num_slices) for k in ks]
        parts.append(network(np.stack(images)))
    return np.ascontiguousarray(np.moveaxis(np.concatenate(parts), 0, -1))


def _by_patches(
    network: _Probabilities,
    image_CIJK: np.ndarray,
    windows: _Windows,
    batch_size: int,
) -> np.ndarray:
    shape = image_CIJK.shape[1:]
    corners = windows.corners(shape)
    total: np.ndarray | None = None
    norm = np.zeros(shape, np.float32)
    for start in range(0, len(corners), batch_size):
        chosen = corners[start : start + batch_size]
        patches = [cut_patch(image_CIJK, c, windows.size, label=False) for c in chosen]
        for corner, patch in zip(chosen, network(np.stack(patches)), strict=True):
            if total is None:
                total = np.zeros((len(patch), *shape), np.float32)
            to_image, to_patch = _overlap(corner, windows.size, shape)
            weights = windows.weights[to_patch]
            total[(slice(None), *to_image)] += patch[(slice(None), *to_patch)] * weights
            norm[to_image] += weights
    assert total is not None
    return total / norm


def _overlap(
    corner: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    ends = [min(c + p, n) for c, p, n in zip(corner, size, shape, strict=True)]
    to_image = tuple(slice(c, e) for c, e in zip(corner, ends, strict=True))
    to_patch = tuple(slice(0, e - c) for c, e in zip(corner, ends, strict=True))
    return to_image, to_patch
