"""A section of docs/results.md: the table, and what the tests say of each claim."""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.harness import ROOT
from benchmarks.multi_site_questions import Claim, Question
from fedmed.report.published import side_by_side
from fedmed.report.rows import Row, row_label
from fedmed.report.run_folder import Comparison, Entry
from fedmed.report.scores import mean_of_finite
from fedmed.report.significance import PairedTest, planned_tests
from fedmed.report.tables import Table, make_table, percent_with_spread
from fedmed.report.transfer import transfer_table
from fedmed.report.wording import (
    NO_VALUE,
    duration,
    p_value,
    percent,
    signed_points,
)

LEVEL = 0.05


def section(question: Question, comparison: Comparison) -> str:
    """Write the section of a question.

    Args:
        question: What was asked.
        comparison: Its runs; those of other questions in the same folder are left out.

    Returns:
        Markdown.
    """
    wanted = _wanted(question)
    kept = [entry for entry in comparison.entries if _key(entry) in wanted]
    kept.sort(key=lambda entry: wanted.index(_key(entry)))
    own = Comparison(comparison.name, tuple(kept))
    table = make_table(own)
    parts = [
        f"## {question.title}",
        _how(question, own),
        *_wrapped(question.remarks),
        _results(table, own),
        *_transfer(table),
        # Published beside the table of the same networks already.
        *([] if question.again else _published(own, table)),
        *_claims(question, own),
    ]
    return "\n\n".join(parts) + "\n"


def _wanted(question: Question) -> list[tuple[str, str]]:
    """Methods and protocols of a question, in its order."""
    return [
        (method, protocol)
        for protocol, methods in question.protocols
        for method in methods
    ]


def _key(entry: Entry) -> tuple[str, str]:
    if entry.trained_on is not None:
        return entry.strategy, "cross_site"
    protocol = "within_site" if entry.held_out is None else "leave_one_site_out"
    return entry.strategy, protocol


def _transfer(table: Table) -> list[str]:
    square = transfer_table(table)
    if square is None:
        return []
    return [
        f"{square.title}. With an asterisk: trained and tested at the same site.",
        _markdown(square.header, square.text_rows()),
        *_wrapped(square.notes),
    ]


def with_section(page: str, key: str, text: str) -> str:
    """Put a section between its markers, or at the end of the page.

    Example:
        >>> with_section("# Results\\n", "a", "text\\n").splitlines()[2]
        '<!-- multi_site a -->'
    """
    start, end = f"<!-- multi_site {key} -->", f"<!-- end of multi_site {key} -->"
    block = f"{start}\n{text}{end}"
    if start in page:
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        return pattern.sub(lambda _: block, page)
    return f"{page.rstrip()}\n\n{block}\n"


def verdict(claim: Claim, test: PairedTest) -> str:
    """Say in a few words what a test says of a claim."""
    if not math.isfinite(test.difference):
        return "not measured"
    if claim.margin is not None:
        return _cost(claim.margin, test)
    seeds = test.seed_differences
    split = len(seeds) > 1 and min(seeds) < 0 < max(seeds)
    if not test.p_holm < LEVEL:
        return "not shown: may be chance"
    if not test.is_of_one_mind:
        return "not shown: patients' ranks lean the other way than the mean over sites"
    if test.difference > 0:
        return "**holds**" + (", though not with every seed" if split else "")
    return "**the reverse holds**"


def _cost(margin: float, test: PairedTest) -> str:
    if not math.isfinite(test.high):
        return "not measured"
    if 100 * test.high <= margin:
        return "**holds**: the whole interval is below"
    if 100 * test.low > margin:
        return "**does not hold**: the whole interval is above"
    return "not shown: the interval holds the bound"


def _how(question: Question, comparison: Comparison) -> str:
    study = comparison.entries[0].run.study
    train = study["train"]
    seeds = sorted({entry.seed for entry in comparison.entries})
    seconds = sum(map(_seconds, comparison.entries))
    if question.again:
        return (
            f"`python -m benchmarks.multi_site {question.key}`: the runs of "
            f"`{question.again}` tested once more\n"
            f"at commit `{_commit()}`; seeds {', '.join(map(str, seeds))}."
        )
    lines = [
        f"`python -m benchmarks.multi_site {question.key}`: {question.study}"
        + (f" with `{' '.join(question.changes)}`" if question.changes else ""),
        f"at commit `{_commit()}`; seeds {', '.join(map(str, seeds))}.",
        f"Every row takes {study['rounds'] * train['local_steps']} steps with "
        f"{train['batch_size']} examples a site and step;",
        f"{_cases(comparison)}.",
        f"{len(comparison.entries)} runs, {duration(seconds)} of one core altogether "
        f"({_machine()}).",
    ]
    return "\n".join(lines)


