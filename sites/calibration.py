"""Normalisation statistics from a site's own images, without labels; nothing leaves.

A site that never trained has no statistics of its own: it estimates mean and variance
on all of its images (AdaBN). A site that trained may estimate its own anew on its
training images (`evaluate.statistics: recalibrated`): those that local training left
belong to the site's own drifted weights, the model to evaluate has the averaged ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmed import seeds
from fedmed.message import State
from fedmed.partition import Entry
from fedmed.strategy import Private
from fedmed.training.examples import (
    ExampleIndex,
    cut_patch,
    pad_alike,
    patch_corner,
    read_image,
    read_slices,
)
from fedmed.training.trainer import DTYPES
from fedmed.unseen import shareable
from sites.context import Workbench
from sites.data import AnyCase

_BatchNorm = nn.modules.batchnorm._BatchNorm
_Read = Callable[[], torch.Tensor]


def needs_calibration(bench: Workbench, private: Private) -> bool:
    """Whether statistics stay at the sites and this one has none yet."""
    return "kept" not in private.states and bool(_statistics(bench))


def keeps_statistics(bench: Workbench) -> bool:
    """Whether running statistics stay at the sites."""
    return bool(_statistics(bench))


def own_normalisation(
    bench: Workbench, private: Private, *, weights: State
) -> dict[str, torch.Tensor]:
    """Give what the site would share of its normalisation and adapters.

    Args:
        bench: The hospital.
        private: What it keeps.
        weights: Shared entries; looked at only if statistics are recalibrated.

    Returns:
        As the site is evaluated with; empty if it never trained, or if its strategy
        keeps more than that, see `fedmed.unseen`.
    """
    kept = private.states.get("kept", {})
    chosen = shareable(bench.partition, bench.strategy.training_only)
    names = [entry.name for entry in chosen if entry.name in kept]
    if not names or bench.study.evaluate.statistics == "kept":
        return {name: kept[name] for name in names}
    model = bench.load(weights, private)
    recalibrate(bench, model)
    return bench.entries(model, names)


def _statistics(bench: Workbench) -> list[Entry]:
    """Running statistics that the site keeps and prediction uses."""
    kept, unused = set(bench.partition.kept), bench.strategy.training_only
    return [
        entry
        for entry in bench.partition.entries
        if entry.name in kept
        and entry.role == "norm_statistic"
        and entry.part not in unused
    ]


@torch.inference_mode()
def calibrate(bench: Workbench, model: nn.Module) -> None:
    """Re-estimate running statistics on all of the site's images, in place.

    Every batch counts equally (cumulative average), so the result does not depend on
    where the network came from.

    Source:
        Li et al., Revisiting Batch Normalization For Practical Domain Adaptation,
        2016, arXiv:1603.04779.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    # In evaluation mode but for these layers: nothing is dropped, no draw is made.
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    dtype = DTYPES[bench.trainer.precision]
    with _momentum(layers, None):
        for images in unlabelled_batches(bench):
            model(images.to(bench.trainer.device, dtype), site=bench.site_id)
    model.eval()


@torch.inference_mode()
def recalibrate(bench: Workbench, model: nn.Module) -> None:
    r"""Re-estimate the kept running statistics on the site's training images, in place.

    With the statistics m_b, v_b of batches that hold a share p_b of the examples:
    mean = sum_b p_b m_b, variance = sum_b p_b (v_b + m_b^2) - mean^2. The batches are
    drawn once through all training examples, in a fixed random order, without
    augmentation; patches are drawn without a look at the labels.

    Source:
        Wu, Johnson, Rethinking "Batch" in BatchNorm, 2021, arXiv:2105.07576, section 3
        (PreciseBN).
    """
    sums = [_Sums(layer) for layer in _kept_layers(bench, model)]
    if not sums or not bench.training:
        return
    model.eval()
    for own in sums:
        own.layer.train()
    dtype = DTYPES[bench.trainer.precision]
    # After a batch, the statistics are that batch's.
    with _momentum([own.layer for own in sums], 1.0):
        for images in training_batches(bench):
            model(images.to(bench.trainer.device, dtype), site=bench.site_id)
            for own in sums:
                own.add(len(images))
    for own in sums:
        own.write()
    model.eval()


@contextlib.contextmanager
def _momentum(layers: Sequence[_BatchNorm], value: float | None) -> Iterator[None]:
    """Set layers' momentum for a while, whatever happens: others use the network too.

    Args:
        layers: The layers.
        value: As of `nn.BatchNorm2d`; None = cumulative average.
    """
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = value
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


