"""Whatever is wrong, a user reads one or two lines that say what to do about it."""

import html
import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fedmed import errors

sys.path.insert(0, str(Path(__file__).parent))
line = importlib.import_module("command_line")
raising = importlib.import_module("raising_dataset")

pytestmark = pytest.mark.timeout(120)

USAGE, DATA, SITE = 2, 3, 4

WRONG_STUDIES = {
    "key": ({"train": {"bach_size": 4}}, ["train.bach_size", "'batch_size'"]),
    "section": ({"modle": {}}, ["'modle'", "'model'"]),
    "name_missing": ({"name": None}, ["name"]),
    "folder": ({"name": "../elsewhere"}, ["name", "name of a folder"]),
    "type": ({"rounds": "many"}, ["rounds", "many"]),
    "range": ({"rounds": 0}, ["rounds", "greater than or equal to 1"]),
    "split": ({"split": {"train": 0.9}}, ["train + validation + test must be 1"]),
    "data_set": ({"sites": {"dataset": "foldr"}}, ["'foldr'", "'folder'", "bids"]),
    "data_module": ({"sites": {"dataset": "no.such"}}, ["no module 'no.such'"]),
    "preset": (
        {"sites": {"dataset": "phantom", "preset": "prostate_abd"}},
        ["'prostate_abd'", "'prostate_abc'"],
    ),
    "data_option": (
        {"sites": {"dataset": "phantom", "cases_per_sit": 3}},
        ["cases_per_sit", "did you mean 'cases_per_site'"],
    ),
    "phantom_size": (
        {"sites": {"dataset": "phantom", "size": [2, 2, 2]}},
        ["(2, 2, 2)", "at least 16"],
    ),
    "variable": (
        {"sites": {"dataset": "folder", "root": "${FEDMED_NOWHERE}/x"}},
        ["FEDMED_NOWHERE", "not set", "export"],
    ),
    "site": (
        {"sites": {**line.TINY["sites"], "include": ["z"]}},
        ["'z'", "a, b, c"],
    ),
    "held_out": ({"split": {"held_out": ["z"]}}, ["'z'", "a, b, c"]),
    "strategy": ({"strategy": {"name": "fedavgg"}}, ["'fedavgg'", "'fedavg'"]),
    "strategy_class": (
        {"strategy": {"name": "no.such:Class"}},
        ["cannot be imported", "package.module:Class"],
    ),
    "strategy_option": (
        {"strategy": {"name": "fedprox", "muu": 1}},
        ["strategy.muu", "did you mean 'mu'"],
    ),
    "strategy_text": (
        {"strategy": {"name": "fedprox", "mu": "much"}},
        ["strategy.mu", "number", "much"],
    ),
    "strategy_value": ({"strategy": {"name": "fedprox", "mu": -1}}, ["mu", "-1"]),
    "sync": ({"strategy": {"name": "fedavg", "sync": "steps"}}, ["steps", "round"]),
    "network": ({"model": {"name": "unett"}}, ["'unett'", "'unet'"]),
    "network_option": (
        {"model": {"name": "unet", "base_widht": 8}},
        ["base_widht", "base_width"],
    ),
    "network_text": ({"model": {"name": "unet", "levels": "two"}}, ["unet"]),
    "norm": ({"model": {"name": "unet", "norm": "bach"}}, ["'bach'", "'batch'"]),
    "patch": ({"model": {"mode": "patch"}}, ["patch_size", "[I, J, K]"]),
    "loss": ({"train": {"loss": "dice"}}, ["'dice'", "dice_linear"]),
    "optimizer": (
        {"train": {"optimizer": {"name": "adma"}}},
        ["train.optimizer.name", "'adam'", "adma"],
    ),
    "augmentation": (
        {"train": {"augmentation": {"flips": True}}},
        ["train.augmentation.flips"],
    ),
    "augmentation_list": (
        {"train": {"augmentation": {"gamma": [0.8, 1.2]}}},
        ["train.augmentation.gamma", "[0.8, 1.2]", "number"],
    ),
    "augmentation_text": (
        {"train": {"augmentation": {"rotate_deg": "abc"}}},
        ["train.augmentation.rotate_deg", "'abc'", "number"],
    ),
    "flip_axes": (
        {"train": {"augmentation": {"flip_axes": 1}}},
        ["train.augmentation.flip_axes", "1", "IJK"],
    ),
    "betas": (
        {"train": {"optimizer": {"name": "adam", "betas": [1.5, 0.9]}}},
        ["train.optimizer.betas", "less than 1", "1.5"],
    ),
    "lr": (
        {"train": {"optimizer": {"lr": float("inf")}}},
        ["train.optimizer.lr", "finite"],
    ),
    "slices": ({"model": {"slices": 2}}, ["model.slices", "odd", "2"]),
    "split_file": (
        {"split": {"file": "nowhere.csv"}},
        ["split.file", "'nowhere.csv'"],
    ),
    "policy": (
        {"sites": {**line.TINY["sites"], "policy": "nowhere.yaml"}},
        ["sites.policy", "'nowhere.yaml'"],
    ),
    "class_weights": (
        {"train": {"loss_options": {"class_weights": "abc"}}},
        ["train.loss_options", "abc", "dice_linear+cross_entropy"],
    ),
    "smooth_numerator": (
        {"train": {"loss_options": {"smooth_numerator": "abc"}}},
        ["train.loss_options", "smooth_numerator", "abc"],
    ),
    "norm_per_site": (
        {"model": {**line.TINY["model"], "norm": "batch_per_site"}},
        ["model.norm", "model.site_ids", "model.norm: batch", "fedbn"],
    ),
    "device": ({"train": {"device": "gpu0"}}, ["train.device", "gpu0", "cuda"]),
    "window": ({"preprocess": {"intensity": "window"}}, ["window", "(low, high)"]),
    "size": ({"preprocess": {"size": [0, 0]}}, ["size", "(0, 0)"]),
    "transport": ({"transport": {"name": "rya"}}, ["transport.name", "'ray'"]),
    "transport_option": (
        {"transport": {"name": "inprocess", "num_wrokers": 2}},
        ["num_wrokers"],
    ),
}


