"""`fedmed sites`: which data sets there are, and whether one is usable."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import typer
import yaml

from fedmed.errors import UsageError
from fedmed.study import expand, load_study


def list_command(*, as_json: bool) -> None:
    """List the data set modules."""
    catalogue = importlib.import_module("sites.catalogue")
    found = catalogue.list_datasets()
    if as_json:
        typer.echo(json.dumps({"datasets": found}))
        return
    width = max(map(len, found))
    for name, title in found.items():
        typer.echo(f"{name:<{width}}  {title}")


def check_command(
    name: str, root: Path | None, options: tuple[str, ...], *, as_json: bool
) -> None:
    """Read every case; exit code 3 if any cannot be used."""
    dataset, folder, chosen = _what(name, root, options)
    check = importlib.import_module("sites.check")
    result = check.check_dataset(dataset, folder, chosen)
    if as_json:
        typer.echo(json.dumps(_record(result)))
    else:
        _print(result)
    if not result.is_clean:
        sys.exit(3)


def _what(
    name: str, root: Path | None, options: tuple[str, ...]
) -> tuple[str, Path | None, dict[str, Any]]:
    """Accept a study file, a folder of data, or the name of a data set."""
    path = Path(name)
    given = dict(_option(text) for text in options)
    if path.suffix in {".yaml", ".yml"}:
        section = load_study(path).sites
        where = root or (expand(section.root) if section.root else None)
        return section.dataset, where, {**section.options, **given}
    if path.is_dir():
        return "folder", path, given
    return name, root, given


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option {text!r} is not of the form key=value")
    return key, yaml.safe_load(value)


def _record(result: Any) -> dict[str, Any]:
    return {
        "sites": sorted(result.facts),
        "cases": result.cases,
        "quarantined": [
            {"site": site, "case": case, "reason": reason}
            for site, case, reason in result.quarantined
        ],
        "twins": [list(map(list, group)) for group in result.twins],
        "num_cases": {site: fact.num_cases for site, fact in result.facts.items()},
    }


def _print(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.card.title}: {result.cases} usable cases")
    titles = ("site", "cases", "subjects", "shape (C, I, J, K)", "spacing mm", "axes")
    for title in (*titles, "labels", "intensity"):
        table.add_column(title)
    for site, fact in sorted(result.facts.items()):
        span = fact.intensity_range
        table.add_row(
            site,
            str(fact.num_cases),
            str(fact.num_subjects),
            _most(fact.shapes),
            _most(fact.spacings_mm),
            ", ".join(fact.orientations),
            ", ".join(map(str, sorted(fact.labels))),
            "" if span is None else f"{span[0]:.4g} to {span[1]:.4g}",
        )
    console = Console()
    console.print(table)
    for site, case, reason in result.quarantined:
        console.print(f"unusable: {site}/{case}: {reason}", highlight=False)
    for group in result.twins:
        told = " = ".join(f"{site}/{case}" for site, case in group)
        console.print(f"the same image or label twice: {told}", highlight=False)


def _most(counts: Any) -> str:
    shown = [" x ".join(f"{v:g}" for v in key) for key in list(counts)[:2]]
    more = f" (+{len(counts) - 2})" if len(counts) > 2 else ""
    return "; ".join(shown) + more
