"""`fedmed init`: a study for somebody's own data."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from fedmed.errors import UsageError

STUDY = """\
# A study of your own hospitals. Try it with:
#   fedmed sites check {name}/study.yaml
#   fedmed run {name}/study.yaml
name: {quoted_name}
seed: 0
rounds: 10

sites:
  dataset: {dataset}          # folder, bids or nnunet
  root: {quoted_root}
{labels}

split: {{train: 0.6, validation: 0.2, test: 0.2}}   # by subject
preprocess:
  size: [128, 128]         # voxels in the plane; the whole stack of slices is kept
  intensity: zscore

model: {{name: unet, base_width: 16, levels: 4, norm: batch, slices: 1}}
train:
  batch_size: 8
  local_epochs: 1
  loss: dice_linear+cross_entropy
  optimizer: {{name: adam, lr: 1.0e-3}}

strategy: {{name: fedavg, sync: round}}   # fedmed strategies lists them
"""

LABELS = {
    "folder": "  labels: {0: background, 1: organ}   # of every value in your masks",
    "bids": "  labels: {0: background, 1: organ}   # of every value in your masks\n"
    "  suffix: T2w              # last word of the images' names",
    "nnunet": "  # the labels' names stand in dataset.json",
}
"""What each data set must be told."""

README = """\
# {name}

Put your data under `{root}`, one folder per hospital:

    <hospital>/images/<case>.nii.gz     (or .nii, .png, .jpg)
    <hospital>/masks/<case>.nii.gz

or set `dataset: bids` or `dataset: nnunet` in `study.yaml`. Then:

    fedmed sites check {name}/study.yaml
    fedmed run {name}/study.yaml
    fedmed compare {name}/study.yaml --strategies separate,joint,fedavg,fedbn
"""


def init_command(folder: Path, data: Path | None) -> None:
    """Write study.yaml and a README into a new folder."""
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty", hint="Name a folder that does not exist yet."
        )
    if data is not None and not data.is_dir():
        raise UsageError(f"there is no data folder {data}")
    root = data.resolve() if data else (folder / "data").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        root.mkdir()
    dataset = guess_layout(root)
    name = folder.resolve().name
    facts = {
        "name": name,
        "quoted_name": json.dumps(name, ensure_ascii=False),
        "dataset": dataset,
        "root": str(root),
        "quoted_root": json.dumps(str(root), ensure_ascii=False),
        "labels": LABELS[dataset],
    }
    (folder / "study.yaml").write_text(STUDY.format(**facts))
    (folder / "README.md").write_text(README.format(**facts))
    edit = "look through it" if dataset == "nnunet" else "edit sites.labels in it"
    typer.echo(f"wrote {folder / 'study.yaml'}; next: {edit}, then")
    typer.echo(f"  fedmed sites check {folder / 'study.yaml'}")
    typer.echo(f"  fedmed run {folder / 'study.yaml'}")


def guess_layout(root: Path) -> str:
    """Guess how somebody's data is laid out.

    Example:
        >>> guess_layout(Path("/nowhere"))
        'folder'
    """
    if any(root.glob("dataset.json")) or any(root.glob("*/dataset.json")):
        return "nnunet"
    names = ("dataset_description.json", "participants.tsv")
    if any(
        any(root.glob(f"{prefix}{name}")) for name in names for prefix in ("", "*/")
    ):
        return "bids"
    return "folder"
