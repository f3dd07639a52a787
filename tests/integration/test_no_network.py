"""A simulation needs no network: it runs where there is none at all."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
line = importlib.import_module("command_line")

pytestmark = pytest.mark.timeout(180)

NOWHERE = ("unshare", "--net", "--map-root-user", "--")
LOOPBACK_ONLY = (
    "unshare", "--net", "--map-root-user", "--",
    "sh", "-c", 'ip link set lo up && exec "$@"', "sh",
)  # fmt: skip


def require(wrapper):
    """Skip loudly where this system lets nobody make an empty network."""
    program = shutil.which(wrapper[0])
    works = (
        program
        and not subprocess.run(
            [*wrapper, "true"], capture_output=True, check=False
        ).returncode
    )
    if not works:
        pytest.skip("NOT TESTED: runs without network, `unshare --net` is not allowed")


def test_the_empty_network_is_empty():
    """The control: from in there, not even this machine can be reached."""
    require(NOWHERE)
    program = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    done = subprocess.run(
        [*NOWHERE, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Network is unreachable" in done.stderr


def test_inprocess_without_any_network(work):
    """Not even loopback is up: train, evaluate, report."""
    require(NOWHERE)
    out = work / "run"
    ended = line.fresh(
        "run", line.write_study(work), "--out", out, "--json", cwd=work, wrapper=NOWHERE
    )
    assert (ended.code, ended.err) == (0, "")
    assert sorted(ended.record["metrics"]) == ["a", "b", "c"]
    assert (out / "report.html").exists()


def test_ray_with_loopback_only(fedmed, work):
    """Ray's processes talk over 127.0.0.1; the numbers are those of one process."""
    require(LOOPBACK_ONLY)
    study = line.write_study(work, transport={"name": "ray", "num_workers": 2})
    ended = line.fresh(
        "run", study, "--out", work / "ray", "--no-report", "--json",
        cwd=work, wrapper=LOOPBACK_ONLY,
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    study = line.write_study(work)
    assert fedmed("run", study, "--out", work / "one", "--no-report").code == 0
    assert line.hashes(work / "ray") == line.hashes(work / "one")


def test_help_and_doctor_without_any_network(work):
    require(NOWHERE)
    for arguments in (("--help",), ("strategies",), ("sites", "list")):
        ended = line.fresh(*arguments, cwd=work, wrapper=NOWHERE)
        assert (ended.code, ended.err) == (0, "")
