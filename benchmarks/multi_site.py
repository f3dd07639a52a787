"""Does it help to know which hospital a scan is from? The tables of docs/results.md.

    python -m benchmarks.multi_site prostate      MS-Net's table, on phantoms
    python -m benchmarks.multi_site prostate_short   the same after fewer steps
    python -m benchmarks.multi_site sync          one exchange a round, against a step
    python -m benchmarks.multi_site heart         distillation between MR and CT
    python -m benchmarks.multi_site heart_few     the same with few patients
    python -m benchmarks.multi_site spinal        the same rows on real data, which
    python -m benchmarks.multi_site retina        lie in the folder $FEDMED_DATA
    python -m benchmarks.multi_site precision     bfloat16 against float32
    python -m benchmarks.multi_site unseen        SAML's table: a hospital left out
    python -m benchmarks.multi_site unseen_again  the same, running values of its own
    python -m benchmarks.multi_site unseen_instance  the same without running values
    python -m benchmarks.multi_site brain         MASF's table: trained on one hospital
    python -m benchmarks.multi_site brain_again   the same, running values of its own
    python -m benchmarks.multi_site camera        a retina camera left out, real data
    python -m benchmarks.multi_site all           all of it

Claims are written down in `benchmarks/multi_site_questions.py`, before any result
unless a question says that it was asked later, and tested across test cases. Stopped at
any moment, the same command goes on; nothing is trained twice. What comes out replaces
its section of docs/results.md, whatever it is.
`--quick` tries the script out in a minute or two and writes no results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.multi_site_page import section, with_section
from benchmarks.multi_site_questions import QUESTIONS, Question
from benchmarks.reestimated import reestimate
from fedmed.report.run_folder import read_comparison

RESULTS = ROOT / "docs" / "results.md"
STORE = ROOT / ".bench" / "multi_site"
COMMAND = "from fedmed.cli import main; main()"
QUICK = ("rounds=1", "train.local_steps=2", "evaluate.overlays=0")


def train(question: Question, folder: Path, given: argparse.Namespace) -> None:
    """Train what is not trained yet.

    Raises:
        SystemExit: If it was stopped, or a run failed.
    """
    changes = (*question.changes, *given.change)
    if given.quick:
        changes += (*QUICK, *question.quick)
    seeds = (given.seeds or range(question.num_seeds))[: 1 if given.quick else None]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    for protocol, methods in question.protocols:
        words = [
            sys.executable, "-c", COMMAND, "compare", str(ROOT / question.study),
            *changes, "--protocol", protocol, "--strategies", ",".join(methods),
            "--seeds", ",".join(map(str, seeds)),
            "--jobs", str(given.jobs), "--out", str(folder),
        ]  # fmt: skip
        code = subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode
        if code:
            sys.exit(code)


def write(question: Question, folder: Path, results: Path) -> None:
    """Put a question's section into the page of results."""
    text = section(question, read_comparison(folder))
    page = results.read_text(encoding="utf-8") if results.exists() else "# Results\n"
    results.write_text(with_section(page, question.key, text), encoding="utf-8")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=[*QUESTIONS, "all"])
    parser.add_argument("change", nargs="*", help="changes to the study: key=value")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(word) for word in text.split(",")],
        help="of all questions; else as many as each one asks for",
    )
    parser.add_argument("--out", type=Path, default=STORE)
    parser.add_argument("--quick", action="store_true", help="a try, not written down")
    return parser.parse_intermixed_args(words)


def main(words: Sequence[str]) -> None:
    """Answer one question, or all."""
    given = arguments(words)
    keys = list(QUESTIONS) if given.question == "all" else [given.question]
    for key in keys:
        question = QUESTIONS[key]
        store = given.out / ("quick" if given.quick else "whole")
        folder = store / question.folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        if question.again:
            source = QUESTIONS[question.again]
            runs = store / source.folder
            train(source, runs, given)
            reestimate(runs, folder, question.left_out, given.jobs)
        else:
            train(question, folder, given)
        if given.quick or given.change:
            sys.stdout.write(section(question, read_comparison(folder)))
        else:
            write(question, folder, RESULTS)
            sys.stdout.write(f"written to {RESULTS.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
