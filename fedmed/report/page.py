"""Write `report.html`: one file that opens anywhere, offline, without scripts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jinja2

from fedmed.errors import StorageError
from fedmed.report import course_grids, narrative, result_grids
from fedmed.report.overlays import CLASS_COLOURS, PREDICTION_COLOUR, TRUTH_COLOUR
from fedmed.report.panels import case_panels, curve_panels, galleries
from fedmed.report.published import side_by_side
from fedmed.report.run_folder import Comparison, read_comparison
from fedmed.report.selected import selected_table
from fedmed.report.significance import choose_reference, paired_tests
from fedmed.report.tables import Table, make_table
from fedmed.report.template import PAGE
from fedmed.report.transfer import transfer_table
from fedmed.report.unseen import statistics_note, unseen_table

REPORT_FILE = "report.html"


def build_report(folder: Path) -> Path:
    """Write the report of a run folder or of a comparison folder.

    Args:
        folder: As `fedmed run` or `fedmed compare` wrote it.

    Returns:
        The file written, `report.html` in that folder. It replaces an older one only
        when it is complete.

    Raises:
        UsageError: If the folder is neither.
        StorageError: If a file in it is damaged, or the report cannot be written.
    """
    html = render(read_comparison(folder))
    target = folder / REPORT_FILE
    partial = folder / f".{REPORT_FILE}.{os.getpid()}"
    try:
        partial.write_text(html, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"{REPORT_FILE} cannot be written to {folder.name!r}: {error.strerror}.",
            hint="Make room, or make the folder writable.",
        ) from error
    return target


def render(comparison: Comparison) -> str:
    """Render the page; equal folders give equal pages, byte for byte.

    Args:
        comparison: One run or several, as read.

    Returns:
        HTML with everything inside it.
    """
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    table = make_table(comparison)
    content = {
        **_results(comparison, table),
        **_pictures(comparison, table),
        **_course(comparison),
    }
    return environment.from_string(PAGE).render(content)


def _results(comparison: Comparison, table: Table) -> dict[str, Any]:
    reference = choose_reference(comparison)
    published = side_by_side(comparison, table)
    transfer = transfer_table(table)
    overall, by_site = paired_tests(comparison, reference) if reference else ((), ())
    return {
        "name": comparison.title,
        "same_patients": comparison.divides_slices,
        "cut_sites": narrative.cut_sites(comparison),
        "table": table,
        "studied": narrative.what_was_studied(comparison, table),
        "outcome": " ".join(
            (
                narrative.what_came_out(table, overall, reference),
                *(transfer.gaps if transfer else ()),
            )
        ).strip(),
        "split": narrative.split_sentence(comparison),
        "sites": course_grids.sites_grid(comparison, table),
        "results": result_grids.results_grid(table),
        "distances": result_grids.distances_grid(table),
        "transfer": transfer.grid() if transfer else None,
        "transfer_notes": transfer.notes if transfer else (),
        "published": published.grid() if published else None,
        "published_notes": published.marks if published else (),
        "classes": result_grids.classes_grid(comparison, table),
        "unseen": unseen_table(comparison),
        "statistics": statistics_note(comparison),
        "selected": selected_table(comparison),
        "reference": reference,
        "tests": result_grids.tests_grid(overall, reference or "", by_site=False),
        "site_tests": result_grids.tests_grid(by_site, reference or "", by_site=True),
    }


def _pictures(comparison: Comparison, table: Table) -> dict[str, Any]:
    shown, notes = galleries(comparison)
    names = comparison.classes
    colours = [CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(len(names))]
    return {
        "curves": curve_panels(comparison),
        "cases": case_panels(comparison, table),
        "galleries": shown,
        "opened": _opened(table, [gallery.label for gallery in shown]),
        "gallery_notes": notes,
        "class_colours": list(zip(names, colours, strict=True)),
        "truth_colour": TRUTH_COLOUR,
        "prediction_colour": PREDICTION_COLOUR,
    }


def _course(comparison: Comparison) -> dict[str, Any]:
    return {
        "single": comparison.is_single,
        "traffic": course_grids.traffic_grid(comparison),
        "events": course_grids.events_grid(comparison),
        "quarantine": course_grids.quarantine_grid(comparison),
        "missing": narrative.what_is_missing(comparison),
        "commands": narrative.how_to_repeat(comparison),
        "settings": course_grids.settings_grid(comparison),
        "fingerprints": course_grids.fingerprints_grid(comparison),
        "versions": course_grids.versions_grid(comparison),
    }


def _opened(table: Table, labels: list[str]) -> str:
    """Choose the gallery to show unfolded: the row with the highest overall score."""
    rows = [row for row in table.rows if row.label in labels]
    scored = [row for row in rows if math.isfinite(row.overall.mean)]
    best = max(scored, key=lambda row: row.overall.mean, default=None)
    return best.label if best else "".join(labels[:1])
