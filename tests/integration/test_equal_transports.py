"""The same study over every transport gives the same model, bit for bit.

On real MRI of two hospitals, with a method that keeps private state, and of a third
that takes no part and is evaluated with normalisation of the two: in this process, in
workers, on Ray, in Flower's simulation and in a deployment of SuperLink and SuperNodes
with TLS and node authentication on the loopback interface.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

STUDY = """\
name: equal
rounds: 2
sites: {dataset: spinal_gm, root: "${FEDMED_DATA}", include: [ceitec, milan, ucl]}
split: {by: slices, train: 0.4, validation: 0.2, test: 0.4, held_out: [ucl]}
preprocess: {spacing_mm: [1.0, 1.0], size: [48, 48]}
model: {name: unet, base_width: 4, levels: 3, norm: batch}
train: {batch_size: 4, local_steps: 2, optimizer: {name: adam, lr: 0.1}}
strategy: {name: fedbn, sync: round}
evaluate:
  overlays: 0
  statistics: recalibrated
  selected: true
  unseen: [adabn, average, ensemble]
"""
FILES = ("model.safetensors", "cases.csv", "unseen.csv", "selected.csv")

pytestmark = [pytest.mark.real_data, pytest.mark.slow]


def hashes(folder: Path, transport: str, *options: str) -> dict[str, str]:
    """Run the study over one transport and hash what it wrote."""
    study = folder / "study.yaml"
    study.write_text(STUDY)
    out = folder / transport
    command = [sys.executable, "-c", "from fedmed.cli import main; main()", "run"]
    arguments = [str(study), *options, "--transport", transport, "--out", str(out)]
    subprocess.run(
        [*command, *arguments, "--no-report"], check=True, env=os.environ, timeout=300
    )
    return {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `inprocess` gives."""
    return hashes(tmp_path_factory.mktemp("inprocess"), "inprocess")


@pytest.mark.parametrize(
    ("transport", "options"),
    [
        ("workers", ("transport.num_workers=2",)),
        ("ray", ("transport.num_workers=2",)),
        ("flower", ()),
        ("deployment", ("transport.tls=true",)),
    ],
)
def test_a_transport_changes_no_bit(
    transport: str,
    options: tuple[str, ...],
    tmp_path: Path,
    reference: dict[str, str],
) -> None:
    assert hashes(tmp_path, transport, *options) == reference


def test_another_seed_gives_another_model(
    tmp_path: Path, reference: dict[str, str]
) -> None:
    """The hashes above can differ at all."""
    other = hashes(tmp_path, "inprocess", "seed=1")
    assert other["model.safetensors"] != reference["model.safetensors"]
