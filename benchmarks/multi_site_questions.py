"""What is asked, and what is claimed: written down before any result was seen.

Budgets (rounds, steps, sizes) of `prostate` and `heart` were chosen by looking at
`separate` and `joint` alone, those of the others by the time that a table takes. What
was asked or changed later, after other results had been seen, says so in its remarks,
and its claims are not called made beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedmed.report.significance import OTHER_SITE, OWN_SITE


@dataclass(frozen=True)
class Claim:
    """One row is better than another.

    Attributes:
        better: Label of the row that should have the higher Dice, as
            `fedmed.report.significance.planned_tests` knows it.
        worse: Label of the other one.
        site: At this site; "" = in the mean over sites.
        margin: Asks another thing where it is not None: that `worse` costs at most
            this much against `better`, in points of Dice.
    """

    better: str
    worse: str
    site: str = ""
    margin: float | None = None

    def __str__(self) -> str:
        where = f" at site {self.site}" if self.site else ""
        if self.margin is not None:
            return f"{self.worse} costs at most {self.margin:g} point{where}"
        return f"{self.better} > {self.worse}{where}"


def unseen(method: str) -> str:
    """Label of the row of a method that is tested on sites left out in turn."""
    return f"{method} (site unseen)"


@dataclass(frozen=True)
class Question:
    """A table of docs/results.md.

    Attributes:
        key: On the command line, and in the markers of the page.
        title: Of its section.
        study: File of the study.
        methods: Rows; trained at all sites.
        claims: One family of tests.
        changes: Of the study.
        quick: More of them in a try.
        store: Folder of the runs; questions may share one, and then its runs.
        remarks: What a reader must know to judge the table.
        left_out: Methods that are tested on each site in turn, trained on the others.
        single: Methods that train on each site in turn, tested on all.
        num_seeds: Seeds.
        is_later: Results of a like question had been seen when this one was asked.
        again: Key of another question. Its runs that left a hospital out are tested
            once more, see `benchmarks.reestimated`; nothing is trained.
    """

    key: str
    title: str
    study: str
    methods: tuple[str, ...]
    claims: tuple[Claim, ...] = ()
    changes: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    store: str = ""
    remarks: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    single: tuple[str, ...] = ()
    num_seeds: int = 5
    is_later: bool = False
    again: str = ""

    @property
    def protocols(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Protocols and their methods, as `fedmed compare` takes them."""
        asked = (
            ("within_site", self.methods),
            ("leave_one_site_out", self.left_out),
            ("cross_site", self.single),
        )
        return tuple((name, methods) for name, methods in asked if methods)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the rows that claims may name."""
        return (
            *self.methods,
            *map(unseen, self.left_out),
            *(f"{m} ({what})" for m in self.single for what in (OWN_SITE, OTHER_SITE)),
        )

    @property
    def folder(self) -> str:
        """Name of the folder of its runs."""
        return self.store or self.key


ROWS: Final = (
    "separate", "joint", "use_net", "dual_stream", "series_adapter",
    "parallel_adapter", "dsbn",
)  # fmt: skip
"""MS-Net's table, but for its last row."""

TINY_PROSTATE = (
    "sites.cases_per_site=5", "sites.size=[32,32,6]", "preprocess.size=[32,32]",
)  # fmt: skip
PLAIN_META: Final = "saml[compact_weight=0,smooth_weight=0]"
COMPACT: Final = "saml[smooth_weight=0]"
"""SAML without its second loss, and without both: rows of its table."""

GENERALISING: Final = (
    "bigaug[weighting=uniform]", "mldg", "meta_reg", "epi_fcr[model.norm=instance]",
    "latreg", "masf", "saml", "feddg[weighting=uniform]", "harmofl",
)  # fmt: skip
"""Methods made for hospitals that never took part."""

OWN_VALUES: Final = (
    "The networks of the table before, with one thing changed: the running values of "
    "batch normalisation are estimated on the images of the hospital left out, without "
    "labels (AdaBN). joint normalises batches of all hospitals together, the others "
    "each hospital's by itself, so that only for joint are the running values those "
    "that it trained with."
)
"""Why methods are tested once more."""

MOST_DIFFERENT: Final = "b"
"""Half the field, another maker, another coil: by its card, not by its results."""

MS_NET_CLAIMS: Final = (
    Claim("ms_net", "dsbn"),
    Claim("dsbn", "joint"),
    Claim("ms_net", "joint"),
    Claim("separate", "joint", MOST_DIFFERENT),
)
UMMKD_ROWS: Final = ("separate", "joint", "ummkd[kd_weight=0]", "ummkd")
UMMKD_CLAIMS: Final = (
    Claim("ummkd", "ummkd[kd_weight=0]"),
    Claim("ummkd[kd_weight=0]", "joint"),
    Claim("ummkd", "joint"),
)
ANEW: Final = "evaluate.statistics=recalibrated"
ROUNDS: Final = {
    name: (f"{name}[sync=round]", f"{name}[sync=round,{ANEW}]")
    for name in ("dsbn", "ms_net")
}

