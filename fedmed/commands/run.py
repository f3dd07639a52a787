"""`fedmed run`: one study, one strategy, one run folder."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from fedmed.checkpoint import Checkpoints
from fedmed.errors import ResumeError, UsageError
from fedmed.progress import TerminalProgress
from fedmed.run import RunResult, Silence, run_study
from fedmed.runfolder import RunFolder, finite
from fedmed.study import Study, load_study


class StopRequest:
    """Ctrl-C once: finish the round. Twice: stop at once. Both can be resumed."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        """Whether somebody asked to stop."""
        return self.asked

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal, raise on the second."""
        del number
        if self.asked and _is_repeating(frame):
            _repeat()  # what is raised there would be dropped as well
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        typer.echo(
            "\nfedmed: finishing this round; press Ctrl-C again to stop now", err=True
        )


def _repeat() -> None:
    """Send the main thread an interrupt, in a moment."""
    main = threading.main_thread().ident
    threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT)).start()


def _is_repeating(frame: FrameType | None) -> bool:
    """Whether a signal came while `listening` dealt with an interrupt that was lost."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "ask_again" and code.co_filename == __file__:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a polite request while a study runs.

    After a request nothing is left to be stopped: a signal that comes when the round is
    saved must not tear the way out.
    """
    request = StopRequest()
    before = {
        number: signal.signal(number, request.on_signal)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    report = sys.unraisablehook

    def ask_again(ignored: sys.UnraisableHookArgs) -> None:
        """Repeat an interrupt that fell into a destructor or a weakref's callback.

        Python prints and drops what is raised there; the second Ctrl-C must count.
        """
        if isinstance(ignored.exc_value, KeyboardInterrupt):
            _repeat()
        else:
            report(ignored)

    sys.unraisablehook = ask_again
    try:
        yield request
    finally:
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if request.asked else handler)


def default_folder(study: Study) -> Path:
    """Name a fresh run folder."""
    return Path("runs") / f"{study.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def newest_folder(study: Study) -> Path:
    """Find the run to resume when none is named.

    Raises:
        ResumeError: If there is none of this study.
    """
    # The name of another study may begin like this one's.
    own = re.compile(rf"{re.escape(study.name)}-\d{{8}}-\d{{6}}")
    locks = Path("runs").glob("*/study.lock.yaml")
    found = sorted(lock.parent for lock in locks if own.fullmatch(lock.parent.name))
    if not found:
        raise ResumeError(
            f"the folder runs holds no run of study {study.name!r}",
            hint="Name the run's folder with --out, or start it without --resume.",
        )
    return found[-1]


RUN_ENTRIES = ("study.lock.yaml", "run.lock", "checkpoints", "sites", "ledger")
"""Any of these makes a folder a run's."""


def refuse_foreign(folder: Path, entries: tuple[str, ...]) -> None:
    """Keep a run out of a folder that holds other things.

    Raises:
        UsageError: If the folder holds something, and none of `entries`.
    """
    if not folder.is_dir() or any((folder / name).exists() for name in entries):
        return
    if any(folder.iterdir()):
        raise UsageError(
            f"the folder {folder} holds other things",
            hint="Name a folder with --out that is new or empty.",
        )


def require_run(folder: Path) -> None:
    """Keep `--resume` from starting anew where a name was mistyped.

    Raises:
        ResumeError: If the folder holds no run, not even one that died at once.
    """
    if not any((folder / name).exists() for name in RUN_ENTRIES):
        raise ResumeError(
            f"the folder {folder} holds no run",
            hint="Name the run's folder with --out, or start it without --resume.",
        )


def execute(
    study: Study, out: Path, *, resume: bool, quiet: bool, should_stop: StopRequest
) -> RunResult:
    """Run a study with progress on the terminal."""
    if quiet:
        # Ray prints to standard output when a worker dies; a program reads there.
        with contextlib.redirect_stdout(sys.stderr):
            return run_study(
                study,
                out,
                resume=resume,
                observer=Silence(),
                should_stop=should_stop,
            )
    first = _rounds_done(out) if resume else 0
    title = f"{study.name} {study.strategy.name}"
    with TerminalProgress(title, study.rounds, first) as progress:
        return run_study(
            study, out, resume=resume, observer=progress, should_stop=should_stop
        )


def _rounds_done(out: Path) -> int:
    folder = RunFolder(out).checkpoints
    return max(Checkpoints(folder).rounds(), default=0) if folder.is_dir() else 0


def run_command(
    study_file: Path,
    overrides: tuple[str, ...],
    *,
    transport: str | None,
    out: Path | None,
    resume: bool,
    report: bool,
    as_json: bool,
) -> None:
    """Run, report, print."""
    if transport is not None:
        overrides = (*overrides, f"transport.name={transport}")
    study = load_study(study_file, overrides)
    if study.report.published:
        from fedmed.report.published import check_published

        check_published(study.report.published, study.report.columns)
    folder = out or (newest_folder(study) if resume else default_folder(study))
    if resume:
        require_run(folder)
    refuse_foreign(folder, RUN_ENTRIES)
    try:
        with listening() as should_stop:
            result = execute(
                study, folder, resume=resume, quiet=as_json, should_stop=should_stop
            )
    except KeyboardInterrupt:
        told = f"stopped in the middle of a round; go on with --resume --out {folder}"
        typer.echo(f"\nfedmed: {told}", err=True)
        sys.exit(130)
    if not result.finished:
        typer.echo(
            f"fedmed: stopped after a round; go on with --resume --out {folder}",
            err=True,
        )
        sys.exit(130)
    page = None
    if report:
        from fedmed.report.page import build_report

        page = build_report(result.folder)
    if as_json:
        typer.echo(json.dumps(json_record(result, page)))
        return
    _print_summary(result, page)


def json_record(result: RunResult, page: Path | None) -> dict[str, Any]:
    """The line that programs read."""
    summary = finite(result.summary)
    return {
        "run": str(result.folder),
        "strategy": summary["strategy"],
        "seed": summary["seed"],
        "rounds": summary["rounds"],
        "profile": summary["profile"],
        "split": summary["split"],
        "metrics": summary["sites"],
        "overall": summary["overall"],
        "worst_site": summary["worst_site"],
        "held_out": summary["held_out"],
        "report": None if page is None else str(page),
    }


def _print_summary(result: RunResult, page: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    summary = result.summary
    if not summary["sites"]:
        typer.echo(
            "no site has a case left for validation or test, so nothing was measured; "
            "give them more cases, or change the fractions in split"
        )
        typer.echo(f"run folder: {result.folder}")
        return
    unseen = (summary["held_out"] or {"sites": {}})["sites"]
    rows = {
        f"{site} (held out)" if site in unseen else site: values
        for site, values in summary["sites"].items()
    }
    rows["overall"] = summary["overall"]
    if unseen and len(unseen) < len(summary["sites"]):
        rows["overall (held out)"] = summary["held_out"]["overall"]
    names = [
        name
        for name in (
            "dice",
            "assd_mm",
            "hd95_mm",
            "accuracy",
            "balanced_accuracy",
            "auc",
        )
        if name in summary["overall"]
    ]
    title = f"{summary['strategy']}, {summary['split']} cases"
    table = Table(title=f"{title}, profile {summary['profile']}")
    table.add_column("site")
    for name in names:
        table.add_column(name, justify="right")
    for site, values in rows.items():
        table.add_row(site, *(f"{values.get(name, math.nan):.3f}" for name in names))
    console = Console()
    console.print(table)
    console.print(f"run folder: {result.folder}", soft_wrap=True)
    if page is not None:
        console.print(f"report: {page}", soft_wrap=True)
