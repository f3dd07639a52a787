"""Small studies of strategies: run them, and look at what came of them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmed.checkpoint import Checkpoints
from fedmed.flat import pack
from fedmed.gate import Yardstick, measure
from fedmed.message import Answer, Message, SiteFailure, SiteId, State
from fedmed.run import Silence, drive, fresh_server, run_study, transport_sites
from fedmed.runfolder import RunFolder
from fedmed.storage import RunLock, read_state
from fedmed.strategy import (
    POOLED_SITE,
    Cohort,
    Exchange,
    Member,
    Private,
    Server,
    ServerHalf,
)
from fedmed.study import Study, study_from_dict
from fedmed.transports.inprocess import InProcessTransport
from sites import catalogue
from sites.context import HospitalContext, Workbench
from sites.private_state import PrivateStore

CACHE = Path(tempfile.mkdtemp(prefix="fedmed-tiny-"))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)

TABLE: dict[str, Any] = {
    "name": "tiny_table",
    "rounds": 2,
    "sites": {"dataset": "tiny.hospitals", "kind": "table"},
    "split": {"train": 1.0, "validation": 0.0, "test": 0.0},
    "preprocess": {"intensity": "none"},
    "model": {
        "name": "mlp",
        "mode": "row",
        "norm": "none",
        "widths": [5],
        "missing_indicator": False,
    },
    "train": {
        "batch_size": 3,
        "local_steps": 3,
        "loss": "cross_entropy",
        "optimizer": {"name": "sgd", "lr": 0.2},
        "precision": "float64",
    },
    "evaluate": {"every": 9, "overlays": 0},
    "cache": str(CACHE),
}
FULL_BATCH = 30
"""A multiple of every hospital's number of cases: each case counts equally often."""

IMAGE: dict[str, Any] = {
    **TABLE,
    "name": "tiny_image",
    "sites": {"dataset": "tiny.hospitals", "kind": "image"},
    "split": {"train": 0.6, "validation": 0.0, "test": 0.4},
    "model": {"name": "unet", "base_width": 2, "levels": 2, "norm": "batch"},
    "train": {
        "batch_size": 2,
        "local_steps": 2,
        "loss": "dice_linear+cross_entropy",
        "optimizer": {"name": "sgd", "lr": 0.05},
    },
}


@pytest.fixture(scope="module", autouse=True)
def modules_are_listed_once() -> Iterator[None]:
    """Save half of a run's time: each opened site parses every module of `sites`."""
    once = functools.cache(catalogue.list_datasets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "list_datasets", once)
        yield


def make_study(base: Mapping[str, Any], method: str, /, **changes: Any) -> Study:
    """A study with some keys of its sections changed.

    Args:
        base: `TABLE` or `IMAGE`.
        method: Name of the strategy.
        changes: Sections (mappings, merged) or single values.
    """
    content = {**base, "strategy": {"name": method}}
    for key, value in changes.items():
        old = content.get(key)
        merge = isinstance(value, Mapping) and isinstance(old, Mapping)
        content[key] = {**old, **value} if merge else value
    return study_from_dict(content)


@dataclass(frozen=True)
class Result:
    """What a run left on disk."""

    folder: RunFolder

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return self.folder.read_rounds()

    def server(self, number: int, name: str = "shared") -> State:
        """A server state as it was after a round; an optimiser's moment by name."""
        states = Checkpoints(self.folder.checkpoints, keep=99).load(number).states
        found = states["shared"] if name == "shared" else states["memory"][name]
        return dict(found)

    @property
    def shared(self) -> State:
        return dict(read_state(self.folder.model_file)[0])

    def private(self, site: SiteId) -> Private:
        store = PrivateStore(self.folder.site_folder(site) / "private")
        return store.committed(self.rounds[-1]["round"])

    def everything(self, site_ids: tuple[SiteId, ...]) -> dict[str, torch.Tensor]:
        """Final model and all that sites keep, under one flat set of names."""
        found = dict(self.shared)
        for site in site_ids:
            for name, state in self.private(site).states.items():
                found |= {f"{site}:{name}:{key}": t for key, t in state.items()}
        return found


