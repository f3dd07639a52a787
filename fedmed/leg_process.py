"""One leg of a comparison in a process of its own, which ends with its comparison."""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from fedmed.cli import set_up_logging
from fedmed.errors import FedMedError

logger = logging.getLogger(__name__)

PRELOADED = ("fedmed.run", "sites.host", "fedmed.transports.inprocess")
"""What every leg needs; imported once, in the process that legs are forked from."""

ORPHANED = 137
"""Exit code of a leg whose comparison was killed."""


@dataclass(frozen=True)
class Verdict:
    """How a leg ended.

    Attributes:
        finished: False if it was stopped after a round.
        error: What a person must know if it failed, else None.
        processor_s: Processor time that it took.
    """

    finished: bool
    error: FedMedError | None = None
    processor_s: float = 0.0


def run_leg_process(
    pipe: Connection, study: dict[str, Any], folder: Path, verbose: bool
) -> None:
    """Be the process of one leg.

    A killed comparison takes its legs along, as a kill of the one process that it is
    without `--jobs` would: both go on from the last checkpoints.

    Args:
        pipe: Where the `Verdict` goes.
        study: The resolved study.
        folder: The run folder.
        verbose: Log what happens inside.
    """
    os.setsid()  # Ctrl-C reaches the comparison only, which passes it on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    threading.Thread(target=_follow_parent, daemon=True).start()
    set_up_logging(verbose)
    verdict = _verdict(study, folder, stop)
    pipe.send(replace(verdict, processor_s=processor_seconds()))
    pipe.close()


def processor_seconds() -> float:
    """Processor time of this process, its threads and its ended child processes."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(ORPHANED)


def _verdict(content: dict[str, Any], folder: Path, stop: threading.Event) -> Verdict:
    from fedmed.run import run_study
    from fedmed.runfolder import RunFolder
    from fedmed.study import study_from_dict

    try:
        study = study_from_dict(content)
        resume = RunFolder(folder).lock_file.exists()
        result = run_study(study, folder, resume=resume, should_stop=stop.is_set)
    except FedMedError as error:
        return Verdict(False, error)
    except Exception as error:  # one leg must not take the others along
        logger.info("unforeseen", exc_info=error)
        # Its own text stays out: it may name a patient's file.
        told = f"this should not happen: {type(error).__name__}"
        return Verdict(False, FedMedError(told))
    return Verdict(result.finished)
