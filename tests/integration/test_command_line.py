"""Every command as a user types it, on small data of every layout."""

import hashlib
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
line = importlib.import_module("command_line")

pytestmark = pytest.mark.timeout(180)

HELP_S = 0.25
IMPORT_S = 0.15
REPETITIONS = 7

COMMANDS = [
    (), ("run",), ("compare",), ("report",), ("strategies",), ("prove",), ("init",),
    ("doctor",), ("sites",), ("sites", "list"), ("sites", "check"),
]  # fmt: skip


def least_seconds(*programs):
    """Shortest time of each program, tried in turns so that noise meets all."""
    least = dict.fromkeys(programs, float("inf"))
    for _ in range(REPETITIONS):
        for program in programs:
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", program],
                env=line.environment(),
                capture_output=True,
                check=True,
            )
            least[program] = min(least[program], time.perf_counter() - start)
    return [least[program] for program in programs]


def test_help_and_import_are_quick():
    """Beyond what Python itself takes, and more on a machine that is slow now."""
    show_help = "import sys; sys.argv = ['fedmed', '--help']; " + line.COMMAND
    nothing, with_help, imported = least_seconds("pass", show_help, "import fedmed")
    slow = max(1.0, nothing / 0.03)
    assert with_help - nothing <= HELP_S * slow
    assert imported - nothing <= IMPORT_S * slow


