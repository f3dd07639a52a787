"""Study: the complete description of a run, read from YAML and checked.

Equal study and equal data give equal numbers. Unknown keys are errors that name the
nearest known key; any key can be overridden as `path.to.key=value`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fedmed.errors import ConfigError
from fedmed.spelling import did_you_mean, nearest

LOCK_ONLY = ("held_out", "task", "data", "public", "versions")
"""Keys that a run's study.lock.yaml holds beside the study."""

MAX_TOLD = 5
"""Problems of a study that one message lists."""


class Section(BaseModel):
    """A part of a study; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OpenSection(Section):
    """A section whose further keys belong to the named module or class."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


class SitesSection(OpenSection):
    """Where the hospitals' data comes from.

    Further keys are options of the dataset module (`preset`, `cases_per_site`...).

    Attributes:
        dataset: Module in `sites` or `package.module`.
        root: Folder of the data; environment variables are expanded when used.
        include: Only these sites; empty = all.
        public: A site of the data set whose images every hospital may open. It neither
            trains nor is it evaluated; methods that distil need one, and get its
            images without labels.
        policy: Policy file, or None for the permissive policy of simulations.
        ledger_digests: Whether the ledger holds a hash of the content of what leaves,
            beside its kind, names, shapes and size; None: in deployments only.
    """

    dataset: str
    root: str | None = None
    include: tuple[str, ...] = ()
    public: str | None = None
    policy: str | None = None
    ledger_digests: bool | None = None


class SplitSection(Section):
    """How cases are divided; always by subject.

    Attributes:
        train: Fraction of a site's subjects for training.
        validation: Fraction for model selection.
        test: Fraction for the final table.
        held_out: Sites that take no part in training; all their cases are test.
        by: "subject", or "slices" for single-subject sites: blocks of slices of the
            same volume are divided. That is the same patient on both sides, and the
            report says so.
        file: CSV `case_id,split` that fixes the division.
        seed: Seed of the division alone; None = the study's seed.
    """

    train: float = Field(0.6, ge=0, le=1)
    validation: float = Field(0.2, ge=0, le=1)
    test: float = Field(0.2, ge=0, le=1)
    held_out: tuple[str, ...] = ()
    by: Literal["subject", "slices"] = "subject"
    file: str | None = None
    seed: int | None = None

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitSection:
        if abs(self.train + self.validation + self.test - 1) > 1e-6:
            raise ValueError("train + validation + test must be 1")
        return self


class PreprocessSection(Section):
    """How a case becomes network input; see `fedmed.imaging.preprocess`."""

    spacing_mm: tuple[float | None, ...] | None = None
    size: tuple[int, ...] | None = None
    intensity: Literal[
        "zscore", "zscore_foreground", "percentile", "window", "unit", "none"
    ] = "zscore"
    percentiles: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] | None = None
    crop: Literal["center", "region", "fit"] = "center"


class ModelSection(OpenSection):
    """The network; further keys are its options (`base`, `levels`, `norm`...).

    Attributes:
        name: "unet", "classifier", "mlp" or "monai:<Name>".
        mode: Segmentation: "slice" (2D, 2.5D) or "patch" (3D). Classification:
            "image" (whole images, 2D or 3D) or "row" (tables).
        slices: Adjacent slices fed as channels (odd); 1 = plain 2D.
        patch_size: Of mode "patch", voxels in I, J, K.
        patches_per_case: Of mode "patch": examples of one case in an epoch.
        foreground_fraction: Of mode "patch": share of patches centred on an organ.
    """

    name: str = "unet"
    mode: Literal["slice", "patch", "image", "row"] = "slice"
    slices: int = Field(1, ge=1)
    patch_size: tuple[int, int, int] | None = None
    patches_per_case: int = Field(1, ge=1)
    foreground_fraction: float = Field(0.0, ge=0, le=1)

    @field_validator("slices")
    @classmethod
    def _has_a_middle(cls, slices: int) -> int:
        if slices % 2 == 0:
            raise ValueError("must be odd: the middle slice is the one to segment")
        return slices

    @model_validator(mode="after")
    def _patches_have_a_size(self) -> ModelSection:
        if self.mode == "patch" and self.patch_size is None:
            raise ValueError("mode: patch needs patch_size: [I, J, K] in voxels")
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]
"""How much of a running mean is kept in a step."""


