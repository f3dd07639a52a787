"""Running a study: open everything by name, drive the engine, write the results."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmed import __version__
from fedmed.checkpoint import Checkpoint, Checkpoints
from fedmed.engine import Engine, restored
from fedmed.errors import ConfigError, FedMedError, ResumeError
from fedmed.join import Joined, join
from fedmed.message import SiteId
from fedmed.partition import StatePartition
from fedmed.resolve import load_strategy, require_own_packages
from fedmed.runfolder import (
    CLASSIFICATION_COLUMNS,
    SEGMENTATION_COLUMNS,
    Observer,
    RunFolder,
)
from fedmed.storage import RunLock, remove_leftovers, write_atomic, write_state
from fedmed.strategy import POOLED_SITE, Server, Strategy
from fedmed.study import Study, expand, study_from_dict
from fedmed.summary import score_rows, summarise
from fedmed.task import Task, build_model, build_optimizer, resolve_device
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


def make_transport(study: Study) -> Transport:
    """Make the transport that a study names.

    Raises:
        ConfigError: If an option is unknown.
    """
    options = study.transport.options
    if study.transport.name == "inprocess":
        from fedmed.transports.inprocess import InProcessTransport

        kind: Callable[..., Transport] = InProcessTransport
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


def check_options(target: Callable[..., Any], study: Study, ours: set[str]) -> None:
    """Check a transport's options.

    Raises:
        ConfigError: If one is unknown; names the nearest known one.
    """
    known = sorted(set(inspect.signature(target).parameters) - ours)
    for name in study.transport.options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            asked = f", did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(known) or "none"
            raise ConfigError(
                f"unknown key 'transport.{name}'{asked}",
                hint=f"Options of transport {study.transport.name!r}: {listed}.",
            )


def host_spec(study: Study, folder: RunFolder) -> HostSpec:
    """How any process opens a host of this study."""
    options = {
        "study": study.to_dict(),
        "folder": str(folder.path.resolve()),
        "cache": str(cache_folder(study).resolve()),
    }
    return HostSpec(HOST_FACTORY, options, threads=study.train.threads)


def transport_sites(study: Study) -> tuple[SiteId, ...]:
    """Every host of the study: the real sites, and the pooled one if needed.

    Raises:
        ConfigError: If pooling is asked for in a deployment, or a name is taken.
    """
    data = importlib.import_module("sites.data")
    _, found = data.list_sites(study, cache_folder(study))
    names = tuple(sorted(site.site_id for site in found))
    if POOLED_SITE in names:
        raise ConfigError(f"a site may not be called {POOLED_SITE!r}")
    strategy = load_strategy(study.strategy.name, study.strategy.options)
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
    checkpoint = newest_checkpoint(folder)
    at_round = checkpoint.round if checkpoint else 0
    transport.open(host_spec(study, folder), site_ids)
    joined = join(transport, study, site_ids, at_round)
    if at_round:
        _refuse_changed_data(folder, joined)
    strategy = load_strategy(study.strategy.name, study.strategy.options)
    server = strategy.initial(fresh_server(study, joined.task, strategy))
    best = None
    if checkpoint is not None:
        server, best = restored(server, checkpoint), checkpoint.facts.get("best")
    folder.write_lock(lock_content(study, strategy, joined))
    folder.cut_back(at_round)
    engine = Engine(
        study=study,
        strategy=strategy,
        transport=transport,
        folder=folder,
        members=joined.members,
        evaluated=joined.evaluated,
        observer=observer,
        columns=columns_of(joined.task),
        score=functools.partial(score_rows, joined.task.kind),
        should_stop=should_stop,
    )
    server, finished = engine.run(server, best)
    if not finished:
        return RunResult(folder.path, finished=False)
    return _finish(study, joined, folder, server)


def newest_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """Read the checkpoint to go on from, and say so if a newer one is damaged."""
    checkpoint, damaged = Checkpoints(folder.checkpoints).load_newest()
    if checkpoint is not None and damaged:
        logger.error(
            "the checkpoint of round %d is damaged; going on from round %d",
            max(damaged),
            checkpoint.round,
        )
    return checkpoint


def check_choices(study: Study) -> None:
    """Refuse at once what every site would refuse later.

    Raises:
        ConfigError: If a loss, a device, an augmentation, a preparation or a file that
            the study names does not exist, or a value is impossible.
    """
    from fedmed.training.augment import Augmentation

    _check_loss(study)
    _check_device(study)
    _check_norm(study)
    if study.transport.name != "deployment":
        _check_files(study)
    # The server half of a strategy reaches this function and may never open a scan.
    importlib.import_module("sites.data").preprocessing_of(study)
    known = [field.name for field in dataclasses.fields(Augmentation)]
    for name in study.train.augmentation:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            asked = f", did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown key 'train.augmentation.{name}'{asked}")
    Augmentation(**study.train.augmentation)


def _check_loss(study: Study) -> None:
    """Try the loss on two pixels: wrong options show only when it is computed."""
    from fedmed.losses.build import build_loss

    options = study.train.loss_options
    loss = build_loss(study.train.loss, **options)
    try:
        num_classes = len(options.get("class_weights") or (0, 0))
        value = loss(torch.zeros(1, num_classes, 2), torch.zeros(1, 2, dtype=torch.int))
        if not torch.isfinite(value):
            raise ValueError(f"the loss of two pixels is {value.item()}")
    except Exception as error:
        told = error.message if isinstance(error, FedMedError) else str(error)
        raise ConfigError(
            f"train.loss_options {dict(options)} do not fit the loss "
            f"{study.train.loss!r}: {told.partition(chr(10))[0]}"
        ) from error


def _check_norm(study: Study) -> None:
    options = study.model.options
    if options.get("norm") == "batch_per_site" and not options.get("site_ids"):
        raise ConfigError(
            "model.norm is batch_per_site, which needs the names of the sites in "
            "model.site_ids",
            hint="One set of normalisation per site is what fedbn does: set "
            "model.norm: batch and strategy.name: fedbn.",
        )


def _check_files(study: Study) -> None:
    """Look for the files that a simulation's sites will read on this machine."""
    files = {"split.file": study.split.file, "sites.policy": study.sites.policy}
    for key, file in files.items():
        if file and not expand(file).is_file():
            raise ConfigError(
                f"{key}: there is no file {file!r}",
                hint="A relative path starts at the folder where fedmed is called.",
            )
    if study.sites.policy:
        policies = importlib.import_module("sites.policy")
        policies.load_policy(expand(study.sites.policy))


