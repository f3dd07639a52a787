r"""Embeddings of what several hospitals show, brought together or apart by their kind.

Each hospital embeds its batch, $e = M_\phi(\bar z)$, with $\bar z$ the mean over a mask
of the features that enter the network's head: one vector for each example and kind (a
class, or contour and background). A loss of distances compares them. What crosses the
wire is one of three grades:

    exact        embeddings of single examples; the server has the loss over the samples
                 of all hospitals, and sends its derivatives (`fedmed.training.coupled`)
    proxy        one mean embedding for each kind; every hospital compares its own
                 samples with the others' means, which are constants
    within_site  nothing; every hospital compares its own samples

Losses of the last two are averaged over hospitals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedmed.losses.known_voxels import at_least_float32
from fedmed.losses.metric import Labelled, contrastive, triplet_semi_hard
from fedmed.message import SiteId, State
from fedmed.networks.metric_network import HEAD
from fedmed.training.coupled import NOTHING_TOLD, Measured, Pass
from fedmed.training.plausibility import means_problem, vectors_problem
from fedmed.training.statistic_bank import PRESENT, banked, banked_sites

Grade = Literal["exact", "proxy", "within_site"]
MetricLoss = Literal["triplet", "contrastive"]

LAYERS = (HEAD,)
"""What a forward pass must note for `features_of`."""
VECTORS, KINDS = "vectors", "kinds"
CENTROIDS, SHOWN = "centroids", "shown"
_MARGINS = 1e4
"""Embeddings as far apart as so many margins were not learned with that loss."""
_FEWEST_SAMPLES = 2
"""The mean of a single example is that example."""


@dataclass(frozen=True)
class Embedded:
    """A batch's embeddings.

    Attributes:
        vectors_NF: One for each example and kind that it shows.
        kinds_N: The kind of each.
        voxels_N: How many voxels (cases, in classification) it is a mean of.
        num_kinds: T.
    """

    vectors_NF: Tensor
    kinds_N: Tensor
    voxels_N: Tensor
    num_kinds: int

    @property
    def labelled(self) -> Labelled:
        """As a metric loss takes them."""
        return Labelled(self.vectors_NF, self.kinds_N)


def features_of(passed: Pass) -> Tensor:
    """What entered the head in a forward pass that noted `LAYERS`, (B, F, ...)."""
    return cropped_to(passed.labels, passed.outputs[f"{HEAD}/input"])


def cropped_to(labels_B: Tensor, features_BF: Tensor) -> Tensor:
    """Cut off what a network appended to images before it computed features."""
    for axis, size in enumerate(labels_B.shape[1:], start=2):
        features_BF = features_BF.narrow(axis, 0, size)
    return features_BF


def embed(metric: nn.Module, features_BF: Tensor, masks_BT: Tensor) -> Embedded:
    """Embed the mean feature of each example's masks.

    Args:
        metric: From (N, F) to (N, D).
        features_BF: (B, F, ...).
        masks_BT: bool, (B, T, ...), one for each kind; empty ones give no embedding.
    """
    features_BFN = at_least_float32(features_BF).reshape(*features_BF.shape[:2], -1)
    masks_BTN = masks_BT.reshape(*masks_BT.shape[:2], -1)
    voxels_BT = masks_BTN.sum(dim=2)
    shown_BT = voxels_BT > 0
    sums_BTF = masks_BTN.to(features_BFN) @ features_BFN.transpose(1, 2)
    voxels_N = voxels_BT[shown_BT]
    means_NF = sums_BTF[shown_BT] / voxels_N.unsqueeze(1)
    num_kinds = masks_BT.shape[1]
    kinds_BT = torch.arange(num_kinds, device=masks_BT.device).expand_as(shown_BT)
    return Embedded(metric(means_NF), kinds_BT[shown_BT], voxels_N, num_kinds)


@dataclass(frozen=True)
class Tally:
    """Embeddings added up by kind.

    Attributes:
        sums_TF: Row t for kind t.
        voxels_T: Voxels behind each row.
        samples_T: Embeddings behind each row.
    """

    sums_TF: Tensor
    voxels_T: Tensor
    samples_T: Tensor

    @classmethod
    def of(cls, embedded: Embedded) -> Tally:
        """Add up one batch's."""
        kinds_T = torch.arange(embedded.num_kinds, device=embedded.kinds_N.device)
        member_TN = kinds_T.unsqueeze(1) == embedded.kinds_N.unsqueeze(0)
        return cls(
            member_TN.to(embedded.vectors_NF) @ embedded.vectors_NF,
            (member_TN * embedded.voxels_N).sum(dim=1),
            member_TN.sum(dim=1),
        )

    @classmethod
    def total(cls, parts: Iterable[Tally]) -> Tally:
        """Several batches' together, without their graphs."""
        listed = list(parts)
        return cls(
            torch.stack([part.sums_TF.detach() for part in listed]).sum(dim=0),
            torch.stack([part.voxels_T for part in listed]).sum(dim=0),
            torch.stack([part.samples_T for part in listed]).sum(dim=0),
        )

    def told(self, min_count: int, *, passes: int = 1) -> Measured:
        """Mean embeddings of the kinds that may be told; nothing of the others.

        Args:
            min_count: Fewest voxels behind a mean; fewer than two samples are none.
            passes: How often each example was counted.
        """
        means_TF = self.sums_TF / self.samples_T.clamp(min=1).unsqueeze(1)
        voxels_T = self.voxels_T // passes
        shown_T = (voxels_T >= min_count) & (self.samples_T >= _FEWEST_SAMPLES * passes)
        return Measured(
            values={CENTROIDS: means_TF.masked_fill(~shown_T.unsqueeze(1), 0.0)},
            facts={SHOWN: shown_T.to(means_TF)},
            min_count=min(voxels_T[shown_T].tolist(), default=NOTHING_TOLD),
        )


