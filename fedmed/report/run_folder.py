"""Read what a run left behind: one run folder, or a folder of runs to compare.

A single run reads as a comparison of one, so whatever follows knows one shape only.
Missing parts become notes for the reader; damaged ones are errors that name the file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedmed.errors import StorageError, UsageError
from fedmed.profile import profile_of

LOCK_FILE = "study.lock.yaml"
ROUNDS_FILE = "rounds.jsonl"
CASES_FILE = "cases.csv"
UNSEEN_FILE = "unseen.csv"
SELECTED_FILE = "selected.csv"
SUMMARY_FILE = "summary.json"
COMPARE_FILE = "compare.json"

SPLIT_ORDER = ("test", "held_out", "all", "validation", "val", "train")
"""Where a site has several splits, the first of these is its result."""


@dataclass(frozen=True)
class Run:
    """One run folder as read.

    Attributes:
        label: Name of the folder, never its path.
        study: The resolved study.
        rounds: One mapping a round, oldest first.
        cases: Rows of `cases.csv` that are the result: one split a site, last round.
        splits: Site -> the split those rows come from.
        summary: Final metrics as the engine wrote them.
        overlay_files: Site -> files with a slice, its truth and its prediction.
        notes: What was not there, in sentences for the reader.
        unseen: Rows of `unseen.csv`: held-out sites by rule.
        selected: As `cases`, of the round that validation picked; empty if the study
            does not ask for it.
    """

    label: str
    study: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...] = ()
    cases: tuple[Mapping[str, str], ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    overlay_files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unseen: tuple[Mapping[str, str], ...] = ()
    selected: tuple[Mapping[str, str], ...] = ()

    @property
    def strategy(self) -> str:
        """Name of the strategy as the study gives it."""
        value = self.study.get("strategy") or {}
        return str(value.get("name", "?") if isinstance(value, Mapping) else value)

    @property
    def profile(self) -> str:
        """How it was evaluated; see `fedmed.profile`."""
        return profile_of(self.study).name

    @property
    def held_out(self) -> tuple[str, ...]:
        """Sites that took no part in training."""
        return tuple(str(site) for site in self.study.get("held_out") or ())


@dataclass(frozen=True)
class Entry:
    """One run of a comparison: which strategy, which seed, which sites.

    Attributes:
        held_out: The site left out to test on, where each is in turn.
        trained_on: The only site that trained, where each does in turn.
    """

    strategy: str
    seed: int
    held_out: str | None
    run: Run
    trained_on: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all of the study's sites trained."""
        return self.held_out is None and self.trained_on is None


