"""Running a study: open everything by name, drive the engine, write the results."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fedmed import __version__
from fedmed.checkpoint import Checkpoint, Checkpoints
from fedmed.engine import Engine, restored
from fedmed.errors import ConfigError, FedMedError
from fedmed.join import Joined, join
from fedmed.message import SiteId
from fedmed.preflight import (
    check_choices,
    check_folder,
    check_method,
    check_options,
    refuse_changed_data,
    require_public,
    settle,
)
from fedmed.profile import profile_of
from fedmed.resolve import load_strategy, require_own_packages
from fedmed.runfolder import (
    CLASSIFICATION_COLUMNS,
    SEGMENTATION_COLUMNS,
    Observer,
    RunFolder,
)
from fedmed.selection import Best
from fedmed.storage import RunLock, remove_leftovers, write_atomic, write_state
from fedmed.strategy import POOLED_SITE, Server, Strategy
from fedmed.study import Study
from fedmed.summary import score_rows, summarise, summarise_unseen
from fedmed.task import Task, build_model, build_optimizer
from fedmed.transports.transport import HostSpec, Transport

logger = logging.getLogger(__name__)

HOST_FACTORY = "sites.host:open_host"
STUDY_FILE = "study.json"
"""Where Flower's server process finds the study, in the run folder."""


@dataclass(frozen=True)
class RunResult:
    """What a run ended with.

    Attributes:
        folder: The run folder.
        summary: Content of summary.json; empty if the run was stopped early.
        finished: False if it was stopped between rounds and can be resumed.
    """

    folder: Path
    summary: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = True


class Silence:
    """An observer that shows nothing."""

    def round_started(self, number: int) -> None:
        """Show nothing."""

    def exchanged(
        self, number: int, exchange: int, losses: Mapping[str, float]
    ) -> None:
        """Show nothing."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """Show nothing."""


def cache_folder(study: Study) -> Path:
    """Where prepared cases and generated phantoms lie, for all runs of a machine."""
    named = study.cache or os.environ.get("FEDMED_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fedmed"


def run_study(
    study: Study,
    out: Path,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Run a study into a folder, or go on with one that was interrupted.

    Args:
        study: The study.
        out: The run folder.
        resume: Go on where the folder's last checkpoint stands.
        observer: Sees progress.
        should_stop: Asked between rounds.

    Raises:
        ResumeError: If the folder holds a run and `resume` is False, or holds a run
            of another study.
        RunLockedError: If another process works in the folder.
    """
    require_own_packages()
    load_strategy(study.strategy.name, study.strategy.options)
    check_choices(study)
    folder = RunFolder(out)
    folder.create()
    with RunLock(folder.path):
        check_folder(folder, study, resume=resume)
        study = settle(study, folder, cache_folder(study))
        remove_leftovers(folder.path)
        if study.transport.name in {"flower", "deployment"}:
            return _run_with_flower(study, folder, observer or Silence(), should_stop)
        with make_transport(study) as transport:
            return drive(
                transport,
                study,
                folder,
                observer=observer or Silence(),
                should_stop=should_stop,
            )


def check_start(study: Study) -> None:
    """Refuse what the server of a run would refuse before its first round.

    Args:
        study: The study. A deployment's data cannot be seen from here: only its
            choices are checked.

    Raises:
        ConfigError: If the study does not fit its method or its data.
    """
    check_choices(study)
    if study.transport.name == "deployment":
        return
    transport_sites(study)
    data = importlib.import_module("sites.data")
    card, sites = data.list_sites(study, cache_folder(study))
    strategy = load_strategy(study.strategy.name, study.strategy.options)
    num_training = len({site.site_id for site in sites} - {*study.split.held_out})
    check_method(strategy, study, Task.of(card), num_training)
    strategy.initial(fresh_server(study, Task.of(card), strategy))


def make_transport(study: Study) -> Transport:
    """Make the transport that a study names.

    Raises:
        ConfigError: If an option is unknown.
    """
    options = study.transport.options
    if study.transport.name == "inprocess":
        from fedmed.transports.inprocess import InProcessTransport

        kind: Callable[..., Transport] = InProcessTransport
    elif study.transport.name == "workers":
        kind = importlib.import_module("fedmed.transports.workers").WorkersTransport
    else:
        from fedmed.transports.ray import RayTransport

        kind = RayTransport
    check_options(kind, study, set())
    return kind(**options)


