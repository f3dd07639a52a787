"""Whether a method was tested at a hospital with layers that nobody trained."""

from __future__ import annotations

from collections.abc import Mapping

from fedmed.report.rows import row_label
from fedmed.report.run_folder import Comparison, Entry
from fedmed.report.wording import listing

KEEPS_LAYERS = ("dual_stream",)
"""Strategies that share some layers and keep others that prediction needs."""


def untrained_notes(comparison: Comparison) -> tuple[str, ...]:
    """Say which methods met a newcomer with layers as they were at the start.

    Args:
        comparison: The runs.

    Returns:
        One sentence, or none.
    """
    found = [entry for entry in comparison.entries if _is_untrained(entry)]
    labels = list(dict.fromkeys(map(row_label, found)))
    if not labels:
        return ()
    return (
        f"{listing(labels)}: a site that took no part was tested with initial, "
        "untrained values of the layers that the method keeps at its sites; its "
        "value says nothing about the method.",
    )


def _is_untrained(entry: Entry) -> bool:
    section = entry.run.study.get("strategy")
    name = section.get("name") if isinstance(section, Mapping) else None
    return name in KEEPS_LAYERS and bool(entry.run.held_out)
