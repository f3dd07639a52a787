"""W5: how long until 200 NIfTI volumes can be trained on, and how fast they come.

    python benchmarks/data.py [--volumes 200] [--repeats 5] [--json FILE]

Beside it MONAI's CacheDataset (all volumes in memory, loaded again at every start) and
PersistentDataset (prepared volumes on disk), with the same steps: load, orient to RAS+,
z-score, centre crop, then one random slice per example; the prepared voxels are
compared before anything is timed. Cold: nothing prepared yet. Warm: a new start of the
same study, the files in the system's page cache. Ready: every case checked, prepared
and able to give a slice; for PersistentDataset that is having read each volume once.

All rows of a kind run one after the other within each repetition. Ratios are to ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fedmed.case import UNKNOWN_LABEL  # noqa: E402
from fedmed.imaging import cache as prepared_cache  # noqa: E402
from fedmed.imaging.file_hashes import FileHashes  # noqa: E402
from fedmed.imaging.prepared_case import forget_open_arrays  # noqa: E402
from fedmed.networks.unet import UNet  # noqa: E402
from fedmed.study import Study, study_from_dict  # noqa: E402
from fedmed.training.augment import Augmentation  # noqa: E402
from fedmed.training.examples import Batch, ExampleIndex  # noqa: E402
from fedmed.training.prefetch import prefetched  # noqa: E402
from sites.data import SiteList  # noqa: E402

SHAPE = (128, 128, 24)
CROP = (96, 96)
BATCH = 8
NUM_SITES = 4
NUM_BATCHES = 50
NUM_STEPS = 25
WARM_BAR_S, WAITING_BAR = 1.0, 0.01
"""Longest warm start; largest share of a step that the model waits for its batch."""
LABELS = {0: "background", 1: "organ", 2: "lesion"}
ALL_CHANGES = Augmentation("I", 15, 0.1, 0.2, 0.1, 0.1)


@dataclass
class Row:
    """Times of one row in seconds, and the row that its ratio is to."""

    name: str
    beside: str
    times_s: list[float]


def write_volumes(root: Path, count: int) -> None:
    """Write scans of a sphere in noise, spread over the sites."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    for number in range(count):
        rng = np.random.default_rng(number)
        centre, radius = rng.uniform(-0.3, 0.3, 3), rng.uniform(0.3, 0.6)
        distance = np.sqrt(
            sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
        )
        label = (distance < radius).astype(np.uint8) + (distance < radius / 2)
        image = 200 + 150 * label + 30 * rng.standard_normal(SHAPE)
        site = root / f"site{number % NUM_SITES}"
        for folder, array in (("images", image.astype(np.int16)), ("masks", label)):
            path = site / folder / f"case{number:04d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            volume = nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0]))
            nibabel.save(volume, path)


def make_study(root: Path) -> Study:
    return study_from_dict(
        {
            "name": "data",
            "rounds": 1,
            "sites": {"dataset": "folder", "root": str(root), "labels": LABELS},
            "split": {"train": 1.0, "validation": 0.0, "test": 0.0},
            "preprocess": {"size": list(CROP)},
            "model": {"name": "unet", "mode": "slice", "base_width": 8, "levels": 3},
            "train": {"batch_size": BATCH, "local_steps": 1},
            "strategy": {"name": "fedavg"},
        }
    )


def start(study: Study, cache: Path) -> list[ExampleIndex]:
    """Do what a new process does until every site can draw its first batch."""
    forget_open_arrays()
    FileHashes.of.cache_clear()
    listed = SiteList(study, cache)
    sites = [listed.open(source.site_id) for source in listed.sources]
    return [ExampleIndex(site.splits["train"], "slice") for site in sites]


# --- MONAI ----------------------------------------------------------------------------


def monai_files(root: Path) -> list[dict[str, str]]:
    images = sorted(root.glob("*/images/*.nii.gz"), key=lambda p: p.name)
    return [
        {"image": str(path), "label": str(path.parents[1] / "masks" / path.name)}
        for path in images
    ]


