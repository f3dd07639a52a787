"""Choose what the figures show, from runs of one or several seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fedmed.errors import StorageError
from fedmed.report.figures import Curve, draw_cases, draw_curves
from fedmed.report.overlays import (
    Overlay,
    draw_overlay,
    is_cropped,
    read_overlay,
    sort_by_rank,
)
from fedmed.report.rows import group_rows, mean_over_seeds, row_label
from fedmed.report.run_folder import Comparison, Entry, Run
from fedmed.report.scores import mean_of_finite
from fedmed.report.tables import Table
from fedmed.report.wording import listing, percent

MAX_OVERLAYS = 60
"""Above this many pictures only the worst case of each site is shown."""


@dataclass(frozen=True)
class Panel:
    """One figure with its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Gallery:
    """The overlays of one strategy.

    Attributes:
        sites: Site -> its panels, worst first.
    """

    label: str
    sites: Mapping[str, tuple[Panel, ...]]


def curve_panels(comparison: Comparison) -> tuple[Panel, ...]:
    """Draw loss and validation over rounds; those without a value drop out."""
    who = "each site" if comparison.is_single else "each strategy (mean over sites)"
    panels = []
    for name, y_label, title in (
        ("loss", "Training loss", "Training loss"),
        ("validation", "Validation score (%)", "Score on validation cases"),
    ):
        scale = 100.0 if name == "validation" else 1.0
        curves = _curves(comparison, name, scale)
        if curves:
            alt = f"Line chart: {title.lower()} by round for {who}. {_ends(curves)}"
            svg = draw_curves(curves, name=name, y_label=y_label, alt=alt)
            band = any(len(curve.low) > 0 for curve in curves)
            more = "; the band spans the runs" if band else ""
            panels.append(Panel(svg, f"{title} of {who}{more}."))
    return tuple(panels)


def case_panels(comparison: Comparison, table: Table) -> tuple[Panel, ...]:
    """Draw every case as a dot: one panel a site, or one panel for a single run."""
    if table.kind == "classification":
        return ()
    label = f"{table.score_name} (%)"
    groups = {row_label(g[0]): mean_over_seeds(g) for g in group_rows(comparison)}
    if comparison.is_single:
        only = next(iter(groups.values()))
        values = {site: _percents(only[site]) for site in sorted(only)}
        return (_case_panel(values, "cases", label, "each site"),) if values else ()
    panels = []
    for index, site in enumerate(table.sites):
        values = {
            k: _percents(found[site]) for k, found in groups.items() if site in found
        }
        if values:
            panels.append(_case_panel(values, f"cases-{index}", label, f"site {site}"))
    return tuple(panels)


def galleries(comparison: Comparison) -> tuple[tuple[Gallery, ...], tuple[str, ...]]:
    """Draw the overlays: of each strategy the run with the lowest seed.

    Returns:
        One gallery a strategy that has pictures, and sentences about what is not shown.
    """
    notes: list[str] = []
    read: list[tuple[str, dict[str, tuple[Overlay, ...]]]] = []
    for group in group_rows(comparison):
        sites = _read_group(group, notes)
        if sites:
            read.append((row_label(group[0]), sites))
    num = sum(len(found) for _, sites in read for found in sites.values())
    if num > MAX_OVERLAYS:
        notes.append(
            "To keep this page small, only the worst case of each site is shown."
        )
        read = [(label, _worst_only(sites)) for label, sites in read]
    per_class = len(comparison.classes) > 1
    shown = tuple(_gallery(label, sites, per_class) for label, sites in read)
    return shown, tuple(notes)


def _curves(comparison: Comparison, name: str, scale: float) -> list[Curve]:
    if comparison.is_single:
        run = comparison.entries[0].run
        sites = sorted({site for line in run.rounds for site in _values(line, name)})
        series = [(site, [_series(run, name, _site_value(site))]) for site in sites]
    else:
        series = [
            (row_label(group[0]), [_series(e.run, name, _mean_value) for e in group])
            for group in group_rows(comparison)
        ]
    curves = [_curve(label, found, scale) for label, found in series]
    return [curve for curve in curves if curve.rounds]


