"""What all tests share: a quiet environment, one cache, and no silent skipping.

Real data are looked for in the folder named by FEDMED_DATA, by default beside the
repository. Where they are missing, their tests are skipped and the last lines of the
run say so; with FEDMED_REQUIRE_DATA=1 they fail instead.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""No telemetry; one thread per process, set before torch is imported."""

LOUD = "NOT TESTED"
"""How the reason of a skip begins that the last lines of the run must repeat."""

_OWN_CACHE = pytest.StashKey[Path]()


def pytest_configure(config):
    os.environ.update(QUIET)
    beside = Path(__file__).parents[2] / "shared" / "data"
    if "FEDMED_DATA" not in os.environ and beside.is_dir():
        os.environ["FEDMED_DATA"] = str(beside)
    # Workers of pytest-xdist inherit the environment, and with it the folder.
    if not hasattr(config, "workerinput"):
        cache = Path(tempfile.mkdtemp(prefix="fedmed-test-cache-"))
        config.stash[_OWN_CACHE] = cache
        os.environ["FEDMED_CACHE"] = str(cache)


def pytest_unconfigure(config):
    if _OWN_CACHE in config.stash:
        shutil.rmtree(config.stash[_OWN_CACHE], ignore_errors=True)


@pytest.fixture(autouse=True)
def _real_data(request):
    """Skip a test of real data where FEDMED_DATA names no folder."""
    if request.node.get_closest_marker("real_data") is None:
        return
    folder = os.environ.get("FEDMED_DATA", "")
    if not Path(folder).is_dir() or not folder:
        pytest.skip("real data sets not found: set FEDMED_DATA to their folder")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    required = os.environ.get("FEDMED_REQUIRE_DATA", "") not in ("", "0")
    if report.skipped and required and "real_data" in item.keywords:
        report.outcome = "failed"
        report.longrepr = (
            f"skipped although FEDMED_REQUIRE_DATA is set: {_reason(report)}"
        )
    return report


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    real = [report for report in skipped if "real_data" in report.keywords]
    if real:
        terminalreporter.write_line(
            f"{LOUD}: {len(real)} tests of real data sets: {_reason(real[0])}",
            yellow=True,
            bold=True,
        )
    for report in skipped:
        if LOUD in _reason(report):
            terminalreporter.write_line(
                f"{report.nodeid}: {_reason(report)}", yellow=True, bold=True
            )


def _reason(report):
    told = report.longrepr
    text = told[2] if isinstance(told, tuple) else str(told)
    return text.removeprefix("Skipped: ")