@dataclass(frozen=True)
class Clustering:
    """The loss of embeddings of one method, with what each half computes of it.

    Attributes:
        grade: What crosses the wire.
        margin: Of the loss.
        weight: Factor of the loss, >= 0; 0 leaves everything out.
        min_count: Fewest voxels behind a proxy.
        loss: "triplet" (semi-hard) or "contrastive".
    """

    grade: Grade
    margin: float
    weight: float
    min_count: int
    loss: MetricLoss = "triplet"

    @property
    def is_exact(self) -> bool:
        """Whether embeddings of single examples travel."""
        return bool(self.weight) and self.grade == "exact"

    @property
    def by_proxies(self) -> bool:
        """Whether mean embeddings travel."""
        return bool(self.weight) and self.grade == "proxy"

    @property
    def is_here(self) -> bool:
        """Whether a hospital computes its part of the loss itself."""
        return bool(self.weight) and self.grade != "exact"

    def distance(self, anchors: Labelled, others: Labelled | None = None) -> Tensor:
        """The unweighted loss; see `fedmed.losses.metric`."""
        function = triplet_semi_hard if self.loss == "triplet" else contrastive
        return function(anchors, others, margin=self.margin)

    def told(self, embedded: Embedded) -> Measured:
        """What of a batch's embeddings leaves in the first half."""
        if self.is_exact:
            facts = {KINDS: embedded.kinds_N}
            return Measured({VECTORS: embedded.vectors_NF}, facts)
        if self.by_proxies:
            return Tally.of(embedded).told(self.min_count)
        return Measured(values={})

    def problem(self, state: State, *, width: int, noised: bool = False) -> str:
        """Say what is wrong with what a site told; "" if nothing is.

        Args:
            state: As `told` made it, other tensors beside.
            width: Of an embedding.
            noised: Its policy may have clipped and noised it.
        """
        largest = _MARGINS * max(1.0, self.margin)
        if self.is_exact:
            return vectors_problem(
                state, vectors=VECTORS, kinds=KINDS, width=width, largest=largest
            )
        if self.by_proxies:
            return means_problem(
                state, means=CENTROIDS, marks=SHOWN, largest=largest, noised=noised
            )
        return ""

    def over_all(self, told: Mapping[SiteId, State]) -> Tensor:
        """The weighted loss over the samples of all sites, for grade "exact"."""
        vectors_NF = torch.cat([told[site][VECTORS] for site in sorted(told)])
        kinds_N = torch.cat([told[site][KINDS] for site in sorted(told)])
        return self.weight * self.distance(Labelled(vectors_NF, kinds_N))

    def here(self, embedded: Embedded, others: State) -> Tensor:
        """The unweighted loss of one site's own samples.

        Args:
            embedded: The site's.
            others: What `others_of` gave for it; not looked at within a site.
        """
        if self.grade == "within_site":
            return self.distance(embedded.labelled)
        if not others:
            return 0.0 * embedded.vectors_NF.sum()
        vectors_MF = others[VECTORS].to(embedded.vectors_NF)
        kinds_M = others[KINDS].to(embedded.kinds_N.device)
        return self.distance(embedded.labelled, Labelled(vectors_MF, kinds_M))

    def pooled(
        self, embedded: Mapping[SiteId, Embedded], weights: Mapping[SiteId, float]
    ) -> Tensor:
        """The weighted loss with all sites at hand.

        Args:
            embedded: By site.
            weights: Of the sites in the mean of grades "proxy" and "within_site".
        """
        told = {}
        for site in sorted(embedded):
            measured = self.told(embedded[site])
            told[site] = {**measured.values, **measured.facts}
        if self.is_exact:
            return self.over_all(told)
        whole = sum(weights[site] for site in told)
        terms = []
        for site in told:
            others = others_of(told, site) if self.by_proxies else {}
            constants = {name: tensor.detach() for name, tensor in others.items()}
            terms.append(weights[site] / whole * self.here(embedded[site], constants))
        return self.weight * torch.stack(terms).sum()


