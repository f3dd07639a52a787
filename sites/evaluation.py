"""Evaluation inside a hospital: numbers about cases leave, images never do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedmed.case import UNKNOWN_LABEL
from fedmed.imaging.preprocess import restore
from fedmed.message import State
from fedmed.metrics.case_scores import score_case
from fedmed.metrics.largest_component import largest_component
from fedmed.strategy import Private
from fedmed.training.examples import is_class
from fedmed.training.predict import predict_case
from sites.calibration import calibrate, needs_calibration
from sites.context import Workbench
from sites.data import AnyCase

Row = Mapping[str, Any]


def evaluate(
    bench: Workbench,
    private: Private,
    *,
    weights: State,
    splits: tuple[str, ...],
    overlays: Path | None = None,
    name: Callable[[str], str] = str,
) -> list[Row]:
    """Score the model of this site on some of its splits.

    Args:
        bench: The hospital.
        private: What it keeps; a site that never trained keeps nothing.
        weights: Shared entries.
        splits: Any of "train", "validation", "test".
        overlays: Folder for pictures of single cases, inside the hospital.
        name: Gives the name under which a case is known outside. Pictures bear it,
            because reports show them; rows are renamed when they leave. Called once
            per scored case, in the order of the rows.

    Returns:
        One row per split, case and class, without images or paths.
    """
    if bench.is_pooled or not splits or _has_no_model(bench, private):
        return []
    model = bench.load(weights, private)
    if needs_calibration(bench, private):
        calibrate(bench, model)
    model.eval()
    rows: list[Row] = []
    shown: list[tuple[float, dict[str, Any]]] = []
    for split in splits:
        for case in bench.data.splits[split]:
            found, picture = _score(bench, model, case)
            rows += [{"split": split, **row} for row in found]
            outside = name(case.case_id) if found else ""
            if picture is not None and split == splits[-1]:
                shown.append((_mean_dice(found), {**picture, "name": outside}))
    if overlays is not None:
        write_overlays(overlays, shown, bench.study.evaluate.overlays)
    return rows


def _has_no_model(bench: Workbench, private: Private) -> bool:
    """A site that keeps the whole network and never trained has nothing to test."""
    return not bench.partition.shared and "kept" not in private.states


def _mean_dice(rows: Iterable[Row]) -> float:
    values = [row["dice"] for row in rows if not np.isnan(row["dice"])]
    return float(np.mean(values)) if values else float("nan")


def _score(
    bench: Workbench, model: nn.Module, case: AnyCase
) -> tuple[list[Row], dict[str, Any] | None]:
    section = bench.study.model
    probabilities = predict_case(
        model,
        case,
        site=bench.site_id,
        mode=section.mode,
        num_slices=section.slices,
        batch_size=bench.study.evaluate.batch_size,
        patch_size=section.patch_size,
        device=bench.trainer.device,
    )
    if bench.task.kind == "classification":
        return _classified(case, probabilities), None
    prediction = restore(probabilities, case)
    label = case.label_native_IJK
    if label is None or np.all(label == UNKNOWN_LABEL):
        return [], None
    if bench.study.evaluate.largest_component:
        prediction = largest_component(prediction)
    names = dict(enumerate(bench.task.class_names))
    scores = score_case(
        prediction,
        label,
        spacing_mm=case.spacing_native_mm,
        class_names=names,
        region_IJK=case.region_native_IJK,
    )
    rows: list[Row] = [
        {
            "case_id": case.case_id,
            "class": score.class_name,
            **{
                name: getattr(score, name)
                for name in (
                    "dice",
                    "assd_mm",
                    "asd_mm_pred2gt",
                    "asd_mm_gt2pred",
                    "hd95_mm",
                    "volume_ml_prediction",
                    "volume_ml_label",
                    "status",
                )
            },
        }
        for score in scores
    ]
    return rows, {"case": case, "prediction": probabilities.argmax(axis=0)}


def _classified(case: AnyCase, probabilities: np.ndarray) -> list[Row]:
    label = case.class_label
    if label is None or not is_class(label):
        return []
    flat = np.asarray(probabilities, dtype=np.float64).ravel()
    score = flat[1] if flat.size == 2 else flat.max()
    row = {
        "case_id": case.case_id,
        "label": int(label),
        "prediction": int(flat.argmax()),
        "score": float(score),
    }
    return [row]


def write_overlays(
    folder: Path, shown: list[tuple[float, dict[str, Any]]], count: int
) -> None:
    """Write the worst, median and best case as pictures, inside the hospital.

    Args:
        folder: Of the site's own run folder.
        shown: Mean Dice and picture material of every scored case: "case",
            "prediction" and "name", under which it is known outside.
        count: How many of the three, 0 to 3.
    """
    ranked = sorted(
        (item for item in shown if not np.isnan(item[0])),
        key=lambda item: (item[0], item[1]["case"].case_id),
    )
    if not ranked or count == 0:
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for old in folder.glob("*.npz"):
        old.unlink()
    picks = {"worst": 0, "median": len(ranked) // 2, "best": len(ranked) - 1}
    seen: set[int] = set()
    for rank, position in list(picks.items())[:count]:
        if position in seen:
            continue
        seen.add(position)
        dice, material = ranked[position]
        _write_overlay(folder, rank, dice, material)


def _write_overlay(
    folder: Path, rank: str, dice: float, material: Mapping[str, Any]
) -> None:
    """Draw the slice with most of the truth, on the network's grid."""
    case, label = material["case"], material["case"].label_IJK
    truth = np.where(label == UNKNOWN_LABEL, 0, label)
    # Where nobody drew, a prediction is neither right nor wrong: it is not shown.
    prediction = np.where(label == UNKNOWN_LABEL, 0, material["prediction"])
    drawn = np.count_nonzero(truth, axis=(0, 1))
    index = int(np.argmax(drawn))
    image = np.asarray(case.image_CIJK[..., index], dtype=np.float32)
    facts = {
        "dice": dice,
        "rank": rank,
        "slice": index,
        "spacing_mm": [float(v) for v in case.spacing_mm],
        "spacing_known": bool(case.spacing_known),
        "case_id": material["name"],
    }
    np.savez_compressed(
        folder / f"{rank}-{material['name']}.npz",
        image=image.mean(axis=0),
        truth=truth[:, :, index].astype(np.uint8),
        prediction=prediction[:, :, index].astype(np.uint8),
        facts=np.array(json.dumps(facts)),
    )