@dataclass(frozen=True)
class Comparison:
    """Runs to set side by side.

    Attributes:
        name: Name of the study.
        entries: The runs that could be read, in the order of `compare.json`.
        missing: Sentences about runs that are named but not there.
        is_single: True if this is one run folder, not a comparison.
        reference: Strategy to test against, if `compare.json` names one.
    """

    name: str
    entries: tuple[Entry, ...]
    missing: tuple[str, ...] = ()
    is_single: bool = False
    reference: str | None = None

    @property
    def strategies(self) -> tuple[str, ...]:
        """Strategies in order of first appearance."""
        return tuple(dict.fromkeys(entry.strategy for entry in self.entries))

    @property
    def held_out(self) -> tuple[str, ...]:
        """Sites that no run trained on, as opposed to those left out in turn."""
        runs = [entry.run for entry in self.entries if entry.is_plain]
        sites = set.intersection(*(set(run.held_out) for run in runs)) if runs else ()
        return tuple(sorted(sites))

    @property
    def title(self) -> str:
        """Title of the study, or its name where it has none."""
        return str(self.entries[0].run.study.get("title") or self.name)

    @property
    def profile(self) -> str:
        """How all runs were evaluated; several names if they differ."""
        return " / ".join(dict.fromkeys(entry.run.profile for entry in self.entries))

    @property
    def divides_slices(self) -> bool:
        """Tell whether slices of one patient may lie on both sides of the split."""
        splits = [entry.run.study.get("split") for entry in self.entries]
        return any(isinstance(s, Mapping) and s.get("by") == "slices" for s in splits)

    @property
    def left_out_in_turn(self) -> tuple[str, ...]:
        """Sites that one run or another left out to test on."""
        found = {entry.held_out for entry in self.entries if entry.held_out}
        return tuple(sorted(found))

    @property
    def trained_in_turn(self) -> tuple[str, ...]:
        """Sites that one run or another trained on alone."""
        found = {entry.trained_on for entry in self.entries if entry.trained_on}
        return tuple(sorted(found))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes to tell apart, without the background."""
        task = self.entries[0].run.study.get("task")
        given = task.get("classes") if isinstance(task, Mapping) else None
        names = given.values() if isinstance(given, Mapping) else given or ()
        words = (str(name) for name in names)
        return tuple(word for word in words if word.lower() != "background")

    @property
    def kind(self) -> str:
        """Say "segmentation" or "classification"."""
        return _kind(self.entries[0].run)


def read_comparison(folder: Path) -> Comparison:
    """Read a run folder or a comparison folder.

    Args:
        folder: Holds `study.lock.yaml` (a run) or `compare.json` (a comparison).

    Returns:
        The runs; a single run becomes a comparison of one.

    Raises:
        UsageError: If the folder is neither.
        StorageError: If a file in it is damaged, or no run of a comparison is there.
    """
    if (folder / COMPARE_FILE).is_file():
        return _read_compared(folder)
    run = read_run(folder)
    seed = int(run.study.get("seed", 0))
    entry = Entry(run.strategy, seed, None, run)
    name = str(run.study.get("name", run.label))
    return Comparison(name, (entry,), is_single=True)


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Args:
        folder: Holds `study.lock.yaml` and what the engine wrote beside it.

    Returns:
        The run. Parts that are missing are empty and named in `notes`.

    Raises:
        UsageError: If there is no `study.lock.yaml`.
        StorageError: If a file is damaged.
    """
    lock_file = folder / LOCK_FILE
    if not lock_file.is_file():
        raise UsageError(
            f"{folder.name!r} is not a run folder: no {LOCK_FILE}, no {COMPARE_FILE}.",
            hint="Name the folder that `fedmed run` or `fedmed compare` wrote.",
        )
    study = _read_yaml(lock_file)
    notes: list[str] = []
    rounds = _read_rounds(folder / ROUNDS_FILE, notes)
    cases, splits = _read_cases(folder / CASES_FILE, notes)
    summary = _read_summary(folder / SUMMARY_FILE, notes)
    overlays = _find_overlays(folder / "sites")
    return Run(
        folder.resolve().name,
        study,
        rounds,
        cases,
        splits,
        summary,
        overlays,
        tuple(notes),
        _read_unseen(folder / UNSEEN_FILE),
        _read_selected(folder / SELECTED_FILE),
    )


def _kind(run: Run) -> str:
    if run.cases:
        return "segmentation" if "dice" in run.cases[0] else "classification"
    task = run.study.get("task")
    kind = task.get("kind") if isinstance(task, Mapping) else None
    return "classification" if kind == "classification" else "segmentation"


def _read_compared(folder: Path) -> Comparison:
    content = _read_json(folder / COMPARE_FILE)
    entries, missing = [], []
    for row in content.get("runs") or ():
        inside = _below(folder, str(row.get("folder", "")))
        if (inside / LOCK_FILE).is_file():
            entries.append(_entry(row, read_run(inside)))
        else:
            missing.append(f"{_describe(row)}: no run folder, or no {LOCK_FILE} in it")
    if not entries:
        raise StorageError(
            f"{folder.name!r}: {COMPARE_FILE} names no run that is there.",
            hint="Run the comparison again, or name a run folder.",
        )
    name = Path(str(content.get("study") or folder.resolve().name)).stem
    reference = content.get("reference")
    return Comparison(
        name,
        tuple(entries),
        tuple(missing),
        reference=None if reference is None else str(reference),
    )


def _entry(row: Mapping[str, Any], run: Run) -> Entry:
    held_out = row.get("held_out")
    if isinstance(held_out, list):
        held_out = held_out[0] if held_out else None
    seed = int(row.get("seed") or 0)
    site = None if held_out is None else str(held_out)
    only = row.get("trained_on")
    trained_on = None if only is None else str(only)
    return Entry(str(row.get("strategy", run.strategy)), seed, site, run, trained_on)


def _describe(row: Mapping[str, Any]) -> str:
    words = f"{row.get('strategy', '?')}, seed {row.get('seed', '?')}"
    if row.get("trained_on"):
        return f"{words}, on {row['trained_on']} alone"
    return f"{words}, without {row['held_out']}" if row.get("held_out") else words


