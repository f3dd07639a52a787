"""torch.compile: the same numbers up to rounding, and only where it pays back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedmed.errors import SiteError
from fedmed.study import study_from_dict
from fedmed.task import Task, build_trainer
from fedmed.training import compiling
from fedmed.training.compiling import (
    Speeds,
    compile_network,
    decide_compile,
    steps_of_a_process,
    with_compile,
)
from fedmed.training.coupled import captured, noting_trainer
from fedmed.training.curvature import hessian_vector
from fedmed.training.measurement import live_model, random_batch
from fedmed.training.trainer import Compiled

OUTLINES = Task("segmentation", ("background", "organ"), 1, 3)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"
)


def study(**train):
    return study_from_dict(
        {
            "name": "x",
            "rounds": 10,
            "sites": {"dataset": "phantom"},
            "model": {"mode": "slice", "base_width": 2, "levels": 2},
            "preprocess": {"size": [16, 16]},
            "train": {"batch_size": 4, "local_steps": 5, "compile": "auto", **train},
        }
    )


def trained(cache, *, is_compiled, precision="float64"):
    """A network after three steps, its loss, and what trained it."""
    settled = study(precision=precision)
    model, batch = live_model(settled, OUTLINES), random_batch(settled, OUTLINES)
    trainer = build_trainer(settled, "a")
    if is_compiled:
        trainer = replace(trainer, compiled=compile_network(model, cache))
    found = trainer.train(model, [batch] * 3)
    state = {name: entry.clone() for name, entry in model.state_dict().items()}
    return state, found.loss, (trainer, model, batch)


def compare(cache):
    """Train with and without compiling, and measure; in a process of its own."""
    plain, loss, _ = trained(cache, is_compiled=False)
    fast, other, (trainer, model, batch) = trained(cache, is_compiled=True)
    vector = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    product = hessian_vector(trainer, model, batch, vector)
    eager = hessian_vector(replace(trainer, compiled=None), model, batch, vector)
    settled = with_compile(study(precision="float64"), decided=True)
    with captured(model, ("head",)) as outputs:
        site: Any = SimpleNamespace(trainer=trainer)
        noting_trainer(site, ("head",)).logits(model, batch)
    return {
        "noted": sorted(outputs),
        "was_compiled": "torch._inductor.graph" in sys.modules,
        "names": sorted(fast) == sorted(plain),
        "difference": max(float((fast[n] - plain[n]).abs().max()) for n in plain),
        "loss_difference": abs(other - loss),
        "second_derivatives": all(torch.equal(product[n], eager[n]) for n in vector),
        "speeds": vars(compiling.measure_speeds(settled, OUTLINES, cache)),
    }


def refusal(cache):
    """Train where no compiler is; in a process of its own."""
    from torch._inductor import config

    config.cpp.cxx = ("no-such-compiler",)
    config.force_disable_caches = True
    decided = decide_compile(study(), OUTLINES, cache, 3)
    found = {"decided": decided, "noted": (cache / "compile").exists()}
    try:
        trained(cache, is_compiled=True)
    except SiteError as error:
        return {**found, "message": error.message, "hint": error.hint}
    return {**found, "message": "", "hint": ""}


def alone(task, cache):
    """Run one of the two above without the checks of shapes that tests install.

    They look into every call, which the compiler cannot trace.
    """
    # The compiler names its folder in the environment of whoever has imported it.
    environment = {n: v for n, v in os.environ.items() if "TORCHINDUCTOR" not in n}
    done = subprocess.run(
        [sys.executable, __file__, task, str(cache)],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_compiler
def test_a_compiled_network_learns_the_same(tmp_path):
    found = alone("compare", tmp_path)
    assert found["was_compiled"]
    assert found["names"]
    assert found["loss_difference"] < 1e-12
    assert found["difference"] < 1e-12
    assert found["second_derivatives"]
    # What is noted on the way is noted although the network was compiled before.
    assert found["noted"] == ["head", "head/input"]
    assert 0 < found["speeds"]["compiled_s"] < 5
    assert 0 < found["speeds"]["eager_s"] < 5
    assert any((tmp_path / "compiled").iterdir())


def test_without_a_compiler_it_says_what_to_do(tmp_path):
    found = alone("refusal", tmp_path)
    assert "cannot be compiled here" in found["message"]
    assert "train.compile: false" in found["hint"]
    assert not found["decided"]
    assert not found["noted"]


def test_another_network_is_not_the_compiled_one(tmp_path):
    _, _, (trainer, model, batch) = trained(tmp_path, is_compiled=False)

    def call(images, site):
        raise AssertionError("called")

    watched = replace(trainer, compiled=Compiled(model, call))
    watched.logits(live_model(study(precision="float64"), OUTLINES), batch)
    with pytest.raises(AssertionError, match="called"):
        watched.logits(model, batch)


def test_it_pays_back_when_the_steps_are_enough():
    speeds = Speeds(eager_s=0.3, compiled_s=0.2, compile_s=10.0)
    assert not speeds.pays_back(99)
    assert speeds.pays_back(101)
    assert not Speeds(1.0, 1.0, 0.0).pays_back(10**9)


def test_the_decision_is_measured_once(monkeypatch, tmp_path):
    calls = []

    def measure(study, task, cache):
        calls.append(study)
        return Speeds(0.3, 0.2, 10.0)

    monkeypatch.setattr(compiling, "measure_speeds", measure)
    monkeypatch.setattr(compiling.os, "cpu_count", lambda: 2)
    assert steps_of_a_process(study(), num_sites=3) == 100
    assert not decide_compile(study(), OUTLINES, tmp_path, 3)
    assert decide_compile(study(), OUTLINES, tmp_path, 6)  # more sites, the same step
    assert len(calls) == 1
    decide_compile(study(precision="bfloat16"), OUTLINES, tmp_path, 6)
    assert len(calls) == 2
    for settled in (False, True):
        asked = with_compile(study(), settled)
        assert decide_compile(asked, OUTLINES, tmp_path, 6) is settled
    assert len(calls) == 2


if __name__ == "__main__":
    answer = {"compare": compare, "refusal": refusal}[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(json.dumps(answer))