def monai_transforms(*, slices: bool) -> Any:
    from monai import transforms as mt

    keys = ["image", "label"]
    steps = [
        mt.LoadImaged(keys),
        mt.EnsureChannelFirstd(keys),
        mt.Orientationd(keys, axcodes="RAS", labels=None),
        mt.NormalizeIntensityd("image"),
        mt.ResizeWithPadOrCropd(keys, (*CROP, -1)),
        mt.EnsureTyped(keys, track_meta=False),
    ]
    if slices:
        steps += [
            mt.RandSpatialCropd(keys, roi_size=(-1, -1, 1), random_size=False),
            mt.SqueezeDimd(keys, dim=-1),
        ]
    return mt.Compose(steps)


def monai_cached(root: Path, workers: int, *, slices: bool = True) -> Any:
    from monai.data import CacheDataset

    return CacheDataset(
        monai_files(root),
        monai_transforms(slices=slices),
        num_workers=workers,
        progress=False,
        copy_cache=False,  # it would copy a volume for each slice
    )


def monai_persistent(root: Path, folder: Path, workers: int) -> Any:
    """Open the prepared volumes and go through them once, as the first epoch would."""
    from monai.data import PersistentDataset

    data = PersistentDataset(
        monai_files(root), monai_transforms(slices=True), cache_dir=folder
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)
    for _ in loader:
        pass
    return data


def monai_batches(data: Any, count: int) -> Iterator[Any]:
    from monai.data import DataLoader

    sampler = torch.utils.data.RandomSampler(
        data, replacement=True, num_samples=count * BATCH
    )
    yield from DataLoader(data, batch_size=BATCH, sampler=sampler, num_workers=0)


# --- rows -----------------------------------------------------------------------------


def check_equal_work(root: Path, cache: Path) -> None:
    """Compare the prepared voxels of every 20th volume with MONAI's."""
    from monai.data import Dataset

    indices = start(make_study(root), cache)
    ours = {case.case_id: case for index in indices for case in index.cases}
    theirs = monai_transforms(slices=False)
    for files in monai_files(root)[::20]:
        case = ours[Path(files["image"]).name.removesuffix(".nii.gz")]
        prepared = Dataset([files], theirs)[0]
        image = np.asarray(prepared["image"])
        np.testing.assert_allclose(case.image_CIJK, image, atol=1e-4)
        np.testing.assert_array_equal(case.label_IJK, np.asarray(prepared["label"])[0])


def draw_batches(index: ExampleIndex) -> None:
    for step in range(NUM_BATCHES):
        index.batch(0, step, BATCH)


def take_batches(data: Any) -> None:
    for _ in monai_batches(data, NUM_BATCHES):
        pass


def time_rows(root: Path, scratch: Path, *, repeats: int, workers: int) -> list[Row]:
    study = make_study(root)
    warm, on_disk = scratch / "warm", scratch / "persistent"
    start(study, warm)
    in_memory = monai_cached(root, workers)
    persistent = monai_persistent(root, on_disk, workers)
    drawn_from = _merged(start(study, warm))

    def cold_ours() -> None:
        with _emptied(scratch / "cold") as cache:
            start(study, cache)

    def cold_persistent() -> None:
        with _emptied(scratch / "cold") as folder:
            monai_persistent(root, folder, workers)

    actions: list[tuple[str, str, Callable[[], object]]] = [
        ("cold start: fedmed", "", cold_ours),
        (
            "cold start: MONAI CacheDataset",
            "cold start: fedmed",
            lambda: monai_cached(root, workers),
        ),
        ("cold start: MONAI PersistentDataset", "cold start: fedmed", cold_persistent),
        ("warm start: fedmed", "", lambda: start(study, warm)),
        (
            "warm start: MONAI CacheDataset",
            "warm start: fedmed",
            lambda: monai_cached(root, workers),
        ),
        (
            "warm start: MONAI PersistentDataset",
            "warm start: fedmed",
            lambda: monai_persistent(root, on_disk, workers),
        ),
        ("batches: fedmed", "", lambda: draw_batches(drawn_from)),
        (
            "batches: MONAI CacheDataset",
            "batches: fedmed",
            lambda: take_batches(in_memory),
        ),
        (
            "batches: MONAI PersistentDataset",
            "batches: fedmed",
            lambda: take_batches(persistent),
        ),
    ]
    rows = [Row(name, beside, []) for name, beside, _ in actions]
    for _ in range(repeats):
        for row, (_, _, action) in zip(rows, actions, strict=True):
            start_s = time.perf_counter()
            action()
            row.times_s.append(time.perf_counter() - start_s)
    return rows