def test_a_study_starts_without_what_it_needs_only_later():
    """What surfaces, reports and other transports need costs the start a second."""
    program = (
        "import sys\n"
        "import fedmed.commands.run, fedmed.run, sites.host, sites.phantom\n"
        "import strategies.fedavg, fedmed.transports.workers\n"
        "later = {'scipy.ndimage', 'scipy.spatial', 'scipy.special', 'sklearn', 'ray',"
        " 'matplotlib', 'flwr', 'monai', 'jinja2', 'torch._dynamo'}\n"
        "print(sorted(later & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=line.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "[]"


def test_help_imports_nothing_heavy():
    """Holds on any machine, however slow it is at the moment."""
    program = (
        "import sys; sys.argv = ['fedmed', '--help']\n"
        "from fedmed.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'scipy', 'ray', 'flwr', 'sklearn', 'matplotlib',"
        " 'nibabel', 'monai', 'pydantic', 'yaml', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=line.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "[]"
    assert "compare" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(fedmed, command):
    for option in ("--help", "-h"):
        ended = fedmed(*command, option)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.startswith("Usage: ")
        assert all(len(each) <= 100 for each in ended.out.splitlines())


def test_version(fedmed):
    ended = fedmed("--version")
    assert ended.code == 0
    assert ended.out.split()[0] == "fedmed"


def test_nothing_at_all_shows_the_help(fedmed):
    ended = fedmed()
    assert ended.code == 2
    assert ended.out.startswith("Usage: ")


def test_strategies(fedmed):
    record = fedmed("strategies", "--json").record
    names = [each["name"] for each in record["strategies"]]
    assert {"fedavg", "fedbn", "fedprox", "joint", "separate"} <= set(names)
    for each in record["strategies"]:
        assert each["paper"]
        assert each["sync"]
        told = fedmed("strategies", each["name"])
        assert told.code == 0
        assert each["paper"] in told.out
    shown = fedmed("strategies")
    assert shown.code == 0
    assert all(f"\n{name}: " in f"\n{shown.out}" for name in names)
    assert all(len(each) < 80 for each in shown.out.splitlines())
    assert "normalisation statistics" in " ".join(shown.out.split())


def test_sites(fedmed):
    record = fedmed("sites", "list", "--json").record
    assert {"phantom", "folder", "bids", "nnunet"} <= set(record["datasets"])
    assert "phantom" in fedmed("sites", "list").out


def test_doctor(fedmed, work):
    ended = fedmed("doctor", "--json")
    findings = {each["name"]: each for each in ended.record["findings"]}
    assert ended.code == (0 if all(f["ok"] for f in findings.values()) else 7)
    assert findings["torch"]["ok"]
    wrong = fedmed("doctor", FEDMED_DATA=str(work / "nowhere"))
    assert wrong.code == 7
    assert "FIX  FEDMED_DATA" in wrong.out
    # Whose folder it is is nobody's business who reads a bug report.
    assert str(work) not in wrong.out


def test_prove(fedmed):
    record = fedmed("prove", "fedavg", "--steps", "2", "--json").record
    assert record["holds"] is True
    assert 0 <= record["max_abs_diff"] <= record["limit"]
    assert record["num_compared"] > 1000
    assert record["moved"] > 1e-3


def test_run_as_json_prints_one_line(fedmed, work):
    out = work / "run"
    ended = fedmed("run", line.write_study(work), "--out", out, "--json")
    assert (ended.code, ended.err) == (0, "")
    record = ended.record
    assert Path(record["run"]) == out
    assert Path(record["report"]) == out / "report.html"
    assert (record["strategy"], record["seed"], record["rounds"]) == ("fedbn", 0, 2)
    assert record["split"] == "test"
    assert sorted(record["metrics"]) == ["a", "b", "c"]
    for values in (*record["metrics"].values(), record["overall"]):
        assert 0 <= values["dice"] <= 1
        assert {"assd_mm", "hd95_mm"} <= set(values)
    assert record["worst_site"] in record["metrics"]
    page = (out / "report.html").read_text()
    assert "fedbn" in page
    again = fedmed("report", out, "--json").record
    assert Path(again["report"]) == out / "report.html"
    shown = fedmed("report", out)
    assert shown.code == 0
    assert "fedbn" in shown.out


def test_held_out_sites_are_shown_apart(fedmed, work):
    study = line.write_study(work, rounds=1, split={"held_out": ["b"]})
    record = fedmed("run", study, "--out", work / "run", "--no-report", "--json").record
    sites = record["metrics"]
    expected = (sites["a"]["dice"] + sites["c"]["dice"]) / 2
    assert record["overall"]["dice"] == pytest.approx(expected)
    assert record["worst_site"] in {"a", "c"}
    assert record["held_out"]["sites"] == {"b": sites["b"]}
    shown = fedmed("run", study, "--out", work / "run", "--resume", "--no-report")
    assert "b (held out)" in shown.out
    assert "overall (held out)" in shown.out


def test_overrides_and_transport_of_the_command_line(fedmed, work):
    study, out = line.write_study(work), work / "run"
    ended = fedmed(
        "run", study, "seed=3", "strategy.name=fedavg", "train.optimizer.lr=1e-2",
        "--transport", "inprocess", "--out", out, "--no-report", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.record["strategy"] == "fedavg"
    assert ended.record["seed"] == 3
    assert ended.record["report"] is None
    lock = (out / "study.lock.yaml").read_text()
    assert "lr: 0.01" in lock
    assert "name: inprocess" in lock


def test_run_without_a_folder_makes_one(fedmed, work):
    ended = fedmed("run", line.write_study(work), "--no-report", "--json", cwd=work)
    folder = work / ended.record["run"]
    assert folder.parent == work / "runs"
    assert folder.name.startswith("small-")
    assert (folder.stat().st_mode & 0o777) == 0o700
    resumed = fedmed("run", "study.yaml", "--resume", "--no-report", "--json", cwd=work)
    assert resumed.code == 0
    assert resumed.record["run"] == ended.record["run"]


LAYOUTS = {
    # data set that `init` must guess, and what the user edits in the study
    "folder": ("folder", ["sites.include=[alpha]", "tolerance.quarantine_budget=1"]),
    "nnunet": ("nnunet", ["tolerance.quarantine_budget=0.5"]),
    "bids": ("bids", []),
    "png": ("folder", []),
}


def write_png(root):
    from PIL import Image

    rng = np.random.default_rng(0)
    for site in ("east", "west"):
        for case in range(5):
            mask = np.zeros((32, 32), np.uint8)
            mask[8:20, 10 : 20 + case] = 1
            image = rng.integers(0, 100, (32, 32)) + 120 * mask
            for name, pixels in (("images", image), ("masks", mask)):
                (root / site / name).mkdir(parents=True, exist_ok=True)
                path = root / site / name / f"p{case}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_a_folder_of_data_to_a_result(fedmed, work, layout):
    """`init`, `sites check`, `run` as its own output tells."""
    guessed, overrides = LAYOUTS[layout]
    data, project = work / "data", work / "2024 #1: mine"  # YAML must be quoted
    if layout == "png":
        write_png(data)
    else:
        importlib.import_module(f"sites.{layout}").write_miniature(data, 1)
    ended = fedmed("init", project, "--data", data)
    assert ended.code == 0, ended.err
    study = project / "study.yaml"
    assert f"dataset: {guessed}" in study.read_text()
    assert f"fedmed run {study}" in ended.out
    checked = fedmed("sites", "check", study, "--json")
    assert checked.code in (0, 3), checked.err
    assert checked.record["cases"] > 0
    clean = not checked.record["quarantined"] and not checked.record["twins"]
    assert checked.code == (0 if clean else 3)
    smaller = [
        "rounds=1", "preprocess.size=[24,24]", "model.base_width=4", "model.levels=2",
        "train.local_epochs=0.5", "split.train=0.4", "split.validation=0",
        "split.test=0.6", "evaluate.overlays=1",
    ]  # fmt: skip
    run = fedmed(
        "run",
        study,
        *smaller,
        *overrides,
        "--out",
        work / "run",
        "--no-report",
        "--json",
    )
    assert run.code == 0, run.out + run.err
    assert run.record["metrics"], run.out


def test_init_refuses_a_folder_in_use(fedmed, work):
    (work / "mine").mkdir()
    (work / "mine" / "thesis.tex").write_text("")
    told = fedmed("init", work / "mine").refused(2)
    assert "not empty" in told
    told = fedmed("init", work / "new", "--data", work / "nowhere").refused(2)
    assert "no data folder" in told
    assert not (work / "new").exists()


def test_compare_is_interrupted_and_goes_on(fedmed, work):
    """Two strategies, two seeds; the runs that were finished are not run again."""
    study, out = line.write_study(work), work / "both"
    arguments = (
        "compare", study, "--strategies", "fedavg,fedbn", "--seeds", "0,1",
        "--out", out,
    )  # fmt: skip
    started = fedmed.start(*arguments)
    started.until((out / "fedavg-seed1" / "checkpoints").is_dir)
    started.send(2)
    ended = started.wait()
    assert ended.code == 130
    assert f"--out {out}" in ended.err
    first = out / "fedavg-seed0" / "model.safetensors"
    before = (first.stat().st_mtime_ns, first.read_bytes())
    record = fedmed(*arguments, "--json").record
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    index = json.loads((out / "compare.json").read_text())
    folders = [run["folder"] for run in index["runs"]]
    assert folders == ["fedavg-seed0", "fedavg-seed1", "fedbn-seed0", "fedbn-seed1"]
    assert all((out / name / "summary.json").exists() for name in folders)
    assert "fedavg" in json.dumps(record["table"])
    assert "fedbn" in json.dumps(record["table"])
    assert Path(record["report"]).stat().st_size > 10_000
    shown = fedmed("report", out)
    assert shown.code == 0
    assert "fedbn" in shown.out
    # Runs of another study may not stand in the same table.
    told = fedmed(*arguments, "train.optimizer.lr=0.1").refused(6)
    assert "train.optimizer.lr: 0.003 -> 0.1" in told


def test_terminal_that_knows_ascii_only(work):
    study = line.write_study(work, rounds=1)
    arguments = ("run", study, "--out", work / "run", "--no-report")
    ended = line.fresh(*arguments, cwd=work, PYTHONIOENCODING="ascii")
    assert ended.code == 0, ended.err
    assert "overall" in ended.out


def test_compare_holds_out_each_site_in_turn(fedmed, work):
    study, out = line.write_study(work, rounds=1), work / "unseen"
    ended = fedmed(
        "compare", study, "--strategies", "separate,fedavg", "--leave-one-site-out",
        "--out", out, "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    folders = sorted(path.parent.name for path in out.glob("*/summary.json"))
    assert folders == [
        "fedavg-seed0-without-a",
        "fedavg-seed0-without-b",
        "fedavg-seed0-without-c",
        "separate-seed0",
    ]


def test_compare_trains_on_each_site_alone_and_tests_on_all(fedmed, work):
    study, out = line.write_study(work, rounds=1), work / "square"
    common = ("--strategies", "joint", "--out", out, "--jobs", "2", "--json")
    ended = fedmed("compare", study, "--protocol", "cross_site", *common)
    assert ended.code == 0, ended.err
    names = sorted(path.parent.name for path in out.glob("*/summary.json"))
    assert names == ["joint-seed0-on-a", "joint-seed0-on-b", "joint-seed0-on-c"]
    for site in "abc":
        rows = (out / f"joint-seed0-on-{site}" / "cases.csv").read_text().splitlines()
        columns = rows[0].split(",")
        tested = [dict(zip(columns, r.split(","), strict=True)) for r in rows[1:]]
        tested = [row for row in tested if row["split"] == "test"]
        counts = {s: len([r for r in tested if r["site"] == s]) for s in "abc"}
        # Its own test split of four cases, and all cases of the others.
        assert counts == {s: 1 if s == site else 4 for s in "abc"}
        assert all(row["subject_id"] for row in tested)
    speed = ended.record["speed"]
    assert (speed["runs"], speed["jobs"]) == (3, 2)
    assert 0 < speed["share_of_ideal"] < 1.5
    assert ended.record["transfer"]["header"][1] == "joint (trained on a)"
    # The other half of the table joins it in the same folder.
    more = ("--protocol", "leave_one_site_out", *common)
    ended = fedmed("compare", study, *more)
    assert ended.code == 0, ended.err
    assert ended.record["transfer"]["header"][-1] == "joint (site unseen)"
    assert len(ended.record["table"]["rows"]) == 4
    again = fedmed("compare", study, *more)
    assert again.code == 0
    assert "speed" not in again.record  # nothing was left to run
    assert again.record["table"] == ended.record["table"]


def test_the_profile_is_told_with_every_number(fedmed, work):
    study, out = line.write_study(work, rounds=1), work / "legacy"
    changes = ("evaluate.profile=legacy", "evaluate.oracle_slice_range=false")
    run = fedmed("run", study, *changes, "--out", out, "--json")
    assert run.code == 0, run.err
    name = "strict but skip_end_slices and batch1_at_test"
    assert run.record["profile"] == name
    assert json.loads((out / "summary.json").read_text())["profile"] == name
    told = fedmed("report", out)
    assert f"profile {name}" in told.out
    assert f"profile {name}" in (out / "report.html").read_text()
    refused = fedmed("run", study, "evaluate.best_on_target=true", "--out", work / "x")
    assert "selection on the test set" in refused.refused(2)


def test_compare_runs_a_leg_again_whose_held_out_site_has_no_result(fedmed, work):
    """As if the left-out site had been away when it was to be evaluated."""
    study, out = line.write_study(work, rounds=2), work / "unseen"
    arguments = (
        "compare", study, "--strategies", "separate,fedavg", "--leave-one-site-out",
        "--out", out, "--json",
    )  # fmt: skip
    assert fedmed(*arguments).code == 0
    leg, other = out / "fedavg-seed0-without-b", out / "fedavg-seed0-without-a"
    whole = line.hashes(leg)
    summary = json.loads((leg / "summary.json").read_text())
    summary["missing"] = {"b": "timeout"}
    summary["held_out"] = None
    del summary["sites"]["b"]
    (leg / "summary.json").write_text(json.dumps(summary))
    rows = (leg / "cases.csv").read_text().splitlines(keepends=True)
    (leg / "cases.csv").write_text("".join(r for r in rows if ",b," not in r))
    untouched = [
        folder / "model.safetensors" for folder in (other, out / "separate-seed0")
    ]
    before = [path.stat().st_mtime_ns for path in untouched]
    ended = fedmed(*arguments)
    assert (ended.code, ended.err) == (0, "")
    assert [path.stat().st_mtime_ns for path in untouched] == before
    summary = json.loads((leg / "summary.json").read_text())
    assert sorted(summary["held_out"]["sites"]) == ["b"]
    assert summary["missing"] == {}
    model = hashlib.sha256((leg / "model.safetensors").read_bytes()).hexdigest()
    assert model == whole["model.safetensors"]


def test_output_into_a_closed_pipe_is_no_error(work):
    done = subprocess.run(
        f"{sys.executable} -c '{line.COMMAND}' strategies | head -1",
        shell=True,
        env=line.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
