"""`fedmed report`: the page and the table of a finished run or comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import typer

from fedmed.report.published import side_by_side
from fedmed.report.run_folder import read_comparison
from fedmed.report.tables import make_table
from fedmed.report.transfer import transfer_table


def report_command(folder: Path, *, as_json: bool) -> None:
    """Write report.html and print the table."""
    from fedmed.report.page import build_report

    page = build_report(folder)
    tell(folder, page, {}, as_json=as_json)


def tell(folder: Path, page: Path, record: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the tables of a run or a comparison.

    Args:
        folder: The run or the comparison.
        page: Its report.
        record: What else programs read.
        as_json: Print one line for programs.
    """
    comparison = read_comparison(folder)
    table = make_table(comparison)
    published = side_by_side(comparison, table)
    transfer = transfer_table(table)
    if as_json:
        known = {**record, "report": str(page), "table": table.as_dict()}
        if published is not None:
            known["published"] = published.as_dict()
        if transfer is not None:
            known["transfer"] = transfer.as_dict()
        typer.echo(json.dumps(known))
        return
    print_table(
        table.title,
        table.header,
        table.text_rows(),
        table.notes,
    )
    if transfer is not None:
        title, notes = transfer.title, transfer.text_notes
        print_table(title, transfer.header, transfer.text_rows(), notes)
    if published is not None:
        title = published.source.title
        print_table(title, published.header, published.text_rows(), published.marks)
    typer.echo(f"report: {page}")


def print_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> None:
    """Print a table to the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    shown = RichTable(title=escape(title))
    for index, name in enumerate(header):
        justify: Literal["left", "right"] = "left" if index == 0 else "right"
        shown.add_column(escape(name), justify=justify, no_wrap=True)
    for row in rows:
        shown.add_row(*map(escape, row))
    console = Console()
    # Cut numbers are worse than wrapped lines, in a file as in a narrow terminal.
    needed = console.measure(shown, options=console.options.update(width=1000)).maximum
    Console(width=max(console.width, needed)).print(shown)
    for note in notes:
        console.print(note, highlight=False, markup=False)