@pytest.mark.parametrize("what", WRONG_STUDIES)
def test_wrong_study(fedmed, work, what):
    changes, words = WRONG_STUDIES[what]
    if what == "name_missing":
        content = {key: line.TINY[key] for key in line.TINY if key != "name"}
        study = work / "study.yaml"
        study.write_text(json.dumps(content))
    else:
        study = line.write_study(work, **changes)
    ended = fedmed("run", study, "--out", work / "run", FEDMED_NOWHERE=None)
    told = ended.refused(USAGE)
    assert all(word in told for word in words), told


def test_wrong_study_as_json(fedmed, work):
    study = line.write_study(work, train={"loss": "dice"})
    ended = fedmed("run", study, "--out", work / "run", "--json")
    assert (ended.code, ended.err) == (2, "")
    assert set(ended.record) == {"error", "message", "hint", "exit_code"}
    assert ended.record["exit_code"] == 2
    assert ended.record["error"] == "ConfigError"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [a\n", "not valid YAML at line 2"),
        ("- a\n- b\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("\xff\xfe", "not valid YAML"),
        ("name: !!python/object/apply:os.system [exit]\n", "not valid YAML"),
    ],
)
def test_file_that_is_no_study(fedmed, work, text, words):
    (work / "study.yaml").write_text(text, encoding="latin-1")
    assert words in fedmed("run", work / "study.yaml").refused(USAGE)


def test_missing_study_names_the_nearest(fedmed, work):
    line.write_study(work)
    told = fedmed("run", work / "stduy.yaml").refused(USAGE)
    assert f"Did you mean {work / 'study.yaml'}?" in told


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.optimizer.lr", "not of the form key=value For example: train"),
        ("=3", "not of the form key=value"),
        ("train.batch_size.x=3", "holds a value"),
        ("tarin.batch_size=3", "did you mean 'train'"),
        ("strategy.nme=fedbn", "did you mean 'name'"),
        ("rounds=[1", "not YAML"),
    ],
)
def test_wrong_override(fedmed, work, override, words):
    study = line.write_study(work)
    assert words in fedmed("run", study, override).refused(USAGE)


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("scaffold", "train.optimizer.name=adam", "scaffold needs plain SGD"),
        ("fedmd", "rounds=1", "names no site that has them"),
        ("mldg", "split.held_out=[b, c]", "'mldg' needs 2 sites that train"),
        ("fedavg[train.loss=dice]", "rounds=1", "dice_linear"),
        ("separate", "report={published: prostate_multi_site, columns: {x: a}}", "'x'"),
    ],
)
def test_compare_refuses_before_it_trains(fedmed, work, method, override, words):
    study = line.write_study(work)
    methods = ("--strategies", f"fedavg,{method}", "--out", work / "out")
    assert words in fedmed("compare", study, override, *methods).refused(USAGE)
    assert not (work / "out").exists()


