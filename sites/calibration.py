"""Calibrating a newcomer: normalisation statistics from its own unlabelled images.

A site that never trained has no statistics of its own. It re-estimates mean and
variance on its images, without labels (AdaBN); nothing leaves.
"""

from __future__ import annotations

import torch
from torch import nn

from fedmed.partition import Entry
from fedmed.strategy import Private
from sites.context import Workbench


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
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    model.train()
    for images in bench.unlabelled_batches():
        model(images.to(bench.trainer.device), site=bench.site_id)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()
