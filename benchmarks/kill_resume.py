"""Kill a run at random instants, resume it, and compare every byte that counts.

    python benchmarks/kill_resume.py --kills 20

Each trial starts `fedmed run` in a process group of its own, sends SIGKILL to all of
it at an instant drawn between the first sign of life and the time the whole run took,
resumes it, and compares the SHA-256 of model.safetensors and cases.csv with those of a
run that nobody touched. Ends with 1 if any trial differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("model.safetensors", "cases.csv")
STUDY = """\
name: kill-resume
rounds: {rounds}
sites: {{dataset: phantom, preset: prostate_abc, cases_per_site: 5, size: [32, 32, 4]}}
preprocess: {{size: [32, 32]}}
model: {{name: unet, base_width: 8, levels: 3, norm: batch}}
train: {{batch_size: 8, local_steps: 8, optimizer: {{name: adam, lr: 3.0e-3}}}}
strategy: {{name: {strategy}, sync: {sync}}}
"""


@dataclass(frozen=True)
class Trial:
    """One death and what came after it."""

    strategy: str
    instant_s: float
    rounds_done: int
    is_equal: bool


def start(study: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a run in a process group of its own."""
    return subprocess.Popen(
        [
            sys.executable, "-c", "from fedmed.cli import main; main()",
            "run", str(study), "--out", str(out), "--no-report", *options,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that must succeed."""
    _, err = process.communicate()
    if process.returncode:
        sys.exit(f"a run ended with {process.returncode}:\n{err.decode()}")


def hashes(out: Path) -> list[str]:
    """SHA-256 of the files that must be equal."""
    return [hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES]


def rounds_done(out: Path) -> int:
    """Newest checkpoint of a run; -1 if it has none."""
    found = (out / "checkpoints").glob("round-*.safetensors")
    return max((int(path.stem.removeprefix("round-")) for path in found), default=-1)


def trial(study: Path, out: Path, instant_s: float, options: Sequence[str]) -> int:
    """Kill a run `instant_s` after its folder appeared, and resume it."""
    process = start(study, out, *options)
    while not (out / "run.lock").exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(instant_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = rounds_done(out)
    finish(start(study, out, "--resume", *options))
    return done


def measure(
    folder: Path, strategy: str, sync: str, arguments: argparse.Namespace
) -> list[Trial]:
    """All trials of one strategy."""
    study = folder / f"{strategy}.yaml"
    study.write_text(
        STUDY.format(strategy=strategy, sync=sync, rounds=arguments.rounds)
    )
    options = ["--transport", arguments.transport]
    for name in ("warm-up", "whole"):  # the first run also generates the phantoms
        out = folder / f"{strategy}-{name}"
        process = start(study, out, *options)
        while not (out / "run.lock").exists():
            time.sleep(0.002)
        begin = time.monotonic()
        finish(process)
        whole_s = time.monotonic() - begin
    expected = hashes(folder / f"{strategy}-whole")
    chance = random.Random(f"{arguments.seed} {strategy}")
    trials = []
    for number in range(arguments.kills):
        instant_s = chance.uniform(0, whole_s)
        out = folder / f"{strategy}-{number}"
        done = trial(study, out, instant_s, options)
        found = Trial(f"{strategy} ({sync})", instant_s, done, hashes(out) == expected)
        trials.append(found)
        report(number + 1, found)
    return trials


def report(number: int, found: Trial) -> None:
    """Print one row of the table."""
    done = "before round 0" if found.rounds_done < 0 else f"round {found.rounds_done}"
    verdict = "equal" if found.is_equal else "DIFFERENT"
    print(
        f"| {number:2d} | {found.strategy:15s} | {found.instant_s:6.2f} "
        f"| {done:14s} | {verdict} |",
        flush=True,
    )


def main() -> None:
    """Run all trials."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="per strategy")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--transport", default="inprocess", choices=["inprocess", "ray"]
    )
    parser.add_argument(
        "--strategies", default="fedbn:round", help="name:sync, comma-separated"
    )
    arguments = parser.parse_args()
    print("| no | strategy        | kill s | checkpoint     | after --resume |")
    print("|---:|-----------------|-------:|----------------|----------------|")
    with tempfile.TemporaryDirectory(prefix="fedmed-kill-") as temporary:
        os.environ.setdefault("FEDMED_CACHE", str(Path(temporary) / "cache"))
        found = []
        for each in arguments.strategies.split(","):
            strategy, _, sync = each.partition(":")
            found += measure(Path(temporary), strategy, sync or "round", arguments)
    equal = sum(each.is_equal for each in found)
    print(f"\n{equal} of {len(found)} resumed runs equal the uninterrupted one.")
    sys.exit(equal != len(found))


if __name__ == "__main__":
    main()
