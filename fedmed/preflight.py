"""Before a run: what would fail later is refused at once, what is open is decided."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from fedmed.errors import ConfigError, FedMedError, ResumeError
from fedmed.join import Joined
from fedmed.message import SiteId
from fedmed.profile import check_profile
from fedmed.resolve import load_strategy
from fedmed.runfolder import RunFolder
from fedmed.spelling import did_you_mean
from fedmed.strategy import Strategy
from fedmed.study import Study, expand, study_from_dict
from fedmed.task import Task, resolve_device

logger = logging.getLogger(__name__)


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
    check_profile(study.to_dict())
    if study.transport.name != "deployment":
        _check_files(study)
    # The server half of a strategy reaches this function and may never open a scan.
    importlib.import_module("sites.data").preprocessing_of(study)
    known = [field.name for field in dataclasses.fields(Augmentation)]
    for name in study.train.augmentation:
        if name not in known:
            asked = did_you_mean(name, known)
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


def check_method(
    strategy: Strategy, study: Study, task: Task, num_training: int
) -> None:
    """Refuse data, or too few sites, that a method cannot be trained on.

    Args:
        strategy: The method.
        study: The study.
        task: What is to be learned.
        num_training: Sites that train.

    Raises:
        ConfigError: If the first exchange could only fail.
    """
    strategy.check_task(task, study.train.batch_size)
    needed, drawn = strategy.smallest_cohort, study.sites_per_round
    if num_training < needed:
        held_out = ", ".join(study.split.held_out) or "none"
        raise ConfigError(
            f"strategy {study.strategy.name!r} needs {needed} sites that train, and "
            f"there are {num_training} (held out: {held_out})",
            hint="Train at more sites, or choose a method without episodes.",
        )
    if drawn is not None and drawn < needed:
        raise ConfigError(
            f"strategy {study.strategy.name!r} needs {needed} sites in a round, and "
            f"sites_per_round is {drawn}",
            hint=f"Set sites_per_round: {needed} or more.",
        )


def check_options(target: Callable[..., Any], study: Study, ours: set[str]) -> None:
    """Check a transport's options.

    Raises:
        ConfigError: If one is unknown; names the nearest known one.
    """
    known = sorted(set(inspect.signature(target).parameters) - ours)
    for name in study.transport.options:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ConfigError(
                f"unknown key 'transport.{name}'{did_you_mean(name, known)}",
                hint=f"Options of transport {study.transport.name!r}: {listed}.",
            )


def settle(study: Study, folder: RunFolder, cache: Path) -> Study:
    """Decide what the study leaves to this machine, once for the whole run.

    A run that goes on keeps what its lock file says.

    Args:
        study: The study; `train.precision` and `train.compile` may be "auto".
        folder: The run folder.
        cache: Where prepared cases and measurements lie.

    Returns:
        The study with nothing left to decide.
    """
    asked = [key for key in _MEASURED if getattr(study.train, key) == "auto"]
    if not asked:
        return study
    before = None
    if folder.lock_file.exists():
        before = study_of_lock(folder.read_lock()).train
    for key in asked:
        found = _decide(key, study, cache) if before is None else getattr(before, key)
        train = study.train.model_copy(update={key: found})
        study = study.model_copy(update={"train": train})
    return study


_MEASURED = ("precision", "compile")
"""Keys of `train` that may be left to a measurement; compiling knows the precision."""


def _decide(key: str, study: Study, cache: Path) -> str | bool:
    card, sites = importlib.import_module("sites.data").list_sites(study, cache)
    task = Task.of(card)
    found: str | bool
    if key == "precision":
        decide = importlib.import_module("fedmed.training.precision").decide_precision
        found = decide(study, task, cache)
    else:
        decide = importlib.import_module("fedmed.training.compiling").decide_compile
        found = decide(study, task, cache, study.sites_per_round or len(sites))
    logger.info("train.%s: auto is %s on this machine", key, found)
    return found


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
    for key in _MEASURED:
        if now["train"][key] == "auto":
            now["train"][key] = before["train"][key]
    changed = differences(before, now)
    if changed:
        raise ResumeError(
            f"{folder.path.name} holds a run of another study: "
            + "; ".join(changed[:5]),
            hint="Resume with the same study file and overrides, or choose --out.",
        )


def require_public(study: Study, hospitals: Collection[SiteId]) -> SiteId:
    """Give the name of the public site, which the strategy needs.

    Args:
        study: The study.
        hospitals: Names of the sites that there are beside it.

    Raises:
        ConfigError: If the study names none.
    """
    if study.sites.public is None:
        listed = ", ".join(sorted(hospitals)[:20])
        raise ConfigError(
            f"strategy {study.strategy.name!r} distils on public images, and the study "
            "names no site that has them",
            hint=f"Set sites.public to one of {listed}: every hospital may then open "
            "its images, and it neither trains nor is it tested.",
        )
    return study.sites.public


def refuse_changed_data(folder: RunFolder, joined: Joined) -> None:
    """A run must end on the data it began with.

    Args:
        folder: The run folder.
        joined: The sites, as they present themselves now.

    Raises:
        ResumeError: If images, labels or splits are not those of the lock file.
    """
    lock = folder.read_lock()
    data = {**joined.data, "the public site": joined.public_data}
    before = {**lock.get("data", {}), "the public site": lock.get("public", {})}
    changed = [
        site
        for site in sorted({*before, *data})
        if before.get(site, {}).get("fingerprint")
        != data.get(site, {}).get("fingerprint")
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


_FREE_TO_CHANGE = (
    "transport",
    "train.gpu_memory_fraction",
    "tolerance.timeout_s",
    "tolerance.retries",
    "checkpoint",
    "sites.ledger_digests",
    "cache",
    "title",
    "report",
)
"""Keys that do not change numbers; a run may be resumed with others."""


def what_counts(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Copy a study's mapping without the keys that do not change numbers."""
    kept: dict[str, Any] = {}
    for key, value in content.items():
        path = f"{prefix}{key}"
        if path not in _FREE_TO_CHANGE:
            nested = isinstance(value, Mapping)
            kept[key] = what_counts(value, f"{path}.") if nested else value
    return kept


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