def test_a_wrong_item_of_a_list_is_told_once(fedmed, work):
    study = line.write_study(work)
    told = fedmed("run", study, "evaluate.unseen=[adbn]").refused(USAGE)
    assert told.endswith("(seen: 'adbn')"), told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rnu",), "no such command 'rnu'. Did you mean 'run'? See fedmed --help."),
        (("run",), "missing argument 'STUDY' See fedmed run --help."),
        (("run", "s.yaml", "--uot", "x"), "no such option '--uot'"),
        (("prove", "fedavg", "--steps", "0"), "'--steps': 0 is not in the range"),
        (("prove", "fedavgg"), "did you mean 'fedavg'"),
        (("strategies", "fedavgg"), "did you mean 'fedavg'"),
        (("report", "nowhere"), "'nowhere' is not a run folder"),
        (("sites", "check", "foldr"), "did you mean 'folder'"),
        (("sites", "check", "phantom", "--option", "x"), "not of the form key=value"),
        (("compare", "study.yaml", "--strategies", "fedavg,nix"), "no strategy 'nix'"),
        (("compare", "study.yaml", "--strategies", ""), "comma-separated names"),
        (("compare", "study.yaml", "--seeds", "one"), "whole numbers: 'one'"),
    ],
)
def test_wrong_command_line(fedmed, work, arguments, words):
    line.write_study(work)
    assert words in fedmed(*arguments, cwd=work).refused(USAGE)
    ended = fedmed(*arguments, "--json", cwd=work)
    assert ended.code == USAGE
    assert not ended.err
    assert ended.record["exit_code"] == USAGE


SHAPE = (24, 24, 4)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def write_case(root, site, case, *, label=1, affine=AFFINE, label_affine=AFFINE):
    """Write one image with a bright block, and its mask."""
    rng = np.random.default_rng([ord(site), ord(case)])
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:14, 8:15] = 1
    image = rng.normal(size=SHAPE) + 3 * mask
    for name, data, where in (
        ("images", image.astype(np.float32), affine),
        ("masks", mask * np.uint8(label), label_affine),
    ):
        folder = root / site / name
        folder.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, where), folder / f"{case}.nii.gz")


@pytest.fixture
def root(work):
    """A folder data set: sites a and b with four cases each."""
    for site in "ab":
        for case in "1234":
            write_case(work / "data", site, case)
    return work / "data"


def folder_study(work, **options):
    return line.write_study(
        work,
        sites={"dataset": "folder", "root": str(work / "data"), **options},
    )


def run_folder(fedmed, work, *overrides, **options):
    study = folder_study(work, **options)
    return fedmed("run", study, *overrides, "--out", work / "run", "--no-report")


def truncate(root):
    for path in (root / "a" / "images").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])


def undeclared(root):
    for case in "1234":
        write_case(root, "a", case, label=7)


def displaced(root):
    for case in "1234":
        moved = AFFINE.copy()
        moved[0, 3] = 40.0
        write_case(root, "a", case, label_affine=moved)


def rescaled(root):
    for case in "1234":
        write_case(root, "a", case, label_affine=np.diag([2.0, 2.0, 5.0, 1.0]))


def emptied(root):
    for name in ("images", "masks"):
        shutil.rmtree(root / "a" / name)
        (root / "a" / name).mkdir()


def without_masks(root):
    for path in (root / "a" / "masks").iterdir():
        path.unlink()


def not_finite(root):
    for path in (root / "a" / "images").iterdir():
        nib.save(nib.Nifti1Image(np.full(SHAPE, np.nan, np.float32), AFFINE), path)