def _below(folder: Path, relative: str) -> Path:
    """Follow a path of `compare.json`, but never out of the comparison's folder."""
    path = (folder / relative).resolve()
    if not relative or not path.is_relative_to(folder.resolve()):
        raise StorageError(
            f"{COMPARE_FILE}: the run folder {Path(relative).name!r} does not lie "
            f"below {folder.name!r}.",
            hint="Give run folders relative to compare.json, e.g. runs/fedavg-0.",
        )
    return path


def _read_yaml(path: Path) -> Mapping[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _damaged(path, "is not YAML") from error
    if not isinstance(content, Mapping):
        raise _damaged(path, "holds no mapping")
    return content


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, "is not JSON") from error
    if not isinstance(content, Mapping):
        raise _damaged(path, "holds no object")
    return content


def _read_summary(path: Path, notes: list[str]) -> Mapping[str, Any]:
    if path.is_file():
        return _read_json(path)
    notes.append(f"There is no {SUMMARY_FILE}: the run has not finished.")
    return {}


def _read_rounds(path: Path, notes: list[str]) -> tuple[Mapping[str, Any], ...]:
    """Read the rounds; a last line cut off by a crash is left out and noted."""
    if not path.is_file():
        notes.append(f"There is no {ROUNDS_FILE}: no learning curves, no traffic.")
        return ()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rounds: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number < len(lines):
                raise _damaged(path, f"line {number} is not JSON") from error
            notes.append(f"The last line of {ROUNDS_FILE} is cut off and left out.")
            continue
        if content is not None:
            rounds.append(content)
    return tuple(rounds)


def _read_cases(
    path: Path, notes: list[str]
) -> tuple[tuple[Mapping[str, str], ...], Mapping[str, str]]:
    if not path.is_file():
        notes.append(f"There is no {CASES_FILE}: results come from {SUMMARY_FILE}.")
        return (), {}
    return _read_table(path)


def _read_selected(path: Path) -> tuple[Mapping[str, str], ...]:
    return _read_table(path)[0] if path.is_file() else ()


def _read_table(
    path: Path,
) -> tuple[tuple[Mapping[str, str], ...], Mapping[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        needed = {"round", "split", "site", "case_id"}
        lacking = sorted(needed - set(reader.fieldnames or ()))
        if lacking:
            raise _damaged(path, f"has no column {', '.join(lacking)}")
        rows = list(reader)
    return _result_rows(rows, path)


def _read_unseen(path: Path) -> tuple[Mapping[str, str], ...]:
    """Read the results by rule; most runs have none."""
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"rule", "sets_of", "site"} <= set(reader.fieldnames or ()):
            raise _damaged(path, "is no table by rule")
        return tuple(reader)


def _result_rows(
    rows: Sequence[dict[str, str]], path: Path
) -> tuple[tuple[Mapping[str, str], ...], Mapping[str, str]]:
    """Keep, for each site, its result split at that split's last round."""
    last_round: dict[tuple[str, str], int] = {}
    for number, row in enumerate(rows, start=2):
        try:
            this_round = int(row["round"])
        except (TypeError, ValueError) as error:
            raise _damaged(path, f"line {number} has no round number") from error
        key = (row["site"], row["split"])
        last_round[key] = max(this_round, last_round.get(key, this_round))
    splits: dict[str, str] = {}
    for site, split in sorted(last_round, key=lambda key: (key[0], _split_rank(key))):
        splits.setdefault(site, split)
    kept = (row for row in rows if splits[row["site"]] == row["split"])
    result = tuple(
        row
        for row in kept
        if int(row["round"]) == last_round[row["site"], row["split"]]
    )
    return result, splits


def _split_rank(key: tuple[str, str]) -> tuple[int, str]:
    split = key[1]
    known = split in SPLIT_ORDER
    return (SPLIT_ORDER.index(split) if known else len(SPLIT_ORDER), split)


def _find_overlays(folder: Path) -> Mapping[str, tuple[Path, ...]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("**/overlays/*.npz")):
        site = path.parent.parent.relative_to(folder).as_posix()
        found.setdefault(site, []).append(path)
    return {site: tuple(paths) for site, paths in found.items()}


def _damaged(path: Path, what: str) -> StorageError:
    return StorageError(
        f"{path.name} in {path.parent.name!r} {what}.",
        hint="The file was changed or cut off after the run wrote it; restore it.",
    )