class _Sums:
    """Sums over batches of one layer's mean and mean square."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self._count = 0
        self._mean = self._square = torch.zeros((), dtype=torch.float64)

    def add(self, count: int) -> None:
        """Add the layer's statistics, those of a batch of so many examples."""
        mean, variance = (tensor.double() for tensor in self._statistics())
        self._count += count
        self._mean = self._mean.to(mean.device) + count * mean
        self._square = self._square.to(mean.device) + count * (variance + mean.square())

    def write(self) -> None:
        """Put mean and total variance into the layer."""
        mean = self._mean / self._count
        variance = (self._square / self._count - mean.square()).clamp(min=0)
        for target, value in zip(self._statistics(), (mean, variance), strict=True):
            target.copy_(value)

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean, variance = self.layer.running_mean, self.layer.running_var
        assert mean is not None  # only such layers keep statistics
        assert variance is not None
        return mean, variance


def _kept_layers(bench: Workbench, model: nn.Module) -> list[_BatchNorm]:
    """Batch normalisation whose statistics stay at the site and prediction uses."""
    kept = {entry.name for entry in _statistics(bench)}
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and f"{name}.running_mean" in kept
    ]


def training_batches(bench: Workbench) -> Iterator[torch.Tensor]:
    """Each of the site's training examples once, in a fixed random order."""
    size, mode = bench.study.evaluate.batch_size, bench.study.model.mode
    seed = seeds.derive(bench.study.seed, "recalibration", bench.site_id)
    index = _plain_index(bench)
    for first in range(0, len(index), size):
        count = min(size, len(index) - first)
        if count == 1 and first and mode in {"row", "image"}:
            return  # batch normalisation refuses a single row
        # A batch that ends beyond the last example goes on with the first again.
        yield index.batch(seed, first // size, size).images[:count]


def _plain_index(bench: Workbench) -> ExampleIndex:
    """The site's training examples as they are."""
    model = bench.study.model
    return ExampleIndex(
        bench.data.splits["train"],
        model.mode,
        num_slices=model.slices,
        patch_size=model.patch_size,
        patches_per_case=model.patches_per_case,
    )


def unlabelled_batches(bench: Workbench) -> Iterator[torch.Tensor]:
    """All of the site's images in a fixed order, slice by slice or case by case.

    Images of different sizes are padded as in training.
    """
    cases = [c for split in sorted(bench.data.splits) for c in bench.data.splits[split]]
    images = [image for case in cases for image in _images(bench, case)]
    mode = bench.study.model.mode
    for chosen in _batches(images, bench.study.evaluate.batch_size, mode):
        batch = [read() for read in chosen]
        alike = pad_alike(batch) if mode in {"slice", "image"} else batch
        yield torch.stack(alike)


def _batches(
    images: Sequence[_Read], batch_size: int, mode: str
) -> Iterator[Sequence[_Read]]:
    """Runs of images; where a case is one example, none is left alone at the end.

    A single row has no variance, nor has a single image that is one position deep
    down, and batch normalisation refuses both.
    """
    starts = list(range(0, len(images), batch_size))
    if mode in {"row", "image"} and len(starts) > 1 and len(images) - starts[-1] == 1:
        starts.pop()
    for first, end in zip(starts, [*starts[1:], len(images)], strict=True):
        yield images[first:end]


def _images(bench: Workbench, case: AnyCase) -> Iterator[_Read]:
    section = bench.study.model
    if section.mode == "slice":
        for k in range(case.image_CIJK.shape[3]):
            yield functools.partial(_slice, case, k, section.slices)
    elif section.mode == "patch":
        yield functools.partial(_middle, case, section.patch_size or (1, 1, 1))
    elif section.mode == "image":
        yield functools.partial(_whole, case)
    else:
        yield functools.partial(_row, case)


def _slice(case: AnyCase, k: int, num_slices: int) -> torch.Tensor:
    return torch.from_numpy(read_slices(case.image_CIJK, k, num_slices=num_slices))


def _middle(case: AnyCase, size: tuple[int, int, int]) -> torch.Tensor:
    shape = case.image_CIJK.shape[1:]
    corner = patch_corner([n // 2 for n in shape], size, shape)
    return torch.from_numpy(cut_patch(case.image_CIJK, corner, size, label=False))


def _whole(case: AnyCase) -> torch.Tensor:
    return torch.from_numpy(read_image(case.image_CIJK))


def _row(case: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(case.features_F, dtype=np.float32))
