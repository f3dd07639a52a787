"""Legs: the runs of a comparison, one a method, a seed and a choice of sites.

A leg is known by its content, a hash of the resolved study and of the data: what was
trained once is not trained again, under whatever label it is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fedmed.errors import ConfigError, ResumeError, StorageError, UsageError
from fedmed.preflight import check_folder, what_counts
from fedmed.resolve import load_strategy
from fedmed.run import cache_folder
from fedmed.runfolder import COMPARISON_FILE, RunFolder
from fedmed.spelling import did_you_mean
from fedmed.storage import write_atomic
from fedmed.study import Study, apply_overrides, study_from_dict

INDEX_FILE = COMPARISON_FILE

ALONE = "separate"
"""The method in which every site trains for itself."""

Protocol = Literal["within_site", "leave_one_site_out", "cross_site"]
"""Who trains and who tests; see `turns_of`."""

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


SECTIONS = ("train", "model", "preprocess", "evaluate")
"""Sections of the study of which a method may change keys, in its brackets."""


@dataclass(frozen=True)
class Turn:
    """Who trains and who tests in a leg; every site does both if nothing is set.

    Attributes:
        held_out: The site that is tested and does not train.
        trained_on: The only site that trains; all are tested.
    """

    held_out: str | None = None
    trained_on: str | None = None


@dataclass(frozen=True)
class Leg:
    """One run of a comparison.

    Attributes:
        strategy: The method as asked for: a strategy's name, then perhaps its options
            in brackets; the label of its row.
        held_out: As in `Turn`.
        folder: Of the run, in the folder of the comparison.
        content: Hash of everything that its numbers depend on.
        trained_on: As in `Turn`.
    """

    strategy: str
    seed: int
    held_out: str | None
    folder: str
    content: str = ""
    trained_on: str | None = None


def split_words(text: str) -> tuple[str, ...]:
    """Split at commas, but not at those in brackets.

    Example:
        >>> split_words("joint, ummkd[kd_weight=0,sync=step]")
        ('joint', 'ummkd[kd_weight=0,sync=step]')
    """
    words = re.findall(r"(?:[^,\[\]]|\[[^\]]*\]?|\])+", text)
    return tuple(word.strip() for word in words if word.strip())


def read_method(label: str) -> tuple[str, tuple[str, ...]]:
    """Read a method: a strategy's name and its options.

    Args:
        label: E.g. "ms_net" or "ms_net[sync=round,warmup_rounds=2]"; a key of the study
            is written with its section: "scaffold[train.optimizer.name=sgd]".

    Returns:
        The name, and the options as overrides.

    Raises:
        UsageError: If the brackets do not match.

    Example:
        >>> read_method("ummkd[kd_weight=0]")
        ('ummkd', ('kd_weight=0',))
    """
    found = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]+)\])?", label)
    if found is None:
        raise UsageError(
            f"{label!r} is no method",
            hint="Write a strategy, with options in brackets: ms_net[sync=round].",
        )
    name, options = found.group(1).strip(), found.group(2) or ""
    return name, tuple(word.strip() for word in options.split(",") if word.strip())


def _of_study(option: str) -> bool:
    """Whether an option in brackets is a key of the study, not of the strategy."""
    key = option.partition("=")[0].strip()
    return key == "rounds" or key.partition(".")[0] in SECTIONS


def turns_of(protocol: Protocol, sites: Sequence[str]) -> tuple[Turn, ...]:
    """List who trains and who tests in the runs of one method and seed.

    Args:
        protocol: "within_site": every site trains, and is tested on its own test split.
            "leave_one_site_out": each site in turn is tested, with all of its cases,
            by a model that the others trained. "cross_site": each site in turn trains
            alone; it is tested on its own test split, the others on all their cases.
        sites: All sites of the study.

    Raises:
        UsageError: If there are too few sites.
    """
    if protocol == "within_site":
        return (Turn(),)
    if len(sites) < 2:
        raise UsageError(f"{protocol} needs two sites; the study has {len(sites)}")
    if protocol == "leave_one_site_out":
        return tuple(Turn(held_out=site) for site in sites)
    return tuple(Turn(trained_on=site) for site in sites)


def read_protocol(name: str, *, leave_one_site_out: bool = False) -> Protocol:
    """Read which protocol was asked for.

    Args:
        name: Of a protocol; "" is within_site.
        leave_one_site_out: The older way to ask for that one.

    Raises:
        UsageError: If there is none of this name, or two were asked for.
    """
    if leave_one_site_out:
        if name not in {"", "leave_one_site_out"}:
            raise UsageError(f"give --leave-one-site-out or --protocol {name}")
        return "leave_one_site_out"
    for known in PROTOCOLS:
        if known == (name or "within_site"):
            return known
    raise UsageError(
        f"there is no protocol {name!r}{did_you_mean(name, PROTOCOLS)}",
        hint=f"Known: {', '.join(PROTOCOLS)}.",
    )


def make_legs(
    methods: Sequence[str], seeds: Sequence[int], turns: Sequence[Turn]
) -> Iterator[Leg]:
    """List the runs of a comparison.

    Args:
        methods: As `read_method` reads them.
        seeds: Seeds.
        turns: Who trains and who tests.
    """
    for label in methods:
        name, _ = read_method(label)
        for seed in seeds:
            # A model trained on one site alone is no generalisation: `separate` is
            # the deck's Intra-site row and is run once, with every site in it.
            for turn in (Turn(),) if name == ALONE else turns:
                plain = re.sub(r"[^\w.+-]+", "-", label).strip("-")
                yield Leg(
                    label,
                    seed,
                    turn.held_out,
                    f"{plain}-seed{seed}{_suffix(turn)}",
                    trained_on=turn.trained_on,
                )


def _suffix(turn: Turn) -> str:
    if turn.trained_on is not None:
        return f"-on-{turn.trained_on}"
    return "" if turn.held_out is None else f"-without-{turn.held_out}"


def study_of(
    content: Mapping[str, Any], study: Study, leg: Leg, *, sites: Sequence[str] = ()
) -> Study:
    """Resolve the study of one leg.

    Args:
        content: The study's mapping as written, so that what was left open shows.
        study: The same, checked.
        leg: The leg.
        sites: All sites of the study, if the leg trains on one of them alone.

    Raises:
        ConfigError: If the method does not exist, an option is none of its, or it
            cannot train at one site.
    """
    name, given = read_method(leg.strategy)
    before = dict(content.get("strategy", {}))
    options = before if before.get("name") == name else {}
    sync = {"sync": before["sync"]} if "sync" in before and not options else {}
    section = {**sync, **options, "name": name}
    try:
        load_strategy(name, {k: v for k, v in section.items() if k != "name"})
    except ConfigError:
        section.pop("sync", None)  # joint has one mode only
    section = apply_overrides(section, [word for word in given if not _of_study(word)])
    changed = {**content, "seed": leg.seed, "strategy": section}
    changed = apply_overrides(changed, [word for word in given if _of_study(word)])
    split = dict(content.get("split", {}))
    # Every seed divides the cases alike, so that cases can be paired.
    split.setdefault("seed", study.seed)
    if leg.held_out is not None:
        split["held_out"] = [leg.held_out]
    if leg.trained_on is not None:
        split["held_out"] = [site for site in sites if site != leg.trained_on]
    changed["split"] = split
    own = study_from_dict(changed, where=f"the study for {leg.strategy}")
    strategy = load_strategy(own.strategy.name, own.strategy.options)
    wants_others = strategy.needs_others or strategy.smallest_cohort > 1
    if leg.trained_on is not None and wants_others:
        raise ConfigError(
            f"{leg.strategy} lets hospitals judge what others taught; under cross_site "
            "one trains alone",
            hint="Run it with --protocol leave_one_site_out, into the same --out.",
        )
    return own


def data_hash(study: Study) -> str:
    """Hash the images and labels of all sites; prepares what is not prepared yet.

    Args:
        study: The study; a deployment's data cannot be seen from here and give "".
    """
    if study.transport.name == "deployment":
        return ""
    sites = importlib.import_module("sites.data").SiteList(study, cache_folder(study))
    digest = hashlib.blake2b(digest_size=16)
    for source in sites.everybody:
        splits = sites.open(source.site_id).splits.values()
        cases = sorted(f"{c.case_id}/{c.content}" for split in splits for c in split)
        digest.update(json.dumps([source.site_id, cases]).encode())
    return digest.hexdigest()


def content_hash(study: Study, data: str) -> str:
    """Hash what the numbers of a run depend on.

    Args:
        study: The resolved study; keys that change no number are left out.
        data: As `data_hash` gives it.
    """
    plain = what_counts(study.to_dict())
    if not study.train.compile:
        del plain["train"]["compile"]  # the hash that comparisons before this key have
    if not study.evaluate.selected:
        del plain["evaluate"]["selected"]  # likewise
    strategy = load_strategy(study.strategy.name, study.strategy.options)
    # Options that were left out count with their defaults.
    plain["strategy"] = [study.strategy.name, asdict(strategy)]
    text = json.dumps([plain, data], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def place_legs(
    folder: Path, studies: Mapping[Leg, Study], data: str
) -> dict[Leg, Study]:
    """Give every leg its folder: that of a run of equal content, where there is one.

    Args:
        folder: Of the comparison.
        studies: Resolved study of each leg.
        data: Hash of the data.

    Raises:
        ResumeError: If the folder of a leg holds a run of another study, or of other
            data.
    """
    known = {run["folder"]: run.get("content", "") for run in read_index(folder)}
    where = {content: name for name, content in known.items() if content}
    placed = {}
    for leg, study in studies.items():
        content = content_hash(study, data)
        name = where.setdefault(content, leg.folder)
        run_folder = RunFolder(folder / name)
        is_there = run_folder.lock_file.exists()
        if is_there:
            check_folder(run_folder, study, resume=True)
        # What was deleted by hand is trained anew.
        if is_there and known.get(name, content) not in {content, ""}:
            raise ResumeError(
                f"{name} was trained on other images, labels or splits, or by a "
                "version with other defaults",
                hint=f"Put the data back as they were, delete {name} to train it anew, "
                "or choose another --out.",
            )
        placed[replace(leg, folder=name, content=content)] = study
    return placed


def write_index(folder: Path, study: Study, legs: Sequence[Leg]) -> None:
    """Write compare.json; runs of earlier calls stay in the table.

    Raises:
        UsageError: If the folder holds a single run.
        StorageError: If its compare.json is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if RunFolder(folder).lock_file.exists():
        raise UsageError(
            f"{folder} holds a single run", hint="Choose another folder with --out."
        )
    runs = {_row_of(run): run for run in read_index(folder)}
    runs |= {_row_of(run): run for run in map(asdict, legs)}
    content = {"study": study.name, "runs": list(runs.values())}
    write_atomic(folder / INDEX_FILE, json.dumps(content, indent=1).encode())


def _row_of(run: Mapping[str, Any]) -> tuple[Any, ...]:
    keys = ("strategy", "seed", "held_out", "trained_on")
    return tuple(run.get(key) for key in keys)


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Read the runs that compare.json names; none if there is no such file.

    Raises:
        StorageError: If it is damaged.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        return []
    try:
        runs = list(json.loads(index.read_text())["runs"])
        return [{**run, "folder": str(run["folder"])} for run in runs]
    except (ValueError, KeyError, TypeError):
        raise StorageError(
            f"{index.name} in {str(index.parent)!r} is damaged",
            hint="Restore it, or choose another folder with --out.",
        ) from None
