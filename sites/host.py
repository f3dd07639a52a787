"""The host: one hospital answering messages.

It runs the strategy's site half on private data, keeps private state in versioned
files, and lets nothing leave that the policy does not allow and the ledger has not
recorded. The transports call it; it knows nothing of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedmed.errors import SiteError, WireError
from fedmed.message import Message, SiteFailure, SiteId, State
from fedmed.payload import Card, Metrics, Payload, to_message
from fedmed.resolve import load_strategy
from fedmed.runfolder import RunFolder
from fedmed.strategy import Outcome, Private, Strategy
from fedmed.study import expand, study_from_dict
from sites.case_names import CaseNames, load_pseudonym_key
from sites.context import HospitalContext, Workbench
from sites.data import list_sites
from sites.evaluation import evaluate
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
        options: "study" (a mapping), "folder" (the run folder), "cache" and
            "durable" (write working state through after each message).
    """
    study = study_from_dict(options["study"])
    folder = RunFolder(Path(options["folder"]))
    policy = (
        load_policy(expand(study.sites.policy))
        if study.sites.policy
        else Policy.permissive()
    )
    cache = Path(options["cache"])
    return Host(
        Workbench(study, site_id, cache),
        load_strategy(study.strategy.name, study.strategy.options),
        policy,
        folder,
        cache=cache,
        durable=bool(options["durable"]),
    )


class Host:
    """One hospital.

    Args:
        bench: Data, network and trainer of the site.
        strategy: The study's method; its `at_site` methods answer.
        policy: What may leave.
        folder: Run folder; the site writes to its own parts only.
        cache: Folder of prepared cases, as the bench's.
        durable: The process may change between two messages.
    """

    def __init__(
        self,
        bench: Workbench,
        strategy: Strategy,
        policy: Policy,
        folder: RunFolder,
        *,
        cache: Path,
        durable: bool,
    ) -> None:
        self._bench = bench
        self._strategy = strategy
        self._policy = policy
        self._cache = cache
        self._folder = folder.site_folder(bench.site_id)
        self._ledger = Ledger(folder.ledger / bench.site_id)
        self._store = PrivateStore(self._folder / "private", durable=durable)
        self._asked = Message("open")
        self._numbers: dict[str, int] = {}
        if bench.is_pooled:
            require_pooled(policy, bench.site_id)

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
            _, found = list_sites(self._bench.study, self._cache)
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
        self._asked, self._numbers = message, {}
        with torch.random.fork_rng(devices=[]):
            # Dropout in a network must not depend on what this process did before.
            torch.manual_seed(self._bench.seed(message))
            payload = self._answer(message)
        reply = to_message(payload)
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
        key = load_pseudonym_key(self._folder)
        return CaseNames(key=key, drop=drop, numbers=self._numbers).name(case_id)

    def _policy_context(self, message: Message) -> PolicyContext:
        """What the policy needs to know; only simulations may have guessable noise."""
        simulated = self._bench.study.transport.name != "deployment"
        header = message.header
        return PolicyContext(
            site_id=self._bench.site_id,
            round=int(header.get("round", 0)),
            token=str(header.get("token", "")),
            received=arguments(message).get("weights", {}),
            case_ids=self._bench.case_ids,
            pseudonym_key=load_pseudonym_key(self._folder),
            numbers=self._numbers,
            simulation_seed=self._bench.study.seed if simulated else None,
        )

    def _answer(self, message: Message) -> Payload:
        if message.kind == "join":
            return self._join(message)
        if message.kind == "end_round":
            return self._end_round(message)
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
            },
        )

    def _act(self, message: Message) -> Payload:
        action = self._action(message.kind)
        number = int(message.header["round"])
        private = self._private(message)
        context = HospitalContext(self._bench, private, number)
        outcome = action(context, **arguments(message))
        if outcome.private is not None:
            private = outcome.private
        self._store.stage(str(message.header["token"]), private)
        return outcome.payload

    def _action(self, name: str) -> Callable[..., Outcome]:
        method = getattr(self._strategy, name, None)
        if method is None or not getattr(method, "_fedmed_at_site", False):
            raise WireError(
                f"strategy {type(self._strategy).__name__} has no site action {name!r}"
            )
        return method  # type: ignore[no-any-return]

    def _private(self, message: Message) -> Private:
        """The private value after the last answer that the server counts."""
        number, after = int(message.header["round"]), str(message.header["after"])
        if not after:
            return self._store.committed(number - 1)
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
        if message.header["after"] and (private.states or private.facts):
            self._store.commit(number, private)
        content = arguments(message)
        rows = evaluate(
            self._bench,
            private,
            weights=content["weights"],
            splits=tuple(content["splits"]),
            overlays=self._folder / "overlays" if content["overlays"] else None,
            name=self._name_outside,
        )
        return Metrics(num_examples=self._bench.num_examples, rows=tuple(rows))


def arguments(message: Message) -> dict[str, Any]:
    """Rebuild the named arguments of a server's message."""
    content: dict[str, Any] = dict(message.header.get("values", {}))
    states: dict[str, State] = {name: {} for name in message.header.get("states", ())}
    for path, tensor in message.tensors.items():
        name, _, entry = path.partition("/")
        states[name][entry] = tensor
    return {**content, **states}