HALF: Final = {
    name: f"{name}[train.precision=bfloat16]" for name in ("fedavg", "fedbn")
}

QUESTIONS: Final = {
    question.key: question
    for question in (
        Question(
            "prostate",
            "Prostate, three phantom hospitals: the table of MS-Net",
            "studies/ms_net_prostate.yaml",
            (*ROWS, "ms_net"),
            MS_NET_CLAIMS,
            quick=TINY_PROSTATE,
            remarks=(
                "Site b is the one whose acquisition differs most by its card (1.5 T, "
                "endorectal coil, another maker); this was fixed beforehand.",
            ),
        ),
        Question(
            "prostate_short",
            "Prostate, three phantom hospitals: the same after 600 steps, not 1,500",
            "studies/ms_net_prostate.yaml",
            ("separate", "joint", "dsbn", "ms_net"),
            MS_NET_CLAIMS,
            changes=("rounds=12", "train.lr_decay.every_steps=480"),
            quick=TINY_PROSTATE,
            remarks=(
                "The study's number of steps was raised from 600 to 1,500 after "
                "separate and joint had been seen: both are shown, with all rows that "
                "claims name.",
            ),
        ),
        Question(
            "sync",
            "Prostate, three phantom hospitals: one exchange a round instead of a step",
            "studies/ms_net_prostate.yaml",
            tuple(row for name, rows in ROUNDS.items() for row in (name, *rows)),
            tuple(
                Claim(name, row, margin=1.0)
                for name, rows in ROUNDS.items()
                for row in rows
            ),
            quick=TINY_PROSTATE,
            store="prostate",
            remarks=(
                "Equal steps, batches and passes through the data; `sync: round` sends "
                "50 times fewer messages and starts its optimiser afresh every round.",
                "With `sync: round` a site's running statistics belong to the kernels "
                "that it had before they were averaged; recalibrated, it estimates "
                "them anew, on its own training images, with the kernels that it is "
                "tested with.",
            ),
        ),
        Question(
            "heart",
            "Heart in MR and CT of different patients: distillation between modalities",
            "studies/ummkd_heart.yaml",
            UMMKD_ROWS,
            UMMKD_CLAIMS,
            # As many patients train as in the study; the others are for the test.
            changes=(
                "sites.cases_per_site=40",
                "split.train=0.3",
                "split.validation=0.1",
                "split.test=0.6",
                "strategy.sync=step",
            ),
            quick=("sites.cases_per_site=5",),
            remarks=(
                "This is the fourth table. At a constant learning rate: separate "
                "91.82, joint 90.32, without distillation 91.32, with it 90.99 (-0.33 "
                "points, "
                "-0.50 to -0.14), and up to 2.6 points between seeds of one method. "
                "With a rate that falls to 1/2000 over the run, as in the publication, "
                "which has 300 times as many steps: 60.63, 61.20, 59.53 and 56.53, all "
                "hardly trained. Now the rate falls to a tenth for the last fifth of "
                "the steps, and KD is halved, as in the reference's code, to whose "
                "weight of 0.5 that belongs; at twice the strength distillation cost "
                "0.32 points (-0.39 to -0.23).",
            ),
            is_later=True,
        ),
        Question(
            "heart_few",
            "Heart in MR and CT: the same with 4 patients a hospital instead of 12",
            "studies/ummkd_heart.yaml",
            UMMKD_ROWS,
            UMMKD_CLAIMS,
            changes=(
                "sites.cases_per_site=40",
                "split.train=0.1",
                "split.validation=0.1",
                "split.test=0.8",
                "strategy.sync=step",
            ),
            quick=("sites.cases_per_site=10",),
            remarks=(
                "Asked after the first table of 12 patients had been seen: whether "
                "another hospital's knowledge helps where a hospital's own is scarce.",
            ),
            is_later=True,
        ),
        Question(
            "spinal",
            "Grey matter of the spinal cord, six hospitals, real MRI: the same rows",
            "studies/spinal_gm.yaml",
            (*ROWS, "ms_net"),
            changes=("strategy.sync=step",),
            remarks=(
                "One volume a site (two at two sites), divided by blocks of slices: "
                "the same person is on both sides, and no test across patients exists.",
            ),
            num_seeds=2,
        ),
        Question(
            "retina",
            "Retinal vessels, three cameras, real photographs: the same rows",
            "studies/fundus_vessels.yaml",
            (*ROWS, "ms_net"),
            (
                Claim("ms_net", "dsbn"),
                Claim("dsbn", "joint"),
                Claim("ms_net", "joint"),
            ),
            changes=("strategy.sync=step", "transport.name=inprocess"),
            quick=("preprocess.size=[64,64]",),
            num_seeds=3,
        ),
        Question(
            "precision",
            "Retinal vessels, three cameras, real photographs: bfloat16 and float32",
            "studies/fundus_vessels.yaml",
            tuple(row for name in ("fedavg", "fedbn") for row in (name, HALF[name])),
            tuple(Claim(name, HALF[name], margin=1.0) for name in ("fedavg", "fedbn")),
            changes=("transport.name=inprocess",),
            quick=("preprocess.size=[64,64]",),
            remarks=(
                "bfloat16: forward passes under autocast, weights, sums and steps in "
                "float32. A run's time says nothing here: this processor has no "
                "instructions that make bfloat16 convolutions fast.",
            ),
            num_seeds=3,
        ),
        Question(
            "unseen",
            "Prostate at a phantom hospital left out of training, each of six in turn",
            "studies/saml_prostate.yaml",
            ("separate",),
            (
                Claim(unseen("saml"), unseen("masf")),
                Claim(unseen("masf"), unseen("joint")),
                Claim(unseen("saml"), unseen(PLAIN_META)),
                Claim(unseen(PLAIN_META), unseen("joint")),
            ),
            quick=("sites.size=[32,32,6]", "preprocess.size=[32,32]"),
            remarks=(
                "separate is the publication's Intra-site row: trained and tested at "
                "the same hospital, on its own test patients only. joint is DeepAll.",
                "A hospital left out is tested with all of its patients; nothing of it "
                "chooses a model, a number of steps or a weight.",
            ),
            left_out=("joint", "masf", PLAIN_META, COMPACT, "saml"),
            num_seeds=3,
        ),
        Question(
            "unseen_again",
            "Prostate at a phantom hospital left out: its own running values",
            "studies/saml_prostate.yaml",
            (),
            (
                Claim(unseen("saml"), unseen("masf")),
                Claim(unseen("masf"), unseen("joint")),
                Claim(unseen("saml"), unseen(PLAIN_META)),
                Claim(unseen(PLAIN_META), unseen("joint")),
                Claim(unseen("saml"), unseen("joint")),
            ),
            quick=("sites.size=[32,32,6]", "preprocess.size=[32,32]"),
            remarks=(OWN_VALUES,),
            left_out=("joint", "masf", PLAIN_META, COMPACT, "saml"),
            num_seeds=3,
            is_later=True,
            again="unseen",
        ),
        Question(
            "unseen_instance",
            "Prostate at a phantom hospital left out: instance normalisation",
            "studies/saml_prostate.yaml",
            (),
            (
                Claim(unseen("saml"), unseen("joint")),
                Claim(unseen(PLAIN_META), unseen("joint")),
                Claim(unseen("saml"), unseen(PLAIN_META)),
            ),
            changes=("model.norm=instance",),
            quick=("sites.size=[32,32,6]", "preprocess.size=[32,32]"),
            remarks=(
                "No running values, so that every row is tested as it was trained; "
                "nothing else differs from the table with batch normalisation.",
            ),
            left_out=("joint", PLAIN_META, "saml"),
            num_seeds=3,
            is_later=True,
        ),
        Question(
            "brain",
            "Brain tissues at four phantom hospitals: trained on one, tested on each",
            "studies/brain_tissue.yaml",
            (),
            (
                Claim(f"joint ({OWN_SITE})", f"joint ({OTHER_SITE})"),
                Claim(unseen("joint"), f"joint ({OTHER_SITE})"),
                Claim(unseen("masf"), unseen("joint")),
            ),
            quick=("sites.cases_per_site=5", "preprocess.size=[40,48]"),
            remarks=(
                "joint (own site alone) is the diagonal of the square table, joint "
                "(one other site alone) the mean of the rest, on the same patients.",
                "joint (site unseen) is DeepAll: trained on the other three hospitals.",
            ),
            left_out=("joint", "masf"),
            single=("joint",),
            num_seeds=3,
        ),
        Question(
            "brain_again",
            "Brain tissues at a phantom hospital left out: its own running values",
            "studies/brain_tissue.yaml",
            (),
            (Claim(unseen("masf"), unseen("joint")),),
            quick=("sites.cases_per_site=5", "preprocess.size=[40,48]"),
            remarks=(OWN_VALUES,),
            left_out=("joint", "masf"),
            num_seeds=3,
            is_later=True,
            again="brain",
        ),
        Question(
            "camera",
            "Retinal vessels, real photographs: each of three cameras left out in turn",
            "studies/fundus_vessels.yaml",
            (),
            tuple(Claim(unseen(name), unseen("fedavg")) for name in GENERALISING),
            changes=(
                "strategy.sync=step",
                "strategy.weighting=uniform",
                "transport.name=inprocess",
                "preprocess.size=[192,192]",
            ),
            quick=("preprocess.size=[64,64]",),
            remarks=(
                "The strongest method beats fedavg if one of these claims holds after "
                "correction for their number; the highest row alone would not show it.",
                "Every site counts alike in every row. epi_fcr has instance "
                "normalisation, since its aggregates would otherwise be normalised by "
                "the receiving site's batches; the others have batch normalisation.",
                "Two cameras train, so an episode learns on one and is judged on the "
                "other. SAML's compactness is made for one round organ: a tree of "
                "vessels is as far from it as can be, and its weight was not changed.",
            ),
            left_out=("fedavg", *GENERALISING),
            num_seeds=3,
        ),
    )
}
