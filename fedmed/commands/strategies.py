"""`fedmed strategies`: what there is, what it costs, what leaves a hospital."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import typer

from fedmed.resolve import strategy_class, strategy_names
from fedmed.strategy import Strategy


def describe(name: str, cls: type[Strategy]) -> dict[str, Any]:
    """Plain facts about one strategy."""
    return {
        "name": name,
        "paper": cls.paper,
        "exchanges_per_step": cls.exchanges.get("step"),
        "exchanges_per_round": cls.exchanges.get("round"),
        "sync": list(cls.syncs),
        "exact": cls.exact,
        "leaves_site": list(cls.leaves_site),
        "kept_by_site": list(cls.kept_by_site),
        "pools_data": cls.pools_data,
        "options": {
            field.name: field.default
            for field in dataclasses.fields(cls)
            if field.default is not dataclasses.MISSING
        },
    }


def strategies_command(name: str | None, *, as_json: bool) -> None:
    """List all methods, or show one."""
    names = strategy_names() if name is None else (name,)
    found = [describe(each, strategy_class(each)) for each in names]
    if as_json:
        typer.echo(json.dumps({"strategies": found}))
    elif name is not None:
        typer.echo(inspect.getdoc(strategy_class(name)) or "")
        typer.echo(f"\nPaper: {found[0]['paper']}")
    else:
        _print_table(found)


def _print_table(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("strategy", "exact", "exchanges", "leaves the site", "kept", "paper"):
        table.add_column(title, overflow="fold")
    for facts in found:
        costs = [
            f"{facts[f'exchanges_per_{unit}']} a {unit}"
            for unit in ("step", "round")
            if facts[f"exchanges_per_{unit}"] is not None
        ]
        table.add_row(
            facts["name"],
            "yes" if facts["exact"] else "",
            " / ".join(costs),
            "; ".join(facts["leaves_site"]),
            "; ".join(facts["kept_by_site"]),
            facts["paper"],
        )
    Console().print(table)
