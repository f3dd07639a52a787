"""`fedmed compare`: several strategies, one study, one table, one report."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from fedmed.checkpoint import Checkpoints
from fedmed.commands.report import print_table
from fedmed.commands.run import default_folder, execute, refuse_foreign
from fedmed.errors import ConfigError, StorageError, UsageError
from fedmed.preflight import check_folder
from fedmed.report.tables import comparison_table
from fedmed.resolve import load_strategy
from fedmed.run import cache_folder
from fedmed.runfolder import RunFolder
from fedmed.storage import write_atomic
from fedmed.study import Study, apply_overrides, read_yaml, study_from_dict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Leg:
    """One run of a comparison."""

    strategy: str
    seed: int
    held_out: str | None
    folder: str


def compare_command(
    study_file: Path,
    overrides: tuple[str, ...],
    *,
    strategies: tuple[str, ...],
    seeds: tuple[int, ...],
    leave_one_site_out: bool,
    transport: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run every leg that is not finished yet, then report."""
    if transport is not None:
        overrides = (*overrides, f"transport.name={transport}")
    content = apply_overrides(read_yaml(study_file), overrides)
    study = study_from_dict(content, where=study_file.name)
    held_out = _sites(study) if leave_one_site_out else (None,)
    folder = out or default_folder(study)
    refuse_foreign(folder, ("compare.json",))
    legs = tuple(_legs(strategies, seeds, held_out))
    studies = {leg: _study_of(content, study, leg) for leg in legs}
    _write_index(folder, study, legs)
    for number, (leg, own) in enumerate(studies.items(), 1):
        if not _run_leg(folder / leg.folder, own, f"{number}/{len(legs)}", as_json):
            typer.echo(
                f"fedmed: stopped; the same command goes on from here (--out {folder})",
                err=True,
            )
            sys.exit(130)
    _finish(folder, as_json=as_json)


def _sites(study: Study) -> tuple[str, ...]:
    import importlib

    data = importlib.import_module("sites.data")
    _, found = data.list_sites(study, cache_folder(study))
    return tuple(site.site_id for site in found)


def _legs(
    strategies: tuple[str, ...],
    seeds: tuple[int, ...],
    held_out: tuple[str | None, ...],
) -> Iterator[Leg]:
    for name in strategies:
        for seed in seeds:
            # A model trained on one site alone is no generalisation: `separate` is
            # the deck's Intra-site row and is run once, with every site in it.
            for site in (None,) if name == "separate" else held_out:
                label = name.replace(":", "-")
                suffix = "" if site is None else f"-without-{site}"
                yield Leg(name, seed, site, f"{label}-seed{seed}{suffix}")


def _study_of(content: dict[str, Any], study: Study, leg: Leg) -> Study:
    before = dict(content.get("strategy", {}))
    options = before if before.get("name") == leg.strategy else {}
    sync = {"sync": before["sync"]} if "sync" in before and not options else {}
    section = {**sync, **options, "name": leg.strategy}
    try:
        load_strategy(leg.strategy, {k: v for k, v in section.items() if k != "name"})
    except ConfigError:
        section.pop("sync", None)  # joint has one mode only
    changed = {**content, "seed": leg.seed, "strategy": section}
    split = dict(content.get("split", {}))
    # Every seed divides the cases alike, so that cases can be paired.
    split.setdefault("seed", study.seed)
    if leg.held_out is not None:
        split["held_out"] = [leg.held_out]
    changed["split"] = split
    own = study_from_dict(changed, where=f"the study for {leg.strategy}")
    load_strategy(own.strategy.name, own.strategy.options)
    return own


def _write_index(folder: Path, study: Study, legs: tuple[Leg, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "compare.json"
    if RunFolder(folder).lock_file.exists():
        raise UsageError(
            f"{folder} holds a single run", hint="Choose another folder with --out."
        )
    runs = [asdict(leg) for leg in legs]
    if index.exists():
        known = _known_runs(index)
        runs += [run for run in known if run not in runs]
    content = {"study": study.name, "runs": runs}
    write_atomic(index, json.dumps(content, indent=1).encode())


def _known_runs(index: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(index.read_text())["runs"])
    except (ValueError, KeyError, TypeError):
        raise StorageError(
            f"{index.name} in {str(index.parent)!r} is damaged",
            hint="Restore it, or choose another folder with --out.",
        ) from None


def _run_leg(folder: Path, study: Study, number: str, as_json: bool) -> bool:
    run_folder = RunFolder(folder)
    if run_folder.summary_file.exists() and run_folder.model_file.exists():
        check_folder(run_folder, study, resume=True)
        if not _sites_without_result(run_folder, study):
            return True
        _forget_last_round(run_folder)
    titled = study.model_copy(update={"title": study.title})
    if not as_json:
        typer.echo(f"run {number}: {folder.name}", err=True)
    resume = run_folder.lock_file.exists()
    try:
        finished = execute(titled, folder, resume=resume, quiet=as_json).finished
    except KeyboardInterrupt:
        return False
    lacking = _sites_without_result(run_folder, study) if finished else ()
    if lacking:
        logger.error(
            "%s has no result for %s, which it held out; the same command tries again",
            folder.name,
            ", ".join(lacking),
        )
    return finished


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


def _finish(folder: Path, *, as_json: bool) -> None:
    from fedmed.report.page import build_report

    page = build_report(folder)
    table = comparison_table(folder)
    if as_json:
        record = {"run": str(folder), "report": str(page), "table": table.as_dict()}
        typer.echo(json.dumps(record))
        return
    print_table(table)
    typer.echo(f"report: {page}")
