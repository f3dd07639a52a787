"""Calibrating a newcomer: normalisation statistics from its own unlabelled images.

A site that never trained has no statistics of its own. It re-estimates mean and
variance on its images, without labels (AdaBN); nothing leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmed.partition import Entry
from fedmed.strategy import Private
from fedmed.training.examples import (
    cut_patch,
    pad_alike,
    patch_corner,
    read_image,
    read_slices,
)
from fedmed.training.trainer import DTYPES
from sites.context import Workbench
from sites.data import AnyCase

_Read = Callable[[], torch.Tensor]


def needs_calibration(bench: Workbench, private: Private) -> bool:
    """Whether statistics stay at the sites and this one has none yet."""
    return "kept" not in private.states and bool(_statistics(bench))


def _statistics(bench: Workbench) -> list[Entry]:
    kept = set(bench.partition.kept)
    return [
        entry
        for entry in bench.partition.entries
        if entry.name in kept and entry.role == "norm_statistic"
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
    batch_norm = nn.modules.batchnorm._BatchNorm
    layers = [m for m in model.modules() if isinstance(m, batch_norm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    model.train()
    dtype = DTYPES[bench.trainer.precision]
    for images in unlabelled_batches(bench):
        model(images.to(bench.trainer.device, dtype), site=bench.site_id)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()


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
