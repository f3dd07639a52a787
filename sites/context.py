"""The workbench of a hospital, and the view of it that a strategy's site half gets."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import math
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmed import seeds
from fedmed.errors import ConfigError, WireError
from fedmed.flat import lazy_clone
from fedmed.imaging.preprocess import cut_fraction
from fedmed.message import Message, SiteId, State
from fedmed.partition import StatePartition
from fedmed.resolve import load_strategy
from fedmed.strategy import POOLED_SITE, Private, Strategy
from fedmed.study import Study
from fedmed.task import (
    Task,
    build_model,
    build_trainer,
    limit_gpu_memory,
    resolve_device,
)
from fedmed.training.augment import Augmentation
from fedmed.training.examples import Batch, ExampleIndex
from fedmed.training.prefetch import available_cores, prefetched
from fedmed.training.trainer import Trainer
from sites.data import SiteData, SiteList, divided_by_slices
from sites.public import PUBLIC, PublicImages

CUT_LIMIT = 0.05
"""Share of an organ outside the network's window that is worth a warning."""


class Workshop:
    """What the workbenches of one process share: above all the one live network.

    A bench puts all entries into the network before it uses it, so that nothing of
    one site is seen by another.

    Args:
        study: The study.
        cache: Folder of prepared cases.
    """

    def __init__(self, study: Study, cache: Path) -> None:
        self.study = study
        self.cache = cache

    @functools.cached_property
    def sites(self) -> SiteList:
        """The study's sites, listed once."""
        return SiteList(self.study, self.cache)

    @functools.cached_property
    def public(self) -> SiteData | None:
        """This machine's copy of the public site; None if the study names none."""
        name = self.study.sites.public
        return None if name is None else self.sites.open(name)

    @functools.cached_property
    def public_images(self) -> PublicImages:
        """Batches of the public site's images, for all benches of this process.

        Raises:
            ConfigError: If the study names no public site.
        """
        if self.public is None:
            raise ConfigError("the study names no public site (sites.public)")
        return PublicImages(self.study, self.public.splits[PUBLIC])

    @functools.cached_property
    def task(self) -> Task:
        """What is to be learned, as the data set's card says."""
        return Task.of(self.sites.card)

    @functools.cached_property
    def strategy(self) -> Strategy:
        """The study's method."""
        section = self.study.strategy
        return load_strategy(section.name, section.options)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The trainer of no site in particular."""
        trainer = build_trainer(self.study, "")
        if self.study.train.compile is False:
            return trainer
        # Imports the compiler, which takes longer than torch itself.
        compiling = importlib.import_module("fedmed.training.compiling")
        return replace(
            trainer, compiled=compiling.compile_network(self.model, self.cache)
        )

    @functools.cached_property
    def model(self) -> nn.Module:
        """The live network; weights are loaded per message."""
        device = resolve_device(self.study.train.device)
        limit_gpu_memory(device, self.study.train.gpu_memory_fraction)
        model = build_model(self.study, self.task, self.strategy).to(device)
        if self.study.model.mode == "slice":
            # A third faster on CPUs, more on GPUs with tensor cores.
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    @functools.cached_property
    def live(self) -> State:
        """The live network's own tensors; what is written to them, it computes with."""
        return {n: t.detach() for n, t in self.model.state_dict(keep_vars=True).items()}

    @functools.cached_property
    def partition(self) -> StatePartition:
        """What of the network is shared."""
        return self.strategy.partition(self.model)

    @functools.cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules of the live network."""
        return tuple(self.model.modules())

    def initial(self) -> State:
        """The network's initial entries, equal at the server and at every site."""
        fresh = build_model(self.study, self.task, self.strategy)
        return {name: tensor.detach() for name, tensor in fresh.state_dict().items()}

    @functools.cached_property
    def initially_kept(self) -> State:
        """Initial entries of what sites keep for themselves."""
        if not self.partition.kept:
            return {}
        fresh = self.initial()
        return {name: fresh[name].clone() for name in self.partition.kept}

    def load(self, state: State) -> nn.Module:
        """Put entries into the live network.

        Raises:
            WireError: If one is missing, or has another shape than the network's.
        """
        targets, values = [], []
        for name, target in self.live.items():
            value = state.get(name)
            if value is None or value.shape != target.shape:
                seen = "missing" if value is None else f"{tuple(value.shape)}"
                raise WireError(
                    f"entry {name!r} of the network is {seen}, expected "
                    f"{tuple(target.shape)}"
                )
            targets.append(target)
            values.append(value)
        with torch.no_grad():
            torch._foreach_copy_(targets, values)
        return self.model