def copied(root):
    for name in ("images", "masks"):
        shutil.copy(root / "a" / name / "1.nii.gz", root / "b" / name / "1.nii.gz")


def removed(root):
    shutil.rmtree(root)


def siteless(root):
    shutil.rmtree(root)
    root.mkdir()


BAD_DATA = {
    truncate: (SITE, ["a: ", "case 1", "ends too early"]),
    undeclared: (SITE, ["a: ", "holds 7", "not declared", "merge"]),
    displaced: (SITE, ["a: ", "lie 40 mm apart"]),
    rescaled: (SITE, ["a: ", "2 x 2 x 3 and 2 x 2 x 5 mm"]),
    emptied: (SITE, ["a: ", "no usable case"]),
    without_masks: (SITE, ["a: ", "no mask with this name"]),
    not_finite: (SITE, ["a: ", "not finite"]),
    copied: (DATA, ["more than one site (a and b)"]),
    removed: (DATA, ["no data folder 'data'"]),
    siteless: (DATA, ["no site found", "<site>/images and <site>/masks"]),
}


@pytest.mark.parametrize("spoil", BAD_DATA, ids=lambda spoil: spoil.__name__)
def test_bad_data(fedmed, work, root, spoil):
    code, words = BAD_DATA[spoil]
    spoil(root)
    told = run_folder(fedmed, work).refused(code)
    assert all(word in told for word in words), told
    assert str(root) not in told


def test_bad_case_within_the_budget_is_counted(fedmed, work, root):
    path = root / "a" / "images" / "2.nii.gz"
    path.write_bytes(path.read_bytes()[:-500])
    told = run_folder(fedmed, work).refused(SITE)
    assert "1 of 4 cases cannot be used, allowed are 20%" in told
    ended = run_folder(fedmed, work, "tolerance.quarantine_budget=0.25")
    assert ended.code == 0, ended.err
    assert "ends too early" in (work / "run" / "study.lock.yaml").read_text()


def test_one_class_only_runs(fedmed, work, root):
    for case in "1234":
        write_case(root, "a", case, label=0)
    ended = run_folder(fedmed, work)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err


def test_site_with_one_case_trains(fedmed, work, root):
    for name in ("images", "masks"):
        for case in "234":
            (root / "a" / name / f"{case}.nii.gz").unlink()
    ended = run_folder(fedmed, work)
    assert ended.code == 0, ended.err


def test_nothing_to_measure_is_said(fedmed, work):
    study = line.write_study(work, sites={**line.TINY["sites"], "cases_per_site": 1})
    ended = fedmed("run", study, "--out", work / "run", "--no-report")
    assert ended.code == 0, ended.err
    assert "nothing was measured" in ended.out


def test_no_site_trains(fedmed, work):
    study = line.write_study(work, split={"held_out": ["a", "b", "c"]})
    told = fedmed("run", study, "--out", work / "run").refused(DATA)
    assert "no training examples at any site" in told


def test_diverging_training_is_told_once(fedmed, work):
    study = line.write_study(work)
    wild = ("train.optimizer.name=sgd", "train.optimizer.lr=1e30")
    told = fedmed("run", study, *wild, "--out", work / "run").refused(SITE)
    assert "a, b, c: the training loss became nan" in told
    assert "--resume" in told


@pytest.mark.parametrize("how", ["file", "key", "own", "exit", "noise"])
def test_what_a_reader_says_of_a_patient_goes_nowhere(fedmed, work, how):
    study = line.write_study(work, sites={"dataset": "tests_raising.set", "how": how})
    package(work)
    ended = fedmed("run", study, "--out", work / "run", PYTHONPATH=str(work))
    told = ended.refused(SITE)
    assert "could not join: a" in told
    nowhere(ended, work / "run")


def test_site_whose_process_dies_is_named(work):
    package(work)
    sites = {"dataset": "tests_raising.set", "how": "die"}
    study = line.write_study(
        work, sites=sites, transport={"name": "ray", "num_workers": 2}
    )
    out = work / "run"
    ended = line.fresh(
        "run", study, "--out", out, "--json", cwd=work, PYTHONPATH=str(work)
    )
    assert ended.code == SITE
    assert ended.record["exit_code"] == SITE
    told = ended.record["message"]
    assert "a: died: the process that plays this site died" in told
    nowhere(ended, out)