def _merged(indices: Sequence[ExampleIndex]) -> ExampleIndex:
    return ExampleIndex([case for index in indices for case in index.cases], "slice")


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def waiting_share(index: ExampleIndex, *, depth: int) -> tuple[float, float]:
    """Train a small U-Net: its time per step, and the share of it spent waiting."""
    torch.manual_seed(0)
    model = UNet(1, len(LABELS), base_width=16, levels=4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    waited_s, begin_s = 0.0, time.perf_counter()
    batches = prefetched(
        lambda step: index.batch(0, step, BATCH), 0, NUM_STEPS, depth=depth
    )
    while True:
        asked_s = time.perf_counter()
        batch: Batch | None = next(batches, None)
        waited_s += time.perf_counter() - asked_s
        if batch is None:
            break
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(batch.images), batch.labels, ignore_index=UNKNOWN_LABEL
        )
        loss.backward()
        optimizer.step()
    total_s = time.perf_counter() - begin_s
    return total_s / NUM_STEPS, waited_s / total_s


def report(rows: Sequence[Row]) -> list[dict[str, Any]]:
    medians = {row.name: statistics.median(row.times_s) for row in rows}
    lines = []
    for row in rows:
        median_s = medians[row.name]
        lines.append(
            {
                "name": row.name,
                "median_s": median_s,
                "spread": [min(row.times_s), max(row.times_s)],
                "ratio": median_s / medians[row.beside] if row.beside else 1.0,
            }
            | ({"seconds_bar": WARM_BAR_S} if row.name == "warm start: fedmed" else {})
        )
        speed = ""
        if row.name.startswith("batches"):
            speed = f"  {NUM_BATCHES * BATCH / median_s:8.0f} slices/s"
        print(
            f"{row.name:38} {median_s:8.3f} s  [{min(row.times_s):.3f}-"
            f"{max(row.times_s):.3f}]  {lines[-1]['ratio']:6.2f}{speed}",
            flush=True,
        )
    return lines


def time_waiting(index: ExampleIndex, repeats: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for name, changes in (("plain", Augmentation()), ("augmented", ALL_CHANGES)):
        changed = ExampleIndex(index.cases, "slice", augmentation=changes)
        for depth in (2, 0):
            found = [waiting_share(changed, depth=depth) for _ in range(repeats)]
            steps_s = [step_s for step_s, _ in found]
            line = {
                "name": f"training step, {name}, {'ahead' if depth else 'inline'}",
                "median_s": statistics.median(steps_s),
                "spread": [min(steps_s), max(steps_s)],
                "ratio": 1.0,
                "waiting_share": statistics.median(share for _, share in found),
            }
            if depth:
                line["waiting_share_bar"] = WAITING_BAR
            if not depth:
                line["ratio"] = line["median_s"] / lines[-1]["median_s"]
            lines.append(line)
            print(
                f"{line['name']:38} {line['median_s']:8.4f} s  waiting "
                f"{line['waiting_share']:.2%}",
                flush=True,
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    prepared_cache.MAX_THREADS = arguments.workers
    with tempfile.TemporaryDirectory() as name:
        root, scratch = Path(name, "volumes"), Path(name, "scratch")
        scratch.mkdir()
        write_volumes(root, arguments.volumes)
        time.sleep(2.5)  # until the files count as untouched
        check_equal_work(root, scratch / "warm")
        rows = time_rows(
            root, scratch, repeats=arguments.repeats, workers=arguments.workers
        )
        lines = report(rows)
        index = _merged(start(make_study(root), scratch / "warm"))
        lines += time_waiting(index, max(1, arguments.repeats // 2))
    if arguments.json:
        arguments.json.write_text(json.dumps({"name": "W5", "rows": lines}, indent=1))


if __name__ == "__main__":
    main()