def _run_with_flower(
    study: Study,
    folder: RunFolder,
    observer: Observer,
    should_stop: Callable[[], bool],
) -> RunResult:
    """Let Flower's own processes run the study; follow it through the run folder."""
    from fedmed.transports import flower

    text = json.dumps(study.to_dict())
    write_atomic(folder.path / STUDY_FILE, text.encode())
    folder.stop_file.unlink(missing_ok=True)
    simulated = study.transport.name == "flower"
    run = flower.run_simulation if simulated else flower.run_deployment
    spec, site_ids = host_spec(study, folder), transport_sites(study)
    check_options(run, study, {"folder", "spec", "site_ids", "driver"})
    with folder.followed(observer, should_stop):
        run(folder.path, spec, site_ids, **study.transport.options)
    summary = folder.read_summary()
    return RunResult(folder.path, summary, bool(summary))


def host_spec(study: Study, folder: RunFolder) -> HostSpec:
    """How any process opens a host of this study."""
    options = {
        "study": study.to_dict(),
        "folder": str(folder.path.resolve()),
        "cache": str(cache_folder(study).resolve()),
        "secrets": str(folder.secrets.resolve()),
    }
    return HostSpec(HOST_FACTORY, options, threads=study.train.threads)


def transport_sites(study: Study) -> tuple[SiteId, ...]:
    """Every host of the study: real sites, the public or the pooled one if needed.

    Raises:
        ConfigError: If pooling is asked for in a deployment, a name is taken, or the
            strategy needs a public site and the study names none.
    """
    data = importlib.import_module("sites.data")
    _, found = data.list_sites(study, cache_folder(study))
    names = tuple(sorted(site.site_id for site in found))
    strategy = load_strategy(study.strategy.name, study.strategy.options)
    if strategy.needs_public:
        names = tuple(sorted((*names, require_public(study, names))))
    if POOLED_SITE in names:
        raise ConfigError(f"a site may not be called {POOLED_SITE!r}")
    if not strategy.pools_data:
        return names
    if study.transport.name == "deployment":
        raise ConfigError(
            f"strategy {study.strategy.name!r} pools the data of all sites, which no "
            "deployment can do",
            hint="Choose a federated strategy, or another transport.",
        )
    return tuple(sorted((*names, POOLED_SITE)))