def _curve(label: str, runs: Sequence[Mapping[int, float]], scale: float) -> Curve:
    rounds = tuple(sorted({number for run in runs for number in run}))
    columns = [[scale * run[r] for run in runs if r in run] for r in rounds]
    values = tuple(mean_of_finite(column) for column in columns)
    if len(runs) < 2:
        return Curve(label, rounds, values)
    low, high = tuple(map(min, columns)), tuple(map(max, columns))
    return Curve(label, rounds, values, low, high)


def _series(
    run: Run, name: str, pick: Callable[[Mapping[str, float]], float]
) -> dict[int, float]:
    found = {int(line["round"]): pick(_values(line, name)) for line in run.rounds}
    return {number: value for number, value in found.items() if math.isfinite(value)}


def _values(line: Mapping[str, Any], name: str) -> Mapping[str, float]:
    given = (line.get(name) or {}).items()
    return {str(site): float(value) for site, value in given if value is not None}


def _site_value(site: str) -> Callable[[Mapping[str, float]], float]:
    return lambda values: values.get(site, math.nan)


def _mean_value(values: Mapping[str, float]) -> float:
    return mean_of_finite(values.values())


def _ends(curves: Sequence[Curve]) -> str:
    """Say where each line starts and ends, for readers who do not see the chart."""
    ends = [f"{c.label} from {c.values[0]:.3g} to {c.values[-1]:.3g}" for c in curves]
    return f"From the first to the last round: {'; '.join(ends)}."


def _percents(cases: Mapping[str, float]) -> list[float]:
    return [100 * value for value in cases.values()]


def _case_panel(
    values: Mapping[str, Sequence[float]], name: str, label: str, where: str
) -> Panel:
    ranges = [f"{k} {_range(found)}" for k, found in values.items()]
    alt = f"Dot and box plot of every case, {where}. Ranges: {listing(ranges)}."
    svg = draw_cases(values, name=name, x_label=label, alt=alt)
    caption = f"{where.capitalize()}: a dot is a case; box: median and quartiles."
    return Panel(svg, caption)


def _range(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{min(finite):.1f} to {max(finite):.1f} %" if finite else "none"


def _read_group(
    group: Sequence[Entry], notes: list[str]
) -> dict[str, tuple[Overlay, ...]]:
    """Read each site's overlays from the first run, by seed, that has them."""
    sites: dict[str, tuple[Overlay, ...]] = {}
    for entry in sorted(group, key=lambda e: e.seed):
        for site, paths in entry.run.overlay_files.items():
            if site in sites or entry.held_out not in {None, site}:
                continue
            found = []
            photograph = "photograph" in _modality(entry.run, site)
            for path in paths:
                try:
                    found.append(read_overlay(path, is_photograph=photograph))
                except StorageError as error:
                    notes.append(f"{entry.run.label}, site {site}: {error.message}")
            sites[site] = sort_by_rank(found)
    return {site: sites[site] for site in sorted(sites) if sites[site]}


def _modality(run: Run, site: str) -> str:
    card = ((run.study.get("data") or {}).get(site) or {}).get("card") or {}
    return str(card.get("modality") or "").lower()


def _worst_only(
    sites: Mapping[str, tuple[Overlay, ...]],
) -> dict[str, tuple[Overlay, ...]]:
    return {site: found[:1] for site, found in sites.items()}


def _gallery(
    label: str, sites: Mapping[str, tuple[Overlay, ...]], per_class: bool
) -> Gallery:
    return Gallery(
        label,
        {
            site: tuple(_overlay_panel(o, site, per_class) for o in found)
            for site, found in sites.items()
        },
    )


def _overlay_panel(overlay: Overlay, site: str, per_class: bool) -> Panel:
    cut = ", enlarged" if is_cropped(overlay) else ""
    caption = (
        f"{overlay.rank.capitalize()}: {overlay.case_id}, "
        f"Dice {percent(overlay.dice)} %, slice {overlay.slice_index}{cut}"
    )
    return Panel(draw_overlay(overlay, site=site, per_class=per_class), caption)
