"""`fedmed report`: the page and the table of a finished run or comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import typer

from fedmed.report.tables import Table, comparison_table


def report_command(folder: Path, *, as_json: bool) -> None:
    """Write report.html and print the table."""
    from fedmed.report.page import build_report

    page = build_report(folder)
    table = comparison_table(folder)
    if as_json:
        typer.echo(json.dumps({"report": str(page), "table": table.as_dict()}))
        return
    print_table(table)
    typer.echo(f"report: {page}")


def print_table(table: Table) -> None:
    """Print a result table to the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    shown = RichTable(title=f"{table.name}: {table.score_name}")
    for index, title in enumerate(table.header):
        justify: Literal["left", "right"] = "left" if index == 0 else "right"
        shown.add_column(title, justify=justify, no_wrap=True)
    for row in table.text_rows():
        shown.add_row(*map(escape, row))
    console = Console()
    # Cut numbers are worse than wrapped lines, in a file as in a narrow terminal.
    needed = console.measure(shown, options=console.options.update(width=1000)).maximum
    Console(width=max(console.width, needed)).print(shown)
    for note in table.notes:
        console.print(note, highlight=False, markup=False)
