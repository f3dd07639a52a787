"""A table as the template prints it: boxes of plain text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """One cell of a printed table: its text, a smaller line below, bold or not."""

    text: str
    below: str = ""
    is_strong: bool = False


@dataclass(frozen=True)
class Grid:
    """A table to print; the first cell of every row is its header.

    Attributes:
        num_text: Columns from the left that hold words; the rest hold numbers.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Box, ...], ...]
    num_text: int = 1


@dataclass(frozen=True)
class NotedGrid:
    """A table and what a reader must know of it.

    Attributes:
        grid: The table.
        notes: Sentences below it, each a paragraph.
    """

    grid: Grid
    notes: tuple[str, ...]