def drive(
    transport: Transport,
    study: Study,
    folder: RunFolder,
    *,
    observer: Observer,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Run a study over a transport that is not open yet.

    Args:
        transport: Any transport.
        study: The study.
        folder: The run folder, created and locked.
        observer: Sees progress.
        should_stop: Asked between rounds.
    """
    site_ids = transport_sites(study)
    study = settle(study, folder, cache_folder(study))
    checkpoints = Checkpoints(folder.checkpoints)
    checkpoint = newest_checkpoint(checkpoints)
    at_round = checkpoint.round if checkpoint else 0
    transport.open(host_spec(study, folder), site_ids)
    joined = join(transport, study, site_ids, at_round)
    if at_round:
        refuse_changed_data(folder, joined)
    strategy = load_strategy(study.strategy.name, study.strategy.options)
    check_method(strategy, study, joined.task, len(joined.members))
    server = strategy.initial(fresh_server(study, joined.task, strategy))
    best, usual_norms = None, {}
    if checkpoint is not None:
        server = restored(server, checkpoint)
        best = Best.read(checkpoint.facts.get("best"))
        usual_norms = checkpoint.facts.get("usual_norms", {})
    folder.write_lock(lock_content(study, strategy, joined))
    folder.cut_back(at_round)
    engine = Engine(
        study=study,
        strategy=strategy,
        transport=transport,
        folder=folder,
        members=joined.members,
        public=joined.public,
        evaluated=joined.evaluated,
        cards={site: facts.get("card", {}) for site, facts in joined.data.items()},
        observer=observer,
        columns=columns_of(joined.task),
        score=functools.partial(score_rows, joined.task.kind),
        should_stop=should_stop,
        checkpoints=checkpoints,
        usual_norms=usual_norms,
    )
    server, finished = engine.run(server, best)
    if not finished:
        return RunResult(folder.path, finished=False)
    return _finish(strategy, joined, folder, server, study=study)


def newest_checkpoint(checkpoints: Checkpoints) -> Checkpoint | None:
    """Read the checkpoint to go on from, and say so if a newer one is damaged."""
    checkpoint, damaged = checkpoints.load_newest()
    if checkpoint is not None and damaged:
        logger.error(
            "the checkpoint of round %d is damaged; going on from round %d",
            max(damaged),
            checkpoint.round,
        )
    return checkpoint


def fresh_server(study: Study, task: Task, strategy: Strategy) -> Server:
    """The server before round 1: initial weights, no memory."""
    model = _built(study, task, strategy)
    partition = strategy.partition(model)
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    shared, _ = partition.split(state)
    return Server(
        shared=shared,
        memory={},
        entries=partition.entries,
        partition=partition,
        optimizer=build_optimizer(study),
        clip_norm=study.train.clip_norm,
    )


def _built(study: Study, task: Task, strategy: Strategy) -> nn.Module:
    """Build the network; what its options make torch say becomes a `ConfigError`."""
    try:
        return build_model(study, task, strategy)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, FedMedError):
            raise
        raise ConfigError(
            f"network {study.model.name!r} cannot be built with the study's options: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error


def columns_of(task: Task) -> tuple[str, ...]:
    """Columns of cases.csv for a task."""
    if task.kind == "classification":
        return CLASSIFICATION_COLUMNS
    return SEGMENTATION_COLUMNS


def lock_content(study: Study, strategy: Strategy, joined: Joined) -> dict[str, Any]:
    """The complete resolved study, as written to study.lock.yaml."""
    content = study.to_dict()
    content["strategy"] = {**content["strategy"], "sync": strategy.sync}
    return content | {
        "held_out": list(study.split.held_out),
        "task": {"kind": joined.task.kind, "classes": list(joined.task.class_names)},
        "data": {site: dict(facts) for site, facts in joined.data.items()},
        "public": dict(joined.public_data),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions that may change numbers."""
    names = ("torch", "numpy", "scipy", "flwr", "ray")
    return {
        "fedmed": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _finish(
    strategy: Strategy,
    joined: Joined,
    folder: RunFolder,
    server: Server,
    *,
    study: Study,
) -> RunResult:
    write_state(folder.model_file, server.shared, {"study": study.name})
    summary = {
        "strategy": study.strategy.name,
        "seed": study.seed,
        "rounds": server.round,
        "profile": profile_of(study.to_dict()).name,
        **summarise(
            folder.cases_file,
            joined.task.kind,
            rounds=server.round,
            held_out=study.split.held_out,
            records=folder.read_rounds(),
        ),
    }
    statistics = {
        entry.name
        for entry in server.entries
        if entry.role == "norm_statistic" and entry.part not in strategy.training_only
    }
    if statistics.intersection(server.partition.kept):
        summary["statistics"] = study.evaluate.statistics
    kind = joined.task.kind
    by_rule = summarise_unseen(folder.unseen_file, kind, rounds=server.round)
    if by_rule:
        summary["unseen"] = by_rule
    if study.evaluate.selected:
        summary["selected"] = _summary_of_selected(folder, kind, study)
    folder.write_summary(summary)
    return RunResult(folder.path, summary)


def _summary_of_selected(
    folder: RunFolder, kind: str, study: Study
) -> dict[str, Any] | None:
    """Numbers of the round that validation picked; None if it could pick none."""
    picked = folder.read_rounds()[-1]["selected"]
    if picked["round"] is None:
        return None
    held_out = study.split.held_out
    number = int(picked["round"])
    numbers = summarise(folder.selected_file, kind, rounds=number, held_out=held_out)
    missing = picked.get("missing", {})
    score = picked["score"]
    return {"round": number, "score": score, **numbers, "missing": missing}