class Workbench:
    """Data, network and trainer of one site; opened once, used for every message.

    Args:
        study: The study.
        site_id: The site, or the virtual pooled site.
        cache: Folder of prepared cases.
        workshop: Shared with the other benches of this process; None = its own.
    """

    def __init__(
        self,
        study: Study,
        site_id: SiteId,
        cache: Path,
        workshop: Workshop | None = None,
    ) -> None:
        self.study = study
        self.site_id = site_id
        self.workshop = workshop or Workshop(study, cache)

    @property
    def is_pooled(self) -> bool:
        """Whether this is the virtual site with everybody's data."""
        return self.site_id == POOLED_SITE

    @property
    def is_public(self) -> bool:
        """Whether this is the site whose images every hospital may open."""
        return self.site_id == self.study.sites.public

    @functools.cached_property
    def pool(self) -> tuple[SiteData, ...]:
        """The hospitals behind this bench: one, or all training sites."""
        sites = self.workshop.sites
        if self.is_public and self.workshop.public is not None:
            return (self.workshop.public,)
        if not self.is_pooled:
            return (self._divided(sites.open(self.site_id)),)
        held_out = set(self.study.split.held_out)
        return tuple(
            self._divided(sites.open(source.site_id))
            for source in sites.sources
            if source.site_id not in held_out
        )

    def _divided(self, data: SiteData) -> SiteData:
        held_out = data.site_id in self.study.split.held_out
        if self.study.split.by == "slices" and not held_out:
            return divided_by_slices(data, self.study)
        return data

    @property
    def data(self) -> SiteData:
        """The site's data; of the pooled site, the first hospital's."""
        return self.pool[0]

    @functools.cached_property
    def case_ids(self) -> frozenset[str]:
        """Names of all cases behind this bench, usable or not."""
        listed = {ref.case_id for data in self.pool for ref in data.source.cases}
        return frozenset(listed.union(*(data.quarantined for data in self.pool)))

    @property
    def task(self) -> Task:
        """What is to be learned."""
        return self.workshop.task

    @property
    def strategy(self) -> Strategy:
        """The study's method."""
        return self.workshop.strategy

    @property
    def model(self) -> nn.Module:
        """The live network, shared by the benches of this process."""
        return self.workshop.model

    @property
    def initial(self) -> State:
        """The network's initial entries, equal at the server and at every site."""
        return self.workshop.initial()

    @property
    def partition(self) -> StatePartition:
        """What of the network is shared."""
        return self.workshop.partition

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The site's trainer."""
        return replace(self.workshop.trainer, site_id=self.site_id)

    @property
    def training(self) -> tuple[SiteData, ...]:
        """The hospitals behind this bench that have training cases."""
        return tuple(data for data in self.pool if data.splits["train"])

    @functools.cached_property
    def indices(self) -> tuple[ExampleIndex, ...]:
        """Training examples of every hospital behind this bench that has some."""
        return tuple(self._index(data) for data in self.training)

    def _index(self, data: SiteData) -> ExampleIndex:
        model = self.study.model
        return ExampleIndex(
            data.splits["train"],
            model.mode,
            num_slices=model.slices,
            patch_size=model.patch_size,
            patches_per_case=model.patches_per_case,
            foreground_fraction=model.foreground_fraction,
            augmentation=Augmentation(**self.study.train.augmentation),
        )

    @functools.cached_property
    def num_examples(self) -> int:
        """Training examples: slices, patches or rows; of the public site, all."""
        if self.is_public:
            return len(self.workshop.public_images)
        return sum(len(index) for index in self.indices)

    @functools.cached_property
    def num_processes(self) -> int:
        """Processes that share the cores of this machine, as far as the study says."""
        section = self.study.transport
        if section.name in {"inprocess", "deployment"}:
            return 1
        return int(section.options.get("num_workers") or available_cores())

    @functools.cached_property
    def steps(self) -> int:
        """Local steps per round."""
        train = self.study.train
        if train.local_steps is not None:
            return train.local_steps
        largest = max((len(index) for index in self.indices), default=0)
        return max(1, math.ceil((train.local_epochs or 1) * largest / train.batch_size))

    def seed(self, message: Message) -> int:
        """Seed of torch's global state while a message is answered, tries apart."""
        number = int(message.header.get("round", 0))
        exchange = str(message.header.get("token", "")).rpartition(".")[2]
        purpose = ("torch", self.site_id, number, message.kind, exchange)
        return seeds.derive(self.study.seed, *purpose)

    def batch(self, number: int, step: int) -> Batch:
        """Batch `step` of round `number`: a pure function of the study and these."""
        drawn = [
            index.batch(
                seeds.derive(self.study.seed, "batches", data.site_id, number),
                step,
                self.study.train.batch_size,
            )
            for index, data in zip(self.indices, self.training, strict=True)
        ]
        if len(drawn) == 1:
            return drawn[0]
        return Batch(
            torch.cat([batch.images for batch in drawn]),
            torch.cat([batch.labels for batch in drawn]),
        )

    def load(self, shared: State, private: Private) -> nn.Module:
        """Put shared and kept entries into the live network."""
        kept = private.states.get("kept", {})
        return self.workshop.load({**self.workshop.initially_kept, **kept, **shared})

    def entries(self, model: nn.Module, names: Iterable[str]) -> State:
        """Copy entries out of a network.

        A copy is made when somebody writes to either side, so that what is only read
        once more, to be sent, is not copied twice.
        """
        live = self.workshop.live
        if model is not self.workshop.model:
            live = {n: t.detach() for n, t in model.state_dict().items()}
        return {name: lazy_clone(live[name].cpu()) for name in names}

    def _data_fingerprint(self) -> str:
        """One hash of all images and labels, and of who is in which split."""
        lines = [
            f"{split}/{case.case_id}/{case.content}"
            for split, cases in self.data.splits.items()
            for case in cases
        ]
        return self._salted("\n".join(sorted(lines)))

    def _public_fingerprint(self) -> str:
        """Hash of the public images that are here, not of labels; "" if none are."""
        has_copy = self.is_public or self.strategy.copies_public
        public = self.workshop.public if has_copy else None
        if public is None:
            return ""
        lines = [
            # Rows of a table have no fingerprint: two may well be equal.
            f"{case.case_id}/{case.fingerprint or case.content}"
            for case in public.splits[PUBLIC]
        ]
        return self._salted("\n".join(sorted(lines)))

    def _salted(self, fingerprint: str) -> str:
        """Hash that only sites of the same study can compare."""
        text = f"{self.study.name}\x1f{self.study.seed}\x1f{fingerprint}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @functools.cached_property
    def _cut_shares(self) -> list[float]:
        """Share of each case's labelled organs outside the network's window."""
        if self.study.model.mode in {"row", "image"}:
            return []
        shares: dict[str, float] = {}
        for case in (c for cases in self.data.splits.values() for c in cases):
            shares[case.case_id] = max(
                cut_fraction(case), shares.get(case.case_id, 0.0)
            )
        return list(shares.values())

    def card(self) -> dict[str, Any]:
        """What the site says about itself when it joins."""
        source = self.data.source.card
        return {
            "task": asdict(self.task),
            "card": {
                "title": source.title,
                "modality": source.modality,
                "facts": dict(source.facts),
            },
            "num_cases": self.data.num_cases,
            "num_cut": sum(share > CUT_LIMIT for share in self._cut_shares),
            "largest_cut": round(max(self._cut_shares, default=0.0), 2),
            "data_fingerprint": self._data_fingerprint(),
            "public_fingerprint": self._public_fingerprint(),
            "fingerprints": sorted(map(self._salted, self.data.fingerprints.values())),
        }


