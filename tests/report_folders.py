"""Write run folders with realistic numbers, as the engine writes them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CARDS: dict[str, dict[str, Any]] = {
    "a": {
        "title": "University hospital A",
        "modality": "T2w MRI",
        "facts": {"vendor": "Siemens", "field_T": 3, "coil": "surface"},
    },
    "b": {
        "title": "Clinic B",
        "modality": "T2w MRI",
        "facts": {"vendor": "Philips", "field_T": 1.5, "coil": "endorectal"},
    },
    "c": {
        "title": "Cancer centre C",
        "modality": "T2w MRI",
        "facts": {"vendor": "Siemens", "field_T": 3, "coil": "none", "country": "NL"},
    },
}
NUM_TEST = {"a": 10, "b": 10, "c": 6}
DICE = {
    "separate": {"a": 0.905, "b": 0.905, "c": 0.87},
    "fedavg": {"a": 0.907, "b": 0.892, "c": 0.88},
    "fedbn": {"a": 0.911, "b": 0.908, "c": 0.895},
    "ms_net": {"a": 0.917, "b": 0.913, "c": 0.912},
}
CASE_COLUMNS = (
    *("round", "split", "site", "case_id", "class", "dice", "assd_mm"),
    *("asd_mm_pred2gt", "asd_mm_gt2pred", "hd95_mm"),
    *("volume_ml_prediction", "volume_ml_label", "status"),
)


@dataclass(frozen=True)
class Plan:
    """What one run folder shall hold."""

    strategy: str = "fedavg"
    seed: int = 0
    name: str = "prostate"
    num_rounds: int = 20
    sites: tuple[str, ...] = ("a", "b", "c")
    classes: tuple[str, ...] = ("prostate",)
    held_out: tuple[str, ...] = ()
    missed_case: tuple[str, int] | None = ("c", 2)
    overlays: bool = True
    trouble: bool = True
    quarantined: dict[str, str] = field(
        default_factory=lambda: {"case_17": "image and label differ in spacing"}
    )


def write_run(folder: Path, plan: Plan) -> Path:
    """Write one run folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([plan.seed, sum(map(ord, plan.strategy))])
    lock = yaml.safe_dump(_study(plan), sort_keys=False)
    (folder / "study.lock.yaml").write_text(lock)
    rounds = [_round(plan, number, rng) for number in range(1, plan.num_rounds + 1)]
    lines = "".join(json.dumps(line) + "\n" for line in rounds)
    (folder / "rounds.jsonl").write_text(lines)
    rows = _case_rows(plan, rng)
    write_rows(folder / "cases.csv", CASE_COLUMNS, rows)
    (folder / "summary.json").write_text(json.dumps(_summary(plan, rows)))
    if plan.overlays:
        _write_overlays(folder, plan, rows)
    return folder


def write_comparison(
    folder: Path,
    strategies: Sequence[str] = tuple(DICE),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    leave_out: Sequence[str | None] = (None,),
    plan: Plan | None = None,
) -> Path:
    """Write run folders for all strategies, seeds and sites left out."""
    runs = []
    base = plan or Plan()
    for strategy in strategies:
        for seed in seeds:
            for site in leave_out:
                name = f"runs/{strategy}-{seed}" + (f"-without-{site}" if site else "")
                facts = {"strategy": strategy, "seed": seed}
                held_out = (site,) if site else base.held_out
                write_run(
                    folder / name,
                    Plan(**{**vars(base), **facts, "held_out": held_out}),
                )
                runs.append({**facts, "held_out": site, "folder": name})
    content = {"study": base.name, "runs": runs}
    (folder / "compare.json").write_text(json.dumps(content))
    return folder


