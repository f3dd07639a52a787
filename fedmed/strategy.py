"""The contract of a strategy: one published method, both halves in one file.

The server half is a generator: every `yield` is one exchange, and what comes back are
replies, never cases. The site half is the methods marked `at_site`. Both are pure:
state comes in and goes out. One object plays every hospital of a simulation, so
anything stored on `self` would leak between them; strategies are frozen.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Container, Generator, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    runtime_checkable,
)

from fedmed.errors import ConfigError
from fedmed.message import SiteId, State
from fedmed.optimizer import OptimizerSpec, clip, descend
from fedmed.partition import Entry, StatePartition
from fedmed.payload import Payload
from fedmed.reduce import merge_states

if TYPE_CHECKING:
    from torch import nn

    from fedmed.task import Task
    from fedmed.training.pooled import PooledTraining
    from fedmed.training.trainer import Trainer, TrainingBatch

Sync = Literal["step", "round"]
Weighting = Literal["examples", "uniform"]
POOLED_SITE = "pooled"
"""The virtual site of strategies that pool data; simulation only."""

Replies = Mapping[SiteId, Any]
"""Accepted payloads by site, in sorted order."""


@dataclass(frozen=True)
class Member:
    """A site as the server knows it: name, public card, number of examples."""

    site_id: SiteId
    num_examples: int
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exchange:
    """One message to some sites and their replies: the unit of cost in federation.

    Attributes:
        action: Name of the `at_site` method that answers.
        site_ids: Addressed sites, sorted.
        content: Named arguments for all of them: states or JSON scalars.
        content_by_site: Further arguments for single sites.
        alike: All sites answer with the same names and shapes.
        comparable: And with updates of about the same size.
        roles: By site, where sites play different parts and their updates differ in
            size by that; empty = one part.
        sends: Shape by name of what a reply's "state" holds; None = undeclared.
        checks: By section of a reply ("state", "extra/class_statistic"): says what is
            wrong with it, "" if nothing is.
    """

    action: str
    site_ids: tuple[SiteId, ...]
    content: Mapping[str, Any] = field(default_factory=dict)
    content_by_site: Mapping[SiteId, Mapping[str, Any]] = field(default_factory=dict)
    alike: bool = True
    comparable: bool = True
    roles: Mapping[SiteId, str] = field(default_factory=dict)
    sends: Mapping[str, tuple[int, ...]] | None = None
    checks: Mapping[str, Callable[[State], str]] = field(default_factory=dict)

    def expecting(
        self,
        sends: Mapping[str, tuple[int, ...]] | None = None,
        *,
        alike: bool = True,
        comparable: bool = True,
        roles: Mapping[SiteId, str] | None = None,
        checks: Mapping[str, Callable[[State], str]] | None = None,
    ) -> Exchange:
        """Say what replies hold: a statistic, or part of the network's entries.

        Args:
            sends: Shape by name of a reply's "state"; other names are refused.
            alike: False: each site may send another part of it.
            comparable: False: a site's update may be next to nothing where another's is
                not, as with a loss of classes that some batches do not show.
            roles: Role by site; only updates of sites of the same one are compared.
            checks: As of the exchange; see `fedmed.training.plausibility`.

        Example:
            >>> ask = Exchange("statistic", ("a", "b"))
            >>> ask.expecting({"confusion": (5, 5), "counts": (5,)}).alike
            True
        """
        return replace(
            self,
            sends=sends,
            alike=alike,
            comparable=comparable,
            roles=roles or {},
            checks=checks or {},
        )


@dataclass(frozen=True)
class Cohort:
    """The sites that take part, as the server sees them: names and cards only.

    Attributes:
        members: In sorted order of `site_id`.
        steps: Optimisation steps per round, per site.
        round: Number of the round, from 1.
        rng_seed: Seed for the strategy's own draws in this round.
        num_sites: All training sites, of which the members may be a draw; 0 = these
            members are all.
        first_step: Number of the round's first step over all rounds, from 0.
        num_rounds: Rounds of the whole run; 0 = unknown.
        public: The public site, if the method needs one and the study names it. It is
            no member: only `at_public` asks it.
    """

    members: tuple[Member, ...]
    steps: int
    round: int
    rng_seed: int
    num_sites: int = 0
    first_step: int = 0
    num_rounds: int = 0
    public: Member | None = None

    def __post_init__(self) -> None:
        """Count the members where nobody said how many sites there are."""
        if not self.num_sites:
            object.__setattr__(self, "num_sites", len(self.members))

    @property
    def site_ids(self) -> tuple[SiteId, ...]:
        """Names, sorted."""
        return tuple(member.site_id for member in self.members)

    @property
    def num_examples(self) -> dict[SiteId, int]:
        """Registered training examples by site."""
        return {member.site_id: member.num_examples for member in self.members}

    def select(self, site_ids: tuple[SiteId, ...]) -> Cohort:
        """The same cohort with only some of its members."""
        members = tuple(m for m in self.members if m.site_id in site_ids)
        return replace(self, members=members)

    def at_public(self) -> Cohort:
        """The cohort whose one member is the public site."""
        assert self.public is not None  # the engine has one if `needs_public`
        return replace(self, members=(self.public,), num_sites=1)

    def ask(
        self,
        action: Callable[..., Outcome],
        *,
        by_site: Mapping[SiteId, Mapping[str, Any]] | None = None,
        **content: Any,
    ) -> Exchange:
        """Ask every member to run one `at_site` method of the strategy.

        Args:
            action: The bound method.
            by_site: Further arguments for single sites.
            content: Arguments for all: states (mappings of tensors) or JSON values.
        """
        name = action.__name__
        if not getattr(action, "_fedmed_at_site", False):
            raise TypeError(f"{name} is not marked at_site")
        return Exchange(name, self.site_ids, content, by_site or {})


@dataclass(frozen=True)
class Server:
    """What the server knows between exchanges; a value, never mutated.

    Attributes:
        shared: Shared entries of the network.
        memory: Named further states: optimiser moments, control variates.
        entries: Role and part of every entry of the network.
        partition: Which entries are shared, which the sites keep.
        optimizer: The study's optimiser, used by `descend`.
        clip_norm: Largest L2 norm of a gradient, None = unlimited.
        round: The last finished round, 0 before training.
        step: The step to be taken next, over all rounds, from 0; with `sync: round`
            the round's first.
    """

    shared: State
    memory: Mapping[str, State]
    entries: tuple[Entry, ...]
    partition: StatePartition
    optimizer: OptimizerSpec
    clip_norm: float | None = None
    round: int = 0
    step: int = 0

    def remember(self, **states: State) -> Server:
        """Give a server with some memory replaced."""
        return replace(self, memory={**self.memory, **states})

    def with_shared(self, state: State) -> Server:
        """Give a server with some or all shared entries replaced."""
        return replace(self, shared={**self.shared, **state})

    def trainable(self, *, part: str | None = None) -> State:
        """Shared entries that an optimiser may move."""
        moving = {"weight", "norm_affine"}
        return {
            e.name: self.shared[e.name]
            for e in self.entries
            if e.name in self.shared
            and e.role in moving
            and (part is None or e.part == part)
        }

    def descend(
        self,
        gradient: State,
        *,
        optimizer: OptimizerSpec | None = None,
        memory: str = "optimizer",
    ) -> Server:
        """Take one step of the study's optimiser on the shared entries.

        Args:
            gradient: Summed or averaged gradient; a subset of the shared entries.
            optimizer: Another optimiser than the study's.
            memory: Where its moments are kept; one name per network or phase.
        """
        moved, moments = descend(
            {name: self.shared[name] for name in gradient},
            clip(gradient, self.clip_norm),
            (optimizer or self.optimizer).at(self.step),
            dict(self.memory.get(memory, {})),
        )
        return self.with_shared(moved).remember(**{memory: moments})

    def merge(
        self, replies: Mapping[SiteId, State], weights: Mapping[SiteId, float]
    ) -> State:
        """Merge states by role: weights averaged, statistics by total variance."""
        return merge_states(replies, weights, self.entries)

    def merge_buffers(
        self, replies: Mapping[SiteId, State], weights: Mapping[SiteId, float]
    ) -> State:
        """Merge states whose statistics all sites moved on from the server's own.

        How many passes they made is told by the counters of their layers, alike at all.
        """
        first = replies[min(site for site in replies if weights[site] > 0)]
        passes = {}
        for entry in self.entries:
            module, dot, _ = entry.name.rpartition(".")
            counter = f"{module}{dot}num_batches_tracked"
            if entry.momentum is not None and counter in first:
                made = int(first[counter]) - int(self.shared[counter])
                passes[entry.name] = max(0, made)
        return merge_states(replies, weights, self.entries, passes=passes)


@dataclass(frozen=True)
class Private:
    """What a site keeps for itself between messages: a value.

    Attributes:
        states: Named states: "kept" holds the kept entries of the network, further
            names belong to the strategy ("optimizer", "control"...).
        facts: JSON facts: counters, DP spending.
    """

    states: Mapping[str, State] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def with_states(self, **states: State) -> Private:
        """Give a copy with some states replaced."""
        return replace(self, states={**self.states, **states})


@dataclass(frozen=True)
class Outcome:
    """What an `at_site` method gives back.

    Attributes:
        payload: What leaves the site, if its policy agrees.
        private: What the site keeps; None = unchanged.
    """

    payload: Payload
    private: Private | None = None


@runtime_checkable
class SiteContext(Protocol):
    """A hospital as an `at_site` method sees it: batches and tensors, no network.

    Attributes:
        first_step: Number of the round's first step over all rounds, from 0.
    """

    site_id: SiteId
    round: int
    first_step: int
    num_examples: int
    steps: int
    keeps_optimizer: bool
    private: Private
    partition: StatePartition
    trainer: Trainer

    def load(self, shared: State) -> nn.Module:
        """Give the network in training mode: shared entries plus what is kept."""

    def batches(self, first: int, count: int) -> Iterable[TrainingBatch]:
        """Draw training batches number `first`... of this round."""

    def public_batches(self, first: int, count: int) -> Iterable[TrainingBatch]:
        """Draw batches number `first`... of the public images, counted over rounds.

        They are the same at every site, without augmentation; every label is unknown.
        """

    def draws(self, *purpose: str | int) -> AbstractContextManager[None]:
        """Let what follows draw the same random numbers in every message of a round.

        Torch's global state is a function of the study's seed, the site, the round
        and the purpose inside the block, and as before it afterwards. Outside, each
        message has draws of its own (dropout masks).
        """

    def shared_of(
        self, model: nn.Module, *, only: Container[str] | None = None
    ) -> State:
        """Copy the shared entries out of the network: all, or only some."""

    def keep(self, model: nn.Module, **states: State) -> Private:
        """The private value after this action: kept entries plus further states."""


def check_constants(strategy: Strategy, *rules: tuple[str, bool, str]) -> None:
    """Refuse a hyper-parameter that makes no sense.

    Args:
        strategy: Whose values are told.
        rules: Name of a field, whether its value fits, and what is needed.

    Raises:
        ConfigError: Naming the first that does not fit.
    """
    for name, fits, needed in rules:
        if not fits:
            seen = getattr(strategy, name)
            raise ConfigError(f"strategy.{name} must be {needed} (seen: {seen})")


def check_images(task: Task, action: str) -> None:
    """Refuse a table where a method works on images.

    Args:
        task: What is to be learned.
        action: What is done to images: "changes".

    Raises:
        ConfigError: If the data are a table.
    """
    if task.spatial_dims == 0:
        raise ConfigError(
            f"the strategy {action} images, and the data are a table",
            hint="Choose another one: fedmed strategies lists them.",
        )


def check_count(task: Task, batch_size: int, min_count: int) -> None:
    """Refuse batches of which no class could ever have enough labels.

    Args:
        task: What is to be learned.
        batch_size: Examples of a step.
        min_count: Fewest labels of a class for its mean to leave a site.

    Raises:
        ConfigError: If examples have one label each and a batch is smaller than that.
    """
    if task.kind == "classification":
        require_count(batch_size, min_count)


def require_count(num_labels: int, min_count: int) -> None:
    """Refuse a batch of which no class could ever have enough labels.

    Args:
        num_labels: Of the whole batch.
        min_count: Fewest labels of a class for its mean to leave a site.

    Raises:
        ConfigError: If there are fewer.
    """
    if num_labels < min_count:
        raise ConfigError(
            f"strategy.min_count is {min_count}, and a batch holds {num_labels} "
            "labels, so that no class can ever be compared",
            hint="Lower strategy.min_count, or raise train.batch_size. The "
            "hospital's policy has a min_count of its own.",
        )


F = TypeVar("F", bound=Callable[..., Outcome])


def at_site(method: F) -> F:
    """Mark a method as the site's half; the server addresses it by its name."""
    method._fedmed_at_site = True  # type: ignore[attr-defined]
    return method


