"""The hospital's policy: what may leave, written by the hospital, enforced here.

The server can neither read nor change it. `policy.yaml`, every key:

    allowed_kinds: [Card, Metrics, Weights, Gradient]   # required; see fedmed.payload
    min_count: 100            # voxels or cases behind every class of a ClassStatistic,
                              # images behind an AmplitudeStatistic, also of those
                              # that travel with Weights or an Embedding
    max_update_norm: 50.0     # L2 norm of all floating tensors of one message
    max_message_bytes: 500000000
    max_rounds: 200           # nothing but Card leaves in a later round
    case_ids: pseudonym       # keep | pseudonym | drop: numbers, new in each message
    pooled: false             # may this site's data join a pooled data set (simulation)
    noise:                    # differential privacy of updates; absent = none
      clip_norm: 1.0          # the update is scaled down to this L2 norm...
      noise_multiplier: 0.8   # ...and gets Gaussian noise of this times clip_norm

What noise does not cover: integer counters and the numbers in a message's header
(losses, per-case metrics, counts). It is added per message; what a run spends in
total is for an accountant to say. Noise may push a normalisation layer's variance
below zero, which no network can use: entries named `...running_var` are lifted to
1e-5 afterwards. That looks at the noised value alone, so it costs no privacy.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedmed import exact_json, seeds
from fedmed.errors import ConfigError, PolicyError
from fedmed.message import Message, SiteId
from fedmed.payload import KINDS, kinds_in
from fedmed.spelling import nearest
from sites.case_names import CaseNames

_NOISED_KINDS = frozenset({"Weights", "Gradient"})
_SILENT_KINDS = frozenset({"Card", "Metrics"})
_COUNTED_KINDS = frozenset({"ClassStatistic", "AmplitudeStatistic"})
_VARIANCE = "running_var"
_LEAST_VARIANCE = 1e-5


class NoisePolicy(BaseModel):
    """Differential privacy of updates: the Gaussian mechanism, per message.

    Source:
        Abadi et al., Deep Learning with Differential Privacy, CCS 2016,
        arXiv:1607.00133, algorithm 1 (clip, then noise), with the site's whole
        update in the place of one example's gradient.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    clip_norm: float = Field(gt=0, allow_inf_nan=False)
    noise_multiplier: float = Field(ge=0, allow_inf_nan=False)