def write_rows(
    path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]
) -> None:
    """Write a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _study(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "seed": plan.seed,
        "strategy": {"name": plan.strategy, "sync": "round", "lr": 0.001},
        "sites": {site: {"dataset": "prostate"} for site in plan.sites},
        "task": {"kind": "segmentation", "classes": ["background", *plan.classes]},
        "rounds": plan.num_rounds,
        "held_out": list(plan.held_out),
        "versions": {"fedmed": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6"},
        "data": {site: _data(plan, site) for site in plan.sites},
    }


def _data(plan: Plan, site: str) -> dict[str, Any]:
    num_test = NUM_TEST.get(site, 8)
    return {
        "num_cases": 3 * num_test,
        "num_train": 2 * num_test - 2,
        "num_validation": 2,
        "num_test": num_test,
        "card": CARDS.get(site, {"title": "", "modality": "T2w MRI", "facts": {}}),
        "quarantined": plan.quarantined if site == plan.sites[0] else {},
    }


def _round(plan: Plan, number: int, rng: np.random.Generator) -> dict[str, Any]:
    fall = np.exp(-number / 6)
    refused = plan.trouble and number in {4, 5, 6}
    failed = plan.trouble and number == 9
    trained = [site for site in plan.sites if site not in plan.held_out]
    answered = [
        s for s in trained if not ((s == "b" and refused) or (s == "c" and failed))
    ]
    target = DICE.get(plan.strategy, DICE["fedavg"])
    every_other = number % 2 == 0
    return {
        "round": number,
        "seconds": float(rng.uniform(11, 14)),
        "loss": {s: float(0.1 + 0.6 * fall + rng.normal(0, 0.01)) for s in answered},
        "bytes_down": dict.fromkeys(trained, 8753672),
        "bytes_up": dict.fromkeys(answered, 8753672),
        "answered": answered,
        "refused": {"b": "update holds NaN in 'enc1.weight'"} if refused else {},
        "failed": {"c": "no answer within 60 s"} if failed else {},
        "validation": {
            s: float(target.get(s, 0.88) - 0.5 * fall + rng.normal(0, 0.008))
            for s in trained
        }
        if every_other
        else None,
        "retries": int(failed),
    }


def _case_rows(plan: Plan, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    target = DICE.get(plan.strategy, DICE["fedavg"])
    for last in (plan.num_rounds // 2, plan.num_rounds):
        for site in plan.sites:
            hardness = np.random.default_rng([ord(site[0])]).normal(0, 0.022, 50)
            for index in range(NUM_TEST.get(site, 8)):
                for name in plan.classes:
                    middle = target.get(site, 0.88) - 0.05 * (last < plan.num_rounds)
                    middle -= 0.04 * (site in plan.held_out)
                    dice = middle + hardness[index] + rng.normal(0, 0.008)
                    is_missed = plan.missed_case == (site, index) and plan.seed == 0
                    facts = {"round": last, "split": "test", "site": site}
                    rows.append({**facts, **_case(index, name, dice, is_missed)})
    return rows


def _case(index: int, name: str, dice: float, is_missed: bool) -> dict[str, Any]:
    score = 0.0 if is_missed else float(np.clip(dice, 0, 1))
    distance = 18 * (1 - score)
    empty = {"assd_mm": "", "asd_mm_pred2gt": "", "asd_mm_gt2pred": "", "hd95_mm": ""}
    distances = {
        "assd_mm": f"{distance:.4f}",
        "asd_mm_pred2gt": f"{0.9 * distance:.4f}",
        "asd_mm_gt2pred": f"{1.1 * distance:.4f}",
        "hd95_mm": f"{3.2 * distance:.4f}",
    }
    return {
        "case_id": f"case_{index:02d}",
        "class": name,
        "dice": f"{score:.6f}",
        **(empty if is_missed else distances),
        "volume_ml_prediction": 0 if is_missed else 40,
        "volume_ml_label": 42,
        "status": "missed" if is_missed else "ok",
    }


def _summary(plan: Plan, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sites = {}
    for site in plan.sites:
        last = [r for r in rows if r["site"] == site and r["round"] == plan.num_rounds]
        values = [float(row["dice"]) for row in last]
        sites[site] = {
            "dice": float(np.mean(values)),
            "dice_std": float(np.std(values, ddof=1)),
            "assd_mm": 1.7,
            "hd95_mm": 5.5,
            "num_cases": len(values),
        }
    dice = [facts["dice"] for facts in sites.values()]
    worst = min(sites, key=lambda site: sites[site]["dice"])
    return {"sites": sites, "overall": {"dice": np.mean(dice)}, "worst_site": worst}


def _write_overlays(folder: Path, plan: Plan, rows: Sequence[dict[str, Any]]) -> None:
    for site in plan.sites:
        last = [r for r in rows if r["site"] == site and r["round"] == plan.num_rounds]
        last = [row for row in last if row["class"] == plan.classes[0]]
        ordered = sorted(last, key=lambda row: float(row["dice"]))
        picked = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
        target = folder / "sites" / site / "overlays"
        target.mkdir(parents=True)
        for rank, row in zip(("worst", "median", "best"), picked, strict=True):
            write_overlay(target, row["case_id"], float(row["dice"]), rank)


def write_overlay(folder: Path, case_id: str, dice: float, rank: str) -> None:
    """Write a slice that looks like a prostate in the pelvis; left of it a marker."""
    rng = np.random.default_rng([int(case_id[-2:]), len(rank)])
    spacing = (0.6, 0.9)
    shape = (230, 150)
    i, j = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    x, y = (i - 115) * spacing[0], (j - 75) * spacing[1]
    body = _ellipse(x, y, (0, 0), (62, 58))
    image = 0.08 + 0.25 * body + 0.35 * (body & ~_ellipse(x, y, (0, 0), (56, 52)))
    image += 0.45 * _ellipse(x, y, (0, 25), (20, 13))
    image -= 0.12 * _ellipse(x, y, (0, -24), (10, 8))
    for side in (-1, 1):
        image -= 0.15 * _ellipse(x, y, (side * 42, 5), (11, 11))
    image += 0.3 * _ellipse(x, y, (38, -30), (4, 4))
    truth = _ellipse(x, y, (0, 0), (22, 16)) & ~_ellipse(x, y, (0, -19), (7, 6))
    shift = 20 * (1 - dice)
    prediction = _ellipse(x, y, (shift, shift / 3), (22, 16)) & (dice > 0)
    image += 0.18 * truth + 0.12 * _ellipse(x, y, (0, 3), (11, 9))
    image = image * (1 + 0.004 * x) + rng.normal(0, 0.025, shape)
    facts = {"dice": dice, "rank": rank, "slice": 11, "spacing_mm": list(spacing)}
    np.savez(
        folder / f"{case_id}.npz",
        image=(900 * image).astype(np.float32),
        truth=truth.astype(np.uint8),
        prediction=prediction.astype(np.uint8),
        facts=json.dumps({**facts, "case_id": case_id}),
    )


def _ellipse(
    x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radii: tuple[int, int]
) -> np.ndarray:
    inside = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 <= 1
    return np.asarray(inside)