def others_of(proxies: Mapping[SiteId, State], site: SiteId) -> State:
    """The proxies of all sites but one, as they are sent to it; {} if there is none.

    Args:
        proxies: By site: "centroids" and "shown".
        site: The one.
    """
    vectors, kinds = [], []
    for other in sorted(proxies):
        if other != site:
            shown_T = proxies[other][SHOWN] > 0.5
            vectors.append(proxies[other][CENTROIDS][shown_T])
            kinds.append(shown_T.nonzero().reshape(-1))
    if not sum(len(rows) for rows in vectors):
        return {}
    return {VECTORS: torch.cat(vectors), KINDS: torch.cat(kinds)}


def to_bank(told: Mapping[SiteId, State]) -> dict[SiteId, State]:
    """Proxies as `updated_bank` takes them."""
    return {
        site: {
            CENTROIDS: state[CENTROIDS],
            PRESENT: (state[SHOWN] > 0.5).to(state[SHOWN]),
        }
        for site, state in told.items()
    }


def from_bank(bank: State) -> dict[SiteId, State]:
    """The proxies that a bank holds, by site."""
    found = {site: banked(bank, site) for site in banked_sites(bank)}
    return {
        site: {CENTROIDS: state[CENTROIDS], SHOWN: state[PRESENT]}
        for site, state in found.items()
    }


def joined(*parts: Measured) -> Measured:
    """Several statistics as one."""
    counts = [part.min_count for part in parts if part.values and part.min_count]
    unknown = 0 if any(part.values for part in parts) else NOTHING_TOLD
    return Measured(
        values={name: t for part in parts for name, t in part.values.items()},
        facts={name: t for part in parts for name, t in part.facts.items()},
        min_count=min(counts, default=unknown),
    )
