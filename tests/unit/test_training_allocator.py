from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from fedmed.training.allocator import keep_freed_memory
    assert keep_freed_memory() and keep_freed_memory()

def work():
    for _ in range(4):
        blocks = [torch.zeros(12_000_000) for _ in range(6)]
        del blocks

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    run = subprocess.run(
        [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_memory_that_is_taken_again_is_not_cleared_again():
    # Blocks of 48 MB: the C library learns by itself to keep some up to 32 MB.
    assert page_faults("keep") < page_faults("return") / 4