class Policy(BaseModel):
    """What may leave a hospital; see the module's text for `policy.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allowed_kinds: tuple[str, ...]
    min_count: int = Field(default=10, ge=0)
    max_update_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_message_bytes: int = Field(default=2**31, gt=0)
    max_rounds: int | None = Field(default=None, gt=0)
    case_ids: Literal["keep", "pseudonym", "drop"] = "pseudonym"
    pooled: bool = False
    noise: NoisePolicy | None = None

    @field_validator("allowed_kinds")
    @classmethod
    def _known_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r}. {_nearest(kind, KINDS)}")
        return kinds

    @classmethod
    def permissive(cls) -> Policy:
        """Everything may leave: for simulations on public data, never for patients."""
        return cls(
            allowed_kinds=tuple(KINDS), min_count=0, case_ids="keep", pooled=True
        )


@dataclass(frozen=True)
class PolicyContext:
    """What the hospital's own code knows about a message that is to leave.

    Attributes:
        site_id: The site.
        round: The round it belongs to.
        token: Names the message within the run; part of the seed of the noise.
        received: The state that came with the server's message: an update by weights
            is measured, clipped and noised relative to it. Names without "state/".
        case_ids: The site's case names, found wherever they stand in a header.
        pseudonym_key: Secret of the site; see `sites.case_names`.
        numbers: Under `case_ids: drop`, the numbers of cases given before in the same
            message; more are added.
        simulation_seed: Makes noise repeatable. Only a simulation may set it: who
            knows the seed can subtract the noise. None = the machine's entropy.
    """

    site_id: SiteId
    round: int = 0
    token: str = ""
    received: Mapping[str, torch.Tensor] = field(default_factory=dict)
    case_ids: frozenset[str] = frozenset()
    pseudonym_key: bytes = b""
    numbers: dict[str, int] = field(default_factory=dict)
    simulation_seed: int | None = None


def load_policy(path: Path | str) -> Policy:
    """Read a hospital's `policy.yaml`.

    Raises:
        ConfigError: If the file is missing or wrong; an unknown key is named with
            the nearest known one.
    """
    path = Path(path)
    try:
        loader = _UniqueKeyLoader(path.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except OSError as error:
        raise ConfigError(f"policy {path.name}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"policy {path.name} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"policy {path.name} holds no keys")
    try:
        return Policy.model_validate(content)
    except ValidationError as error:
        raise _config_error(path.name, error) from None


def enforce(
    policy: Policy, message: Message, *, context: PolicyContext | Mapping[str, Any]
) -> Message:
    """Let a message leave, changed as the policy asks, or refuse it.

    Args:
        policy: The hospital's.
        message: What a strategy wants to send.
        context: What the hospital knows about it.

    Returns:
        The message that may leave: case names replaced, updates clipped and noised,
        and without the count that `min_count` was compared with.

    Raises:
        PolicyError: If it may not leave; names the kind and the rule.
    """
    if isinstance(context, Mapping):
        context = PolicyContext(**context)
    _check_kind_and_round(policy, message, context)
    _check_counts(policy, message)
    if policy.case_ids != "keep":
        renamed = _rename_cases(policy, message.header, context)
        message = replace(message, header=renamed)
    if policy.noise is not None:
        message = _privatise(policy.noise, message, context)
    _check_norm(policy, message, context)
    _check_size(policy, message)
    return _without_count(message)


def _without_count(message: Message) -> Message:
    """Leave of a count only whether there was one: how rare a class is, stays here."""
    if not message.header.get("min_count"):
        return message
    return replace(message, header={**message.header, "min_count": 1})


def require_pooled(policy: Policy, site_id: SiteId) -> None:
    """Refuse to let a site's data join a pooled data set unless its policy agrees.

    Raises:
        PolicyError: If `pooled` is false.
    """
    if not policy.pooled:
        raise PolicyError(
            f"site {site_id}: rule 'pooled' forbids to put its data together with "
            "other sites'",
            hint="Take the site out of the pooled baseline.",
        )


def _refuse(message: Message, rule: str, why: str) -> PolicyError:
    return PolicyError(
        f"a {message.kind} message may not leave: rule {rule!r} of the site's policy, "
        f"{why}",
        hint="Choose a method that needs no such message, or ask the hospital.",
    )


def _check_kind_and_round(
    policy: Policy, message: Message, context: PolicyContext
) -> None:
    for kind in kinds_in(message):
        if kind not in policy.allowed_kinds:
            listed = f"which lists {', '.join(policy.allowed_kinds)}"
            why = listed if kind == message.kind else f"it holds a {kind}; {listed}"
            raise _refuse(message, "allowed_kinds", why)
    last = policy.max_rounds
    if last is not None and context.round > last and message.kind != "Card":
        raise _refuse(message, "max_rounds", f"round {context.round} is after {last}")


def _check_counts(policy: Policy, message: Message) -> None:
    if _COUNTED_KINDS.isdisjoint(kinds_in(message)) or policy.min_count == 0:
        return
    count = message.header.get("min_count", 0)
    if not isinstance(count, int) or count < policy.min_count:
        raise _refuse(
            message, "min_count", f"{count} behind one; at least {policy.min_count}"
        )


def _check_norm(policy: Policy, message: Message, context: PolicyContext) -> None:
    if policy.max_update_norm is None or message.kind in _SILENT_KINDS:
        return
    norm = _norm(_updates(message, context))
    # NaN compares false and is refused.
    if not norm <= policy.max_update_norm:
        raise _refuse(
            message,
            "max_update_norm",
            f"its norm is {norm:.3g}; at most {policy.max_update_norm:.3g}",
        )


def _check_size(policy: Policy, message: Message) -> None:
    # JSON writes no character in more than six.
    if message.num_bytes + 8 * len(repr(message.header)) <= policy.max_message_bytes:
        return
    try:
        size = message.num_bytes + len(exact_json.dumps(message.header).encode())
    except ValueError as error:
        raise _refuse(message, "header", f"not JSON: {error}") from None
    if size > policy.max_message_bytes:
        raise _refuse(
            message,
            "max_message_bytes",
            f"{size} bytes; at most {policy.max_message_bytes}",
        )


def _updates(message: Message, context: PolicyContext) -> dict[str, torch.Tensor]:
    """Give the floating tensors in float64.

    Weights and normalisation statistics count as differences to what was received.
    """
    updates = {}
    for name, tensor in message.tensors.items():
        if tensor.is_floating_point():
            updates[name] = tensor.double() - _origin(name, message, context)
    return updates


def _origin(name: str, message: Message, context: PolicyContext) -> torch.Tensor:
    received = context.received.get(name.partition("/")[2])
    if not _holds_values(name, message) or received is None:
        return torch.zeros((), dtype=torch.float64)
    return received.double()


def _holds_values(name: str, message: Message) -> bool:
    """Whether a tensor holds the network's values, not differences or gradients."""
    section = name.partition("/")[0]
    return section == "buffers" or (message.kind, section) == ("Weights", "state")


