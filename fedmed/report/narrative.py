"""The sentences of the page: what was studied, what came out, how to do it again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence

from fedmed.report.rows import ALONE, Row
from fedmed.report.run_folder import LOCK_FILE, Comparison, Entry
from fedmed.report.significance import PairedTest
from fedmed.report.tables import Table
from fedmed.report.wording import count, listing, percent, signed_points

POOLED = ("joint", "deepall")
"""Strategies that put all images in one place, which hospitals cannot do."""


def what_was_studied(comparison: Comparison, table: Table) -> str:
    """Say in one plain paragraph what this study did."""
    sites = count(len(table.sites), "site")
    named = f" ({listing(table.sites)})" if table.sites else ""
    sentences = [
        f"This study trained models for {_purpose(comparison)} at {sites}{named}."
    ]
    sentences += _how_compared(comparison)
    held_out = comparison.held_out
    if len(held_out) == 1:
        sentences.append(
            f"Site {held_out[0]} was held out: its images were used for testing only."
        )
    elif held_out:
        sentences.append(
            f"Sites {listing(held_out)} were held out: their images were used for "
            "testing only."
        )
    if comparison.left_out_in_turn:
        sentences.append(
            "In the runs marked “site unseen” each site in turn was left out of "
            "training and used for testing."
        )
    if comparison.trained_in_turn:
        sentences.append(
            "In the runs marked “trained on” one site trained alone, and its model was "
            "tested at every site."
        )
    return " ".join([*sentences, *_public_images(comparison)])


def _public_images(comparison: Comparison) -> list[str]:
    """Say which methods learned from whose public images."""
    found: dict[str, list[str]] = {}
    for entry in comparison.entries:
        if entry.run.study.get("public"):  # written only if the method used it
            site = (entry.run.study.get("sites") or {}).get("public")
            names = found.setdefault(str(site), [])
            names += [entry.strategy] if entry.strategy not in names else []
    return [
        f"{'It' if comparison.is_single else listing(names)} also learned from the "
        f"public images of site {site}, without their labels."
        for site, names in sorted(found.items())
    ]


def what_came_out(
    table: Table, tests: Sequence[PairedTest], reference: str | None
) -> str:
    """Say the main result, its weakest site and its misses in a few sentences."""
    scored = [row for row in table.rows if math.isfinite(row.overall.mean)]
    if not scored:
        return "There is no result yet: no case has been scored."
    sentences = []
    for is_left_out in (False, True):
        rows = [
            row
            for row in scored
            if row.is_left_out == is_left_out and not row.trained_on
        ]
        sentences += _outcome(table, rows, tests, reference)
    return " ".join(sentences)


def how_to_repeat(comparison: Comparison) -> tuple[str, ...]:
    """Give the commands that repeat the study, each from the lock file of a run.

    A comparison has two if it ran the same strategy with and without leaving sites out.
    """
    entries = comparison.entries
    if comparison.is_single:
        return (shlex.join(["fedmed", "run", _lock_of(entries[0])]),)
    left_out = {entry.strategy for entry in entries if entry.held_out}
    plain = {entry.strategy for entry in entries if entry.is_plain}
    groups = [
        [entry for entry in entries if entry.is_plain],
        [entry for entry in entries if entry.held_out],
        [entry for entry in entries if entry.trained_on],
    ]
    if left_out and plain <= {ALONE}:
        # That one leaves no site out even where all others do.
        groups = [groups[0] + groups[1], groups[2]]
    return tuple(_compare_command(group) for group in groups if group)


def _compare_command(entries: Sequence[Entry]) -> str:
    """Repeat these runs, from the lock file that says most about all of them."""
    named = max(entries, key=_what_it_says)
    words = ["fedmed", "compare", _lock_of(named)]
    whole = [entry.run for entry in entries if not entry.held_out]
    if named.held_out and whole:
        # What this run left out is not left out where no site is.
        words.append(f"split.held_out=[{', '.join(whole[0].held_out)}]")
    strategies = dict.fromkeys(entry.strategy for entry in entries)
    seeds = sorted({entry.seed for entry in entries})
    words += ["--strategies", ",".join(strategies)]
    words += ["--seeds", ",".join(map(str, seeds))]
    if any(entry.held_out for entry in entries):
        words.append("--leave-one-site-out")
    if any(entry.trained_on for entry in entries):
        words += ["--protocol", "cross_site"]
    return shlex.join(words)


def _what_it_says(entry: Entry) -> tuple[bool, bool, int, bool]:
    """Rank a lock file as the study of a comparison.

    Options in brackets are one row's, not the study's. `sync: step` holds for every
    strategy that has it; the study's options of one strategy are in the lock files of
    that strategy alone.
    """
    given = entry.run.study.get("strategy")
    options = given if isinstance(given, Mapping) else {}
    is_plain = "[" not in entry.strategy
    is_step = options.get("sync") == "step"
    return is_plain, is_step, len(options), entry.is_plain


def _lock_of(entry: Entry) -> str:
    return f"{entry.run.label}/{LOCK_FILE}"


def what_is_missing(comparison: Comparison) -> tuple[str, ...]:
    """List what the folder does not hold, once each, with the runs it concerns."""
    found: dict[str, list[str]] = {}
    for entry in comparison.entries:
        for note in entry.run.notes:
            found.setdefault(note, []).append(entry.run.label)
    single = comparison.is_single
    notes = [
        note if single else f"{note} ({listing(labels)})"
        for note, labels in found.items()
    ]
    return tuple(f"{m}." for m in comparison.missing) + tuple(notes)


def split_sentence(comparison: Comparison) -> str:
    """Say which cases the results are from."""
    splits: dict[str, set[str]] = {}
    for entry in comparison.entries:
        for site, split in entry.run.splits.items():
            splits.setdefault(split, set()).add(site)
    if not splits:
        return ""
    if len(splits) == 1:
        return (
            f"Results are from the “{next(iter(splits))}” cases after the last round."
        )
    parts = [
        f"“{split}” at {listing(sorted(s))}" for split, s in sorted(splits.items())
    ]
    return f"Results are after the last round, from the cases: {'; '.join(parts)}."


def _purpose(comparison: Comparison) -> str:
    shown = comparison.classes
    if not shown:
        return f"image {comparison.kind}"
    if comparison.kind == "classification":
        return f"telling apart {listing(shown)}"
    return f"outlining {listing(shown)} in images"


def _how_compared(comparison: Comparison) -> list[str]:
    strategies = comparison.strategies
    seeds = sorted({entry.seed for entry in comparison.entries})
    if comparison.is_single:
        sentences = [f"It used the strategy “{strategies[0]}” with seed {seeds[0]}."]
    else:
        num = len(strategies)
        ways = f"{num} training strategies" if num > 1 else "one training strategy"
        each = count(len(seeds), "random seed")
        sentences = [f"It ran {ways} ({listing(strategies)}), each with {each}."]
    if ALONE in strategies:
        sentences.append(f"In “{ALONE}” each site trains alone.")
    pooled = [name for name in strategies if name in POOLED]
    if pooled:
        sentences.append(
            f"In “{pooled[0]}” all images are pooled, which only a simulation can do."
        )
    return sentences


def _outcome(
    table: Table,
    rows: Sequence[Row],
    tests: Sequence[PairedTest],
    reference: str | None,
) -> list[str]:
    """Say what came out for the rows that were tested in one way."""
    if not rows:
        return []
    best = max(rows, key=lambda row: row.overall.mean)
    where = "At sites left out of training the" if best.is_left_out else "The"
    which = f"highest overall {table.score_name} is that of {best.strategy}:"
    if len(rows) == 1:
        of = f" of {best.strategy}" if len(table.rows) > 1 else ""
        which = f"overall {table.score_name}{of} is"
    score = f"{percent(best.overall.mean)} % (mean over sites)."
    sentences = [f"{where} {which} {score}"]
    if best.worst_site and len(best.cells) > 1:
        lowest = f"{best.worst_site} with {percent(best.worst)} %"
        sentences.append(f"Its lowest site is {lowest}.")
    if best.num_organs:
        sentences.append(_misses(best))
    return sentences + _against(best, tests, reference)


def _misses(best: Row) -> str:
    organs = count(best.num_organs, "organ")
    if not best.num_missed:
        return f"It missed none of {organs}."
    seeds = count(len(best.seeds), "seed")
    together = f", {seeds} taken together" if len(best.seeds) > 1 else ""
    return f"It missed {best.num_missed} of {organs} entirely{together}."


def _against(
    best: Row, tests: Sequence[PairedTest], reference: str | None
) -> list[str]:
    """Compare the best row with the reference, without claiming more than is known."""
    found = [test for test in tests if test.row == best.label]
    if not found:
        return []
    test = found[0]
    points = signed_points(test.difference)
    start = f"Compared with {reference}, case by case, it differs by {points} points"
    seeds = test.seed_differences
    if not test.p_holm < 0.05:
        return [f"{start}, which may be chance."]
    if not test.is_of_one_mind:
        return [
            f"{start} in the mean over sites, but the ranks of all patients together "
            "lean the other way, so it should not be relied on."
        ]
    if seeds and min(seeds) * max(seeds) <= 0:
        return [f"{start}, but not with every seed, so it should not be relied on."]
    return [f"{start}, which is unlikely to be chance (p < 0.05 after correction)."]


def cut_sites(comparison: Comparison) -> str:
    """Name the sites where the network's window cut off part of an organ.

    Returns:
        E.g. "site chum (up to 70 %)"; empty if there is none.
    """
    largest: dict[str, float] = {}
    for entry in comparison.entries:
        for site, facts in (entry.run.study.get("data") or {}).items():
            if facts and facts.get("num_cut"):
                cut = float(facts.get("largest_cut", 0.0))
                largest[str(site)] = max(cut, largest.get(str(site), 0.0))
    named = [
        f"site {s} (up to {100 * cut:.0f} %)" for s, cut in sorted(largest.items())
    ]
    return listing(named)
