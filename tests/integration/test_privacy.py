"""What a hospital's policy keeps inside: looked for in everything that comes out."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from safetensors.torch import load_file

from fedmed.errors import DataError
from fedmed.message import Message
from sites.host import open_host

PATIENTS = ("jane_doe_1950", "john_roe_1961", "mary_poe_1972", "adam_low_1983")
POLICY = {"allowed_kinds": ["Card", "Metrics", "Weights", "Gradient"]}
SHAPE = (24, 24, 3)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def root(work):
    """A folder data set whose files are called like patients."""
    rng = np.random.default_rng(3)
    for site in ("north", "south"):
        for patient in PATIENTS:
            mask = np.zeros(SHAPE, np.uint8)
            mask[6:14, 8:15] = 1
            image = (rng.normal(size=SHAPE) + 3 * mask).astype(np.float32)
            for name, data in (("images", image), ("masks", mask)):
                folder = work / "data" / site / name
                folder.mkdir(parents=True, exist_ok=True)
                where = np.diag([2.0, 2.0, 3.0, 1.0])
                nib.save(nib.Nifti1Image(data, where), folder / f"{patient}.nii.gz")
    return work / "data"


def study(work, *, sites=None, **policy):
    """Write a study and the hospitals' policy."""
    (work / "policy.yaml").write_text(json.dumps({**POLICY, **policy}))
    content = {
        "name": "small",
        "rounds": 2,
        "sites": {
            "dataset": "folder",
            "root": str(work / "data"),
            **(sites or {}),
            "policy": str(work / "policy.yaml"),
        },
        "split": {"train": 0.5, "validation": 0.0, "test": 0.5},
        "preprocess": {"size": [24, 24]},
        "model": {"name": "unet", "base_width": 4, "levels": 2, "norm": "batch"},
        "train": {
            "batch_size": 4,
            "local_steps": 2,
            "optimizer": {"name": "adam", "lr": 3e-3},
        },
        "strategy": {"name": "fedavg", "sync": "round"},
        "evaluate": {"overlays": 3},
    }
    (work / "study.yaml").write_text(json.dumps(content))
    return work / "study.yaml"


def assert_nobody_named(text):
    assert not [patient for patient in PATIENTS if patient in text.lower()], text


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("rule", ["pseudonym", "drop"])
def test_a_broken_scan_names_no_patient(fedmed, work, root, rule):
    truncate(root / "north" / "images" / "jane_doe_1950.nii.gz")
    path = study(work, case_ids=rule)
    out = work / "run"
    ended = fedmed(
        "run", path, "tolerance.quarantine_budget=0", "--out", out, "--no-report"
    )
    told = ended.refused(4)
    assert "north" in told
    assert "1 of 4 cases cannot be used" in told
    assert_nobody_named(ended.out + ended.err)
    entries = (out / "ledger" / "north" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in entries] == ["Failure"] * len(entries)
    assert entries


def test_the_names_stay_where_the_policy_lets_them_go(fedmed, work, root):
    truncate(root / "north" / "images" / "jane_doe_1950.nii.gz")
    path = study(work, case_ids="keep")
    arguments = ("tolerance.quarantine_budget=0", "--out", work / "run", "--no-report")
    assert "jane_doe_1950" in fedmed("run", path, *arguments).refused(4)


@pytest.mark.parametrize("rule", ["pseudonym", "drop"])
def test_a_quarantined_case_is_counted_without_its_name(fedmed, work, root, rule):
    truncate(root / "north" / "images" / "jane_doe_1950.nii.gz")
    path = study(work, case_ids=rule)
    out = work / "run"
    few = "tolerance.quarantine_budget=0.25"
    ended = fedmed("run", path, few, "--out", out, "--no-report")
    assert ended.code == 0, ended.err
    assert_nobody_named(ended.out + ended.err)
    lock = (out / "study.lock.yaml").read_text()
    assert "ends too early" in lock
    assert_nobody_named(lock)


def test_where_the_data_cannot_be_listed_nothing_is_quoted(fedmed, work, root):
    path = study(work, case_ids="drop")
    host = _host(path, work)
    twin = root / "north" / "images" / "jane_doe_1950.nii"
    twin.write_bytes(b"")
    with pytest.raises(DataError, match="jane_doe_1950") as caught:
        host.handle(Message("join"))
    told = host.describe_failure(caught.value)
    host.close()
    assert_nobody_named(told.detail)
    assert told.detail.startswith("DataError in sites.listing:")
    entries = (work / "run" / "ledger" / "north" / "ledger.jsonl").read_text()
    assert json.loads(entries)["kind"] == "Failure"
    assert json.loads(entries)["action"] == "join"


def _host(path, work):
    options = {
        "study": json.loads(path.read_text()),
        "folder": str(work / "run"),
        "cache": str(work / "cache"),
        "durable": False,
    }
    return open_host("north", options)


@pytest.mark.parametrize("rule", ["pseudonym", "drop"])
def test_neither_tables_nor_pictures_nor_the_report_name_a_patient(
    fedmed, work, root, rule
):
    out = work / "run"
    ended = fedmed("run", study(work, case_ids=rule), "--out", out)
    assert ended.code == 0, ended.err
    assert_nobody_named(ended.out + ended.err)
    files = [path for path in out.rglob("*") if path.is_file()]
    for path in files:
        assert_nobody_named(str(path.relative_to(out)))
        if "private" not in path.parts and path.suffix != ".npz":
            assert_nobody_named(path.read_bytes().decode("latin-1"))
    rows = _rows(out)
    for site in ("north", "south"):
        named = {row["case_id"] for row in rows if row["site"] == site}
        assert len(named) == 2, "the rows of one case stay together"
        patients = {row["subject_id"] for row in rows if row["site"] == site}
        assert len(patients) == 2
        assert all(patient.startswith("case-") for patient in patients)
        if rule == "drop":
            assert named == {"case-1", "case-2"}
        pictures = list((out / "sites" / site / "overlays").glob("*.npz"))
        assert pictures
        for path in pictures:
            with np.load(path) as picture:
                facts = json.loads(str(picture["facts"]))
            assert facts["case_id"] in named
            assert path.stem == f"{facts['rank']}-{facts['case_id']}"
            own = [row for row in rows if row["case_id"] == facts["case_id"]]
            dice = {float(r["dice"]) for r in own if r["site"] == site}
            assert any(abs(d - facts["dice"]) < 1e-4 for d in dice)


def _rows(out):
    files = list(out.rglob("cases.csv"))
    assert len(files) == 1
    with files[0].open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["split"] == "test"]


def test_noise_leaves_variances_that_a_network_can_use(fedmed, work, root):
    noise = {"clip_norm": 1.0, "noise_multiplier": 8.0}
    out = work / "run"
    # One round: what noise made of the variances is not trained away again.
    path = study(work, noise=noise)
    ended = fedmed("run", path, "rounds=1", "--out", out, "--no-report")
    assert ended.code == 0, ended.err
    files = list(out.rglob("model.safetensors"))
    assert files
    for state in map(load_file, files):
        assert any(name.endswith("running_var") for name in state)
        for name, tensor in state.items():
            assert tensor.isfinite().all(), name
            assert not name.endswith("running_var") or (tensor > 0).all(), name
