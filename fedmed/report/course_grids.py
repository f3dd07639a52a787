"""The tables about the course of a study: sites, traffic, problems, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmed.report.grid import Box, Grid
from fedmed.report.rows import group_rows, row_label
from fedmed.report.run_folder import Comparison, Entry, Run
from fedmed.report.scores import mean_of_finite
from fedmed.report.tables import Table
from fedmed.report.wording import NO_VALUE, duration, size

_SCANNER_FACTS = ("vendor", "scanner", "model")
_FIELD_FACTS = ("field_T", "field_t", "field", "field_strength_T")
_SPLITS = ("num_train", "num_validation", "num_test")
_COIL_FACTS = ("coil",)


def sites_grid(comparison: Comparison, table: Table) -> Grid:
    """List the sites: who, which scanner, how many cases; empty columns drop out."""
    data = merged_data(comparison)
    sites = sorted(set(data) | set(table.sites))
    rows = [
        _site_row(site, data.get(site) or {}, _role(site, comparison)) for site in sites
    ]
    titles = tuple(rows[0]) if rows else ("Site",)
    used = [t for t in titles if t == "Site" or any(row[t] for row in rows)]
    boxes = tuple(tuple(Box(row[title] or NO_VALUE) for title in used) for row in rows)
    return Grid(
        "Who took part, with which scanner and cases",
        tuple(used),
        boxes,
        num_text=len(used),
    )


def traffic_grid(comparison: Comparison) -> Grid | None:
    """Lay out bytes and time; by site for one run, by strategy for several."""
    runs = [entry.run for entry in comparison.entries if entry.run.rounds]
    if not runs:
        return None
    if comparison.is_single:
        return _traffic_by_site(runs[0])
    rows = tuple(
        _traffic_row(row_label(group[0]), [e.run for e in group if e.run.rounds])
        for group in group_rows(comparison)
        if any(entry.run.rounds for entry in group)
    )
    header = (
        "Strategy",
        "Rounds",
        "To a site, a round",
        "From a site, a round",
        "All traffic of a run",
        "Time a round",
        "Retries",
    )
    return Grid("Traffic and time, mean over runs", header, rows)


def events_grid(comparison: Comparison) -> Grid | None:
    """List refused updates and failures; None if there were none."""
    found: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for entry in comparison.entries:
        for line in entry.run.rounds:
            for what in ("refused", "failed"):
                for site, reason in (line.get(what) or {}).items():
                    runs = found.setdefault((str(site), what, str(reason)), {})
                    rounds = runs.setdefault(_run_name(entry), [])
                    rounds.append(int(line.get("round", 0)))
    if not found:
        return None
    many = len(comparison.entries)
    rows: tuple[tuple[Box, ...], ...] = tuple(
        (Box(site), Box(_what(what)), Box(reason), Box(rounds), Box(_runs(runs, many)))
        for (site, what, reason), events in sorted(found.items())
        for rounds, runs in _same_rounds(events).items()
    )
    header = ("Site", "What", "Reason", "Rounds", "Run")
    kept = 5 if many > 1 else 4
    rows = tuple(row[:kept] for row in rows)
    return Grid("Updates that were not used", header[:kept], rows, num_text=kept)


def quarantine_grid(comparison: Comparison) -> Grid | None:
    """List the cases left out and why; None if all could be used."""
    rows = tuple(
        (Box(site), Box(str(case_id)), Box(str(reason)))
        for site, facts in sorted(merged_data(comparison).items())
        for case_id, reason in sorted((facts.get("quarantined") or {}).items())
    )
    if not rows:
        return None
    return Grid("Cases left out", ("Site", "Case", "Reason"), rows, num_text=3)


def versions_grid(comparison: Comparison) -> Grid | None:
    """List the versions of the software; all of them where runs differ."""
    found: dict[str, list[str]] = {}
    for entry in comparison.entries:
        for name, version in (entry.run.study.get("versions") or {}).items():
            known = found.setdefault(str(name), [])
            if str(version) not in known:
                known.append(str(version))
    rows = tuple((Box(name), Box(", ".join(v))) for name, v in sorted(found.items()))
    return Grid("Software", ("Package", "Version"), rows, num_text=2) if rows else None


def fingerprints_grid(comparison: Comparison) -> Grid | None:
    """List what identifies each site's data; None if nothing was recorded."""
    found = {
        site: str(facts.get("fingerprint") or "")
        for site, facts in sorted(merged_data(comparison).items())
    }
    rows = tuple((Box(site), Box(mark[:16])) for site, mark in found.items() if mark)
    return Grid("Data", ("Site", "Fingerprint"), rows, num_text=2) if rows else None


def settings_grid(comparison: Comparison) -> Grid:
    """List each strategy with the settings it ran with."""
    rows = []
    for group in group_rows(comparison):
        setting = group[0].run.study.get("strategy")
        pairs = setting.items() if isinstance(setting, Mapping) else ()
        words = [f"{k} = {v}" for k, v in pairs if k != "name" and _is_plain(v)]
        seeds = ", ".join(str(seed) for seed in sorted({e.seed for e in group}))
        shown = Box(", ".join(words) or NO_VALUE)
        rows.append((Box(row_label(group[0])), shown, Box(seeds)))
    header = ("Strategy", "Settings", "Seeds")
    return Grid("Strategies and seeds", header, tuple(rows), num_text=3)