def _norm(updates: Mapping[str, torch.Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(u)) for u in updates.values()))


def _privatise(noise: NoisePolicy, message: Message, context: PolicyContext) -> Message:
    """Clip the whole update to `clip_norm` and add Gaussian noise to every entry."""
    if message.tensors and message.kind not in _NOISED_KINDS:
        raise _refuse(message, "noise", "it would leave without noise")
    updates = _updates(message, context)
    if not updates:
        return message
    if message.kind == "Weights" and not context.received:
        raise _refuse(message, "noise", "there is nothing to measure the update from")
    norm = _norm(updates)
    if not math.isfinite(norm):
        raise _refuse(message, "noise", "its update is not finite")
    scale = min(1.0, noise.clip_norm / norm) if norm > 0 else 1.0
    deviation = noise.noise_multiplier * noise.clip_norm
    rng = _noise_rng(context)
    tensors = dict(message.tensors)
    for name in sorted(updates):
        draw = torch.from_numpy(rng.normal(0.0, 1.0, size=tuple(updates[name].shape)))
        value = _origin(name, message, context) + scale * updates[name]
        value = value + deviation * draw
        if name.endswith(_VARIANCE) and _holds_values(name, message):
            value = value.clamp(min=_LEAST_VARIANCE)
        tensors[name] = value.to(message.tensors[name].dtype)
    return replace(message, tensors=tensors)


def _noise_rng(context: PolicyContext) -> np.random.Generator:
    if context.simulation_seed is None:
        return np.random.default_rng(secrets.randbits(256))
    return seeds.numpy_rng(
        context.simulation_seed, "noise", context.site_id, context.round, context.token
    )


def _rename_cases(
    policy: Policy, header: Mapping[str, Any], context: PolicyContext
) -> dict[str, Any]:
    """Replace or drop case names: under their own keys, and wherever one is met."""
    if policy.case_ids == "keep":
        return dict(header)
    names = CaseNames(
        context.case_ids,
        key=context.pseudonym_key,
        drop=policy.case_ids == "drop",
        numbers=context.numbers,
    )
    if names.drop or names.key:
        return names.mapping(header)
    met = replace(names, drop=True, numbers={})
    met.mapping(header)
    if met.numbers:
        raise PolicyError("rule 'case_ids: pseudonym' needs the site's secret key")
    return dict(header)


def _config_error(name: str, error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(step) for step in first["loc"])
    if first["type"] == "extra_forbidden":
        model = NoisePolicy if len(first["loc"]) > 1 else Policy
        hint = _nearest(str(first["loc"][-1]), model.model_fields)
        return ConfigError(f"policy {name}: unknown key {where!r}", hint=hint)
    return ConfigError(
        f"policy {name}: {where}: {first['msg']}", hint=f"seen: {first['input']!r}"
    )


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = nearest(name, known)
    guess = f"did you mean {near!r}? " if near else ""
    return f"{guess}Known: {', '.join(known)}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key given twice is an error: which of two bounds holds must not be a guess."""

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice")
        return super().construct_mapping(node, deep)
