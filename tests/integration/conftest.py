"""The command line, started quickly; see `command_line`."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def fedmed(tmp_path_factory):
    """`fedmed("run", ...)` runs a command to its end."""
    command_line = importlib.import_module("command_line")
    line = command_line.CommandLine(tmp_path_factory.mktemp("commands"))
    yield line
    line.close()


@pytest.fixture
def work(tmp_path):
    """An empty folder for a test's study and runs."""
    return tmp_path
