"""`fedmed compare`: several methods, one study, one table, one report."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from fedmed.checkpoint import Checkpoints
from fedmed.commands.report import tell
from fedmed.commands.run import default_folder, execute, listening, refuse_foreign
from fedmed.leg_pool import LegPool
from fedmed.leg_process import Verdict
from fedmed.leg_progress import LegProgress
from fedmed.leg_speed import Speed, speed_of
from fedmed.legs import (
    INDEX_FILE,
    Leg,
    data_hash,
    make_legs,
    place_legs,
    read_protocol,
    study_of,
    turns_of,
    write_index,
)
from fedmed.report.published import check_published
from fedmed.resolve import load_strategy
from fedmed.run import cache_folder, check_start
from fedmed.runfolder import RunFolder
from fedmed.study import Study, apply_overrides, read_yaml, study_from_dict

logger = logging.getLogger(__name__)

STOPPED = 130
"""Exit code after Ctrl-C."""


def compare_command(
    study_file: Path,
    overrides: tuple[str, ...],
    *,
    strategies: tuple[str, ...],
    seeds: tuple[int, ...],
    protocol: str,
    leave_one_site_out: bool,
    jobs: int,
    transport: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run every leg that is not finished yet, then report."""
    asked_for = read_protocol(protocol, leave_one_site_out=leave_one_site_out)
    if transport is not None:
        overrides = (*overrides, f"transport.name={transport}")
    content = apply_overrides(read_yaml(study_file), overrides)
    study = study_from_dict(content, where=study_file.name)
    check_published(study.report.published, study.report.columns)
    sites = () if asked_for == "within_site" else _sites(study)
    turns = turns_of(asked_for, sites)
    folder = out or default_folder(study)
    refuse_foreign(folder, (INDEX_FILE,))
    asked = make_legs(strategies, seeds, turns)
    wanted = {leg: study_of(content, study, leg, sites=sites) for leg in asked}
    legs = place_legs(folder, wanted, data_hash(study))
    _refuse_at_once(legs.values())
    write_index(folder, study, tuple(legs))
    todo = _unfinished(folder, legs)
    began_s = time.monotonic()
    try:
        spent = _run_all(todo, jobs, quiet=as_json)
    except KeyboardInterrupt:
        spent = None
    if spent is None:
        told = f"stopped; the same command goes on from here (--out {folder})"
        typer.echo(f"fedmed: {told}", err=True)
        sys.exit(STOPPED)
    speed = speed_of(spent, jobs=jobs, wall_s=time.monotonic() - began_s)
    # What actors of another machine compute is not in the time of these processes.
    is_here = "address" not in study.transport.options
    shown = speed if jobs > 1 and spent and is_here else None
    _finish(folder, shown, as_json=as_json)


def _sites(study: Study) -> tuple[str, ...]:
    data = importlib.import_module("sites.data")
    _, found = data.list_sites(study, cache_folder(study))
    return tuple(site.site_id for site in found)


def _refuse_at_once(studies: Iterable[Study]) -> None:
    """Find what a method cannot do before the first trains, not after hours.

    Raises:
        ConfigError: Of the first method that the study does not fit.
    """
    by_method: dict[str, Study] = {}
    for study in studies:
        content = study.to_dict()
        # Seeds and sites left out take turns; what one may do, all may.
        told = {k: v for k, v in content.items() if k not in {"seed", "split"}}
        by_method.setdefault(json.dumps(told, sort_keys=True), study)
    for study in by_method.values():
        check_start(study)


def _unfinished(folder: Path, legs: Mapping[Leg, Study]) -> dict[Path, Study]:
    """Find the runs that are to be made; legs of equal content share one."""
    todo: dict[Path, Study] = {}
    for leg, study in legs.items():
        run_folder = RunFolder(folder / leg.folder)
        if run_folder.summary_file.exists() and run_folder.model_file.exists():
            if not _sites_without_result(run_folder, study):
                continue
            _forget_last_round(run_folder)
        todo.setdefault(run_folder.path, study)
    return todo


def _run_all(
    todo: Mapping[Path, Study], jobs: int, *, quiet: bool
) -> tuple[Verdict, ...] | None:
    """Run legs; give how those side by side ended, or None if not all finished.

    Raises:
        FedMedError: Of the first leg that failed, after all others have ended.
    """
    if not todo:
        return ()
    verdicts: tuple[Verdict, ...] = ()
    if jobs == 1:
        finished = _run_in_turn(todo, quiet=quiet)
    else:
        verdicts = _run_side_by_side(todo, jobs, quiet=quiet)
        finished = len(verdicts) == len(todo) and all(v.finished for v in verdicts)
    for path, study in todo.items() if finished else ():
        lacking = _sites_without_result(RunFolder(path), study)
        if lacking:
            logger.error(
                "%s has no result for %s, which it held out; the same command tries "
                "again",
                path.name,
                ", ".join(lacking),
            )
    return verdicts if finished else None


def _run_in_turn(todo: Mapping[Path, Study], *, quiet: bool) -> bool:
    with listening() as should_stop:
        for number, (path, study) in enumerate(todo.items(), 1):
            if should_stop():
                return False  # asked in the last round of the leg before
            if not quiet:
                typer.echo(f"run {number}/{len(todo)}: {path.name}", err=True)
            resume = RunFolder(path).lock_file.exists()
            result = execute(
                study, path, resume=resume, quiet=quiet, should_stop=should_stop
            )
            if not result.finished:
                return False
    return True


def _run_side_by_side(
    todo: Mapping[Path, Study], jobs: int, *, quiet: bool
) -> tuple[Verdict, ...]:
    rounds = next(iter(todo.values())).rounds
    progress = LegProgress(len(todo), jobs=jobs, rounds=rounds, quiet=quiet)
    with listening() as should_stop, progress:
        verdicts = LegPool(jobs, progress, should_stop).run(todo)
    failed = {p: v.error for p, v in verdicts.items() if v.error is not None}
    for path, error in failed.items():
        hint = " ".join(filter(None, (error.hint, _others(len(failed) - 1))))
        raise type(error)(f"{path.name}: {error.message}", hint=hint)
    return tuple(verdicts.values())


def _others(number: int) -> str:
    return f"({number} more failed.)" if number else ""


def _sites_without_result(run_folder: RunFolder, study: Study) -> tuple[str, ...]:
    """Held-out sites that were to be tested and were not."""
    strategy = load_strategy(study.strategy.name, study.strategy.options)
    if "all" in strategy.keeps:
        return ()  # no network leaves the sites, so there is none to test elsewhere
    sites = run_folder.read_summary().get("sites", {})
    return tuple(site for site in study.split.held_out if site not in sites)


def _forget_last_round(run_folder: RunFolder) -> None:
    """Let the last round, and with it the final evaluation, be run again."""
    rounds = Checkpoints(run_folder.checkpoints).rounds()
    if len(rounds) > 1:
        name = f"round-{rounds[-1]:06d}.safetensors"
        (run_folder.checkpoints / name).unlink()


def _finish(folder: Path, speed: Speed | None, *, as_json: bool) -> None:
    from fedmed.report.page import build_report

    record: dict[str, Any] = {"run": str(folder)}
    if speed is not None:
        record["speed"] = speed.as_dict()
    tell(folder, build_report(folder), record, as_json=as_json)
    if speed is not None and not as_json:
        typer.echo(str(speed))
