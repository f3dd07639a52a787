"""The `fedmed` command as a user meets it, and a way to start it without the wait.

Importing torch takes seconds, so most tests start the command in a fork of one process
that has imported it already. What runs is the same `fedmed.cli.main`, in a process of
its own that can be killed or interrupted; `fresh` starts a new interpreter instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMMAND = "from fedmed.cli import main; main()"
LIMIT_S = 120.0

TINY: dict[str, Any] = {
    "name": "small",
    "rounds": 2,
    "sites": {
        "dataset": "phantom",
        "preset": "prostate_abc",
        "cases_per_site": 4,
        "size": [24, 24, 4],
    },
    "preprocess": {"size": [24, 24]},
    "model": {"name": "unet", "base_width": 4, "levels": 2, "norm": "batch"},
    "train": {
        "batch_size": 4,
        "local_steps": 2,
        "optimizer": {"name": "adam", "lr": 3e-3},
    },
    "strategy": {"name": "fedbn", "sync": "round"},
    "evaluate": {"overlays": 0},
}
"""Three phantom hospitals; a run takes a fraction of a second."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command that has ended; `code` is negative if a signal ended it."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        """The one JSON line on standard output."""
        lines = self.out.splitlines()
        assert len(lines) == 1, f"not one line: {self.out!r}\n{self.err}"
        found: dict[str, Any] = json.loads(lines[0])
        return found

    def refused(self, code: int) -> str:
        """Assert a polite refusal and give its words on one line."""
        told = self.err.strip().splitlines()
        assert self.code == code, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err + self.out
        assert 1 <= len(told) <= 2, f"{len(told)} lines:\n{self.err}"
        assert told[0].startswith("fedmed: ")
        assert not self.out
        return " ".join(line.strip() for line in told)


@dataclasses.dataclass(frozen=True)
class Started:
    """A command under way."""

    pid: int
    line: CommandLine
    folder: Path

    def send(self, number: int) -> None:
        """Send a signal; a process that has ended already does not mind."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for its end."""
        code = self.line.ask({"do": "wait", "pid": self.pid})["code"]
        out, err = ((self.folder / n).read_text() for n in ("out", "err"))
        return Ended(code, out, err)

    def until(self, what: Any, limit_s: float = 60.0) -> None:
        """Wait until `what()` is true."""
        stop = time.monotonic() + limit_s
        while not what():
            assert time.monotonic() < stop, (self.folder / "err").read_text()
            time.sleep(0.002)


class CommandLine:
    """Starts `fedmed` in forks of a process that has imported everything.

    Args:
        folder: Where the commands run, and where their output goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the prepared process for something."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(
        self,
        *arguments: object,
        cwd: Path | None = None,
        die_at: int = 0,
        **variables: str | None,
    ) -> Started:
        """Start a command.

        Args:
            arguments: Of the command.
            cwd: Where.
            die_at: Kill the process (SIGKILL) just before it forces data to disk or
                renames a file for the `die_at`-th time; 0 = never.
            variables: Environment; None removes one.
        """
        self._number += 1
        folder = self.folder / f".command-{self._number}"
        folder.mkdir()
        request = {
            "do": "start",
            "arguments": [str(each) for each in arguments],
            "cwd": str(cwd or self.folder),
            "output": str(folder),
            "variables": variables,
            "die_at": die_at,
        }
        return Started(self.ask(request)["pid"], self, folder)

    def __call__(self, *arguments: object, **options: Any) -> Ended:
        """Run a command to its end."""
        return self.start(*arguments, **options).wait()

    def close(self) -> None:
        """End the prepared process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def fresh(
    *arguments: object,
    cwd: Path,
    wrapper: tuple[str, ...] = (),
    **variables: str | None,
) -> Ended:
    """Run a command in an interpreter of its own, as a shell would."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment of a command: ours, this repository first on the path."""
    changed = {**os.environ, "COLUMNS": "100", **(changes or {})}
    paths = [str(ROOT), changed.get("PYTHONPATH")]
    changed["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return {name: value for name, value in changed.items() if value is not None}


def write_study(folder: Path, **changes: Any) -> Path:
    """Write `TINY` with whole sections replaced, and give the file."""
    path = folder / "study.yaml"
    path.write_text(json.dumps({**TINY, **changes}))  # JSON is YAML
    return path


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of what a resumed run must reproduce."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "cases.csv")
    }


def hashes_of_all(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {"run.pid", "run.lock"}
    }


def serve() -> None:
    """Import everything once, then start commands in forks on request."""
    for name in ("fedmed.commands.run", "sites.host", "torch._dynamo"):
        __import__(name)
    for name in ("fedmed.report.page", "fedmed.transports.inprocess"):
        __import__(name)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            answer = {"pid": fork(request)}
        else:
            status = os.waitpid(request["pid"], 0)[1]
            answer = {"code": os.waitstatus_to_exitcode(status)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def fork(request: Mapping[str, Any]) -> int:
    """Start one command; gives the process."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = run(request)
        finally:
            os._exit(code)
    return pid


def run(request: Mapping[str, Any]) -> int:
    """Be the command, in the fork."""
    import traceback

    from fedmed.cli import main

    os.setsid()
    os.chdir(request["cwd"])
    for name, value in request["variables"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    for number, name in enumerate(("/dev/null", "out", "err")):
        path = Path(request["output"], name)
        flags = os.O_RDWR if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(path, flags), number)
    sys.argv = ["fedmed", *request["arguments"]]
    dying(request["die_at"])
    try:
        with flushed():
            main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Write what is buffered, whatever happens."""
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def dying(at: int) -> None:
    """Let the process be killed just before a given write to disk."""
    count = 0

    def mortal(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    if at:
        os.fsync, os.replace = mortal(os.fsync), mortal(os.replace)


if __name__ == "__main__":
    serve()