class OptimizerSection(Section):
    """See `fedmed.optimizer.OptimizerSpec`."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(1e-2, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)


class LrDecaySection(Section):
    """See `fedmed.training.schedule.StepDecay`; steps are counted over all rounds."""

    factor: float = Field(gt=0, le=1)
    every_steps: int = Field(ge=1)


class TrainSection(Section):
    """Local training.

    Attributes:
        batch_size: Examples per step and site.
        local_steps: Steps per round and site.
        local_epochs: Instead of `local_steps`: passes over the site's own examples.
        loss: Name for `fedmed.losses.build`.
        loss_options: Its options (`smooth_numerator`, `class_weights`...).
        optimizer: Of the sites in `sync: round`, of the server in `sync: step`.
        optimizer_state: Whether a site's optimiser starts afresh each round.
        lr_decay: How the optimiser's learning rate falls: `{factor: 0.95,
            every_steps: 500}`.
        clip_norm: Largest gradient norm.
        precision: float32, float64, bfloat16 autocast, or auto: the faster of float32
            and bfloat16 on this machine, by a measurement. The lock file holds which.
        augmentation: Options of `fedmed.training.augment.Augmentation`.
        threads: Torch threads per site, whatever the transport.
        compile: Whether sites train with `torch.compile`, or auto: where a measurement
            on this machine says that the study is long enough to pay for it. The lock
            file holds which.
        device: "cpu", "cuda" or "auto".
        gpu_memory_fraction: Most that a process may take of a GPU's memory, so that
            several share one; None = all that is free.
    """

    batch_size: int = Field(8, ge=1)
    local_steps: int | None = Field(None, ge=1)
    local_epochs: float | None = Field(None, gt=0)
    loss: str = "dice_linear+cross_entropy"
    loss_options: Mapping[str, Any] = Field(default_factory=dict)
    optimizer: OptimizerSection = OptimizerSection()
    optimizer_state: Literal["reset", "keep"] = "reset"
    lr_decay: LrDecaySection | None = None
    clip_norm: float | None = Field(None, gt=0)
    precision: Literal["float32", "float64", "bfloat16", "auto"] = "float32"
    augmentation: Mapping[str, Any] = Field(default_factory=dict)
    threads: int = Field(1, ge=1)
    compile: Literal[True, False, "auto"] = False
    device: str = "cpu"
    gpu_memory_fraction: float | None = Field(None, gt=0, le=1)

    @field_validator("loss_options", "augmentation")
    @classmethod
    def _numbers(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: _number(value) for name, value in options.items()}

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("give local_steps or local_epochs, not both")
        return self


class StrategySection(OpenSection):
    """The method; further keys are its hyper-parameters."""

    name: str = "fedavg"


UnseenRule = Literal["adabn", "average", "average_adabn", "nearest", "ensemble"]
"""Whose normalisation a site uses that took no part; see `fedmed.unseen`."""


class EvaluateSection(Section):
    """What is measured, and when.

    Attributes:
        every: Rounds between validations; the last round is always evaluated.
        batch_size: Examples per forward pass.
        largest_component: Keep only the largest component of each class.
        overlays: Cases per site kept as pictures (worst, median, best), 0 = none.
        statistics: Of normalisation that stays at its site: "kept" as training left
            them, or "recalibrated" before each evaluation, with the averaged weights,
            on the site's own training images; labels are not used, nothing leaves.
        unseen: What a method with normalisation per site does at a held-out site. The
            first rule gives the result; others are reported beside it, in unseen.csv.
            All but "adabn" ask the training sites once for their normalisation.
        selected: Report beside the last round, in selected.csv, the round that scored
            best on the validation cases of the sites that trained. Every round that is
            validated is then checkpointed too.
        profile: "strict", or "legacy": all three that follow, as the public code of
            several publications does; see `fedmed.profile`.
        skip_end_slices: Predict neither the first nor the last slice.
        oracle_slice_range: Let predictions count only where the label shows an organ.
        bn_at_test: Batch normalisation by what was learned ("running"), or by each
            test slice's own statistics ("batch1").
    """

    every: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    largest_component: bool = False
    overlays: int = Field(3, ge=0, le=3)
    statistics: Literal["kept", "recalibrated"] = "kept"
    unseen: tuple[UnseenRule, ...] = Field(("adabn",), min_length=1)
    selected: bool = False
    profile: Literal["strict", "legacy"] = "strict"
    skip_end_slices: bool | None = None
    oracle_slice_range: bool | None = None
    bn_at_test: Literal["running", "batch1"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _selects_on_no_test_set(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "best_on_target" in given:
            raise ValueError(
                "best_on_target picks the checkpoint by the scores that it reports, "
                "which is selection on the test set: its numbers say nothing about "
                "new patients. The last round is reported; evaluate.selected: true "
                "adds the best one by validation at the sites that trained"
            )
        return given

    @field_validator("unseen")
    @classmethod
    def _each_once(cls, rules: tuple[UnseenRule, ...]) -> tuple[UnseenRule, ...]:
        if len(set(rules)) < len(rules):
            raise ValueError("names a rule twice")
        return rules


class ToleranceSection(Section):
    """What a run survives.

    Attributes:
        quarantine_budget: Largest fraction of unusable cases per site.
        quorum: Smallest fraction of the training sites that must answer a round.
        retries: How often a round below quorum is tried again.
        timeout_s: Longest wait for one exchange; None = no limit.
        norm_factor: An update is refused if its norm exceeds this many times the
            median norm of the other sites, and of the exchanges before.
    """

    quarantine_budget: float = Field(0.2, ge=0, le=1)
    quorum: float = Field(1.0, gt=0, le=1)
    retries: int = Field(1, ge=0)
    timeout_s: float | None = Field(3600.0, gt=0)
    norm_factor: float = Field(100.0, gt=1)


class CheckpointSection(Section):
    """How much work a death may cost.

    Attributes:
        every: Rounds between checkpoints; the last round always has one. What comes
            out does not depend on it, but the best round is kept only if it is among
            them (it always is with evaluate.selected).
    """

    every: int = Field(1, ge=1)


class TransportSection(OpenSection):
    """How exchanges travel; further keys are the transport's options."""

    name: Literal["inprocess", "workers", "ray", "flower", "deployment"] = "inprocess"


class ReportSection(Section):
    """What the report says beside the results; changes no number.

    Attributes:
        published: Table of a publication to print beside ours, by the name of its file
            in `fedmed/report/published_tables`.
        columns: Its columns -> our sites, where their names differ by more than case.
    """

    published: str | None = None
    columns: Mapping[str, str] = Field(default_factory=dict)


class Study(Section):
    """A complete study.

    Attributes:
        sites_per_round: Training sites that take part in a round, drawn anew each
            round from the seed; None = all. Every site is evaluated all the same.
    """

    name: str
    title: str = ""
    seed: int = 0
    rounds: int = Field(10, ge=1)
    sites_per_round: int | None = Field(None, ge=1)
    sites: SitesSection
    split: SplitSection = SplitSection()
    preprocess: PreprocessSection = PreprocessSection()
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    strategy: StrategySection = StrategySection()
    evaluate: EvaluateSection = EvaluateSection()
    tolerance: ToleranceSection = ToleranceSection()
    checkpoint: CheckpointSection = CheckpointSection()
    transport: TransportSection = TransportSection()
    report: ReportSection = ReportSection()
    cache: str | None = None

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not name.strip() or name.startswith(".") or {"/", "\\", "\0"} & {*name}:
            raise ValueError("must be usable as the name of a folder")
        return name

    @model_validator(mode="after")
    def _has_what_selects(self) -> Study:
        if self.evaluate.selected and not (self.split.validation or self.split.file):
            raise ValueError(
                "evaluate.selected picks a round by validation cases, of which "
                "split.validation: 0 leaves none"
            )
        others = self.evaluate.unseen[0] != "adabn" and self.split.held_out
        if self.evaluate.selected and others:
            raise ValueError(
                "evaluate.selected has no normalisation of other hospitals for one "
                "held out, as sites do not share that of earlier rounds; name adabn "
                "first in evaluate.unseen"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML, JSON and other processes."""
        return self.model_dump(mode="json")


def study_from_dict(content: Mapping[str, Any], *, where: str = "the study") -> Study:
    """Check a mapping and turn it into a `Study`.

    Raises:
        ConfigError: With the first problems found, the nearest known key for each
            unknown one.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        lines = [_explain(problem) for problem in _causes(error.errors())]
        more = [f"and {len(lines) - MAX_TOLD} more"] if len(lines) > MAX_TOLD else []
        raise ConfigError(f"{where}: " + "; ".join(lines[:MAX_TOLD] + more)) from None


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and apply `key=value` overrides.

    The study.lock.yaml of a run is a study file too, and describes the same run.

    Raises:
        ConfigError: If the file is missing, is no YAML mapping, or does not check.
    """
    content = apply_overrides(read_yaml(path), overrides)
    return study_from_dict(content, where=path.name)


def apply_overrides(
    content: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """Copy a study's content with `path.to.key=value` changes applied.

    Raises:
        ConfigError: If an override is not of this form.
    """
    changed = copy.deepcopy(dict(content))
    for override in overrides:
        _apply(changed, override)
    return changed


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; of a run's lock file, the study in it.

    Its `split.held_out` and `strategy.sync` stand, for all legs of a comparison too.

    Raises:
        ConfigError: If it is missing or is no mapping.
    """
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*.y*ml")]
        near = nearest(path.name, there, cutoff=0.6)
        hint = f"Did you mean {path.parent / near}?" if near else ""
        raise ConfigError(f"there is no study file {path}", hint=hint)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path.name} is not valid YAML{place}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} must hold a mapping of keys to values")
    return _study_in_lock(content) if "versions" in content else content


def _study_in_lock(lock: Mapping[str, Any]) -> dict[str, Any]:
    study = {key: value for key, value in lock.items() if key not in LOCK_ONLY}
    split = study.get("split")
    if isinstance(split, dict) and split.get("seed", 0) is None:
        # Left out, so that `compare` may divide the cases of all seeds alike.
        study["split"] = {key: split[key] for key in split if key != "seed"}
    return study


def _apply(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(
            f"override {override!r} is not of the form key=value",
            hint="For example: train.optimizer.lr=0.01",
        )
    *parents, last = path.split(".")
    target = content
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value")
    try:
        target[last] = _scalar(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML") from None


def _scalar(text: str) -> Any:
    """YAML value; 1e-3 is a number here, as everybody means it."""
    return _number(yaml.safe_load(text))


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _causes(problems: Sequence[Any]) -> list[Any]:
    """Leave out lists that are too short only because their items are wrong."""
    inner = {problem["loc"][:-1] for problem in problems}
    return [
        problem
        for problem in problems
        if problem["type"] != "too_short" or problem["loc"] not in inner
    ]


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, key = problem["loc"]
        return f"unknown key {where!r}{did_you_mean(str(key), _known_keys(parents))}"
    if problem["type"] == "missing":
        return f"key {where!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    seen = problem.get("input")
    shown = f" (seen: {seen!r})" if isinstance(seen, str | int | float) else ""
    return f"{where}: {message}{shown}" if where else f"{message}{shown}"


def _known_keys(parents: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Study
    for parent in parents:
        kind = model.model_fields[str(parent)].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        model = kind
    return list(model.model_fields)


def expand(path: str) -> Path:
    """Expand `~` and environment variables of a path in a study.

    Raises:
        ConfigError: If a variable is not set.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    if "$" in expanded:
        name = expanded[expanded.index("$") :].strip("${}").split("}")[0].split("/")[0]
        raise ConfigError(
            f"the path {path!r} names the environment variable {name}, "
            "which is not set",
            hint=f"export {name}=/folder/of/your/data",
        )
    return Path(expanded)