def _cases(comparison: Comparison) -> str:
    """Count cases; a site that is left out in turn has its most in some run."""
    found: dict[str, tuple[int, int]] = {}
    for entry in comparison.entries:
        for site, facts in (entry.run.study.get("data") or {}).items():
            train, test = found.get(site, (0, 0))
            found[site] = (
                max(train, facts.get("num_train") or 0),
                max(test, facts.get("num_test") or 0),
            )
    told = [f"{site} {train} and {test}" for site, (train, test) in found.items()]
    is_plain = all(entry.is_plain for entry in comparison.entries)
    most = "" if is_plain else ", at most in a run"
    return f"cases that train and that are tested{most}: {', '.join(sorted(told))}"


def _results(table: Table, comparison: Comparison) -> str:
    header = (
        f"Dice, %, profile {table.profile}", *table.sites, "overall", "worst site",
        "gain over alone", "overall by seed", "ASD, mm", "a run",
    )  # fmt: skip
    rows = [
        (
            row.label,
            *(percent_with_spread(row.cells.get(site)) for site in table.sites),
            percent(row.overall.mean),
            f"{percent(row.worst)} ({row.worst_site})",
            signed_points(row.overall.gain),
            ", ".join(_by_seed(row, comparison)),
            f"{row.overall.assd_mm:.2f}",
            duration(mean_of_finite(map(_seconds, _entries(row, comparison)))),
        )
        for row in table.rows
    ]
    return _markdown(header, rows)


def _by_seed(row: Row, comparison: Comparison) -> list[str]:
    found = []
    for seed in row.seeds:
        chosen = [e for e in _entries(row, comparison) if e.seed == seed]
        (only,) = make_table(Comparison("", tuple(chosen))).rows
        found.append(percent(only.overall.mean))
    return found


def _entries(row: Row, comparison: Comparison) -> list[Entry]:
    return [entry for entry in comparison.entries if row_label(entry) == row.label]


def _seconds(entry: Entry) -> float:
    return float(sum(line.get("seconds") or 0 for line in entry.run.rounds))


def _published(comparison: Comparison, table: Table) -> list[str]:
    both = side_by_side(comparison, table)
    if both is None:
        return []
    return [
        f"The same beside the published table ({both.source.title}):",
        _markdown(both.header, both.text_rows()),
        *_wrapped(both.marks),
    ]


def _claims(question: Question, comparison: Comparison) -> list[str]:
    if not question.claims:
        return []
    plan = [(claim.better, claim.worse, claim.site) for claim in question.claims]
    tests = planned_tests(comparison, plan)
    rows = [_claim_row(c, t) for c, t in zip(question.claims, tests, strict=True)]
    claim = "Claim" if question.is_later else "Claim, made beforehand"
    header = (
        claim, "difference, points", "95 % interval",
        "by seed", "better / worse", "p (Holm)", "what the test says",
    )  # fmt: skip
    told = (
        "Difference: mean over test cases (seeds of one case averaged first), then "
        "over sites. Interval: bootstrap of patients, with all of their cases, within "
        "sites. p: two-sided Wilcoxon signed-rank test over patients, corrected for "
        "the number of claims.",
    )
    return [_markdown(header, rows), *_wrapped(told)]


def _claim_row(claim: Claim, test: PairedTest) -> tuple[str, ...]:
    seeds = [signed_points(value) for value in test.seed_differences]
    interval = f"{signed_points(test.low)} to {signed_points(test.high)}"
    return (
        str(claim),
        signed_points(test.difference),
        interval if math.isfinite(test.low) else NO_VALUE,
        ", ".join(seeds) or NO_VALUE,
        f"{test.num_better} / {test.num_worse}",
        NO_VALUE if claim.margin is not None else p_value(test.p_holm),
        verdict(claim, test),
    )


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _wrapped(sentences: Iterable[str], width: int = 88) -> list[str]:
    import textwrap

    return [textwrap.fill(sentence, width) for sentence in sentences]


def _commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    name = model.group(1).strip() if model else "unknown processor"
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"
