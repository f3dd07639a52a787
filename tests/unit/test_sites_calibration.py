"""Statistics that a site re-estimates on its own training images."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.case import UNKNOWN_LABEL
from fedmed.strategy import Private
from fedmed.study import study_from_dict
from sites.calibration import (
    calibrate,
    keeps_statistics,
    needs_calibration,
    recalibrate,
    training_batches,
)
from sites.context import Workbench
from sites.evaluation import evaluate

sys.path.insert(0, str(Path(__file__).parents[1]))
runs = importlib.import_module("tiny.runs")
modules_are_listed_once = runs.modules_are_listed_once

EVALUATE = {"statistics": "recalibrated", "batch_size": 3, "overlays": 0}
EXACT = {"precision": "float64"}


def _bench(method: str = "fedbn", base: Any = runs.IMAGE, **how: Any) -> Workbench:
    section = {"evaluate": EVALUATE, "model": {"norm": "batch"}, "train": EXACT}
    study = runs.make_study(base, method, **{**section, **how})
    return Workbench(study, "a", runs.CACHE)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def _statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {n: t.clone() for n, t in state.items() if "running" in n}


def test_every_training_image_is_seen_once_and_no_other() -> None:
    bench = _bench()
    cases = bench.data.splits["train"]
    batches = list(training_batches(bench))
    assert len(cases) == 4
    assert [len(images) for images in batches] == [3, 1]
    seen = sorted(image.sum().item() for image in torch.cat(batches))
    np.testing.assert_allclose(
        seen, sorted(case.image_CIJK.sum() for case in cases), rtol=1e-6
    )
    again = torch.cat(list(training_batches(bench)))
    assert torch.equal(again, torch.cat(batches))


def test_nothing_is_dropped_while_a_newcomer_estimates_its_statistics() -> None:
    """AdaBN is a function of images and weights, whatever was drawn before."""
    network = {"name": "tiny.dropping:Dropping", "mode": "slice"}
    study = runs.make_study({**runs.IMAGE, "model": network}, "fedbn")
    found = []
    for seed in (0, 1):
        bench = Workbench(study, "a", runs.CACHE)
        torch.manual_seed(seed)
        calibrate(bench, bench.model)
        assert not any(module.training for module in bench.model.modules())
        found.append({n: t.clone() for n, t in bench.model.state_dict().items()})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_what_only_training_uses_asks_for_no_statistics() -> None:
    """The random head of Epi-FCR is kept, and nobody is evaluated with it."""
    strategy = {"head": ["head", "decoder.levels.0"]}
    study = runs.make_study(
        runs.IMAGE, "epi_fcr", strategy=strategy, model={"norm": "batch"}
    )
    bench = Workbench(study, "a", runs.CACHE)
    assert any("running_mean" in name for name in bench.partition.kept)
    assert not needs_calibration(bench, Private())
    assert not keeps_statistics(bench)


def test_training_images_of_a_divided_volume_are_its_training_slices() -> None:
    content = {
        "name": "slices",
        "sites": {
            "dataset": "phantom",
            "preset": "prostate_abc",
            "cases_per_site": 1,
            "size": [16, 16, 8],
        },
        "split": {"by": "slices", "train": 0.5, "validation": 0.25, "test": 0.25},
        "model": {"name": "unet", "base_width": 2, "levels": 2},
        "strategy": {"name": "fedbn"},
    }
    bench = Workbench(study_from_dict(content), "a", runs.CACHE)
    images = torch.cat(list(training_batches(bench)))
    assert len(images) == len(bench.indices[0]) < 8
    (case,) = bench.data.splits["train"]
    known = [
        k
        for k in range(8)
        if np.any(np.asarray(case.label_IJK)[..., k] != UNKNOWN_LABEL)
    ]
    wanted = [np.asarray(case.image_CIJK)[0, ..., k].sum() for k in known]
    np.testing.assert_allclose(
        sorted(images.sum(dim=(1, 2, 3)).tolist()), sorted(wanted), rtol=1e-4, atol=1e-3
    )


def test_the_first_layer_gets_the_total_variance_of_the_batches() -> None:
    """By hand from the convolved images; an unbiased variance within each batch."""
    bench = _bench()
    model: Any = bench.model.eval()
    first = model.encoder.levels[0]
    recalibrate(bench, model)
    images = np.concatenate([b.numpy() for b in training_batches(bench)])
    with torch.no_grad():
        features = first.conv1(torch.from_numpy(images).double()).numpy()
    count = len(features)
    batches = [features[:3], features[3:]]
    shares = np.array([len(batch) / count for batch in batches])
    means = np.stack([batch.mean((0, 2, 3)) for batch in batches])
    variances = np.stack(
        [batch.transpose(1, 0, 2, 3).reshape(2, -1).var(1, ddof=1) for batch in batches]
    )
    mean = shares @ means
    total = shares @ (variances + (means - mean) ** 2)
    norm = first.norm1
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-10)
    np.testing.assert_allclose(norm.running_var.numpy(), total, rtol=1e-10)
    assert np.abs(shares @ variances - total).max() > 1e-5  # it is no mean of variances


def test_nothing_but_statistics_changes_and_the_network_is_left_to_be_read() -> None:
    bench = _bench()
    before = {n: t.clone() for n, t in bench.model.state_dict().items()}
    momenta = {n: m.momentum for n, m in _layers(bench.model).items()}
    recalibrate(bench, bench.model.train())
    after = bench.model.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    ends = {"running_mean", "running_var", "num_batches_tracked"}
    assert {n.rpartition(".")[2] for n in changed} == ends
    assert {n: m.momentum for n, m in _layers(bench.model).items()} == momenta
    assert not any(module.training for module in bench.model.modules())


@pytest.mark.parametrize("estimate", [calibrate, recalibrate])
def test_a_failure_leaves_the_network_as_other_sites_need_it(estimate: Any) -> None:
    """It is the one live network of its process, and others go on training it."""
    bench = _bench()
    model = bench.load(bench.initial, Private())
    before = [layer.momentum for layer in _layers(model).values()]

    def fail(*_: Any) -> None:
        raise ValueError("no memory left")

    handle = model.register_forward_hook(fail)
    with pytest.raises(ValueError, match="no memory left"):
        estimate(bench, model)
    handle.remove()
    assert before == [layer.momentum for layer in _layers(model).values()]
    assert before == [0.1] * len(before)


def test_it_does_not_matter_where_the_statistics_came_from() -> None:
    bench = _bench()
    recalibrate(bench, bench.model)
    once = _statistics(bench.model)
    for layer in _layers(bench.model).values():
        layer.running_mean.fill_(7)  # type: ignore[operator]
        layer.running_var.fill_(7)  # type: ignore[operator]
    recalibrate(bench, bench.model)
    for name, tensor in _statistics(bench.model).items():
        assert torch.equal(tensor, once[name])


@pytest.mark.parametrize("method", ["fedavg", "dual_stream", "ms_net"])
def test_only_what_the_site_keeps_and_predicts_with_is_estimated(method: str) -> None:
    bench = _bench(method)
    before = _statistics(bench.model)
    recalibrate(bench, bench.model)
    after = _statistics(bench.model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    kept = {n for n in bench.partition.kept if "running" in n}
    assert changed == {n for n in kept if not n.startswith("auxiliary")}
    assert bool(changed) == (method != "fedavg")


class _Flipped:
    """A case with the other label everywhere."""

    def __init__(self, case: Any) -> None:
        self._case = case
        self.label_IJK = 1 - np.asarray(case.label_IJK)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._case, name)


def test_labels_are_not_used() -> None:
    bench = _bench()
    recalibrate(bench, bench.model)
    expected = _statistics(bench.model)
    other = _bench()
    flipped = tuple(_Flipped(case) for case in other.data.splits["train"])
    data = copy.copy(other.data)
    object.__setattr__(data, "splits", {**data.splits, "train": flipped})
    other.__dict__["pool"] = (data,)
    recalibrate(other, other.model)
    assert other.indices[0].cases[0].label_IJK is flipped[0].label_IJK
    for name, tensor in _statistics(other.model).items():
        assert torch.equal(tensor, expected[name])


def _evaluated(statistics: str, kept: Any, *, base: Any) -> Any:
    evaluation = {**EVALUATE, "statistics": statistics}
    bench = _bench(base=base, evaluate=evaluation)
    shared = {name: bench.initial[name] for name in bench.partition.shared}
    private = Private({"kept": kept})
    return evaluate(bench, private, weights=shared, splits=("train",))


def test_evaluation_uses_them_if_the_study_says_so() -> None:
    """Of a network whose kept statistics are far off."""
    base = runs.TABLE
    bench = _bench(base=base)
    wrong = {n: bench.initial[n] for n in bench.partition.kept}
    wrong = {n: t + 2 if "running" in n else t for n, t in wrong.items()}
    recalibrate(bench, bench.load(bench.initial, Private()))
    right = {n: bench.model.state_dict()[n].clone() for n in wrong}
    expected = _evaluated("kept", right, base=base)
    assert len(expected) == 6
    assert _evaluated("recalibrated", wrong, base=base) == expected
    assert _evaluated("kept", wrong, base=base) != expected


def test_statistics_are_used_as_they_were_kept_unless_the_study_says_more() -> None:
    study = study_from_dict({"name": "n", "sites": {"dataset": "phantom"}})
    assert study.evaluate.statistics == "kept"


def test_nothing_more_leaves(tmp_path: Path) -> None:
    found = {}
    for how in ("kept", "recalibrated"):
        transport = runs.Recorder()
        study = _bench(evaluate={**EVALUATE, "statistics": how, "every": 1}).study
        result = runs.run(study, tmp_path / how, transport=transport)
        up = [(site, m.kind, [*m.tensors]) for site, m in transport.up]
        kept = [
            {n: t.tolist() for n, t in result.private(site).states["kept"].items()}
            for site in "abc"
        ]
        model = result.folder.model_file.read_bytes()
        found[how] = up, kept, model
    assert found["kept"] == found["recalibrated"]