def merged_data(comparison: Comparison) -> Mapping[str, Mapping[str, Any]]:
    """Put together what the runs say of each site.

    The first that speaks is heard, of runs that trained there if there are any.
    """
    merged: dict[str, dict[str, Any]] = {}
    for entry in comparison.entries:
        for site, facts in (entry.run.study.get("data") or {}).items():
            told, known = dict(facts or {}), merged.get(str(site), {})
            left_out = dict(told.get("quarantined") or {})
            left_out |= known.get("quarantined") or {}
            trains_now = told.get("num_train") and not known.get("num_train")
            heard = told if trains_now or not known else known
            merged[str(site)] = {**heard, "quarantined": left_out}
    return merged


def _site_row(site: str, data: Mapping[str, Any], role: str) -> dict[str, str]:
    card = data.get("card") or {}
    facts = dict(card.get("facts") or {})
    scanner = " ".join(_take(facts, name) for name in _SCANNER_FACTS).strip()
    field = next(filter(None, [_take(facts, name) for name in _FIELD_FACTS]), "")
    coil = _take(facts, *_COIL_FACTS)
    others = "; ".join(f"{k}: {_plain(v)}" for k, v in sorted(facts.items()))
    splits = [f"{data[key]} {key[4:]}" for key in _SPLITS if key in data]
    return {
        "Site": site,
        "Hospital": str(card.get("title") or ""),
        "Images": str(card.get("modality") or ""),
        "Scanner": scanner,
        "Field (T)": field.removesuffix(" T").removesuffix("T"),
        "Coil": coil,
        "More": others,
        "Cases": str(data.get("num_cases", "")),
        "Used for": ", ".join(splits),
        "Left out": str(len(data.get("quarantined") or {})) if data else "",
        "Role": role,
    }


def _role(site: str, comparison: Comparison) -> str:
    if site in comparison.held_out:
        return "held out, never trained on"
    roles = ["left out in turn"] if site in comparison.left_out_in_turn else []
    roles += ["trained alone in turn"] if site in comparison.trained_in_turn else []
    return ", ".join(roles) or "trained"


def _take(facts: dict[str, Any], *names: str) -> str:
    return " ".join(_plain(facts.pop(name)) for name in names if name in facts)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _traffic_by_site(run: Run) -> Grid:
    sites = sorted(
        {s for line in run.rounds for s in _bytes(line, "bytes_down")}
        | {s for line in run.rounds for s in _bytes(line, "bytes_up")}
    )
    rows = []
    for site in sites:
        down = [_bytes(line, "bytes_down").get(site, 0.0) for line in run.rounds]
        up = [_bytes(line, "bytes_up").get(site, 0.0) for line in run.rounds]
        answered = sum(site in (line.get("answered") or ()) for line in run.rounds)
        rows.append(
            (
                Box(site),
                Box(size(mean_of_finite(down))),
                Box(size(mean_of_finite(up))),
                Box(size(float(sum(down) + sum(up)))),
                Box(f"{answered} of {len(run.rounds)}"),
            )
        )
    header = (
        "Site",
        "To the site, a round",
        "From the site, a round",
        "In total",
        "Rounds answered",
    )
    total = size(_total_bytes(run))
    time = duration(mean_of_finite(_seconds(run)))
    caption = f"Traffic: {total} in {len(run.rounds)} rounds of {time} on average"
    return Grid(caption, header, tuple(rows))


def _traffic_row(label: str, runs: Sequence[Run]) -> tuple[Box, ...]:
    lines = [line for run in runs for line in run.rounds]
    down = [v for line in lines for v in _bytes(line, "bytes_down").values()]
    up = [v for line in lines for v in _bytes(line, "bytes_up").values()]
    num_rounds = sorted({len(run.rounds) for run in runs})
    return (
        Box(label),
        Box(", ".join(map(str, num_rounds))),
        Box(size(mean_of_finite(down))),
        Box(size(mean_of_finite(up))),
        Box(size(mean_of_finite(_total_bytes(run) for run in runs))),
        Box(duration(mean_of_finite(s for run in runs for s in _seconds(run)))),
        Box(str(sum(int(line.get("retries") or 0) for line in lines))),
    )


def _bytes(line: Mapping[str, Any], name: str) -> Mapping[str, float]:
    return {
        str(k): float(v) for k, v in (line.get(name) or {}).items() if v is not None
    }


def _total_bytes(run: Run) -> float:
    names = ("bytes_down", "bytes_up")
    every = (_bytes(line, name).values() for line in run.rounds for name in names)
    return float(sum(map(sum, every)))


def _seconds(run: Run) -> list[float]:
    return [float(line["seconds"]) for line in run.rounds if line.get("seconds")]


def _run_name(entry: Entry) -> str:
    words = f"{entry.strategy}, seed {entry.seed}"
    if entry.trained_on:
        return f"{words}, on {entry.trained_on} alone"
    return f"{words}, without {entry.held_out}" if entry.held_out else words


def _what(word: str) -> str:
    return "update refused" if word == "refused" else "site failed"


def _same_rounds(events: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """Put runs together in which the same happened in the same rounds."""
    grouped: dict[str, list[str]] = {}
    for run, rounds in events.items():
        grouped.setdefault(_ranges(rounds), []).append(run)
    return grouped


def _runs(names: Sequence[str], num_runs: int) -> str:
    if len(names) == num_runs:
        return "every run" if num_runs > 1 else names[0]
    return "; ".join(names)


def _ranges(rounds: Sequence[int]) -> str:
    """Write 1, 2, 3, 7 as "1 to 3, 7"."""
    spans: list[list[int]] = []
    for this in sorted(set(rounds)):
        if spans and this == spans[-1][1] + 1:
            spans[-1][1] = this
        else:
            spans.append([this, this])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)
