"""The host: one hospital answering messages.

It runs the strategy's site half on private data, keeps private state in versioned
files, and lets nothing leave that the policy does not allow and the ledger has not
recorded. The transports call it; it knows nothing of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmed.errors import PolicyError, SiteError, WireError
from fedmed.message import Message, SiteFailure, SiteId, State
from fedmed.payload import Card, Metrics, Normalisation, Payload, to_message
from fedmed.runfolder import RunFolder
from fedmed.seeds import seeded
from fedmed.strategy import Outcome, Private
from fedmed.study import Study, expand, study_from_dict
from fedmed.unseen import NEEDS_SETS
from sites.calibration import own_normalisation
from sites.case_names import CaseNames, load_pseudonym_key
from sites.context import HospitalContext, Workbench, Workshop
from sites.evaluation import evaluate, evaluate_newcomer
from sites.ledger import Ledger
from sites.policy import (
    Policy,
    PolicyContext,
    enforce,
    load_policy,
    require_pooled,
)
from sites.private_state import PrivateStore
from sites.scrub import describe

logger = logging.getLogger(__name__)


def open_host(site_id: SiteId, options: Mapping[str, Any]) -> Host:
    """Open one hospital's host; the factory that transports are given.

    Args:
        site_id: The site.
        options: "study" (a mapping), "folder" (the run folder), "cache",
            "durable" (write working state through after each message) and, if not in
            the run folder, "secrets".
    """
    common = options.get("common", {})
    if "hospital" not in common:
        common["hospital"] = Premises.of(options)
    return Host(common["hospital"], site_id, durable=bool(options["durable"]))


@dataclass(frozen=True)
class Premises:
    """What all hosts of one process share.

    Attributes:
        workshop: Study, list of sites and the live network.
        policy: What may leave.
        folder: Run folder.
        secrets: What hospitals keep secret over all runs of a comparison.
    """

    workshop: Workshop
    policy: Policy
    folder: RunFolder
    secrets: Path

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Premises:
        """Read what a transport was given."""
        study = study_from_dict(options["study"])
        policy = (
            load_policy(expand(study.sites.policy))
            if study.sites.policy
            else Policy.permissive()
        )
        workshop = Workshop(study, Path(options["cache"]))
        folder = RunFolder(Path(options["folder"]))
        secrets = Path(options.get("secrets", folder.sites))
        return cls(workshop, policy, folder, secrets)


class Host:
    """One hospital.

    Args:
        premises: What it shares with the others of this process.
        site_id: Its name.
        durable: The process may change between two messages.
    """

    def __init__(self, premises: Premises, site_id: SiteId, *, durable: bool) -> None:
        shop, folder = premises.workshop, premises.folder
        self._bench = Workbench(shop.study, site_id, shop.cache, shop)
        self._policy = premises.policy
        self._folder = folder.site_folder(site_id)
        self._secrets = premises.secrets / site_id
        self._ledger = Ledger(folder.ledger / site_id, digests=_digests(shop.study))
        self._store = PrivateStore(self._folder / "private", durable=durable)
        self._asked = Message("open")
        self._numbers: dict[str, int] = {}
        self._keeps = self._store.keeps(Private())
        if self._bench.is_pooled:
            require_pooled(self._policy, site_id)

    def close(self) -> None:
        """Release files."""
        self._ledger.close()

    def describe_failure(self, error: BaseException) -> SiteFailure:
        """Say what went wrong without a path or a patient; on record, as all else.

        Raises:
            StorageError: If it cannot be recorded; then it must not leave.
        """
        keep = (self._bench.site_id,)
        failure = describe(error, keep=keep, remove=self._names_to_remove())
        self._record(Message("Failure", asdict(failure)))
        return failure

    def _names_to_remove(self) -> frozenset[str] | None:
        """Names of cases and subjects that must stay; None if nobody can list them.

        What failed may be the preparation of the cases, so they are only listed.
        """
        if self._policy.case_ids == "keep":
            return frozenset()
        try:
            found = self._bench.workshop.sites.everybody
        except Exception:
            return None
        names = {name for site in found for name in site.problems}
        for ref in (ref for site in found for ref in site.cases):
            names |= {ref.case_id, ref.subject_id}
        return frozenset(names)

    def handle(self, message: Message) -> Message:
        """Answer one message.

        Raises:
            FedMedError: Anything that a person can mend.
        """
        self._asked, self._numbers = Message(message.kind, message.header), {}
        # Dropout in a network must not depend on what this process did before.
        with seeded(self._bench.seed(message)):
            payload = self._answer(message)
        # Who keeps nothing need not be asked to file it, and may move to any process.
        reply = to_message(payload, keeps=self._keeps)
        reply = enforce(self._policy, reply, context=self._policy_context(message))
        self._record(reply)
        return reply

    def _record(self, reply: Message) -> None:
        """Put what is about to leave on the ledger."""
        number = self._asked.header.get("round", 0)
        self._ledger.append(
            action=self._asked.kind,
            server_round=number if isinstance(number, int) else 0,
            exchange=str(self._asked.header.get("token", "")),
            reply=reply,
        )

    def _name_outside(self, case_id: str) -> str:
        """Give the name under which the policy lets a case be known outside."""
        if self._policy.case_ids == "keep":
            return case_id
        drop = self._policy.case_ids == "drop"
        key = self._pseudonym_key
        return CaseNames(key=key, drop=drop, numbers=self._numbers).name(case_id)

    @functools.cached_property
    def _pseudonym_key(self) -> bytes:
        keeps_names = self._policy.case_ids == "keep"
        return b"" if keeps_names else load_pseudonym_key(self._secrets)

    def _policy_context(self, message: Message) -> PolicyContext:
        """What the policy needs to know; only simulations may have guessable noise."""
        simulated = self._bench.study.transport.name != "deployment"
        header = message.header
        measured = self._policy.noise or self._policy.max_update_norm is not None
        return PolicyContext(
            site_id=self._bench.site_id,
            round=int(header.get("round", 0)),
            token=str(header.get("token", "")),
            received=arguments(message).get("weights", {}) if measured else {},
            case_ids=self._bench.case_ids,
            pseudonym_key=self._pseudonym_key,
            numbers=self._numbers,
            simulation_seed=self._bench.study.seed if simulated else None,
        )

    def _answer(self, message: Message) -> Payload:
        if message.kind == "join":
            return self._join(message)
        if message.kind == "end_round":
            return self._end_round(message)
        if message.kind == "evaluate_selected":
            return self._evaluate_selected(message)
        if message.kind == "share_normalisation":
            return self._share_normalisation(message)
        if message.kind == "evaluate_newcomer":
            return self._evaluate_newcomer(message)
        return self._act(message)

    def _join(self, message: Message) -> Card:
        """Present the site; roll private state back to the server's round."""
        self._store.discard_after(int(message.header.get("round", 0)))
        data = self._bench.data
        values = self._bench.card()
        return Card(
            num_examples=self._bench.num_examples,
            values=values
            | {
                "quarantined": dict(data.quarantined),
                "case_names": self._policy.case_ids,
            },
        )

    def _act(self, message: Message) -> Payload:
        action = self._action(message.kind)
        number = int(message.header["round"])
        private = self._private(message)
        first = int(message.header.get("first_step", 0))
        context = HospitalContext(self._bench, private, number, first_step=first)
        outcome = action(context, **arguments(message))
        if outcome.private is not None:
            private = outcome.private
        self._keeps = self._store.keeps(private)
        if self._keeps:
            self._store.stage(str(message.header["token"]), private)
        return outcome.payload

    def _action(self, name: str) -> Callable[..., Outcome]:
        strategy = self._bench.strategy
        method = getattr(strategy, name, None)
        if method is None or not getattr(method, "_fedmed_at_site", False):
            raise WireError(
                f"strategy {type(strategy).__name__} has no site action {name!r}"
            )
        return method  # type: ignore[no-any-return]

    def _private(self, message: Message) -> Private:
        """The private value after the last answer that the server counts."""
        number, after = int(message.header["round"]), str(message.header["after"])
        if not after:
            known = int(message.header.get("version", 0))
            return self._store.committed(number - 1, at_least=known)
        staged = self._store.staged(after)
        if staged is None:
            raise SiteError(
                f"site {self._bench.site_id} was restarted in round {number} and lost "
                "what it had not filed yet"
            )
        return staged

    def _end_round(self, message: Message) -> Metrics:
        number = int(message.header["round"])
        private = self._private(message)
        content = arguments(message)
        files = bool(content.get("file", True))
        if content.get("best") is not None:
            self._store.select(int(content["best"]))  # before newer ones push it out
        if message.header["after"] and (private.states or private.facts):
            self._store.commit(number, private, durable=files)
        elif files:
            self._store.file()
        rows = evaluate(
            self._bench,
            private,
            weights=content["weights"],
            splits=tuple(content["splits"]),
            overlays=self._folder / "overlays" if content["overlays"] else None,
            name=self._name_outside,
        )
        return Metrics(num_examples=self._bench.num_examples, rows=tuple(rows))

    def _evaluate_selected(self, message: Message) -> Metrics:
        """Score the network of an earlier round, with what the site kept then."""
        content = arguments(message)
        rows = evaluate(
            self._bench,
            self._store.selected(int(content["selected"])),
            weights=content["weights"],
            splits=tuple(content["splits"]),
            name=self._name_outside,
        )
        return Metrics(num_examples=self._bench.num_examples, rows=tuple(rows))

    def _share_normalisation(self, message: Message) -> Normalisation:
        """Give what the site keeps of normalisation; nothing if it never trained.

        Raises:
            PolicyError: If the study, as this site knows it, does not ask for it now.
        """
        number, study = int(message.header["round"]), self._bench.study
        is_named = not NEEDS_SETS.isdisjoint(study.evaluate.unseen)
        if not is_named or not study.split.held_out or number != study.rounds:
            raise PolicyError(
                f"site {self._bench.site_id} shares its normalisation after the last "
                "round of a study whose evaluate.unseen needs it, and never else"
            )
        known = int(message.header.get("version", 0))
        private = self._store.committed(number, at_least=known)
        weights = arguments(message)["weights"]
        state = own_normalisation(self._bench, private, weights=weights)
        return Normalisation(num_examples=self._bench.num_examples, state=state)

    def _evaluate_newcomer(self, message: Message) -> Metrics:
        """Score the network with the normalisation of others."""
        content = arguments(message)
        rows = evaluate_newcomer(
            self._bench,
            [content[f"set{number}"] for number in range(content["sets"])],
            weights=content["weights"],
            re_estimates=content["re_estimates"],
            splits=tuple(content["splits"]),
            overlays=self._folder / "overlays" if content["overlays"] else None,
            name=self._name_outside,
        )
        return Metrics(num_examples=self._bench.num_examples, rows=tuple(rows))


def _digests(study: Study) -> bool:
    """Whether the ledger hashes the content of what leaves."""
    asked = study.sites.ledger_digests
    return study.transport.name == "deployment" if asked is None else asked


def arguments(message: Message) -> dict[str, Any]:
    """Rebuild the named arguments of a server's message."""
    content: dict[str, Any] = dict(message.header.get("values", {}))
    states: dict[str, State] = {name: {} for name in message.header.get("states", ())}
    for path, tensor in message.tensors.items():
        name, _, entry = path.partition("/")
        states[name][entry] = tensor
    return {**content, **states}
