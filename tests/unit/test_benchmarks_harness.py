"""The harness of the benchmarks: interleaving, resuming, ratios, memory, floors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks import floor, workload
from benchmarks.bench import fewest_repetitions
from benchmarks.harness import (
    FailedRunError,
    Row,
    Store,
    Variant,
    Workload,
    combined,
    descendants,
    measure,
    plan,
    run_once,
    summarise,
    tree_memory,
)
from benchmarks.results_page import bars, code_lines, table

WORKLOAD = Workload(
    key="W0",
    title="A try",
    module="benchmarks.there_is_no_such_module",
    variants=(Variant("floor"), Variant("ours", "floor", bar=1.5, memory_bar=1.2)),
    memory=True,
)
PYTHON = [sys.executable, "-c"]


def test_repetitions_interleave_the_variants():
    names = [(v.name, number) for v, number in plan(WORKLOAD, 2)]
    assert names == [
        *[("floor", 0), ("ours", 0), ("floor", 1), ("ours", 1)],
        *[("floor", "memory"), ("ours", "memory")],
    ]


def stored(folder: Path) -> Store:
    """Three repetitions on a machine that became three times slower."""
    store = Store(folder)
    for number, slower in enumerate((1.0, 1.0, 3.0)):
        store.write("W0", "floor", number, result={"seconds": slower})
        store.write("W0", "ours", number, result={"seconds": 1.4 * slower})
    store.write("W0", "floor", "memory", result={"memory_bytes": 100})
    store.write("W0", "ours", "memory", result={"memory_bytes": 150})
    return store


def test_a_ratio_is_taken_within_a_repetition(tmp_path):
    bare, ours = summarise(WORKLOAD, stored(tmp_path), 3)
    assert bare.is_met is None
    assert ours.ratio == pytest.approx(1.4)
    assert ours.ratio_spread == pytest.approx((1.4, 1.4))
    assert ours.spread == pytest.approx((1.4, 4.2))


def test_a_missed_bar_of_memory_is_a_missed_bar(tmp_path):
    rows = summarise(WORKLOAD, stored(tmp_path), 3)
    assert rows[1].memory_ratio == pytest.approx(1.5)
    assert rows[1].is_met is False
    assert "**missed**" in table(WORKLOAD, rows, {})


def test_the_page_tells_the_least_number_of_repetitions(tmp_path):
    store = stored(tmp_path)
    known = {
        "W0": WORKLOAD,
        "W1": dataclasses.replace(WORKLOAD, key="W1"),
        "W2": dataclasses.replace(WORKLOAD, key="W2", repetitions=1),
    }
    assert fewest_repetitions(known, store, most=2) == 2
    assert fewest_repetitions(known, store, most=5) == 3
    store.write("W1", "floor", 0, result={"seconds": 1.0})
    assert fewest_repetitions(known, store, most=5) == 1
    store.write("W2", "floor", 0, result={"seconds": 1.0})
    assert fewest_repetitions(known, store, most=1) == 1


def test_time_counts_per_core():
    variant = Variant("workers", "floor", bar=1.3, cores=4, per_core=True)
    assert Row(variant, 1.0, (1.0, 1.0), ratio=1.31).is_met is False
    assert Row(variant, 1.0, (1.0, 1.0), ratio=1.3).is_met is True


def test_only_missing_runs_are_run(tmp_path):
    store = stored(tmp_path)
    assert measure(WORKLOAD, store, repetitions=3) == {}
    store.path("W0", "ours", 1).write_text('{"seconds": ')
    failed = measure(WORKLOAD, store, repetitions=3)
    assert list(failed) == ["ours"]
    assert "there_is_no_such_module" in failed["ours"]
    assert store.read("W0", "floor", 1) == {"seconds": 1.0}


def test_the_last_line_is_the_result():
    told = "print('noise'); print('{\"seconds\": 0.5}')"
    assert run_once([*PYTHON, told]) == {"seconds": 0.5}


@pytest.mark.parametrize("code", ["raise ValueError('odd')", "print('no object')"])
def test_a_run_that_fails_says_how(code):
    with pytest.raises(FailedRunError, match=r"odd|said nothing"):
        run_once([*PYTHON, code])


def command_lines() -> list[str]:
    """Command lines of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_text())
    return found