class HospitalContext:
    """One message's view of a hospital; see `fedmed.strategy.SiteContext`.

    Args:
        bench: The hospital's workbench.
        private: What the site kept after the last acknowledged message.
        number: The round.
        first_step: Number of its first step over all rounds.
    """

    def __init__(
        self, bench: Workbench, private: Private, number: int, *, first_step: int = 0
    ) -> None:
        self._bench = bench
        self.private = private
        self.round = number
        self.first_step = first_step
        self.site_id = bench.site_id
        self.num_examples = bench.num_examples
        self.steps = bench.steps
        self.partition = bench.partition
        self.trainer = bench.trainer
        self.keeps_optimizer = bench.study.train.optimizer_state == "keep"

    def load(self, shared: State) -> nn.Module:
        """Give the network in training mode: shared entries plus what is kept."""
        model = self._bench.load(shared, self.private)
        # As `model.train()`, without setting what is set: that costs more than a step
        # of a small network.
        for module in self._bench.workshop.modules:
            if not module.training:
                module.training = True
        return model

    def batches(self, first: int, count: int) -> Iterator[Batch]:
        """Draw training batches number `first`... of this round."""
        yield from prefetched(
            lambda step: self._bench.batch(self.round, step),
            first,
            count,
            processes=self._bench.num_processes,
        )

    def public_batches(self, first: int, count: int) -> Iterator[Batch]:
        """Draw batches number `first`... of the public images, all labels unknown."""
        yield from prefetched(
            self._bench.workshop.public_images.batch,
            first,
            count,
            processes=self._bench.num_processes,
        )

    def draws(self, *purpose: str | int) -> contextlib.AbstractContextManager[None]:
        """Let what follows draw the same numbers in every message of this round."""
        root, number = self._bench.study.seed, self.round
        return seeds.seeded(seeds.derive(root, "draws", self.site_id, number, *purpose))

    def shared_of(
        self, model: nn.Module, *, only: Container[str] | None = None
    ) -> State:
        """Copy the shared entries out of the network: all, or only some."""
        names: Iterable[str] = self.partition.shared
        if only is not None:
            names = [name for name in names if name in only]
        return self._bench.entries(model, names)

    def keep(self, model: nn.Module, **states: State) -> Private:
        """The private value after this action: kept entries plus further states."""
        kept = self._bench.entries(model, self.partition.kept)
        return self.private.with_states(**({"kept": kept} if kept else {}), **states)
