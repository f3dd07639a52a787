"""`fedmed strategies`: what there is, what it costs, what leaves a hospital."""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap
from typing import Any

import typer

from fedmed.message_size import NetworkSize, network_size
from fedmed.report.wording import size
from fedmed.resolve import load_strategy, strategy_class, strategy_names
from fedmed.strategy import Strategy

DEFAULT_MODEL = {"name": "unet"}
"""What a study that says nothing about its model gets."""


def describe(name: str, cls: type[Strategy]) -> dict[str, Any]:
    """Plain facts about one strategy."""
    return {
        "name": name,
        "paper": cls.paper,
        "exchanges_per_step": cls.exchanges.get("step"),
        "exchanges_per_round": cls.exchanges.get("round"),
        "first_round_exchanges": dict(cls.first_round_exchanges),
        "sync": list(cls.syncs),
        "exact": cls.exact,
        "leaves_site": list(cls.leaves_site),
        "kept_by_site": list(cls.kept_by_site),
        "pools_data": cls.pools_data,
        "needs_public": cls.needs_public,
        "copies_public": cls.copies_public,
        "options": {
            field.name: field.default
            for field in dataclasses.fields(cls)
            if field.default is not dataclasses.MISSING
        },
    }


def message_sizes(name: str) -> list[NetworkSize]:
    """What its messages weigh, with the default and with the published network."""
    strategy = load_strategy(name, {})
    models = [DEFAULT_MODEL, strategy.published_model]
    return [network_size(strategy, model) for model in models if model]


def strategies_command(name: str | None, *, as_json: bool) -> None:
    """List all methods, or show one and what its messages weigh."""
    if name is not None:
        _show(name, as_json=as_json)
        return
    found = [describe(each, strategy_class(each)) for each in strategy_names()]
    if as_json:
        typer.echo(json.dumps({"strategies": found}))
    else:
        _print_table(found)


def _show(name: str, *, as_json: bool) -> None:
    cls = strategy_class(name)
    facts, sizes = describe(name, cls), message_sizes(name)
    if as_json:
        facts["networks"] = [dataclasses.asdict(each) for each in sizes]
        typer.echo(json.dumps({"strategies": [facts]}))
        return
    typer.echo(inspect.getdoc(cls) or "")
    typer.echo(f"\nPaper: {facts['paper']}")
    typer.echo(f"Exchanges: {_price(facts)}")
    if cls.needs_public:
        where = "every hospital" if cls.copies_public else "the public site"
        typer.echo(f"Public images (sites.public): opened at {where}")
    _print_sizes(sizes)


def _price(facts: dict[str, Any]) -> str:
    costs = [
        f"{facts[f'exchanges_per_{unit}']} a {unit}"
        for unit in ("step", "round")
        if facts[f"exchanges_per_{unit}"] is not None
    ]
    more = facts["first_round_exchanges"]
    if set(more) == set(facts["sync"]) and len(set(more.values())) == 1:
        once = [f"{next(iter(more.values()))} more a run"]
    else:
        once = [f"{count} more a run with sync: {sync}" for sync, count in more.items()]
    return "; ".join([" / ".join(costs), *once])


def _print_sizes(sizes: list[NetworkSize]) -> None:
    typer.echo(
        "\nA message carries what is shared of the parts that it is about: down as "
        "weights,\nup as weights or as their gradient (float32). 'Leaves the site' "
        "says what else it holds."
    )
    for each in sizes:
        typer.echo(f"\n{each.network}, {each.num_classes} classes")
        _print_parts(each)


def _print_parts(network: NetworkSize) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    for heading in ("weights shared", "in a message", "weights kept", "kept, in all"):
        table.add_column(heading, justify="right")
    for part in network.parts:
        table.add_row(
            part.part,
            f"{part.shared_values:,}",
            size(part.shared_bytes),
            f"{part.kept_values:,}",
            size(part.kept_bytes),
        )
    Console().print(table)


def _print_table(found: list[dict[str, Any]]) -> None:
    """One block a method: a table of six columns breaks words on most terminals."""
    for facts in found:
        typer.echo(f"{facts['name']}: {facts['paper']}")
        _print_fact("exact", "with sync: step" if facts["exact"] else "")
        _print_fact("exchanges", _price(facts))
        _print_fact("leaves the site", "; ".join(facts["leaves_site"]))
        _print_fact("stays", "; ".join(facts["kept_by_site"]))


def _print_fact(heading: str, told: str) -> None:
    if told:
        first = f"  {heading:<16}"
        later = " " * len(first)
        lines = textwrap.wrap(told, 79, initial_indent=first, subsequent_indent=later)
        typer.echo("\n".join(lines))
