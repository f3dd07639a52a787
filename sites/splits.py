"""Train, validation and test by subject: nobody is on two sides."""

from __future__ import annotations

import csv
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmed.case import CaseRef
from fedmed.errors import ConfigError, DataError
from fedmed.seeds import derive

LOGGER = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

_NEEDED_FIRST = ("train", "test", "validation")


def split_by_subject(
    refs: Sequence[CaseRef],
    fractions: Mapping[str, float],
    *,
    seed: int,
    site_id: str,
    assignment: Mapping[str, str] | None = None,
) -> dict[str, tuple[CaseRef, ...]]:
    r"""Split one site's cases so that no subject is in two splits.

    Subjects are put in the order of a hash of (seed, site, subject), so neither the
    order of the files nor other sites matter. N subjects are shared out by largest
    remainder; then, as far as there are subjects, train, test and validation each get
    at least one if asked for at all, in this order, taken from the fullest split.

    Too few subjects: one subject (whatever its number of sessions) goes wholly to
    train, two go to train and test. To use a site only for testing, ask for
    `{"test": 1.0}`.

    Args:
        refs: The site's cases, in any order.
        fractions: Split name -> fraction of the subjects, in [0, 1], summing to 1.
        seed: The study's seed.
        site_id: The site, part of the hash.
        assignment: case_id -> split name, which then replaces `fractions`. It may
            name further cases, since a quarantined case is not among `refs`.

    Returns:
        All three splits, possibly empty; cases in sorted `case_id` order.

    Raises:
        ConfigError: If `fractions` names an unknown split or does not sum to 1.
        DataError: If `assignment` leaves out a case, or puts a subject into two
            splits.
    """
    subjects: dict[str, list[CaseRef]] = defaultdict(list)
    for ref in refs:
        subjects[ref.subject_id].append(ref)
    if assignment is not None:
        chosen = _assigned(subjects, assignment, site_id)
    else:
        chosen = _drawn(sorted(subjects), _check(fractions), seed, site_id)
    splits: dict[str, list[CaseRef]] = {name: [] for name in SPLITS}
    for subject, name in chosen.items():
        splits[name].extend(subjects[subject])
    return {
        name: tuple(sorted(cases, key=lambda ref: ref.case_id))
        for name, cases in splits.items()
    }


def count_subjects(num_subjects: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Share subjects out over the splits; see `split_by_subject`.

    Args:
        num_subjects: Subjects at the site.
        fractions: As in `split_by_subject`.

    Returns:
        Number of subjects of each split.

    Example:
        >>> count_subjects(10, {"train": 0.7, "validation": 0.1, "test": 0.2})
        {'train': 7, 'validation': 1, 'test': 2}
        >>> count_subjects(1, {"train": 0.2, "test": 0.8})
        {'train': 1, 'validation': 0, 'test': 0}
    """
    exact = {name: num_subjects * fractions.get(name, 0.0) for name in SPLITS}
    # The small push keeps 0.7 * 10 = 7.000000000000001 and 6.999999999999999 equal.
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    rest = sorted(
        (name for name in _NEEDED_FIRST if exact[name] > 0),
        key=lambda name: round(counts[name] - exact[name], 9),
    )
    for name in rest[: num_subjects - sum(counts.values())]:
        counts[name] += 1
    wanted = [name for name in _NEEDED_FIRST if exact[name] > 0]
    for name in wanted[:num_subjects]:
        if counts[name] == 0:
            fullest = max(reversed(wanted), key=lambda other: counts[other])
            counts[fullest] -= 1
            counts[name] += 1
    return counts


def read_assignment(path: Path, *, site_id: str) -> dict[str, str]:
    """Read a fixed split from a table with the columns case_id and split.

    Args:
        path: A CSV file. A third column, site, is optional: rows of other sites are
            then passed over.
        site_id: The site whose rows are wanted.

    Returns:
        case_id -> "train", "validation" or "test".

    Raises:
        DataError: If a column is missing, a split is unknown or a case appears twice.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"case_id", "split"} <= rows[0].keys():
        raise DataError(
            f"{path.name} is no split table: expected the columns case_id, split"
        )
    assignment: dict[str, str] = {}
    for row in rows:
        if row.get("site", site_id) != site_id:
            continue
        if row["split"] not in SPLITS:
            raise DataError(
                f"{path.name}: split {row['split']!r} of case {row['case_id']} is "
                f"unknown; known are {', '.join(SPLITS)}"
            )
        if row["case_id"] in assignment:
            raise DataError(f"{path.name} names case {row['case_id']} twice")
        assignment[row["case_id"]] = row["split"]
    return assignment


def _check(fractions: Mapping[str, float]) -> Mapping[str, float]:
    unknown = sorted(set(fractions) - set(SPLITS))
    if unknown:
        raise ConfigError(
            f"unknown split {unknown[0]!r}", hint=f"known are {', '.join(SPLITS)}"
        )
    if any(not 0 <= value <= 1 for value in fractions.values()):
        raise ConfigError(f"split fractions must lie in [0, 1], seen {dict(fractions)}")
    total = math.fsum(fractions.values())
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"split fractions must sum to 1, seen {total:g}")
    return fractions


def _drawn(
    subjects: Sequence[str], fractions: Mapping[str, float], seed: int, site_id: str
) -> dict[str, str]:
    counts = count_subjects(len(subjects), fractions)
    empty = [name for name, value in fractions.items() if value and not counts[name]]
    if empty and subjects:
        LOGGER.info(
            "site %s has %d subject(s): its %s split stays empty",
            site_id,
            len(subjects),
            " and ".join(empty),
        )
    order = sorted(subjects, key=lambda name: derive(seed, "split", site_id, name))
    names = [name for name in SPLITS for _ in range(counts[name])]
    return dict(zip(order, names, strict=True))


def _assigned(
    subjects: Mapping[str, Sequence[CaseRef]],
    assignment: Mapping[str, str],
    site_id: str,
) -> dict[str, str]:
    case_ids = {ref.case_id for refs in subjects.values() for ref in refs}
    missing = sorted(case_ids - set(assignment))
    if missing:
        raise DataError(
            f"the fixed split of site {site_id} leaves out {len(missing)} of "
            f"{len(case_ids)} case(s), first {missing[0]}",
            hint="every case needs a row in the split table",
        )
    chosen: dict[str, str] = {}
    for subject, refs in subjects.items():
        names = sorted({assignment[ref.case_id] for ref in refs})
        if len(names) > 1:
            raise DataError(
                f"the fixed split of site {site_id} puts one subject into "
                f"{' and '.join(names)}: cases "
                f"{', '.join(sorted(ref.case_id for ref in refs)[:4])}",
                hint="cases of one subject must share a split",
            )
        if names[0] not in SPLITS:
            raise DataError(f"site {site_id}: unknown split {names[0]!r}")
        chosen[subject] = names[0]
    return chosen
