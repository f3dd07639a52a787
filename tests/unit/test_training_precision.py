from __future__ import annotations

import json

import pytest
import torch

from fedmed.study import study_from_dict
from fedmed.task import Task
from fedmed.training import precision
from fedmed.training.measurement import (
    batch_shape,
    measured_signature,
    processor_name,
    random_batch,
)
from fedmed.training.precision import (
    decide_precision,
    measure_ratio,
    with_precision,
)

OUTLINES = Task("segmentation", ("background", "organ"), 2, 3)
FINDINGS = Task("classification", ("no", "yes"), 1, 2)
TABLE = Task("classification", ("no", "yes"), 4, 0)
MODEL = {"mode": "slice", "base_width": 2, "levels": 2, "slices": 3}


def study(model=MODEL, size=(16, 24), **train):
    return study_from_dict(
        {
            "name": "x",
            "sites": {"dataset": "phantom"},
            "model": dict(model),
            "preprocess": {"size": size},
            "train": {"batch_size": 4, "precision": "auto", **train},
        }
    )


@pytest.fixture
def measured(monkeypatch):
    """Count measurements, and let them find a ratio."""

    def pretend(ratio):
        calls = []

        def measure(study, task):
            calls.append((study, task))
            return ratio

        monkeypatch.setattr(precision, "measure_ratio", measure)
        return calls

    return pretend


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.7, "float32"), (1.09, "float32"), (1.1, "bfloat16")]
)
def test_bfloat16_has_to_be_a_tenth_faster(measured, tmp_path, ratio, expected):
    calls = measured(ratio)
    assert decide_precision(study(), OUTLINES, tmp_path) == expected
    assert decide_precision(study(), OUTLINES, tmp_path) == expected
    assert len(calls) == 1


def test_another_shape_or_network_is_another_measurement(measured, tmp_path):
    calls = measured(2.0)
    decide_precision(study(), OUTLINES, tmp_path)
    decide_precision(study(size=(16, 32)), OUTLINES, tmp_path)
    decide_precision(study({**MODEL, "base_width": 4}), OUTLINES, tmp_path)
    decide_precision(study(threads=2), OUTLINES, tmp_path)
    assert len(calls) == 4


@pytest.mark.parametrize("content", ["", "{}", '{"numbers": {"ratio": "fast"}}', "[1]"])
def test_a_damaged_note_is_measured_again(measured, tmp_path, content):
    calls = measured(2.0)
    decide_precision(study(), OUTLINES, tmp_path)
    (note,) = (tmp_path / "precision").iterdir()
    note.write_text(content)
    assert decide_precision(study(), OUTLINES, tmp_path) == "bfloat16"
    assert len(calls) == 2
    assert json.loads(note.read_text())["numbers"] == {"ratio": 2.0}


def test_what_is_settled_is_not_measured(measured, tmp_path):
    calls = measured(2.0)
    for settled in ("float32", "float64", "bfloat16"):
        asked = with_precision(study(), settled)
        assert decide_precision(asked, OUTLINES, tmp_path) == settled
    table = study({"name": "mlp", "mode": "row"}, size=None)
    assert decide_precision(table, TABLE, tmp_path) == "float32"
    assert not calls
    assert not list(tmp_path.iterdir())


def test_a_measurement_leaves_threads_and_random_state(tmp_path):
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    assert decide_precision(study(threads=2), OUTLINES, tmp_path) in {
        "float32",
        "bfloat16",
    }
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)


def test_a_measurement_is_a_ratio_of_times():
    settled = with_precision(study(), "float32")
    assert 0.01 < measure_ratio(settled, OUTLINES) < 100


def test_batches_have_the_shape_of_the_studys():
    assert batch_shape(study(), OUTLINES) == (4, 6, 16, 24)
    patch = {"mode": "patch", "patch_size": (8, 8, 4)}
    assert batch_shape(study(patch, size=None), OUTLINES) == (4, 2, 8, 8, 4)
    image = study({"name": "classifier", "mode": "image"}, size=None)
    assert batch_shape(image, FINDINGS) == (4, 1, 128, 128)
    assert random_batch(image, FINDINGS).labels.shape == (4,)
    assert random_batch(study(), OUTLINES).labels.shape == (4, 16, 24)


def test_the_signature_is_json_and_names_the_processor():
    signature = measured_signature(study(), OUTLINES)
    assert json.loads(json.dumps(signature)) == signature
    assert signature["processor"] == processor_name("cpu")
    assert signature["processor"].strip()
