"""The floor of W4: pooled training of six sites in one plain PyTorch loop.

One process, one thread, channels-last, float32, freed memory kept. In each step every
site's batch goes forward and backward, its loss weighted by the site's share, so that
gradients add up in place, and one fused Adam moves all parameters. `fedbn`:
convolutions are one and the same parameter in six networks, every site has
normalisation of its own. Batches are drawn through the same `ExampleIndex` and seeds as
ours, within the timed loop for both, so both train on the same numbers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fedmed import seeds
from fedmed.strategy import Strategy
from fedmed.study import Study
from fedmed.training.allocator import keep_freed_memory
from fedmed.training.examples import ExampleIndex
from sites.context import Workbench


def networks(model: nn.Module, num_sites: int, *, per_site: bool) -> list[nn.Module]:
    """One network for all sites, or one per site that differs in normalisation."""
    if not per_site:
        return [model] * num_sites
    memo: dict[int, object] = {}
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            memo |= {id(p): p for p in module.parameters(recurse=False)}
    return [copy.deepcopy(model, dict(memo)) for _ in range(num_sites)]


class PooledFloor:
    """Trains as a study says, round by round; a round is the study's local steps.

    Args:
        study: The study.
        site_ids: All sites.
        strategy: Its method, of which the weights and what sites keep are read.
        cache: Folder of prepared cases.
    """

    def __init__(
        self,
        study: Study,
        site_ids: Sequence[str],
        strategy: Strategy,
        *,
        cache: Path,
    ) -> None:
        torch.set_num_threads(study.train.threads)
        keep_freed_memory()
        benches = [Workbench(study, site, cache) for site in site_ids]
        self.study, self.site_ids = study, site_ids
        self.indices: list[ExampleIndex] = [bench.indices[0] for bench in benches]
        is_uniform = strategy.weighting == "uniform"
        counts = [1 if is_uniform else len(index) for index in self.indices]
        self.shares = [count / sum(counts) for count in counts]
        self.models = networks(
            benches[0].model.train(), len(benches), per_site=bool(strategy.keeps)
        )
        distinct = {id(p): p for model in self.models for p in model.parameters()}
        section = study.train.optimizer
        self.optimizer = torch.optim.Adam(distinct.values(), lr=section.lr, fused=True)
        self.loss_of = benches[0].trainer.loss
        self.took_s: list[float] = []
        self.losses: list[float] = []

    def round(self) -> None:
        """One round; notes its seconds and the sites' mean loss at its end."""
        began = time.perf_counter()
        study, number = self.study, len(self.took_s) + 1
        streams = [
            seeds.derive(study.seed, "batches", site, number) for site in self.site_ids
        ]
        for step in range(study.train.local_steps or 1):
            self.optimizer.zero_grad(set_to_none=True)
            last = []
            for model, index, stream, share in zip(
                self.models, self.indices, streams, self.shares, strict=True
            ):
                batch = index.batch(stream, step, study.train.batch_size)
                images = batch.images.contiguous(memory_format=torch.channels_last)
                loss = self.loss_of(model(images), batch.labels)
                (loss * share).backward()
                last.append(loss.detach())
            self.optimizer.step()
        self.losses.append(float(torch.stack(last).mean()))
        self.took_s.append(time.perf_counter() - began)