def package(work):
    """Make the data set importable as `tests_raising.set`."""
    (work / "tests_raising").mkdir()
    shutil.copy(raising.__file__, work / "tests_raising" / "set.py")
    (work / "tests_raising" / "__init__.py").write_text("")


def nowhere(ended, out):
    """Assert that the patient is named in no output and in no file of the run."""
    assert raising.SENTINEL not in ended.out + ended.err
    assert "JANE" not in ended.out + ended.err
    for path in out.rglob("*"):
        # A simulated site's own folder is inside the hospital.
        if path.is_file() and "sites" not in path.relative_to(out).parts:
            assert raising.SENTINEL.encode() not in path.read_bytes(), path.name


def test_an_error_that_nobody_foresaw(fedmed, work):
    """A folder that cannot be listed: an `OSError` from deep inside."""
    (work / "runs").write_text("")
    told = fedmed("run", line.write_study(work), cwd=work).refused(6)
    assert "runs" in told


def test_run_is_kept_out_of_a_folder_with_other_things(fedmed, work):
    study = line.write_study(work)
    for command in ("run", "compare"):
        told = fedmed(command, study, "--out", "", cwd=work).refused(USAGE)
        assert "holds other things" in told
    assert [path.name for path in work.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize("content", ["{}", "name: [", "- a", "name: x\nsites: 3\n"])
def test_damaged_lock_file(fedmed, work, content):
    study, out = line.write_study(work), work / "run"
    out.mkdir()
    (out / "study.lock.yaml").write_text(content)
    fedmed("run", study, "--out", out, "--resume").refused(6)


def repeated(fedmed, folder, *, cwd):
    """Type what the report says, in the folder where the named file is."""
    page = (folder / "report.html").read_text()
    told = re.findall(r"<pre>fedmed (.+?)</pre>", page)
    assert len(told) == 1
    ended = fedmed(*shlex.split(html.unescape(told[0])), "--out", cwd / "2", cwd=cwd)
    assert ended.code == 0, ended.err
    return cwd / "2"


def test_the_report_tells_how_to_repeat_a_run(fedmed, work):
    study, out = line.write_study(work, rounds=1), work / "run"
    assert fedmed("run", study, "--out", out).code == 0
    again = repeated(fedmed, out, cwd=work)
    assert line.hashes(again) == line.hashes(out)


def test_the_report_tells_how_to_repeat_a_comparison(fedmed, work):
    """The leg without sites left out, and the options of one strategy, come back."""
    strategy = {"name": "fedprox", "mu": 0.5}
    sites = {**line.TINY["sites"], "include": ["a", "b"]}
    study = line.write_study(work, rounds=1, strategy=strategy, sites=sites)
    out = work / "both"
    ended = fedmed(
        "compare", study, "--strategies", "separate,fedprox", "--seeds", "3",
        "--leave-one-site-out", "--out", out,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    again = repeated(fedmed, out, cwd=out)
    legs = sorted(path.parent.name for path in out.glob("*/summary.json"))
    assert len(legs) == 3
    for leg in legs:
        assert line.hashes(again / leg) == line.hashes(out / leg), leg


def test_damaged_index_of_a_comparison(fedmed, work):
    study, out = line.write_study(work), work / "both"
    out.mkdir()
    (out / "compare.json").write_text("{")
    told = fedmed("compare", study, "--out", out).refused(6)
    assert "compare.json" in told


def test_exit_codes_are_documented():
    """docs/exit_codes.md holds every class of fedmed/errors.py with its code."""
    text = (line.ROOT / "docs" / "exit_codes.md").read_text()
    rows = dict(
        reversed([cell.strip(" `") for cell in row.strip("|").split("|")][:2])
        for row in text.splitlines()
        if row.startswith("| ") and "Error`" in row
    )
    found = {
        name: str(item.exit_code)
        for name, item in vars(errors).items()
        if isinstance(item, type) and issubclass(item, errors.FedMedError)
    }
    assert rows == found
