"""Names of cases on their way out: pseudonyms of a site, or none at all."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmed.storage import storage_errors, write_once

_RENAMED_KEYS = frozenset({"case_id", "subject_id"})
_RENAMED_LISTS = frozenset({"case_ids", "subject_ids"})
_RENAMED_MAPPINGS = frozenset({"quarantined"})
_SHORTEST_IN_TEXT = 4


def load_pseudonym_key(folder: Path) -> bytes:
    """Read a site's secret for pseudonyms; made at the first call, mode 0600.

    Raises:
        StorageError: If the folder cannot be written.
    """
    path = folder / "pseudonym.key"
    with storage_errors(path.name):
        if not path.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_once(path, secrets.token_bytes(32), mode=0o600)
        return path.read_bytes()


def pseudonym(case_id: str, key: bytes) -> str:
    """Give the name under which a case is known outside.

    Equal for equal cases and keys; without the key nobody can test a guess.

    Example:
        >>> pseudonym("smith", b"secret") == pseudonym("smith", b"secret")
        True
        >>> pseudonym("smith", b"secret") == pseudonym("smith", b"other")
        False
    """
    digest = hashlib.blake2b(case_id.encode(), key=key, digest_size=8)
    return f"case-{digest.hexdigest()}"


@dataclass(frozen=True)
class CaseNames:
    """Walks a message's header and gives it back without the site's names of cases.

    Names stand under the keys `case_id`, `case_ids` (and `subject_...`), are the keys
    of `quarantined`, and may turn up in any text.

    Attributes:
        known: The site's case names, found wherever they stand.
        key: The site's secret, for pseudonyms.
        drop: Give numbers instead, which say nothing beyond one message: the rows of
            one case stay together, the cases of two messages cannot be matched.
        numbers: Numbers given so far, in the order in which cases were met.
    """

    known: frozenset[str] = frozenset()
    key: bytes = b""
    drop: bool = False
    numbers: dict[str, int] = field(default_factory=dict)

    def name(self, case_id: object) -> str:
        """Give what stands for a case outside."""
        if self.drop:
            number = self.numbers.setdefault(str(case_id), len(self.numbers) + 1)
            return f"case-{number}"
        return pseudonym(str(case_id), self.key)

    def mapping(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Rename in a mapping, at any depth."""
        result: dict[str, Any] = {}
        for key, item in value.items():
            if key in _RENAMED_KEYS or key in _RENAMED_LISTS:
                result[key] = self._named(item)
            elif key in _RENAMED_MAPPINGS and isinstance(item, Mapping):
                result[key] = self._keyed(item)
            else:
                result[self.text(key)] = self._any(item)
        return result

    def _any(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return self.mapping(value)
        if isinstance(value, list | tuple):
            return [self._any(item) for item in value]
        return value

    def text(self, value: str) -> str:
        """Replace known names in a text."""
        if value in self.known:
            return self.name(value)
        # Longest first: one name may be the beginning of another. Very short names
        # ("1") are only replaced where they stand alone. One pass: what stands for one
        # case may look like the name of another.
        names = sorted(self.known, key=len, reverse=True)
        found = [re.escape(n) for n in names if len(n) >= _SHORTEST_IN_TEXT]
        if not found:
            return value
        return re.sub("|".join(found), lambda match: self.name(match[0]), value)

    def _named(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self.name(item) for item in value]
        return self.name(value)

    def _keyed(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Rename the keys of case -> reason; the reason may repeat the name."""
        result = {}
        for case_id, reason in value.items():
            known = frozenset({*self.known, case_id})
            result[self.name(case_id)] = replace(self, known=known)._any(reason)
        return result