ServerHalf = Generator[Exchange, Replies, Server]


def _noting_losses(
    half: ServerHalf,
) -> Generator[Exchange, Replies, tuple[Server, frozenset[SiteId]]]:
    """Run a server half, and give with its end the sites that did not answer it."""
    lost: set[SiteId] = set()
    try:
        request = next(half)
        while True:
            replies = yield request
            lost.update(set(request.site_ids) - set(replies))
            request = half.send(replies)
    except StopIteration as end:
        return end.value, frozenset(lost)


@dataclass(frozen=True)
class Strategy(abc.ABC):
    """One published method.

    Attributes:
        sync: "step": gradients every step, optimiser on the server, equal to pooled
            training. "round": local steps between exchanges.
        weighting: Weight of a site in sums: its examples, or equal for all.

    Class attributes:
        paper: Citation.
        exchanges: Number of exchanges per step and per round, by `sync`.
        first_round_exchanges: How many more in the first round, for what is told once.
        exact: Whether `sync: step` equals the pooled method to rounding.
        leaves_site: Kinds and contents of what leaves.
        kept_by_site: What stays.
        syncs: The modes that make sense for the method.
        keeps: Words for `StatePartition.of`: what of the network stays at the site.
        training_only: Parts of the network that prediction does not use.
        pools_data: Simulation only: one process sees the data of all sites.
        needs_public: Uses the images of the study's public site (`sites.public`).
        copies_public: Every hospital opens them, from a copy of its own.
        needs_others: With one site it runs, but as another and simpler method.
        published_model: `model` section of the publication; empty = any network.
    """

    sync: Sync = "round"
    weighting: Weighting = "examples"

    paper: ClassVar[str]
    exchanges: ClassVar[Mapping[Sync, int]]
    first_round_exchanges: ClassVar[Mapping[Sync, int]] = {}
    exact: ClassVar[bool] = False
    leaves_site: ClassVar[tuple[str, ...]]
    kept_by_site: ClassVar[tuple[str, ...]] = ()
    syncs: ClassVar[tuple[Sync, ...]] = ("step", "round")
    keeps: ClassVar[tuple[str, ...]] = ()
    training_only: ClassVar[tuple[str, ...]] = ()
    pools_data: ClassVar[bool] = False
    needs_public: ClassVar[bool] = False
    copies_public: ClassVar[bool] = False
    needs_others: ClassVar[bool] = False
    published_model: ClassVar[Mapping[str, Any]] = {}

    @property
    def smallest_cohort(self) -> int:
        """How many sites a round needs; more than one where sites judge each other."""
        return 1

    def check_task(self, task: Task, batch_size: int) -> None:  # noqa: B027
        """Refuse data that the method has nothing to say about; none by default.

        Args:
            task: What is to be learned.
            batch_size: Examples of a step.

        Raises:
            ConfigError: If the method cannot be trained on them.
        """

    def network(self, build: Callable[..., nn.Module]) -> nn.Module:
        """Compose the networks of the method; `build` takes changes of `model`."""
        return build()

    def partition(self, model: nn.Module) -> StatePartition:
        """Divide the network into what is shared and what stays at the site."""
        return StatePartition.of(model, self.keeps)

    def initial(self, server: Server) -> Server:
        """Add what the method remembers before the first round."""
        return server

    def weights_of(self, cohort: Cohort) -> dict[SiteId, float]:
        """Weight of each site in sums, normalised where they are used."""
        if self.weighting == "uniform":
            return dict.fromkeys(cohort.site_ids, 1.0)
        return {site: float(n) for site, n in cohort.num_examples.items()}

    def step(self, server: Server, cohort: Cohort, index: int) -> ServerHalf:
        """Server half of one optimisation step (`sync: step`)."""
        raise NotImplementedError

    def round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """Server half of one round (`sync: round`)."""
        raise NotImplementedError

    def run_round(self, server: Server, cohort: Cohort) -> ServerHalf:
        """One round in the mode that the study asks for."""
        server = replace(server, step=cohort.first_step)
        if self.sync == "round":
            return (yield from self.round(server, cohort))
        for index in range(cohort.steps):
            server = replace(server, step=cohort.first_step + index)
            half = self.step(server, cohort, index)
            server, lost = yield from _noting_losses(half)
            # Those that are left share the following steps among them.
            left = tuple(site for site in cohort.site_ids if site not in lost)
            if lost and len(left) >= self.smallest_cohort:
                cohort = cohort.select(left)
        return server

    def personalise(self, site: SiteContext, model: nn.Module) -> None:  # noqa: B027
        """Adapt the network to a site before it is evaluated there; not by default.

        Called inside the hospital, at sites that have training data and are not held
        out; what it changes is forgotten after the evaluation.

        Args:
            site: The hospital, as after its last message.
            model: The live network in training mode, to be changed in place.
        """

    def pooled_step(self, pool: PooledTraining, index: int) -> None:
        """One step of the pooled method that `sync: step` equals."""
        from fedmed.training.pooled import pooled_step

        pooled_step(pool, index)
