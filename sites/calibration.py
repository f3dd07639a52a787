"""Calibrating a newcomer: normalisation statistics from its own unlabelled images.

A site that never trained has no statistics of its own. It re-estimates mean and
variance on its images, without labels (AdaBN); nothing leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmed.partition import Entry
from fedmed.strategy import Private
from fedmed.training.examples import cut_patch, patch_corner, read_slices
from fedmed.training.trainer import DTYPES
from sites.context import Workbench
from sites.data import AnyCase


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
    """All of the site's images in a fixed order, slice by slice or case by case."""
    cases = [c for split in sorted(bench.data.splits) for c in bench.data.splits[split]]
    images = [image for case in cases for image in _images(bench, case)]
    batch_size = bench.study.evaluate.batch_size
    for first in range(0, len(images), batch_size):
        yield torch.stack([read() for read in images[first : first + batch_size]])


def _images(
    bench: Workbench, case: AnyCase
) -> Iterator[Callable[[], torch.Tensor]]:
    section = bench.study.model
    if section.mode == "slice":
        for k in range(case.image_CIJK.shape[3]):
            yield functools.partial(_slice, case, k, section.slices)
    elif section.mode == "patch":
        yield functools.partial(_middle, case, section.patch_size or (1, 1, 1))
    else:
        yield functools.partial(_row, case)


def _slice(case: AnyCase, k: int, num_slices: int) -> torch.Tensor:
    return torch.from_numpy(read_slices(case.image_CIJK, k, num_slices=num_slices))


def _middle(case: AnyCase, size: tuple[int, int, int]) -> torch.Tensor:
    shape = case.image_CIJK.shape[1:]
    corner = patch_corner([n // 2 for n in shape], size, shape)
    return torch.from_numpy(cut_patch(case.image_CIJK, corner, size, label=False))


def _row(case: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(case.features_F, dtype=np.float32))