def run(
    study: Study,
    out: Path,
    *,
    transport: InProcessTransport | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Run a study through the engine, over the study's transport or a given one."""
    if transport is None:
        run_study(study, out, resume=resume, should_stop=should_stop)
        return Result(RunFolder(out))
    folder = RunFolder(out)
    folder.create()
    with RunLock(folder.path), transport:
        drive(transport, study, folder, observer=Silence(), should_stop=should_stop)
    return Result(folder)


@dataclass
class Recorder(InProcessTransport):
    """Carries messages as ever, and notes them."""

    down: list[tuple[SiteId, Message]] = field(default_factory=list)
    up: list[tuple[SiteId, Message]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def exchange(
        self, messages: Mapping[SiteId, Message], **how: Any
    ) -> dict[SiteId, Answer]:
        answers = super().exchange(messages, **how)
        self.down += messages.items()
        self.up += [(s, a) for s, a in answers.items() if isinstance(a, Message)]
        return answers


class Backwards(InProcessTransport):
    """Lets the last site answer first."""

    def exchange(
        self, messages: Mapping[SiteId, Message], **how: Any
    ) -> dict[SiteId, Answer]:
        answers: dict[SiteId, Answer] = {}
        for site in sorted(messages, reverse=True):
            answers |= super().exchange({site: messages[site]}, **how)
        return answers


def require_same_files(one: Result, other: Result, *names: str) -> None:
    """Assert that files of two run folders hold the same bytes, by name: "cases"."""
    for name in names:
        first, second = (getattr(r.folder, f"{name}_file") for r in (one, other))
        assert first.read_bytes() == second.read_bytes(), name


@dataclass
class Faulty(InProcessTransport):
    """Spoils what one site answers in one round: NaN in its tensors, or no answer."""

    site: SiteId = "b"
    round: int = 1
    fault: str = "nan"

    def __post_init__(self) -> None:
        super().__init__()

    def exchange(
        self, messages: Mapping[SiteId, Message], **how: Any
    ) -> dict[SiteId, Answer]:
        answers = super().exchange(messages, **how)
        sent, answer = messages.get(self.site), answers.get(self.site)
        ends = {"join", "end_round"}
        if sent is None or sent.kind in ends or sent.header["round"] != self.round:
            return answers
        assert isinstance(answer, Message)
        if self.fault == "silent":
            answers[self.site] = SiteFailure("timeout", "no answer")
        else:
            answers[self.site] = _with_nan(answer)
        return answers


def _with_nan(answer: Message) -> Message:
    """The answer of a site that computed NaN, as it would have been measured."""
    tensors = {
        name: torch.full_like(tensor, float("nan"))
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in answer.tensors.items()
    }
    spoiled = Message(answer.kind, answer.header, pack(tensors))
    return replace(spoiled, norms=measure(spoiled, Yardstick({})))


class Ward:
    """Hospitals in this process that answer exchanges directly: values, no messages.

    Args:
        study: The study.
    """

    def __init__(self, study: Study) -> None:
        ids = transport_sites(study)
        self.site_ids = (POOLED_SITE,) if POOLED_SITE in ids else ids
        cache = Path(study.cache or "")
        self.benches = {site: Workbench(study, site, cache) for site in self.site_ids}
        bench = self.benches[self.site_ids[0]]
        self.strategy, self.task = bench.strategy, bench.task
        self.privates = dict.fromkeys(self.site_ids, Private())
        self.public = study.sites.public if self.strategy.needs_public else None
        self.server: Server = self.strategy.initial(
            fresh_server(study, self.task, self.strategy)
        )

    def cohort(self, number: int = 1, **examples: int) -> Cohort:
        """All sites; `examples` claims other numbers of examples for some."""
        members = tuple(
            Member(site, examples.get(site, bench.num_examples))
            for site, bench in self.benches.items()
            if site != self.public
        )
        steps, public = self.benches[self.site_ids[0]].steps, None
        if self.public is not None:
            public = Member(self.public, self.benches[self.public].num_examples)
        return Cohort(members, steps, number, rng_seed=1, public=public)

    def answer(self, exchange: Exchange, number: int = 1) -> dict[SiteId, Any]:
        """Let every addressed site act, and keep what it keeps."""
        replies = {}
        for site in exchange.site_ids:
            bench = self.benches[site]
            content = {**exchange.content, **exchange.content_by_site.get(site, {})}
            action = getattr(bench.strategy, exchange.action)
            context = HospitalContext(bench, self.privates[site], number)
            outcome = action(context, **content)
            replies[site] = outcome.payload
            self.privates[site] = outcome.private or self.privates[site]
        return replies

    def finish(self, half: ServerHalf, drop: SiteId = "") -> Server:
        """Drive one server half to its end; replies of `drop` never arrive."""
        try:
            request = next(half)
            while True:
                replies = self.answer(request)
                replies.pop(drop, None)
                request = half.send(replies)
        except StopIteration as end:
            server: Server = end.value
            return server
