"""Calibration and evaluation of images with one class each, at one hospital."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.strategy import Private
from fedmed.study import study_from_dict
from fedmed.training.predict import predict_case
from sites.calibration import calibrate, needs_calibration, unlabelled_batches
from sites.context import Workbench
from sites.data import list_sites
from sites.evaluation import evaluate

CONTENT = {
    "name": "findings",
    "sites": {
        "dataset": "phantom",
        "preset": "chest_xray_findings",
        "cases_per_site": 5,
        "size": [16, 16, 1],
    },
    "split": {"train": 0.6, "validation": 0.0, "test": 0.4},
    "model": {"name": "classifier", "mode": "image", "base_width": 4, "levels": 2},
    "train": {"loss": "cross_entropy", "precision": "float64"},
    "strategy": {"name": "fedbn"},
    "evaluate": {"batch_size": 2, "overlays": 0},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def make_bench(cache, **changes):
    content = {**CONTENT}
    for key, value in changes.items():
        content[key] = {**content[key], **value}
    return Workbench(study_from_dict(content), "jsrt", cache)


def all_cases(bench):
    return [c for split in sorted(bench.data.splits) for c in bench.data.splits[split]]


def test_every_image_is_calibrated_on_and_none_alone(cache):
    bench = make_bench(cache)
    batches = list(unlabelled_batches(bench))
    # Five images by twos: the fifth would be alone.
    assert [tuple(b.shape) for b in batches] == [(2, 1, 16, 16), (3, 1, 16, 16)]
    images = torch.cat(batches)
    for image, case in zip(images, all_cases(bench), strict=True):
        assert np.array_equal(image[0], case.image_CIJK[0, ..., 0])


def test_calibration_gives_the_first_layer_the_images_own_mean(cache):
    bench = make_bench(cache)
    assert needs_calibration(bench, Private())
    calibrate(bench, bench.model)
    layer = bench.model.encoder.levels[0]
    means = []
    with torch.no_grad():
        for chosen in ([0, 1], [2, 3, 4]):
            stack = [all_cases(bench)[n].image_CIJK[..., 0] for n in chosen]
            features = layer.conv1(torch.from_numpy(np.stack(stack)).double())
            means.append(features.mean(dim=(0, 2, 3)))
    expected = (means[0] + means[1]) / 2
    torch.testing.assert_close(layer.norm1.running_mean, expected)


@pytest.mark.parametrize("lean", [-3.0, 3.0])
def test_rows_say_the_class_of_the_image_and_the_score_of_the_model(cache, lean):
    bench = make_bench(cache)
    bias = torch.tensor([-lean, lean], dtype=torch.float64)
    weights = {**bench.initial, "head.bias": bias}
    private = Private(states={"kept": {}})
    splits = ("train", "test")
    rows = evaluate(bench, private, weights=weights, splits=splits)
    cases = {(s, c.case_id): c for s in splits for c in bench.data.splits[s]}
    assert [(row["split"], row["case_id"]) for row in rows] == list(cases)
    assert {row["label"] for row in rows} == {0, 1}
    assert {row["prediction"] for row in rows} == {int(lean > 0)}
    for row in rows:
        case = cases[row["split"], row["case_id"]]
        probabilities = predict_case(bench.model, case, mode="image")
        assert row["label"] == case.class_label
        assert row["prediction"] == probabilities.argmax()
        assert row["score"] == pytest.approx(probabilities[1])


def test_images_that_nobody_classified_are_not_scored(cache):
    bench = make_bench(cache)
    found = bench.data.splits["test"]
    unknown = (
        dataclasses.replace(found[0], class_label=None),
        dataclasses.replace(found[0], class_label=255),
    )
    splits = {**bench.data.splits, "test": (*unknown, found[1])}
    bench.pool = (dataclasses.replace(bench.data, splits=splits),)
    private = Private(states={"kept": {}})
    rows = evaluate(bench, private, weights=bench.initial, splits=("test",))
    assert [row["case_id"] for row in rows] == [found[1].case_id]


def test_a_model_for_outlines_is_refused_before_any_case_is_opened(cache):
    bench = make_bench(cache, model={"name": "unet", "mode": "slice"})
    with pytest.raises(ConfigError, match=r"mode: image and model\.name: class"):
        list_sites(bench.study, cache)
