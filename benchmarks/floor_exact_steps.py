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

from benchmarks.measured_study import Timed
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


def train_pooled(
    study: Study,
    site_ids: Sequence[str],
    strategy: Strategy,
    *,
    cache: Path,
    rounds: int,
) -> Timed:
    """Train as the study says; a round is the study's local steps."""
    torch.set_num_threads(study.train.threads)
    keep_freed_memory()
    benches = [Workbench(study, site, cache) for site in site_ids]
    indices: list[ExampleIndex] = [bench.indices[0] for bench in benches]
    is_uniform = strategy.weighting == "uniform"
    counts = [1 if is_uniform else len(index) for index in indices]
    shares = [count / sum(counts) for count in counts]
    models = networks(
        benches[0].model.train(), len(benches), per_site=bool(strategy.keeps)
    )
    distinct = {id(p): p for model in models for p in model.parameters()}
    section = study.train.optimizer
    optimizer = torch.optim.Adam(distinct.values(), lr=section.lr, fused=True)
    loss_of = benches[0].trainer.loss
    took, losses = [], []
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        streams = [
            seeds.derive(study.seed, "batches", site, number) for site in site_ids
        ]
        for step in range(study.train.local_steps or 1):
            optimizer.zero_grad(set_to_none=True)
            last = []
            for model, index, stream, share in zip(
                models, indices, streams, shares, strict=True
            ):
                batch = index.batch(stream, step, study.train.batch_size)
                images = batch.images.contiguous(memory_format=torch.channels_last)
                loss = loss_of(model(images), batch.labels)
                (loss * share).backward()
                last.append(loss.detach())
            optimizer.step()
        losses.append(float(torch.stack(last).mean()))
        took.append(time.perf_counter() - began)
    return Timed(took, losses)
