from __future__ import annotations

import warnings

import pytest
import torch

from fedmed.errors import ConfigError
from fedmed.networks.classifier import Classifier
from fedmed.networks.unet import UNet
from fedmed.resolve import load_strategy
from fedmed.study import study_from_dict
from fedmed.task import (
    Task,
    build_model,
    build_trainer,
    check_fit,
    example_dims,
    limit_gpu_memory,
)

OUTLINES = Task("segmentation", ("background", "organ"), 1, 3)
FINDINGS = Task("classification", ("no", "yes"), 1, 2)
VOLUMES = Task("classification", ("no", "yes"), 1, 3)
TABLE = Task("classification", ("no", "yes"), 4, 0)
SIZES = {"base_width": 4, "levels": 2}


def study(model, **sections):
    return study_from_dict(
        {"name": "x", "sites": {"dataset": "phantom"}, "model": model, **sections}
    )


def build(model, task, **sections):
    asked = study(model, **sections)
    return build_model(asked, task, load_strategy("fedavg", {}))


FITS = [
    (OUTLINES, {"name": "unet", "mode": "slice"}),
    (OUTLINES, {"name": "unet", "mode": "patch", "patch_size": (4, 4, 4)}),
    (OUTLINES, {"name": "residual_unet", "mode": "slice"}),
    (OUTLINES, {"name": "unet_3d_pairs", "mode": "patch", "patch_size": (8, 8, 8)}),
    (FINDINGS, {"name": "classifier", "mode": "image"}),
    (FINDINGS, {"name": "monai:DenseNet121", "mode": "image"}),
    (TABLE, {"name": "mlp", "mode": "row"}),
    (TABLE, {"name": "package.module:Forest", "mode": "row"}),
]


@pytest.mark.parametrize("case", range(len(FITS)))
def test_models_for_their_data_pass(case):
    task, model = FITS[case]
    check_fit(study(model), task)


@pytest.mark.parametrize(
    ("task", "model", "words"),
    [
        (
            OUTLINES,
            {"mode": "image"},
            "'image'.*label for every voxel.*\n.*mode: slice",
        ),
        (OUTLINES, {"mode": "row", "name": "mlp"}, "'row'.*segm.*\n.*name: unet"),
        (OUTLINES, {"name": "classifier"}, "name is 'classifier'.*\n.*name: unet"),
        (OUTLINES, {"name": "unet_3d_pairs"}, "'unet_3d_pairs' in mode 'slice'"),
        (
            OUTLINES,
            {"name": "dilated_residual", "mode": "patch", "patch_size": (8, 8, 8)},
            "'dilated_residual' in mode 'patch'",
        ),
        (
            FINDINGS,
            {},
            "mode is 'slice'.*one class each.*\n.*mode: image and model.name: classif",
        ),
        (FINDINGS, {"mode": "image"}, "name is 'unet'.*\n.*name: classifier"),
        (FINDINGS, {"mode": "row", "name": "mlp"}, "'row'.*\n.*mode: image"),
        (FINDINGS, {"mode": "image", "name": "mlp"}, "'mlp'.*\n.*name: classifier"),
        (TABLE, {}, "'slice'.*table.*\n.*mode: row and model.name: mlp"),
        (TABLE, {"mode": "image", "name": "classifier"}, "'image'.*\n.*mode: row"),
        (TABLE, {"mode": "row"}, "'unet'.*\n.*name: mlp"),
        (
            VOLUMES,
            {"mode": "image", "name": "classifier", "spatial_dims": 2},
            "spatial_dims is 2.*have 3 dimensions\n.*preprocess.size",
        ),
    ],
)
def test_a_model_for_other_data_is_refused_with_what_to_set(task, model, words):
    with pytest.raises(ConfigError, match=words):
        check_fit(study(model), task)
    with pytest.raises(ConfigError, match=words):
        build(model, task)


def test_classes_cannot_be_divided_by_slices():
    model = {"mode": "image", "name": "classifier"}
    with pytest.raises(ConfigError, match=r"Set split\.by: subject"):
        check_fit(study(model, split={"by": "slices"}), VOLUMES)


def test_a_classifier_has_the_dimensions_of_its_images():
    model = {"name": "classifier", "mode": "image", **SIZES}
    for task, dims in ((FINDINGS, 2), (VOLUMES, 3)):
        network = build(model, task)
        assert isinstance(network, Classifier)
        assert network(torch.zeros(2, 1, *(8,) * dims)).shape == (2, 2)
    flat = {"size": (8, 8, 1)}
    assert build(model, VOLUMES, preprocess=flat).spatial_dims == 2
    assert example_dims(study(model, preprocess={"size": (8, 8)}), VOLUMES) == 3


def test_a_unet_has_the_dimensions_of_its_mode():
    patches = {"name": "unet", "mode": "patch", "patch_size": (4, 4, 4), **SIZES}
    for model, dims in (({"name": "unet", **SIZES}, 2), (patches, 3)):
        network = build(model, OUTLINES)
        assert isinstance(network, UNet)
        assert network(torch.zeros(1, 1, *(8,) * dims)).shape[2:] == (8,) * dims


@pytest.fixture
def _monai():
    # MONAI's own imports warn about other packages; that is not what is tested here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("monai", reason="MONAI is not installed")
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_monai")
@pytest.mark.parametrize("task", [FINDINGS, VOLUMES])
def test_a_monai_classifier_has_the_dimensions_of_its_images(task):
    one_layer_each = (1, 1, 1, 1)
    name = "monai:DenseNet121"
    network = build(
        {"name": name, "mode": "image", "block_config": one_layer_each}, task
    )
    images = torch.zeros(2, 1, *(32,) * task.spatial_dims)
    assert network(images, site="a").shape == (2, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("_monai")
def test_a_monai_network_without_dimensions_is_given_none():
    name = "monai:FullyConnectedNet"
    build({"name": name, "mode": "image", "hidden_channels": (4,)}, FINDINGS)
    with pytest.raises(ConfigError, match="DenseNet121"):
        build({"name": "monai:DenseNet12l", "mode": "image"}, FINDINGS)


def test_a_precision_that_nobody_has_settled_is_refused():
    undecided = study({**SIZES}, train={"precision": "auto"})
    with pytest.raises(ConfigError, match="nobody has measured"):
        build_trainer(undecided, "a")
    with pytest.raises(ConfigError, match="nobody has measured"):
        build_model(undecided, OUTLINES, load_strategy("fedavg", {}))


@pytest.mark.parametrize("fraction", [0.0, 1.5, -1.0])
def test_a_share_of_a_gpu_is_a_share(fraction):
    with pytest.raises(ConfigError, match="gpu_memory_fraction"):
        study({**SIZES}, train={"gpu_memory_fraction": fraction})


def test_a_share_of_a_gpu_is_asked_of_gpus_only(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda fraction, device: asked.append((fraction, str(device))),
    )
    limit_gpu_memory("cpu", 0.5)
    limit_gpu_memory("cuda:1", None)
    assert not asked
    limit_gpu_memory("cuda:1", 0.5)
    assert asked == [(0.5, "cuda:1")]
