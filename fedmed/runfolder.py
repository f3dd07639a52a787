"""The run folder: what a run writes, and how it is read back after a death.

Tables are appended while a run lives and cut back to the last checkpoint when it is
resumed, so an interrupted run ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml

from fedmed.errors import ResumeError, StorageError
from fedmed.message import SiteId
from fedmed.storage import write_atomic

COMPARISON_FILE = "compare.json"
"""In a folder of several runs: which they are."""

SEGMENTATION_COLUMNS = (
    "round", "split", "site", "case_id", "subject_id", "class", "dice", "assd_mm",
    "asd_mm_pred2gt", "asd_mm_gt2pred", "hd95_mm", "volume_ml_prediction",
    "volume_ml_label", "status",
)  # fmt: skip
CLASSIFICATION_COLUMNS = (
    "round", "split", "site", "case_id", "subject_id", "label", "prediction", "score",
)  # fmt: skip


FOLLOW_S = 0.5
"""How often the folder of another process is looked at, seconds."""


@runtime_checkable
class Observer(Protocol):
    """Who wants to see a run's progress."""

    def round_started(self, number: int) -> None:
        """A round begins."""

    def exchanged(
        self, number: int, exchange: int, losses: Mapping[str, float]
    ) -> None:
        """An exchange of a round is over."""

    def round_finished(self, record: Mapping[str, Any]) -> None:
        """A round is over; `record` is its line in rounds.jsonl."""


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of one run."""

    path: Path

    @property
    def lock_file(self) -> Path:
        """The complete resolved study."""
        return self.path / "study.lock.yaml"

    @property
    def rounds_file(self) -> Path:
        """One JSON line a round."""
        return self.path / "rounds.jsonl"

    @property
    def cases_file(self) -> Path:
        """One row per case, class, round, split and site."""
        return self.path / "cases.csv"

    @property
    def unseen_file(self) -> Path:
        """As `cases_file`, for held-out sites, by rule; only if there are several."""
        return self.path / "unseen.csv"

    @property
    def selected_file(self) -> Path:
        """As `cases_file`, of the round that validation picked; only if asked for."""
        return self.path / "selected.csv"

    @property
    def summary_file(self) -> Path:
        """Final metrics."""
        return self.path / "summary.json"

    @property
    def model_file(self) -> Path:
        """The final shared model."""
        return self.path / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Folder of the server's checkpoints."""
        return self.path / "checkpoints"

    @property
    def sites(self) -> Path:
        """Folder of the simulated sites' private parts."""
        return self.path / "sites"

    @property
    def ledger(self) -> Path:
        """Folder of the simulated sites' ledgers."""
        return self.path / "ledger"

    @property
    def stop_file(self) -> Path:
        """Its presence asks another process to stop after the round."""
        return self.path / "stop-requested"

    def create(self) -> None:
        """Make the folder, readable by its owner only.

        Raises:
            StorageError: If that is not possible.
        """
        try:
            for folder in (self.path, self.checkpoints, self.sites, self.ledger):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"the run folder {self.path} cannot be made: {error.strerror}",
                hint="Choose another folder with --out.",
            ) from None

    def write_lock(self, content: Mapping[str, Any]) -> None:
        """Write the resolved study."""
        text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
        write_atomic(self.lock_file, text.encode())

    def read_lock(self) -> dict[str, Any]:
        """Read the resolved study.

        Raises:
            ResumeError: If the folder holds no run.
        """
        try:
            content = yaml.safe_load(self.lock_file.read_text())
            if not isinstance(content, dict):
                raise ValueError("no mapping")
        except (OSError, ValueError, yaml.YAMLError):
            raise ResumeError(f"{self.path} holds no run that could be read") from None
        return content

    def write_summary(self, content: Mapping[str, Any]) -> None:
        """Write the final metrics."""
        text = json.dumps(finite(content), indent=1, sort_keys=True)
        write_atomic(self.summary_file, text.encode())

    def read_summary(self) -> dict[str, Any]:
        """Read the final metrics; empty if the run has not finished."""
        if not self.summary_file.exists():
            return {}
        return dict(json.loads(self.summary_file.read_text()))

    def append_round(self, record: Mapping[str, Any], *, sync: bool = True) -> None:
        """Append one round's record; `sync` forces all of the file to disk."""
        _append(self.rounds_file, json.dumps(finite(record)) + "\n", sync=sync)

    def append_cases(
        self,
        columns: tuple[str, ...],
        rows: Iterable[Mapping[str, Any]],
        *,
        sync: bool = True,
    ) -> None:
        """Append rows to `cases.csv`, its header first; `sync` as in `append_round`."""
        _append_table(self.cases_file, columns, rows, sync=sync)

    def append_unseen(
        self,
        columns: tuple[str, ...],
        rows: Sequence[Mapping[str, Any]],
        *,
        sync: bool = True,
    ) -> None:
        """Append rows to `unseen.csv`, of the columns of `cases.csv`, if there are."""
        if rows:
            _append_table(self.unseen_file, unseen_columns(columns), rows, sync=sync)

    def write_selected(
        self, columns: tuple[str, ...], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write `selected.csv`, of the columns of `cases.csv`."""
        text = _table(columns, rows, has_header=True)
        write_atomic(self.selected_file, text.encode())

    def read_rounds(self) -> list[dict[str, Any]]:
        """Read the complete lines of `rounds.jsonl`."""
        if not self.rounds_file.exists():
            return []
        records = []
        for line in self.rounds_file.read_text(errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line that was being written when the run died
        return records

    def cut_back(self, last_round: int) -> None:
        """Forget everything after a round, before the run goes on from there."""
        rounds = [r for r in self.read_rounds() if r["round"] <= last_round]
        text = "".join(json.dumps(record) + "\n" for record in rounds)
        write_atomic(self.rounds_file, text.encode())
        for table in (self.cases_file, self.unseen_file):
            if table.exists():
                text = table.read_text(errors="replace")
                lines = text.splitlines(keepends=True)
                kept = [line for line in lines[1:] if _is_up_to(line, last_round)]
                # Without complete rows it must go, so that the header is rewritten.
                content = "".join(lines[:1] + kept) if kept else ""
                write_atomic(table, content.encode())
        if not (rounds and rounds[-1].get("selected")):
            self.selected_file.unlink(missing_ok=True)
        self.summary_file.unlink(missing_ok=True)
        self.model_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def followed(
        self, observer: Observer, should_stop: Callable[[], bool]
    ) -> Iterator[None]:
        """Show the progress of another process that works in this folder.

        Args:
            observer: Is told of every finished round.
            should_stop: If it turns true, that process is asked to stop.
        """
        over = threading.Event()

        def follow() -> None:
            known = {record["round"] for record in self.read_rounds()}
            while not over.wait(FOLLOW_S):
                if should_stop():
                    self.stop_file.touch()
                for record in self.read_rounds():
                    if record["round"] not in known:
                        known.add(record["round"])
                        observer.round_finished(record)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def site_folder(self, site_id: SiteId) -> Path:
        """Folder of one simulated site's private part."""
        return self.sites / site_id

    @property
    def secrets(self) -> Path:
        """Folder of what simulated sites keep secret over all runs of a comparison.

        Cases have the same pseudonyms in all of them, or nothing could be paired.
        """
        is_of_many = (self.path.parent / COMPARISON_FILE).is_file()
        return self.path.parent / "secrets" if is_of_many else self.sites


def finite(value: Any) -> Any:
    """Replace NaN and infinities by None, so that the JSON is valid everywhere."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(float(value)) if isinstance(value, float) else value


def _is_up_to(line: str, last_round: int) -> bool:
    """Whether a line of cases.csv is whole and of a round that counts.

    What was never forced to disk may be anything after a power cut.
    """
    number = line.partition(",")[0]
    return line.endswith("\n") and number.isdecimal() and int(number) <= last_round


def unseen_columns(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Columns of unseen.csv: those of cases.csv, the rule, and whose sets it used."""
    return (columns[0], "rule", "sets_of", *columns[1:])


def _append_table(
    path: Path,
    columns: tuple[str, ...],
    rows: Iterable[Mapping[str, Any]],
    *,
    sync: bool,
) -> None:
    is_new = not path.exists() or path.stat().st_size == 0
    _append(path, _table(columns, rows, has_header=is_new), sync=sync)


def _table(
    columns: tuple[str, ...], rows: Iterable[Mapping[str, Any]], *, has_header: bool
) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n", restval="")
    if has_header:
        writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(row.get(name)) for name in columns})
    return buffer.getvalue()


def _append(path: Path, text: str, *, sync: bool) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"{path.name} cannot be written: {error.strerror}",
            hint="Free some disk space, then go on with --resume.",
        ) from None