def test_nothing_runs_on_after_a_timeout():
    name = f"sleep-of-{time.monotonic_ns()}"
    code = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', "
        f"'{name}']); time.sleep(60)"
    )
    with pytest.raises(FailedRunError, match="longer than"):
        run_once([*PYTHON, code], timeout_s=1.0)
    # A killed process is gone when its new parent has noticed.
    deadline = time.monotonic() + 10
    while running := [line for line in command_lines() if line.endswith(f"{name}\0")]:
        assert time.monotonic() < deadline, running
        time.sleep(0.05)


def test_memory_that_processes_share_counts_once():
    size = 64 * 2**20
    code = (
        "import mmap, os, sys, time;"
        f"shared = mmap.mmap(-1, {size}); shared.write(bytes({size}));"
        "child = os.fork(); shared[:1], sum(shared[::4096]);"
        "print('ready', flush=True) if child else None;"
        "time.sleep(60)"
    )
    with subprocess.Popen([*PYTHON, code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.3)
            found, memory = descendants(process.pid), tree_memory(process.pid)
        finally:
            for one in descendants(process.pid)[1:]:
                subprocess.run(["kill", str(one)], check=False)
            process.kill()
    assert len(found) == 2
    assert size < memory < 1.7 * size


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("large", [1, 1_000_000])
def test_the_floor_is_federated_averaging(monkeypatch, large):
    monkeypatch.setattr(floor, "LARGE", large)
    with floor.Floor("W2", 2, num_sites=5) as bare:
        bare.round()
        bare.round()
        found = dict(bare.model().named_parameters())

    model = workload.build_model("W2").double()
    work = workload.WORKLOADS["W2"]
    for number in range(2):
        moved = []
        for site in range(5):
            local = copy.deepcopy(model)
            images, labels = workload.site_data("W2", site)
            (chosen,) = workload.draw_batches("W2", site, number)
            step = torch.optim.SGD(local.parameters(), lr=work.learning_rate)
            logits = local(images[chosen].double())
            functional.cross_entropy(logits, labels[chosen]).backward()
            step.step()
            moved.append(dict(local.named_parameters()))
        for name, parameter in model.named_parameters():
            mean = torch.stack([one[name].detach() for one in moved]).mean(0)
            parameter.data = mean
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found[name].double(), parameter, rtol=1e-5, atol=1e-6
        )


def test_the_floor_moves_a_network_into_one_vector_without_changing_it():
    model = workload.build_model("W1")
    images, _ = workload.site_data("W1", 0)
    before = model.eval()(images[:2])
    flat = floor.flatten(model)
    torch.testing.assert_close(model(images[:2]), before, rtol=0, atol=0)
    flat.zero_()
    assert not any(p.any() for p in model.parameters())


def test_lines_of_code_are_neither_words_nor_blank():
    assert (
        code_lines('"""Words."""\n\n# more\ndef f():\n    """W."""\n    return 1\n')
        == 2
    )


def test_runs_that_measure_themselves_are_put_together():
    runs = [
        {"rows": [{"name": "ours", "median_s": m, "spread": [m, m + 1], "bar": 0.5}]}
        for m in (3.0, 1.0, 2.0)
    ]
    assert combined(runs) == [
        {"name": "ours", "median_s": 2.0, "spread": [1.0, 4.0], "bar": 0.5}
    ]


def test_a_run_may_bring_the_time_that_it_is_divided_by(tmp_path):
    workload_ = Workload("W0", "", "", (Variant("ours", "its floor", bar=1.05),))
    store = Store(tmp_path)
    for number, floor_s in enumerate((1.0, 2.0, 4.0)):
        told = {"seconds": 1.1 * floor_s, "reference_seconds": floor_s}
        store.write("W0", "ours", number, result=told)
    (row,) = summarise(workload_, store, 3)
    assert row.ratio == pytest.approx(1.1)
    assert row.reference_s == 2.0
    (verdict,) = row.verdicts
    assert "its floor: 1.1, at most 1.05: **not held**, 5% above" in str(verdict)


def test_the_page_says_of_every_bar_whether_it_is_held(tmp_path):
    rows = summarise(WORKLOAD, stored(tmp_path), 3)
    told = bars([(WORKLOAD, rows, {})], [])
    assert "* W0, ours, time / floor: 1.4, at most 1.5: held, 7% below" in told
    assert "* W0, ours, memory / floor: 1.5, at most 1.2: **not held**, 25%" in told
