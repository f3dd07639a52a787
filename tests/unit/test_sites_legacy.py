"""The habits of older code: which slices count, and whose statistics normalise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.imaging.preprocess import restore
from fedmed.metrics.case_scores import score_case
from fedmed.profile import Profile
from fedmed.strategy import Private
from fedmed.study import study_from_dict
from fedmed.training.predict import predict_case
from sites.context import Workbench
from sites.evaluation import evaluate
from sites.legacy import counted_slices, cut, own_statistics


def label(*shown: int, size: int = 6) -> np.ndarray:
    found = np.zeros((2, 2, size), np.uint8)
    for k in shown:
        found[0, 1, k] = 1
    return found


@pytest.mark.parametrize(
    ("profile", "shown", "expected"),
    [
        (Profile(), (2, 4), (0, 6)),
        (Profile(skip_end_slices=True), (0, 4), (1, 5)),
        (Profile(oracle_slice_range=True), (2, 4), (2, 5)),
        (Profile(True, True), (1, 4), (2, 4)),
        (Profile(True, True), (3,), (4, 4)),
        (Profile(oracle_slice_range=True), (), (0, 0)),
    ],
)
def test_slices_that_count(
    profile: Profile, shown: tuple[int, ...], expected: tuple[int, int]
) -> None:
    label_IJK = label(*shown)
    label_IJK[..., 5] = 255  # not annotated
    assert counted_slices(label_IJK, profile) == slice(*expected)
    everywhere = np.ones_like(label_IJK)
    kept = cut(everywhere, label_IJK, profile)
    assert np.flatnonzero(kept.any(axis=(0, 1))).tolist() == list(range(*expected))
    assert (kept is everywhere) == (profile == Profile())


def test_each_batch_is_normalised_by_itself_and_nothing_is_learned() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    layer.running_mean.fill_(5.0)
    model = nn.Sequential(layer).eval()
    images = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with own_statistics(model):
        found = model(images).detach()
    x = images.numpy()
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(found.numpy(), (x - mean) / np.sqrt(var + 1e-5))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not torch.allclose(model(images).detach(), found)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def scored(cache, **options):
    study = study_from_dict(
        {
            "name": "volumes",
            "sites": {
                "dataset": "phantom",
                "preset": "prostate_abc",
                "cases_per_site": 3,
                "size": [24, 24, 16],
            },
            "preprocess": {"size": [16, 16]},
            "model": {"name": "unet", "base_width": 4, "levels": 2, "norm": "batch"},
            "strategy": {"name": "fedavg"},
            "evaluate": {"overlays": 0, **options},
        }
    )
    bench = Workbench(study, "a", cache)
    weights = {n: t.detach().clone() for n, t in bench.model.state_dict().items()}
    return bench, evaluate(bench, Private(), weights=weights, splits=("test",))


def dice_of(bench, case, prediction):
    names = dict(enumerate(bench.task.class_names))
    (score,) = score_case(
        prediction,
        case.label_native_IJK,
        spacing_mm=case.spacing_native_mm,
        class_names=names,
    )
    return score.dice


@pytest.mark.parametrize("option", ["skip_end_slices", "oracle_slice_range"])
def test_scores_are_those_of_the_slices_that_count(cache, option):
    bench, rows = scored(cache, **{option: True})
    (case,) = bench.data.splits["test"]
    prediction = restore(predict_case(bench.model, case), case)
    shown = np.flatnonzero((case.label_native_IJK == 1).any(axis=(0, 1)))
    outside = np.ones(prediction.shape[2], bool)
    if option == "skip_end_slices":
        outside[1:-1] = False
    else:
        outside[shown[0] : shown[-1] + 1] = False
    whole = dice_of(bench, case, prediction)
    prediction[..., outside] = 0
    assert [row["dice"] for row in rows] == [dice_of(bench, case, prediction)]
    assert rows[0]["dice"] != whole


def test_legacy_statistics_are_those_of_each_slice(cache):
    bench, rows = scored(cache, bn_at_test="batch1")
    (case,) = bench.data.splits["test"]
    model = bench.model
    parts = []
    for k in range(case.image_CIJK.shape[3]):
        one = torch.from_numpy(np.array(case.image_CIJK[..., k]))[None]
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for layer in layers:
            layer.train()
            layer.momentum = 0.0
        with torch.no_grad():
            parts.append(model(one, site="a").softmax(dim=1)[0].numpy())
    prediction = restore(np.stack(parts, axis=-1), case)
    assert rows[0]["dice"] == pytest.approx(dice_of(bench, case, prediction), abs=1e-6)
    _, strict = scored(cache)
    assert strict[0]["dice"] != rows[0]["dice"]
