"""Evaluation inside a hospital: numbers about cases leave, images never do."""

from __future__ import annotations

import contextlib
import functools
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedmed.case import UNKNOWN_LABEL
from fedmed.imaging.preprocess import restore
from fedmed.message import State
from fedmed.metrics.case_scores import score_case
from fedmed.metrics.largest_component import largest_component
from fedmed.profile import Profile, profile_of
from fedmed.strategy import Private
from fedmed.training.examples import is_class
from fedmed.training.predict import predict_case
from sites.calibration import (
    calibrate,
    keeps_statistics,
    needs_calibration,
    recalibrate,
)
from sites.context import HospitalContext, Workbench
from sites.data import AnyCase, SliceView
from sites.legacy import cut, own_statistics

MAX_HELPERS = 4
"""Threads that score beside the network; more would have nothing to do."""

COLUMNS = (
    "dice",
    "assd_mm",
    "asd_mm_pred2gt",
    "asd_mm_gt2pred",
    "hd95_mm",
    "volume_ml_prediction",
    "volume_ml_label",
    "status",
)
"""What a row says of a class, in the words of `fedmed.metrics.case_scores`."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """One slice of one case, to be shown inside the hospital.

    Attributes:
        case_id: Of the case.
        image_IJ: Mean over the channels.
        truth_IJ: Class numbers, unknown as background.
        prediction_IJ: Likewise.
        facts: Which slice, and its scale.
    """

    case_id: str
    image_IJ: np.ndarray
    truth_IJ: np.ndarray
    prediction_IJ: np.ndarray
    facts: Mapping[str, Any]


View = tuple[str, AnyCase]
"""A split and a case in it."""

Scored = tuple[list[Row], Picture | None]
"""The rows of a case, and a picture of it if it may be shown."""

Predict = Callable[[AnyCase], np.ndarray]
"""Gives the probabilities of every class."""


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
    if not any(bench.data.splits[split] for split in splits):
        return []  # a held-out site, before the last round
    model = bench.load(weights, private)
    if needs_calibration(bench, private):
        calibrate(bench, model)
    elif bench.study.evaluate.statistics == "recalibrated":
        recalibrate(bench, model)
    if bench.data.site_id not in bench.study.split.held_out and bench.training:
        site: Any = HospitalContext(bench, private, number=0)
        bench.strategy.personalise(site, model.train())
    predict = functools.partial(_predict, bench, model.eval())
    return _rows(bench, predict, splits, overlays, name)


def evaluate_newcomer(
    bench: Workbench,
    sets: Sequence[State],
    *,
    weights: State,
    re_estimates: bool,
    splits: tuple[str, ...],
    overlays: Path | None = None,
    name: Callable[[str], str] = str,
) -> list[Row]:
    """Score the model at a site that took no part, with the normalisation of others.

    Args:
        bench: The hospital.
        sets: Normalisation and adapters; of several the predictions are averaged.
            None: initial ones.
        weights: Shared entries.
        re_estimates: Re-estimate running statistics on the site's own images first,
            without labels; of one set, or of none.
        splits: As in `evaluate`.
        overlays: As in `evaluate`.
        name: As in `evaluate`.

    Returns:
        As `evaluate`.
    """
    privates = [Private({"kept": state}) for state in sets] or [Private()]
    if re_estimates:
        model = bench.load(weights, privates[0])
        if keeps_statistics(bench):
            calibrate(bench, model)
        predict = functools.partial(_predict, bench, model.eval())
    else:
        predict = functools.partial(_predict_together, bench, weights, privates)
    return _rows(bench, predict, splits, overlays, name)


def _predict_together(
    bench: Workbench, weights: State, privates: Sequence[Private], case: AnyCase
) -> np.ndarray:
    """Average the probabilities that the network gives with each of several sets."""
    total = np.zeros((), np.float64)
    for private in privates:
        model = bench.load(weights, private).eval()
        total = total + _predict(bench, model, case)
    mean: np.ndarray = (total / len(privates)).astype(np.float32)
    return mean


def _rows(
    bench: Workbench,
    predict: Predict,
    splits: tuple[str, ...],
    overlays: Path | None,
    name: Callable[[str], str],
) -> list[Row]:
    views = [(split, case) for split in splits for case in bench.data.splits[split]]
    pictured = splits[-1] if overlays is not None else None
    rows: list[Row] = []
    shown: list[tuple[float, Picture, str]] = []
    scored = _score_all(bench, predict, views, pictured)
    for (split, case), (found, picture) in zip(views, scored, strict=True):
        rows += [{"split": split, **row} for row in found]
        outside = name(case.case_id) if found else ""
        if picture is not None:
            shown.append((_mean_dice(found), picture, outside))
    if overlays is not None:
        write_overlays(overlays, shown, bench.study.evaluate.overlays)
    return rows


def _has_no_model(bench: Workbench, private: Private) -> bool:
    """A site that keeps the whole network and never trained has nothing to test."""
    return not bench.partition.shared and "kept" not in private.states


def _mean_dice(rows: Iterable[Row]) -> float:
    values = [row["dice"] for row in rows if not np.isnan(row["dice"])]
    return float(np.mean(values)) if values else float("nan")


def _score_all(
    bench: Workbench, predict: Predict, views: Sequence[View], pictured: str | None
) -> list[Scored]:
    """Predict every case once, and score it wherever it is in the splits.

    While the network predicts a case, helper threads score those before: as many as
    this process may use cores besides its own. They compute with NumPy alone, and each
    result has its place, so neither their number nor their pace changes a row.
    """
    found: list[Scored] = [([], None)] * len(views)
    helpers = num_helpers(bench.trainer.device)
    with contextlib.ExitStack() as stack:
        if helpers:
            pool = stack.enter_context(ThreadPoolExecutor(helpers))
            submit: Callable[..., Future[list[Scored]]] = pool.submit
        else:
            submit = _at_once
        waiting: deque[tuple[list[int], Future[list[Scored]]]] = deque()
        for numbers in _by_case(views):
            chosen = [views[number] for number in numbers]
            probabilities = predict(_whole(chosen[0][1]))
            job = submit(_score_views, bench, chosen, probabilities, pictured)
            waiting.append((numbers, job))
            while len(waiting) > helpers:  # few predictions are in memory at a time
                _collect(*waiting.popleft(), found)
        for numbers, job in waiting:
            _collect(numbers, job, found)
    return found


def num_helpers(device: str) -> int:
    """Give how many threads score beside the network.

    Args:
        device: Where the network computes. Elsewhere than on the CPU, the core of this
            process waits meanwhile, so one is always free.
    """
    free = torch.get_num_threads() - 1
    if not device.startswith("cpu"):
        free = max(free, 1)
    return min(free, MAX_HELPERS)


def _at_once(
    function: Callable[..., list[Scored]], *arguments: Any
) -> Future[list[Scored]]:
    """Compute in this thread what a pool would compute in another."""
    done: Future[list[Scored]] = Future()
    done.set_result(function(*arguments))
    return done


def _collect(
    numbers: Sequence[int], job: Future[list[Scored]], found: list[Scored]
) -> None:
    for number, scored in zip(numbers, job.result(), strict=True):
        found[number] = scored


def _whole(case: AnyCase) -> AnyCase:
    """Give the case behind a view that differs in its label only."""
    return case.case if isinstance(case, SliceView) else case


def _by_case(views: Sequence[View]) -> Iterable[list[int]]:
    """Group the labelled views of one case, by their places in the list."""
    groups: dict[int, list[int]] = {}
    for number, (_, case) in enumerate(views):
        if _is_labelled(case):
            groups.setdefault(id(_whole(case)), []).append(number)
    return groups.values()


def _is_labelled(case: AnyCase) -> bool:
    """Say whether there is anything to compare a prediction with."""
    if case.class_label is not None:
        return is_class(case.class_label)
    return case.label_native_IJK is not None


def _predict(bench: Workbench, model: nn.Module, case: AnyCase) -> np.ndarray:
    section = bench.study.model
    alone = _profile(bench).batch1_at_test
    with own_statistics(model) if alone else contextlib.nullcontext():
        return predict_case(
            model,
            case,
            site=bench.site_id,
            mode=section.mode,
            num_slices=section.slices,
            batch_size=1 if alone else bench.study.evaluate.batch_size,
            patch_size=section.patch_size,
            device=bench.trainer.device,
            precision=bench.trainer.precision,
        )


def _profile(bench: Workbench) -> Profile:
    return profile_of({"evaluate": bench.study.evaluate.model_dump()})


def _score_views(
    bench: Workbench,
    views: Sequence[View],
    probabilities: np.ndarray,
    pictured: str | None,
) -> list[Scored]:
    """Score one prediction against one case, or against several parts of it."""
    if bench.task.kind == "classification":
        return [(_classified(case, probabilities), None) for _, case in views]
    prediction = restore(probabilities, _whole(views[0][1]))
    profile = _profile(bench)
    largest = bench.study.evaluate.largest_component
    if largest and not profile.cuts:
        prediction = largest_component(prediction)
    scored: list[Scored] = []
    for split, case in views:
        label_IJK, counted = case.label_native_IJK, prediction
        if profile.cuts and label_IJK is not None:
            counted = cut(prediction, label_IJK, profile)
            counted = largest_component(counted) if largest else counted
        rows = _segmented(case, counted, bench.task.class_names)
        is_shown = bool(rows) and split == pictured
        scored.append((rows, _picture(case, probabilities) if is_shown else None))
    return scored


def _segmented(
    case: AnyCase, prediction_IJK: np.ndarray, class_names: Sequence[str]
) -> list[Row]:
    label_IJK = case.label_native_IJK
    if label_IJK is None or np.all(label_IJK == UNKNOWN_LABEL):
        return []
    scores = score_case(
        prediction_IJK,
        label_IJK,
        spacing_mm=case.spacing_native_mm,
        class_names=dict(enumerate(class_names)),
        region_IJK=case.region_native_IJK,
    )
    return [
        {
            "case_id": case.case_id,
            "subject_id": case.subject_id,
            "class": score.class_name,
            **{name: getattr(score, name) for name in COLUMNS},
        }
        for score in scores
    ]


def _classified(case: AnyCase, probabilities: np.ndarray) -> list[Row]:
    label = case.class_label
    if label is None or not is_class(label):
        return []
    flat = np.asarray(probabilities, dtype=np.float64).ravel()
    score = flat[1] if flat.size == 2 else flat.max()
    row = {
        "case_id": case.case_id,
        "subject_id": case.subject_id,
        "label": int(label),
        "prediction": int(flat.argmax()),
        "score": float(score),
    }
    return [row]


def write_overlays(
    folder: Path, shown: Sequence[tuple[float, Picture, str]], count: int
) -> None:
    """Write the worst, median and best case as pictures, inside the hospital.

    Args:
        folder: Of the site's own run folder.
        shown: Mean Dice, picture and name outside of every scored case.
        count: How many of the three, 0 to 3.
    """
    ranked = sorted(
        (item for item in shown if not np.isnan(item[0])),
        key=lambda item: (item[0], item[1].case_id),
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
        dice, picture, outside = ranked[position]
        facts = {"dice": dice, "rank": rank, **picture.facts, "case_id": outside}
        np.savez_compressed(
            folder / f"{rank}-{outside}.npz",
            image=picture.image_IJ,
            truth=picture.truth_IJ,
            prediction=picture.prediction_IJ,
            facts=np.array(json.dumps(facts)),
        )


def _picture(case: AnyCase, probabilities_LIJK: np.ndarray) -> Picture:
    """Draw the slice with most of the truth, on the network's grid."""
    label_IJK = case.label_IJK
    assert label_IJK is not None  # the case was scored
    truth_IJK = np.where(label_IJK == UNKNOWN_LABEL, 0, label_IJK)
    index = int(np.argmax(np.count_nonzero(truth_IJK, axis=(0, 1))))
    # Where nobody drew, a prediction is neither right nor wrong: it is not shown.
    prediction_IJ = np.where(
        label_IJK[..., index] == UNKNOWN_LABEL,
        0,
        probabilities_LIJK[..., index].argmax(axis=0),
    )
    return Picture(
        case_id=case.case_id,
        image_IJ=np.asarray(case.image_CIJK[..., index], np.float32).mean(axis=0),
        truth_IJ=truth_IJK[..., index].astype(np.uint8),
        prediction_IJ=prediction_IJ.astype(np.uint8),
        facts={
            "slice": index,
            "spacing_mm": [float(v) for v in case.spacing_mm],
            "spacing_known": bool(case.spacing_known),
        },
    )