def _check_device(study: Study) -> None:
    try:
        torch.device(resolve_device(study.train.device))
    except RuntimeError:
        raise ConfigError(
            f"train.device must be cpu, cuda or auto (seen: {study.train.device!r})"
        ) from None


def fresh_server(study: Study, task: Task, strategy: Strategy) -> Server:
    """The server before round 1: initial weights, no memory."""
    model = _built(study, task, strategy)
    partition = StatePartition.of(model, strategy.keeps)
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
    study: Study, joined: Joined, folder: RunFolder, server: Server
) -> RunResult:
    write_state(folder.model_file, server.shared, {"study": study.name})
    summary = {
        "strategy": study.strategy.name,
        "seed": study.seed,
        "rounds": server.round,
        **summarise(
            folder.cases_file,
            joined.task.kind,
            rounds=server.round,
            held_out=study.split.held_out,
            records=folder.read_rounds(),
        ),
    }
    folder.write_summary(summary)
    return RunResult(folder.path, summary)


def check_folder(folder: RunFolder, study: Study, *, resume: bool) -> None:
    """Refuse a folder that holds a run, unless it is this one and to be resumed.

    Raises:
        ResumeError: If it holds a run and `resume` is False, or one of another study.
    """
    if not folder.lock_file.exists():
        return
    if not resume:
        raise ResumeError(
            f"{folder.path} already holds a run",
            hint="Go on with it with --resume, or choose another folder with --out.",
        )
    before = study_of_lock(folder.read_lock()).to_dict()
    section = study.strategy
    sync = load_strategy(section.name, section.options).sync
    now = study.to_dict()
    now["strategy"] = {**now["strategy"], "sync": sync}
    changed = differences(before, now)
    if changed:
        raise ResumeError(
            f"{folder.path.name} holds a run of another study: "
            + "; ".join(changed[:5]),
            hint="Resume with the same study file and overrides, or choose --out.",
        )


def _refuse_changed_data(folder: RunFolder, joined: Joined) -> None:
    """A run must end on the data it began with."""
    before = folder.read_lock().get("data", {})
    changed = [
        site
        for site in sorted({*before, *joined.data})
        if before.get(site, {}).get("fingerprint")
        != joined.data.get(site, {}).get("fingerprint")
    ]
    if changed:
        raise ResumeError(
            f"the images, labels or splits of {', '.join(changed)} are not those that "
            "the run began with",
            hint="Put the data back as they were, or start a new run with --out.",
        )


def study_of_lock(lock: Mapping[str, Any]) -> Study:
    """Read the study back from study.lock.yaml.

    Raises:
        ResumeError: If it is no study that this version knows.
    """
    known = {name: lock[name] for name in Study.model_fields if name in lock}
    try:
        return study_from_dict(known, where="study.lock.yaml")
    except ConfigError as error:
        raise ResumeError(
            f"the run cannot be read back: {error.message}",
            hint="It was changed, or another version of fedmed wrote it.",
        ) from None


_FREE_TO_CHANGE = ("transport", "tolerance.timeout_s", "tolerance.retries", "cache")
"""Keys that do not change numbers; a run may be resumed with others."""


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """List the keys in which two studies differ, as "key: old -> new"."""
    found: list[str] = []
    for key in sorted({*before, *after}):
        path = f"{prefix}{key}"
        if path in _FREE_TO_CHANGE:
            continue
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{path}.")
        elif old != new:
            found.append(f"{path}: {old!r} -> {new!r}")
    return found
