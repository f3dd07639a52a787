"""What is asked, and what is claimed: written down before any result was seen.

Budgets (rounds, steps, sizes) were chosen by looking at `separate` and `joint` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Claim:
    """One row is better than another.

    Attributes:
        better: Label of the row that should have the higher Dice.
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


@dataclass(frozen=True)
class Question:
    """A table of docs/results.md.

    Attributes:
        key: On the command line, and in the markers of the page.
        title: Of its section.
        study: File of the study.
        methods: Rows.
        claims: One family of tests.
        changes: Of the study.
        quick: More of them in a try.
        store: Folder of the runs; questions may share one, and then its runs.
        remarks: What a reader must know to judge the table.
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
MOST_DIFFERENT: Final = "b"
"""Half the field, another maker, another coil: by its card, not by its results."""

QUESTIONS: Final = {
    question.key: question
    for question in (
        Question(
            "prostate",
            "Prostate, three phantom hospitals: the table of MS-Net",
            "studies/ms_net_prostate.yaml",
            (*ROWS, "ms_net"),
            (
                Claim("ms_net", "dsbn"),
                Claim("dsbn", "joint"),
                Claim("ms_net", "joint"),
                Claim("separate", "joint", MOST_DIFFERENT),
            ),
            quick=TINY_PROSTATE,
            remarks=(
                "Site b is the one whose acquisition differs most by its card (1.5 T, "
                "endorectal coil, another maker); this was fixed beforehand.",
            ),
        ),
        Question(
            "sync",
            "Prostate, three phantom hospitals: one exchange a round instead of a step",
            "studies/ms_net_prostate.yaml",
            ("dsbn", "dsbn[sync=round]", "ms_net", "ms_net[sync=round]"),
            (
                Claim("dsbn", "dsbn[sync=round]", margin=1.0),
                Claim("ms_net", "ms_net[sync=round]", margin=1.0),
            ),
            quick=TINY_PROSTATE,
            store="prostate",
            remarks=(
                "Equal steps, batches and passes through the data; `sync: round` sends "
                "50 times fewer messages and starts its optimiser afresh every round.",
            ),
        ),
        Question(
            "heart",
            "Heart in MR and CT of different patients: distillation between modalities",
            "studies/ummkd_heart.yaml",
            ("separate", "joint", "ummkd[kd_weight=0]", "ummkd"),
            (
                Claim("ummkd", "ummkd[kd_weight=0]"),
                Claim("ummkd[kd_weight=0]", "joint"),
                Claim("ummkd", "joint"),
            ),
            # As many patients train as in the study; the others are for the test.
            changes=(
                "sites.cases_per_site=40",
                "split.train=0.3",
                "split.validation=0.1",
                "split.test=0.6",
                "strategy.sync=step",
            ),
            quick=("sites.cases_per_site=5",),
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
        ),
    )
}
